"""What is written to disk for others to read. Every write is whole or not there: a temporary file, then a rename."""

from hasten.formats.distilled import Distilled
from hasten.formats.files import whole_file, write_json
from hasten.formats.pixels import ZCA, PixelRange, pixels_from_tensors
from hasten.formats.recipes import recipe_hash
from hasten.formats.trajectories import Trajectory, open_trajectories, write_trajectory

__all__ = [
    "ZCA",
    "Distilled",
    "PixelRange",
    "Trajectory",
    "open_trajectories",
    "pixels_from_tensors",
    "recipe_hash",
    "whole_file",
    "write_json",
    "write_trajectory",
]
