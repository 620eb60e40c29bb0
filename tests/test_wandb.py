"""Weights & Biases as a run leaves it: offline folders, read back."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from hasten.cli import main
from hasten.errors import HastenError
from hasten.loggers import wandb
from hasten.run import _summarize, compose

CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC")
QUICK = ["experiment=classify_digits", "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1", "logger=wandb"]


def _environment(home, **more):
    """Of someone who has never used Weights & Biases, in an empty home folder."""
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_"))}
    return kept | {"HOME": str(home), "MPLCONFIGDIR": str(home.parent), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where a data set was distilled, with Weights & Biases, by someone who is not logged in; and what was printed."""
    top = tmp_path_factory.mktemp("wandb")
    words = ["experiment=dm_digits", *compose(["experiment=dm_digits"]).tiny, "trainer.log_every_n_steps=1"]
    done = subprocess.run(
        [Path(sys.executable).with_name("hasten"), *words, "logger=wandb", f"run_dir={top}/dm/run"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=top, env=_environment(top / "home"), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return top, done.stdout


@pytest.fixture
def run(trained, wandb_runs):
    (run,) = wandb_runs(trained[0] / "dm/run")
    return run


def _result(folder):
    return json.loads((folder / "result.json").read_text())


# ------------------------------------------------------------------ what is sent


def test_nobody_is_asked_and_nothing_is_written_outside_of_the_run_folder(trained):
    top, printed = trained
    assert (
        f"wandb: offline (no login found); to upload the run later: wandb sync {top}/dm/run/wandb/offline-*" in printed
    )
    assert list((top / "home").iterdir()) == []
    assert {path for path in top.rglob("*wandb*") if not path.is_relative_to(top / "dm/run")} == set()
    assert list((top / "dm/run/wandb").glob("own/**/*.log"))  # what would stand in the home folder


def test_the_config_is_nested_as_in_config_yaml(trained, run):
    config = yaml.safe_load((trained[0] / "dm/run/config.yaml").read_text())
    assert {key: run.config[key] for key in config} == json.loads(json.dumps(config))
    assert not [key for key in run.config if "/" in key or "." in key]
    assert (run.project, run.name, run.group) == ("hasten", "dm/run", "")


def test_the_summary_is_the_result_and_the_best_of_the_objective(trained, run):
    metrics = _result(trained[0] / "dm/run")["metrics"]
    assert {name: run.summary[name] for name in metrics} == pytest.approx(metrics)
    assert run.summary["eval/acc_best"] == pytest.approx(metrics["eval/acc"])  # of one evaluation
    assert run.exit_code == 0


def test_the_history_has_the_steps_and_the_values_of_metrics_csv(trained, run):
    with (trained[0] / "dm/run/metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    logged = {}
    for row in run.history:
        for name, value in row.items():
            logged[name, row.get("trainer/global_step")] = value
    assert len(rows) > 2
    for row in rows:
        step = row.pop("step")
        assert {name: logged[name, step] for name in row} == pytest.approx(row)


def test_pictures_and_the_table_are_media_of_the_run(run):
    for name in ("synthetic", "initial"):
        (picture,) = [row["pictures"][name] if "pictures" in row else row.get(f"pictures/{name}") for row in run.history
                      if f"pictures/{name}" in row or "pictures" in row]  # fmt: skip
        (file,) = picture["filenames"]
        assert (run.files / file).read_bytes().startswith(b"\x89PNG")
    assert list(run.files.glob("media/table/eval/*.json"))


def test_the_distilled_set_and_the_last_pictures_are_artifacts_and_checkpoints_are_none(trained, run):
    folder = trained[0] / "dm/run"
    assert run.artifacts.keys() == {"distilled", "pictures", "run_table"}
    assert run.artifacts["distilled"].keys() >= {"final/distilled.safetensors", "best/distilled.safetensors"}
    assert run.artifacts["pictures"].keys() == {"synthetic.png", "initial.png"}
    for files in run.artifacts.values():
        assert all(path.is_file() and path.is_relative_to(folder) for path in files.values())


# ------------------------------------------------------------------ resume


def _wandb_environment():
    return {key: value for key, value in os.environ.items() if key.startswith("WANDB")}


def test_a_run_goes_on_under_its_id_and_another_gets_its_own(tmp_path, monkeypatch, wandb_runs):
    monkeypatch.chdir(tmp_path)
    environment = _wandb_environment()
    words = [*QUICK, "logger.wandb.group=both"]
    assert main([*words, "run_dir=run", "trainer.max_epochs=1", "logger.wandb.log_model=true"]) == 0
    shutil.copytree("run/checkpoints", "first")
    result = _result(Path("run"))
    Path("run/result.json").write_text(json.dumps(result | {"status": "interrupted"}))
    assert main([*QUICK, "run_dir=run", "ckpt_path=last", "trainer.max_epochs=2"]) == 0
    assert main([*QUICK, "run_dir=run", "ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=3"]) == 0
    assert main([*QUICK, "run_dir=other", "ckpt_path=first/last.ckpt", "trainer.max_epochs=2"]) == 0
    assert _wandb_environment() == environment
    runs, (other,) = wandb_runs("run"), wandb_runs("other")
    assert [run.id for run in runs] == [runs[0].id] * 3
    assert [(run.group, run.name) for run in runs] == [("both", f"{tmp_path.name}/run")] * 3
    assert other.id != runs[0].id and other.group == ""
    steps = [[row["trainer/global_step"] for row in run.history if "train/loss" in row] for run in runs]
    assert steps == [[0, 1], [2, 3], [4, 5]]
    (checkpoint,) = runs[0].artifacts["model"].values()  # as asked for; the others did not ask
    assert checkpoint.is_relative_to(tmp_path / "run/wandb/own")
    assert "model" not in other.artifacts


# ------------------------------------------------------------------ the logger


@pytest.fixture
def _nobody(monkeypatch, tmp_path):
    for name in (*CREDENTIALS, "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("_nobody")
@pytest.mark.parametrize("asked", [{"offline": False}, {}])
def test_online_without_a_login_is_refused_where_wandb_would_ask(monkeypatch, tmp_path, asked):
    if not asked:
        monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(HastenError, match=r"^expected a login for mode 'online', found none; run"):
        wandb(tmp_path, **asked)


@pytest.mark.usefixtures("_nobody")
def test_what_is_asked_for_goes_before_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb(tmp_path)._wandb_init["mode"] is None  # what `wandb offline` has set, say
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb(tmp_path)._wandb_init["mode"] == "offline"
    assert wandb(tmp_path, offline=False)._wandb_init["mode"] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb(tmp_path)._wandb_init["mode"] == "disabled"


def test_only_rank_zero_makes_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = wandb(tmp_path / "run", offline=True)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.log_table("table", columns=["a"], data=[[1]], step=1)
    logger.finalize("success")
    assert logger._experiment is None
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_terminal_does_not_make_wandb_ask(tmp_path):
    pty = pytest.importorskip("pty")
    keyboard, terminal = pty.openpty()
    code = f"from hasten.loggers import wandb\nwandb({str(tmp_path / 'run')!r}).experiment.finish()"
    with os.fdopen(keyboard, "rb"), os.fdopen(terminal, "r+b", buffering=0) as screen:
        # whoever asks on it waits for an answer that nobody types
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=screen, stdout=screen, stderr=screen, cwd=tmp_path,
            env=_environment(tmp_path / "home"), timeout=60,
        )  # fmt: skip
    assert done.returncode == 0
    assert len(list(tmp_path.glob("run/wandb/offline-run-*"))) == 1


def test_the_best_value_of_the_objective_is_the_best_checkpoints_and_not_the_last():
    class Logger(WandbLogger):
        experiment = SimpleNamespace(summary={})  # of a run that needs no W&B

        def __init__(self):
            pass

    checkpoints = SimpleNamespace(best_model_score=torch.tensor(0.9), current_score=torch.tensor(0.5))
    trainer = SimpleNamespace(checkpoint_callback=checkpoints, loggers=[Logger()])
    _summarize(compose(["experiment=classify_digits"]), trainer, {"val/acc": 0.5})
    assert Logger.experiment.summary == {"val/acc": 0.5, "val/acc_best": pytest.approx(0.9)}


def test_a_mode_that_needs_a_login_is_named_once_by_its_key(tmp_path, monkeypatch, capsys):
    for key in ("WANDB_MODE", *CREDENTIALS):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*QUICK, "logger.wandb.offline=false", f"run_dir={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err.startswith("hasten: logger.wandb: expected a login for mode 'online'")
