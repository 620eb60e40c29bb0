"""Every shipped config is a test parameter: it composes, it is checked, and every digits experiment runs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning import LightningDataModule, Trainer
from omegaconf import OmegaConf, open_dict
from torch.utils.data import DataLoader, TensorDataset

from hasten import registry
from hasten.check import build, check
from hasten.nn.protocols import GeneratesImages
from hasten.run import compose, run

ROOT = Path(__file__).parents[2]
EXPERIMENTS = list(registry.group("experiment"))
DIGITS = [name for name in EXPERIMENTS if name.endswith("_digits")]


def _header(name: str) -> dict[str, str]:
    text = (ROOT / "src/hasten/configs/experiment" / f"{name}.yaml").read_text()
    return dict(re.findall(r"^# (\w+): +(.+)$", text, flags=re.MULTILINE))


def _defaults(name: str) -> set[str]:
    """The files that it begins with."""
    config = yaml.safe_load((ROOT / "src/hasten/configs/experiment" / f"{name}.yaml").read_text())
    return {entry for entry in config.get("defaults", []) if isinstance(entry, str)}


def _words(name: str) -> list[str]:
    """Its command, but for the machine: what a person must name, such as data.root, stands there."""
    return [word for word in _header(name)["command"].split()[2:] if not word.startswith("trainer=")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_is_found_right(name):
    cfg = compose([*_words(name), "trainer.accelerator=cpu", "run_dir=x"])
    assert cfg.experiment == name
    with open_dict(cfg):
        cfg.stages = {stage: f"runs/stages/{stage}" for stage in cfg.first}
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
        for group in ("data", "optimizer", "scheduler", "logger", "callbacks", "timestep_sampler", "noise_scheduler")
        for option in registry.group(group)
    ],
)
def test_every_option_of_a_group_composes_and_is_found_right(group, option):
    owed = {
        "image_folder": ["image.num_classes=2"],
        "imagenet_classes": ["data.subset=[n01440764,n01443537]", "image.num_classes=2"],
        "sample_distance": ["callbacks.sample_distance.feature_net.checkpoint=net.ckpt"],
    }
    uses = {
        "timestep_sampler": "speed_digits",
        "noise_scheduler": "speed_digits",
        "gsam": "experts_digits",
        "save_trajectory": "experts_digits",
    }
    experiment = uses.get(option) or uses.get(group) or "classify_digits"
    words = [f"experiment={experiment}", f"{group}={option}", "run_dir=x", *owed.get(option, [])]
    if group == "data" and OmegaConf.is_missing(compose(words).data, "root"):
        words.append("data.root=data")
    check(compose(words))


def test_another_data_set_is_one_word():
    digits, mnist = (compose(["experiment=speed_digits", f"data={data}", "run_dir=x"]) for data in ("digits", "mnist"))
    assert (digits.model.model.image_size, mnist.model.model.image_size) == (8, 28)
    assert (digits.model.data_var, mnist.model.data_var) == (0.717, 0.925)
    check(mnist)


@pytest.mark.parametrize("name", DIGITS)
def test_a_digits_experiment_trains_and_resumes_in_its_tiny_form(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = list(compose([f"experiment={name}"]).tiny)
    assert tiny, f"configs/experiment/{name}.yaml: expected tiny: [overrides ...], got none"
    words = [f"experiment={name}", *tiny]
    result = run(compose(words))
    assert result.metrics and all(map(math.isfinite, result.metrics.values()))
    written = json.loads((result.folder / "result.json").read_text())
    assert (written["status"], written["metrics"]) == ("complete", result.metrics)
    by_files = "resumes" in _header(name)  # not from a checkpoint; its tests show how
    for checkpoint in ("best.ckpt",) if by_files else ("best.ckpt", "last.ckpt"):
        torch.load(result.folder / "checkpoints" / checkpoint, weights_only=True)
    objective = compose([f"experiment={name}"]).objective.metric
    assert objective in result.metrics
    if by_files:
        return
    longer = "trainer.max_steps=4" if result.trainer.max_steps > 0 else "trainer.max_epochs=2"
    resumed = run(compose([*words, longer, f"ckpt_path={result.folder}/checkpoints/last.ckpt"]))
    assert resumed.trainer.global_step == 2 * result.trainer.global_step


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DIGITS if "resumes" not in _header(name)])
def test_a_digits_experiment_that_was_interrupted_ends_as_one_that_was_not(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"experiment={name}", *compose([f"experiment={name}"]).tiny]
    words.append("trainer.max_steps=4" if compose(words).trainer.max_steps > 0 else "trainer.max_epochs=2")
    every_step = (
        "+callbacks.every_step={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: every_step, "
        "filename: '{step}', every_n_train_steps: 1, save_top_k: -1}"
    )
    whole = run(compose([*words, every_step]))
    resumed = run(compose([*words, f"ckpt_path='{tmp_path}/every_step/step=1.ckpt'"]))
    one, other = (torch.load(each.folder / "checkpoints/last.ckpt", weights_only=True) for each in (whole, resumed))
    assert one["global_step"] == other["global_step"] > 1
    for key in {"state_dict", "current_model_state", "optimizer_states", "lr_schedulers"} & one.keys():
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=0)
    for metric in whole.metrics:
        if metric.startswith(("val/", "test/", "sample/", "eval/")):
            assert resumed.metrics[metric] == whole.metrics[metric], metric


class _RandomImages(LightningDataModule):
    """Noise of the shape that an experiment's data has, two batches a split."""

    def __init__(self, channels: int, size: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.split = TensorDataset(torch.rand(4, channels, size, size) * 2 - 1, torch.arange(4) % num_classes)

    def train_dataloader(self):
        return DataLoader(self.split, batch_size=2)

    val_dataloader = train_dataloader


# what fits on the data itself; what wraps it, and tasks, are tried in their own tests
PLAIN = [
    name
    for name in sorted(set(EXPERIMENTS) - set(DIGITS))
    for cfg in [compose([f"experiment={name}"])]
    if cfg.task is None and cfg.datamodule is None
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|logging interval|recommended to use|isinstance.tree)")
@pytest.mark.parametrize("name", PLAIN)
def test_the_module_of_an_experiment_trains_in_its_tiny_form(name):
    tiny = list(compose([f"experiment={name}"]).tiny)
    assert tiny, f"configs/experiment/{name}.yaml: expected tiny: [overrides ...], got none"
    cfg = compose([f"experiment={name}", *tiny])
    module = build(cfg, "module")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=2, precision=cfg.precision, **quiet)
    before = [parameter.detach().clone() for parameter in module.model.parameters()]
    trainer.fit(module, _RandomImages(cfg.image.channels, cfg.image.size, cfg.image.num_classes))
    assert trainer.callback_metrics[cfg.objective.metric].isfinite()
    assert any(not torch.equal(*pair) for pair in zip(before, module.model.parameters(), strict=True))
    if isinstance(module, GeneratesImages):
        assert module.generate(2).shape == (2, cfg.image.channels, cfg.image.size, cfg.image.size)


# a stage of another one runs in full with that, and what only changes settings of another one is as long as that
STAGES = {stage for name in DIGITS for stage in compose([f"experiment={name}"]).first}
VARIANTS = {name for name in DIGITS if _defaults(name) & set(EXPERIMENTS)}


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - set(DIGITS) - set(PLAIN)))
def test_the_module_of_an_experiment_on_wrapped_data_can_be_built(name):
    words = _words(name)
    cfg = compose([*words, *compose(words).tiny, "run_dir=x"])  # tiny: without pretrained weights
    if cfg.task is None:
        build(cfg, "module")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DIGITS) - STAGES - VARIANTS))
def test_a_digits_experiment_runs_in_full(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(compose([f"experiment={name}"])).metrics
