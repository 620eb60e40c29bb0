"""What attaches to anyone's LightningModule and leaves it as it found it."""

from hasten.callbacks.class_consistency import ClassConsistency
from hasten.callbacks.dataset_distillation.evaluate_distilled import EvaluateDistilled
from hasten.callbacks.dataset_distillation.export_distilled import ExportDistilled
from hasten.callbacks.dataset_distillation.save_trajectory import SaveTrajectory
from hasten.callbacks.dataset_distillation.skip_guard import SkipGuard
from hasten.callbacks.distillation import Distillation
from hasten.callbacks.ema import EMA
from hasten.callbacks.exact_resume import ExactResume
from hasten.callbacks.image_grid import ImageGrid
from hasten.callbacks.magnitude_probe import MagnitudeProbe
from hasten.callbacks.progress import Progress
from hasten.callbacks.sample_distance import SampleDistance
from hasten.callbacks.throughput import Throughput
from hasten.callbacks.timestep_sampling import TimestepSampling
from hasten.callbacks.token_merging import TokenMerging

__all__ = [
    "EMA",
    "ClassConsistency",
    "Distillation",
    "EvaluateDistilled",
    "ExactResume",
    "ExportDistilled",
    "ImageGrid",
    "MagnitudeProbe",
    "Progress",
    "SampleDistance",
    "SaveTrajectory",
    "SkipGuard",
    "Throughput",
    "TimestepSampling",
    "TokenMerging",
]
