"""The command line as people type it: what it prints, what it leaves, and one line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Subset

from hasten.cli import main
from hasten.errors import HastenError
from hasten.nn import vim

QUICK = ["experiment=classify_digits", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def _python(*words: str, code: str | None = None) -> subprocess.CompletedProcess:
    """A process of its own, as for a user who has just installed hasten."""
    start = ["-c", code] if code else [str(Path(sys.executable).with_name("hasten"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *words], capture_output=True, text=True, env=environment, timeout=300
    )


# ------------------------------------------------------------------ help and lists


def test_help_and_list_import_nothing_heavy():
    code = """
import sys
from hasten.cli import main
assert main(["--help"]) == main(["list"]) == main(["-h"]) == main(["--version"]) == 0
print("heavy:", sorted({"torch", "lightning", "timm", "diffusers", "wandb", "numpy", "sklearn"} & set(sys.modules)))
"""
    done = _python(code=code)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout


def test_help_lists_every_experiment_with_a_sentence(capsys):
    from hasten import registry

    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, summary in registry.group("experiment").items():
        assert name in printed and summary in printed


def test_list_shows_methods_experiments_and_data(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for word in ["speed", "speed_digits", "digits", "mnist"]:
        assert f"  {word} " in printed


# ------------------------------------------------------------------ runs


def test_a_run_leaves_its_folder_and_prints_what_it_wrote(capsys):
    assert main([*QUICK, "seed=3"]) == 0
    (folder,) = Path("runs/classify_digits").iterdir()
    assert folder.name.endswith("_3")
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() == {"status", "metrics", "experiment", "seed", "overrides", "versions", "duration_s", "tested"}
    assert (result["status"], result["seed"], result["experiment"]) == ("complete", 3, "classify_digits")
    assert result["overrides"] == [*QUICK, "seed=3"]
    assert result["metrics"].keys() >= {"train/loss", "val/acc", "test/acc"}
    printed = capsys.readouterr().out
    for name in ["config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "result.json"]:
        assert (folder / name).exists()
        assert str(folder / name) in printed
    assert "test/acc" in printed


def test_the_written_config_runs_again_to_the_same_numbers():
    from omegaconf import OmegaConf

    from hasten.run import run

    assert main(QUICK) == 0
    (folder,) = Path("runs/classify_digits").iterdir()
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.run_dir = "again"
    again = run(cfg)
    first = json.loads((folder / "result.json").read_text())["metrics"]
    same = [name for name in first if not name.startswith("throughput/")]
    assert {name: again.metrics[name] for name in same} == {name: first[name] for name in same}


def test_a_sweep_makes_one_folder_a_job_and_goes_on_where_one_fails(capsys):
    assert main(["-m", *QUICK, "seed=0,1", "optimizer.lr=1e-3,-1"]) == 1
    folders = sorted(path.name for path in Path("runs/classify_digits").iterdir())
    assert len(folders) == 2 and all("lr-0.001" in name for name in folders)
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if "Invalid learning rate" in line] == [
        "hasten: optimizer: Invalid learning rate: -1"
    ] * 2
    assert errors[-1] == "hasten: 2 of the sweep's jobs failed; their lines stand above"


def test_flags_may_stand_anywhere_among_the_words():
    assert main([QUICK[0], "-m", *QUICK[1:], "seed=0,1"]) == 0
    assert len(list(Path("runs/classify_digits").iterdir())) == 2


def test_the_composed_config_is_printed_without_a_run(capsys):
    assert main(["experiment=classify_digits", "--cfg", "job"]) == 0
    assert "_target_: hasten.modules.Classification" in capsys.readouterr().out
    assert not Path("runs").exists()


@pytest.mark.slow
def test_the_installed_command_and_train_py_are_one_entry():
    help_of = [
        subprocess.run([*words, "--help"], capture_output=True, text=True, timeout=60).stdout
        for words in (
            [str(Path(sys.executable).with_name("hasten"))],
            [sys.executable, str(Path(__file__).parents[1] / "train.py")],
        )
    ]
    assert help_of[0] == help_of[1] != ""


@pytest.mark.slow
def test_two_processes_share_one_run_folder():
    done = _python(*QUICK, "trainer.strategy=ddp", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs/classify_digits").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "complete"
    assert done.stdout.count("final metrics") == 1


# ------------------------------------------------------------------ tasks and wrapped data


def write_sum(folder: Path, *, data, wrong: bool = False) -> dict[str, float]:
    """A task: a file and a number about the data."""
    if wrong:
        raise HastenError("data: no sum today")
    (folder / "sum.txt").write_text("written")
    return {"sum": float(sum(labels.sum() for _, labels in data.test_dataloader()))}


class FirstHundred(LightningDataModule):
    """Another datamodule's first hundred training images."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return DataLoader(Subset(self.data.splits.train, range(100)), batch_size=50)

    def val_dataloader(self):
        return self.data.val_dataloader()

    def test_dataloader(self):
        return self.data.test_dataloader()


