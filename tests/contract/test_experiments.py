"""Every shipped config is a test parameter: it composes, it is checked, and every digits experiment runs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from hasten import registry
from hasten.check import check
from hasten.run import compose, run

ROOT = Path(__file__).parents[2]
EXPERIMENTS = list(registry.group("experiment"))
DIGITS = [name for name in EXPERIMENTS if name.endswith("_digits")]


def _header(name: str) -> dict[str, str]:
    text = (ROOT / "src/hasten/configs/experiment" / f"{name}.yaml").read_text()
    return dict(re.findall(r"^# (\w+): +(.+)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_is_found_right(name):
    cfg = compose([f"experiment={name}", "trainer.accelerator=cpu", "run_dir=x"])
    assert cfg.experiment == name
    for stage in cfg.first:
        cfg.stages[stage] = f"runs/stages/{stage}"
    check(cfg)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_of_an_experiment_gives_command_cost_and_expected_result(name):
    header = _header(name)
    assert header.keys() >= {"command", "cost", "expect"}
    assert f"experiment={name}" in header["command"]
    if name not in DIGITS:
        assert header.get("twin") in DIGITS


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, option)
        for group in ("data", "model", "optimizer", "scheduler", "logger", "timestep_sampler", "noise_scheduler")
        for option in registry.group(group)
    ],
)
def test_every_option_of_a_group_composes(group, option):
    given = {"data": ["data.root=data", "image.num_classes=2"] if option == "image_folder" else []}
    experiment = "speed_digits" if group in ("timestep_sampler", "noise_scheduler") else "classify_digits"
    cfg = compose([f"experiment={experiment}", f"{group}={option}", *given.get(group, [])])
    assert group in cfg


@pytest.mark.parametrize("name", DIGITS)
def test_a_digits_experiment_runs_in_its_tiny_form(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = list(compose([f"experiment={name}"]).tiny)
    assert tiny, f"configs/experiment/{name}.yaml: expected tiny: [overrides ...], got none"
    result = run(compose([f"experiment={name}", *tiny]))
    assert result.metrics and all(map(math.isfinite, result.metrics.values()))
    written = json.loads((result.folder / "result.json").read_text())
    assert (written["status"], written["metrics"]) == ("complete", result.metrics)
    for checkpoint in ("best.ckpt", "last.ckpt"):
        torch.load(result.folder / "checkpoints" / checkpoint, weights_only=True)
    objective = compose([f"experiment={name}"]).objective.metric
    assert objective in result.metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS)
def test_a_digits_experiment_runs_in_full(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(compose([f"experiment={name}"])).metrics
