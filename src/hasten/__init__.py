"""hasten: published methods that make training cheaper, for PyTorch Lightning.

The parts, each importable alone: ``hasten.functional`` (formulas on tensors), ``hasten.nn`` (modules),
``hasten.modules`` (LightningModules), ``hasten.callbacks`` (what attaches to yours), ``hasten.datamodules``.
"""

__version__ = "0.1.0"
