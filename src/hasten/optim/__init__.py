"""Optimizers, learning-rate schedules and parameter groups."""

from hasten.optim.build import configure_optimizers, parameter_groups
from hasten.optim.gsam import GSAM
from hasten.optim.schedules import cosine

__all__ = ["GSAM", "configure_optimizers", "cosine", "parameter_groups"]