def _own_experiment(name: str, text: str) -> list[str]:
    Path("own/experiment").mkdir(parents=True, exist_ok=True)
    Path(f"own/experiment/{name}.yaml").write_text(f"# @package _global_\n# Own.\n{text}")
    return ["hydra.searchpath=[file://own]", f"experiment={name}"]


@pytest.fixture
def as_module(monkeypatch):
    """This file's functions by an importable name, as a config asks for them."""
    monkeypatch.setitem(sys.modules, "tests_of_the_cli", sys.modules[__name__])
    return "tests_of_the_cli"


def test_a_task_takes_the_place_of_the_fit_and_leaves_a_run_folder(as_module, capsys):
    words = _own_experiment(
        "summed", f"task: {{_target_: {as_module}.write_sum, _partial_: true, data: '${{data}}'}}\n"
    )
    assert main(words) == 0, capsys.readouterr().err
    (folder,) = Path("runs/summed").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["metrics"]) == ("complete", {"sum": 1798.0})
    assert (folder / "sum.txt").exists()
    assert "sum" in capsys.readouterr().out


def test_a_task_that_fails_is_one_line_and_recorded(as_module, capsys):
    words = _own_experiment(
        "summed", f"task: {{_target_: {as_module}.write_sum, _partial_: true, data: '${{data}}', wrong: true}}\n"
    )
    assert main(words) == 1
    assert capsys.readouterr().err == "hasten: data: no sum today\n"
    (folder,) = Path("runs/summed").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


def test_a_run_fits_on_what_wraps_its_data(as_module, capsys):
    words = _own_experiment(
        "wrapped",
        "defaults: [classify_digits]\ntrainer: {max_epochs: 1}\n"
        f"datamodule: {{_target_: {as_module}.FirstHundred, data: '${{data}}'}}\n",
    )
    assert main([*words, "data.batch_size=32"]) == 0, capsys.readouterr().err
    (folder,) = Path("runs/wrapped").iterdir()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


# ------------------------------------------------------------------ stages


@pytest.fixture
def staged():
    """Words for an experiment that waits for another, both of the test's own making."""
    small = "defaults: [classify_digits]\ntrainer: {max_epochs: 1, limit_train_batches: 2}\n"
    _own_experiment("small", f"{small}tiny: [trainer.limit_train_batches=1]\n")
    return _own_experiment("staged", f"{small}first: [small]\n")


def test_a_stage_runs_once_and_is_found_again(staged):
    assert main(staged) == 0
    (stage,) = [path for path in Path("runs/stages").iterdir() if path.is_dir()]
    written = (stage / "result.json").stat().st_mtime_ns
    assert json.loads((stage / "result.json").read_text())["status"] == "complete"
    assert main([*staged, "trainer.max_epochs=2"]) == 0
    assert (stage / "result.json").stat().st_mtime_ns == written


def test_a_stage_takes_the_seed_and_the_data_of_the_run_that_needs_it(staged):
    assert main(staged) == 0
    assert main([*staged, "seed=1"]) == 0
    assert main([*staged, "data.batch_size=32"]) == 0
    configs = [path.read_text() for path in sorted(Path("runs/stages").glob("*/config.yaml"))]
    assert len(configs) == 3
    assert sum("batch_size: 32" in text for text in configs) == 1


def test_what_a_constructor_refuses_is_said_before_the_stages_run(staged, capsys):
    assert main([*staged, "+module.label_smoothing=2"]) == 1
    assert capsys.readouterr().err.startswith("hasten: module: classification: label_smoothing: expected")
    assert not Path("runs").exists() or not list(Path("runs").glob("stages/*/"))


