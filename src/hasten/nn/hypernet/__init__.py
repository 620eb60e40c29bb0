"""Hypernetworks for any module: the model that is generated, the heads that generate it, the inputs they read."""

from hasten.nn.hypernet.heads import Basis, Chunked, Dense, LoRA
from hasten.nn.hypernet.inputs import Choice, Range
from hasten.nn.hypernet.model import HyperModel, head_sizes, hypernetize
from hasten.nn.hypernet.separate import SeparateModels

__all__ = [
    "Basis",
    "Choice",
    "Chunked",
    "Dense",
    "HyperModel",
    "LoRA",
    "Range",
    "SeparateModels",
    "head_sizes",
    "hypernetize",
]
