"""A sweep from the command line to its table, with a job that fails halfway."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from hasten.cli import main

FAILS = """
import os
from lightning.pytorch import Callback

class Fails(Callback):
    def on_validation_start(self, trainer, pl_module):
        if trainer.optimizers[0].defaults["lr"] == 0.01 and os.environ["PL_GLOBAL_SEED"] == "1":
            raise RuntimeError("the disk of this job is gone")
"""
QUICK = ["experiment=classify_digits", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=wandb"]
FAIL = ["+callbacks.fails._target_=callback_that_fails.Fails", "tiny=[a,b]"]  # a list, of which nothing is swept


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two learning rates and two seeds of which one job fails: where, its exit code and what it printed."""
    top, out, err = tmp_path_factory.mktemp("sweep"), io.StringIO(), io.StringIO()
    (top / "callback_that_fails.py").write_text(FAILS)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(top)
        patch.syspath_prepend(str(top))
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        code = main(["-m", *QUICK, *FAIL, "optimizer.lr=0.001,0.01", "seed=0,1"])
    folders = sorted((top / "runs/classify_digits").iterdir())
    results = {folder: json.loads((folder / "result.json").read_text()) for folder in folders}
    return SimpleNamespace(top=top, code=code, out=out.getvalue(), err=err.getvalue().splitlines(), results=results)


def _words(result):
    return dict(word.split("=", 1) for word in result["overrides"])


def test_every_job_has_a_folder_and_those_behind_the_one_that_fails_run(swept):
    status = {(_words(r)["optimizer.lr"], r["seed"]): r["status"] for r in swept.results.values()}
    assert status == {
        ("0.001", 0): "complete", ("0.001", 1): "complete", ("0.01", 0): "complete", ("0.01", 1): "failed",
    }  # fmt: skip
    for folder, result in swept.results.items():
        assert folder.name.endswith(f"_{result['seed']}_optimizer.lr-{_words(result)['optimizer.lr']}")
        assert (folder / "traceback.txt").exists() == (result["status"] == "failed")


def test_the_exit_code_and_the_last_line_tell_of_the_failure(swept):
    assert swept.code == 1
    lines = [line for line in swept.err if line.startswith("hasten: ")]
    assert lines == [
        "hasten: RuntimeError: the disk of this job is gone (HYDRA_FULL_ERROR=1 shows where)",
        "hasten: 1 of the sweep's jobs failed; their lines stand above",
    ]
    assert [line for line in swept.out.splitlines() if line.startswith("job ")] == [
        f"job {n}: {word}"
        for n, word in enumerate(f"optimizer.lr={lr}, seed={seed}" for lr in (0.001, 0.01) for seed in (0, 1))
    ]


def test_every_job_is_a_run_of_weights_and_biases_that_says_what_was_swept(swept, wandb_runs):
    runs = {}
    for folder, result in swept.results.items():
        (run,) = wandb_runs(folder)
        assert run.name == f"optimizer.lr={_words(result)['optimizer.lr']}, seed={result['seed']}"
        assert run.config["run_dir"] == str(folder.relative_to(swept.top))
        assert run.exit_code == (1 if result["status"] == "failed" else 0)
        assert list((folder / "wandb/own").rglob("core-debug*.log"))  # a service of its own
        runs[run.id] = run
    (sweep,) = (swept.top / "runs/sweeps").iterdir()
    assert len(runs) == 4
    assert {run.group for run in runs.values()} == {sweep.name}


def test_compare_reads_the_sweep_by_what_was_swept(swept, capsys):
    assert main(["compare", str(swept.top / "runs/classify_digits")]) == 0
    printed = capsys.readouterr().out
    table = (swept.top / "runs/classify_digits/compare.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("| 0.")]
    assert [row[:2] for row in rows] == [["0.001", "2"], ["0.01", "1"]]
    failed = next(folder for folder, result in swept.results.items() if result["status"] == "failed")
    assert f"left out: {failed}: failed" in printed


def test_a_job_that_cannot_begin_says_why_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *QUICK, "trainer.max_epochs=zero"]) == 1
    assert "trainer.max_epochs" in capsys.readouterr().err
    assert not Path("runs/classify_digits").exists()