def test_a_stage_can_be_asked_for_in_its_tiny_form(staged):
    assert main([*staged, "first=[small:tiny]"]) == 0
    (stage,) = [path for path in Path("runs/stages").iterdir() if path.is_dir()]
    assert torch.load(stage / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


def test_a_stage_that_did_not_complete_runs_again(staged):
    assert main(staged) == 0
    (result,) = Path("runs/stages").glob("*/result.json")
    result.write_text(json.dumps({"status": "interrupted"}))
    assert main(staged) == 0
    assert json.loads(result.read_text())["status"] == "complete"


# ------------------------------------------------------------------ mistakes


def _broken(path: str, content: bytes = b"PK\x03\x04 not a checkpoint") -> str:
    Path(path).write_bytes(content)
    return path


MISTAKES = {
    "unknown experiment": (["experiment=speed_digit"], "experiment: there is no 'speed_digit'; did you mean 'speed"),
    "unknown option": (["trainer=gup"], "trainer: there is no 'gup'; did you mean 'gpu'?"),
    "unknown key": (["trainer.max_step=3"], "trainer.max_step: there is no such key; did you mean 'trainer.max"),
    "unknown top key": (["sead=3"], "sead: there is no such key; did you mean 'seed'?"),
    "unknown group": (["optimiser=adamw"], "optimiser: there is no such key; did you mean 'optimizer'?"),
    "unknown command": (["lst"], "'lst': expected a command or key=value; did you mean 'list'?"),
    "unknown flag": (["--nonsense"], "unrecognized arguments: --nonsense; see --help"),
    "not key=value": (["seed=1", "foo"], "foo: expected key=value, cannot read it"),
    "broken value": (["model.width=["], "model.width=[: expected key=value, cannot read it"),
    "appended argument": (["+optimizer.momentun=0.9"], "optimizer.momentun: AdamW takes no 'momentun'"),
    "wrong type": (["data.batch_size=big"], "data.batch_size: expected int, got 'big'"),
    "wrong type of an optimizer": (["optimizer.lr=high"], "optimizer.lr: expected float or Tensor, got 'high'"),
    "out of range": (["data.batch_size=0"], "data: "),
    "negative rate": (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
    "too deep": (["model.depth=9"], "model: convnet: depth: expected 2 ** depth <= image_size = 8, got depth 9"),
    "negative seed": (["seed=-1"], "seed: expected 0 <= seed < 2**32, got -1"),
    "no threads": (["threads=0"], "threads: expected >= 1, got 0"),
    "unknown precision": (["precision=8-bit"], "precision: expected one of 32-true"),
    "unknown metric": (["objective.metric=val/accuracy"], "objective.metric: "),
    "missing folder": (["data=image_folder", "data.root=nowhere", "image.num_classes=2"], "data: "),
    "no checkpoint": (["ckpt_path=no.ckpt"], "ckpt_path: expected a checkpoint, there is no file 'no.ckpt'"),
    "corrupted checkpoint": (["ckpt_path=broken.ckpt"], "ckpt_path: 'broken.ckpt' is no whole Lightning checkpoint"),
    "foreign checkpoint": (["ckpt_path=foreign.ckpt"], "ckpt_path: 'foreign.ckpt' is of another model: "),
    "unknown form of a stage": (["first=[classify_digits:big]"], "first: classify_digits:big: expected classify"),
    "no function": (["task={_target_: builtins.int}"], "task: expected a function of the run's folder, got int"),
    "folder in use": (["run_dir=used"], "run_dir: 'used' holds a run already"),
    "other data than the model's": (["image.num_classes=7"], "image.num_classes: expected 10"),
    "sweep of several processes": (["-m", "seed=0,1", "trainer.devices=2"], "--multirun: expected one process a job"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_1(name, capsys):
    words, line = MISTAKES[name]
    _broken("broken.ckpt")
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, "foreign.ckpt")
    Path("used").mkdir()
    Path("used/result.json").write_text("{}")
    command = name in ("unknown command", "unknown experiment")
    assert main(words if command else [*QUICK, *words]) == 1
    printed = capsys.readouterr().err.splitlines()
    if name == "sweep of several processes":
        assert printed.pop() == "hasten: 2 of the sweep's jobs failed; their lines stand above"
        assert printed.pop(0) == printed[0]
    assert len(printed) == 1, "\n".join(printed)
    assert printed[0].startswith(f"hasten: {line}"), printed[0]
    assert not Path("runs/classify_digits").exists() or name == "unknown metric"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("preset", ["gpu", "ddp", "fsdp2"])
def test_a_gpu_preset_without_a_gpu_is_one_line(preset, capsys):
    assert main([*QUICK, f"trainer={preset}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "hasten: trainer.accelerator: expected a GPU for 'gpu', this machine has none; use trainer=cpu"


def test_several_mistakes_are_said_at_once(capsys):
    assert main([*QUICK, "optimizer.lr=high", "data.batch_size=big", "threads=0"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_whole_traceback_is_there_for_who_asks(monkeypatch):
    from hasten.errors import HastenError

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(HastenError, match=r"data\.batch_size"):
        main([*QUICK, "data.batch_size=big"])
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_failure_in_the_middle_is_recorded_in_the_run_folder(capsys):
    # more batches than an epoch has: what Lightning finds out only when it has the data
    assert main([*QUICK, "trainer.val_check_interval=1000"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "val_check_interval" in line
    (folder,) = Path("runs/classify_digits").iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert "Traceback" in (folder / "traceback.txt").read_text()


def test_a_run_says_which_weights_it_started_from(capsys):
    tiny = ["experiment=rmeeto_digits", "first=[]", "model.depth=4", "model.embed_dim=16", "trainer.max_epochs=1",
            "callbacks.token_merging.r=8", "trainer.limit_train_batches=2"]  # fmt: skip
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "d_state": 8, "in_chans": 1, "num_classes": 7}
    torch.save(vim(depth=4, **sizes).state_dict(), "seven.pt")
    assert main([*tiny, "model.checkpoint=seven.pt"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "seven.pt is for 7 classes, the model for 10: its classifier stays fresh" in out
    assert "vim: loaded weights of seven.pt" in out


def test_a_key_of_a_chosen_option_is_explained_by_what_that_option_takes(capsys):
    assert main(["experiment=classify_digits", "optimizer=sgd", "optimizer.dampening=0.1"]) == 1
    assert "torch.optim.SGD takes it; add it with +optimizer.dampening=VALUE" in capsys.readouterr().err
