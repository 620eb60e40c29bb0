"""Modules over the formulas of hasten.functional; no Lightning."""

from hasten.nn.convnet import ConvNet
from hasten.nn.dataset_distillation.curriculum import EasyToHard, grand
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.dataset_distillation.guide import DiscriminativeArea
from hasten.nn.dataset_distillation.masks import DepthMask, LossQuantileMask
from hasten.nn.dataset_distillation.synthetic import SyntheticSet
from hasten.nn.diffusion import LinearSkip, dit, unet
from hasten.nn.hypernet import (
    Basis,
    Choice,
    Chunked,
    Dense,
    HyperModel,
    LoRA,
    Range,
    SeparateModels,
    head_sizes,
    hypernetize,
)
from hasten.nn.scaled_unet import ScaledUNet
from hasten.nn.selection import select_modules, select_parameters
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
from hasten.nn.token_merging import MergeHandle, MergeOptions, Merging, attach_token_merging, unmerged_copy
from hasten.nn.vision_mamba import VisionMamba, vim
from hasten.nn.weights import timm_model

__all__ = [
    "DSA",
    "Basis",
    "CLTSSampler",
    "Choice",
    "Chunked",
    "ConvNet",
    "DebiasSampler",
    "Dense",
    "DepthMask",
    "DiscriminativeArea",
    "EDMSampler",
    "EasyToHard",
    "FlatModel",
    "HyperModel",
    "LinearSkip",
    "LoRA",
    "LogitNormalSampler",
    "LossQuantileMask",
    "LossSecondMomentSampler",
    "MergeHandle",
    "MergeOptions",
    "Merging",
    "MinSNRSampler",
    "ModeSampler",
    "P2Sampler",
    "Range",
    "ScaledUNet",
    "SeparateModels",
    "SoftMinSNRSampler",
    "SpeeDSampler",
    "SyntheticSet",
    "TimestepSampler",
    "TruncatedSNRSampler",
    "UniformSampler",
    "VisionMamba",
    "alphas_cumprod",
    "attach_token_merging",
    "dit",
    "grand",
    "head_sizes",
    "hypernetize",
    "num_timesteps",
    "select_modules",
    "select_parameters",
    "timm_model",
    "unet",
    "unmerged_copy",
    "vim",
]
