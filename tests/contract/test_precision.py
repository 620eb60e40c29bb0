"""Every digits experiment in bfloat16: the arithmetic is small, what is kept is not."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file
from torch import Tensor

from hasten import registry
from hasten.check import build
from hasten.errors import HastenError
from hasten.run import compose, run

DIGITS = [name for name in registry.group("experiment") if name.endswith("_digits")]
CONFIGS = {name: compose([f"experiment={name}"]) for name in DIGITS}
DRAWING = ["image_grid", "class_consistency", "magnitude_probe"]
"""What has no part in the training."""

REFUSING = [name for name in DIGITS if CONFIGS[name].module._target_.endswith("TrajectoryMatching")]
"""An inner step moves a parameter by about 1e-4 of itself, which bfloat16 does not resolve."""


def _fast_and_slow(names: list[str]) -> list[Any]:
    """The first one that each card names, and the slow rest."""
    named = [card.front.get("experiments", []) for card in registry.cards().values()]
    fast = {next(name for name in experiments if name in DIGITS) for experiments in named if experiments}
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: what an experiment starts from is then made once."""
    return tmp_path_factory.mktemp("precision")


def _run(name: str, *words: str) -> Any:
    return run(compose([f"experiment={name}", *CONFIGS[name].tiny, "trainer.log_every_n_steps=1", *words]))


def _losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        losses = [row.get("train/loss") or row.get("train/matching_loss") for row in csv.DictReader(file)]
    return [float(loss) for loss in losses if loss]


def _small(tree: Any, where: str = "") -> Iterator[str]:
    """The names of all tensors in a tree of dicts and lists whose numbers have less than 32 bits."""
    if isinstance(tree, Tensor) and tree.is_floating_point() and tree.dtype.itemsize < 4:
        yield f"{where}: {tree.dtype}"
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _small(value, f"{where}.{key}")


@pytest.mark.parametrize("name", _fast_and_slow([name for name in DIGITS if name not in REFUSING]))
def test_an_experiment_trains_in_bf16_mixed_and_keeps_float32(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = _run(name, "precision=bf16-mixed")
    assert result.metrics and all(map(math.isfinite, result.metrics.values()))
    assert not list(_small(result.module.state_dict() | dict(result.module.named_buffers())))
    assert not list(_small([optimizer.state_dict() for optimizer in result.trainer.optimizers]))
    checkpoints = list(result.folder.rglob("*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        assert not list(_small(torch.load(path, weights_only=True))), path
    for path in result.folder.rglob("*.safetensors"):
        assert not list(_small(load_file(path))), path

    shorter = [f"callbacks.{tool}=null" for tool in DRAWING if CONFIGS[name].callbacks.get(tool) is not None]
    exact = _run(name, *shorter, "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
    losses, wanted = _losses(result.folder), _losses(exact.folder)
    assert losses[0] == pytest.approx(wanted[0], rel=0.03)
    assert losses != wanted, "autocast was not on"


@pytest.mark.parametrize("name", _fast_and_slow(REFUSING))
def test_matching_trajectories_in_bf16_is_refused_in_one_line(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(HastenError, match=r"^trajectory_matching: precision: expected 32-true, got bf16-mixed.*$"):
        _run(name, "precision=bf16-mixed")


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_other_precisions_train_on_the_cpu(precision, folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = _run("classify_digits", f"precision={precision}")
    assert all(map(math.isfinite, result.metrics.values()))


def test_an_average_in_bf16_is_refused_in_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(HastenError, match=r"^ema: .*: expected .* float32 .* train in float32 or mixed precision$"):
        _run("speed_digits", "precision=bf16-true")


def test_noise_weights_and_timesteps_are_exact_in_bf16_mixed():
    cfg = compose(["experiment=speed_digits", *CONFIGS["speed_digits"].tiny])
    module, seen = build(cfg, "module"), []
    add_noise, sampler = module.noise_scheduler.add_noise, module.timestep_sampler

    def noted(x, noise, t):
        assert torch.is_autocast_enabled("cpu")
        seen.extend([x.dtype, noise.dtype, add_noise(x, noise, t).dtype, sampler(4)[1].dtype])
        return add_noise(x, noise, t)

    module.noise_scheduler.add_noise = noted
    small = []
    convolution = next(layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda _, __, output: small.append(output.dtype))
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(accelerator="cpu", precision="bf16-mixed", max_steps=1, limit_val_batches=0, **quiet)
    trainer.fit(module, build(cfg, "data"))
    assert set(small) == {torch.bfloat16}
    assert set(seen) == {torch.float32}


@pytest.mark.slow
def test_magnitudes_are_measured_in_float32(folder, monkeypatch):
    monkeypatch.chdir(folder)
    norms = []
    for precision in ("32-true", "bf16-mixed"):
        result = _run("mip_digits", f"precision={precision}", "callbacks.image_grid=null")
        with (result.folder / "pictures/magnitude.csv").open() as file:
            norms.append([row["theta_norm"] for row in csv.DictReader(file) if row["step"] == "0"])
    assert norms[0] == norms[1]
