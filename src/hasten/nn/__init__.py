"""Modules over the formulas of hasten.functional; no Lightning."""

from hasten.nn.convnet import ConvNet
from hasten.nn.diffusion import LinearSkip, dit, unet
from hasten.nn.speed import SpeeDSampler
from hasten.nn.timestep_peers import (
    CLTSSampler,
    DebiasSampler,
    EDMSampler,
    LogitNormalSampler,
    LossSecondMomentSampler,
    MinSNRSampler,
    ModeSampler,
    P2Sampler,
    SoftMinSNRSampler,
    TruncatedSNRSampler,
)
from hasten.nn.timesteps import TimestepSampler, UniformSampler, alphas_cumprod, num_timesteps

__all__ = [
    "CLTSSampler",
    "ConvNet",
    "DebiasSampler",
    "EDMSampler",
    "LinearSkip",
    "LogitNormalSampler",
    "LossSecondMomentSampler",
    "MinSNRSampler",
    "ModeSampler",
    "P2Sampler",
    "SoftMinSNRSampler",
    "SpeeDSampler",
    "TimestepSampler",
    "TruncatedSNRSampler",
    "UniformSampler",
    "alphas_cumprod",
    "dit",
    "num_timesteps",
    "unet",
]
