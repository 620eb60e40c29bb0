import csv
import json
import subprocess
import sys
from statistics import fmean, stdev

import pytest

from hasten.cli import main
from hasten.run_folders import claimed


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def write_run(folder, words, *, seed=0, metrics=None, lr=0.001, status="complete", curve=(), experiment="digits"):
    folder.mkdir(parents=True)
    result = {"status": status, "metrics": metrics or {"val/acc": 0.5}, "experiment": experiment, "seed": seed}
    (folder / "result.json").write_text(json.dumps(result | {"overrides": words, "duration_s": 2.0 + seed}))
    config = f"optimizer: {{lr: {lr}}}\nmodel: {{_target_: x}}\nobjective: {{metric: val/acc, mode: max}}\n"
    (folder / "config.yaml").write_text(f"experiment: {experiment}\n{config}")
    lines = [f"{step},{value},,0.1" for step, value in curve]
    (folder / "metrics.csv").write_text("\n".join(["step,val/acc,test/acc,train/loss", *lines]) + "\n")
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Two learning rates and three seeds; the first rate is what the config says anyway."""
    accuracy = {("a", 0): 0.5, ("a", 1): 0.6, ("a", 2): 0.9, ("b", 0): 0.1, ("b", 1): 0.2, ("b", 2): 0.3}
    for (name, seed), value in accuracy.items():
        words = ["experiment=digits", f"seed={seed}", *(["optimizer.lr=1e-2"] if name == "b" else [])]
        metrics = {"val/acc": value, "test/acc": value / 2, "train/loss": 1.0}
        curve = [(1, value / 2), (3, value)]
        lr = 0.01 if name == "b" else 0.001
        write_run(tmp_path / f"runs/{name}{seed}", words, seed=seed, metrics=metrics, lr=lr, curve=curve)
    return tmp_path / "runs"


def test_runs_are_one_row_for_each_swept_value_with_mean_and_deviation_over_seeds(sweep, capsys):
    assert main(["compare", "runs"]) == 0
    with (sweep / "compare.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert [row["optimizer.lr"] for row in (first, second)] == ["0.001", "0.01"]
    assert (first["runs"], first["seeds"]) == ("3", "0 1 2")
    assert float(first["val/acc mean"]) == pytest.approx(fmean([0.5, 0.6, 0.9]))
    assert float(second["test/acc sd"]) == pytest.approx(stdev([0.05, 0.1, 0.15]))
    text = (sweep / "compare.md").read_text()
    assert "| optimizer.lr | runs | val/acc | test/acc | duration_s |" in text
    assert "| 0.01 | 3 | 0.2 ± 0.1 | 0.1 ± 0.05 | 3 ± 1 |" in text
    assert (sweep / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "0.2 ± 0.1" in printed and "compare.png" in printed


def test_single_run_folders_can_be_named_and_written_elsewhere(sweep, tmp_path):
    assert main(["compare", "runs/a0", "runs/b0", "runs/b0", "--out", "elsewhere", "--metrics", "train/loss"]) == 0
    assert "| optimizer.lr | runs | train/loss |" in (tmp_path / "elsewhere/compare.md").read_text()
    assert "| 0.01 | 1 | 1 |" in (tmp_path / "elsewhere/compare.md").read_text()
    assert not (sweep / "compare.md").exists()


def test_what_was_not_asked_for_is_the_default_of_a_group_of_options(tmp_path):
    write_run(tmp_path / "runs/a", ["experiment=digits", "model=vim"])
    write_run(tmp_path / "runs/b", ["experiment=digits", "+callbacks.x=1", "ckpt_path=here", "run_dir=runs/b"])
    assert main(["compare", "runs"]) == 0
    heads, _, *rows = (tmp_path / "runs/compare.md").read_text().splitlines()[2:]
    assert heads.startswith("| model | callbacks.x | runs |")
    assert [row[:18] for row in rows] == ["| vim | default | ", "| default | 1 | 1 "]


def test_experiments_are_told_apart(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / "runs" / name / "x", [f"experiment={name}"], experiment=name)
    assert main(["compare", "runs"]) == 0
    assert "| experiment | runs |" in (tmp_path / "runs/compare.md").read_text()


def test_runs_that_are_not_complete_are_listed_with_the_reason(sweep, capsys):
    write_run(sweep / "failed", [], status="failed")
    write_run(sweep / "killed", [], status="running")
    alive = write_run(sweep / "alive", [], status="running")
    broken = write_run(sweep / "broken", [])
    (broken / "result.json").write_text('{"status": "comp')
    strange = write_run(sweep / "strange", [])
    (strange / "result.json").write_text('{"status": "complete", "metrics": {"val/acc": [1]}}')
    begun = write_run(sweep / "begun", [])
    (begun / "result.json").unlink()
    with claimed(alive):
        assert main(["compare", "runs"]) == 0
    reasons = {
        "failed": "failed",
        "killed": "killed while it was running",
        "alive": "still running",
        "broken": "no readable result.json",
        "strange": "no readable result.json",
        "begun": "no readable result.json",
    }
    printed, text = capsys.readouterr().out, (sweep / "compare.md").read_text()
    for name, reason in reasons.items():
        assert f"left out: runs/{name}: {reason}" in printed
        assert f"- `runs/{name}`: {reason}" in text
    assert "| 0.01 | 3 |" in text


def test_a_run_without_a_readable_curve_still_counts(sweep):
    (sweep / "a0/metrics.csv").write_text("step,val/acc\n1,half\n")
    (sweep / "a1/metrics.csv").unlink()
    assert main(["compare", "runs"]) == 0
    assert "| 0.001 | 3 |" in (sweep / "compare.md").read_text()


MISTAKES = {
    "no folder": ([], "compare: expected run folders, got none; try: hasten compare runs/EXPERIMENT"),
    "not there": (["nowhere"], "compare: expected a folder, there is no 'nowhere'"),
    "no runs": (["empty"], "compare: expected a run, or a folder of runs, there is none in 'empty'"),
    "unknown metric": (["runs", "--metrics", "val/akk"], "compare: --metrics: no run has 'val/akk'; did you mean "),
    "unknown flag": (["runs", "--nonsense"], "compare: unrecognized arguments: --nonsense; see hasten compare --help"),
    "cannot write": (["runs", "--out", "file"], "compare: cannot write to 'file': "),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(sweep, tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    words, line = MISTAKES[name]
    assert main(["compare", *words]) == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"hasten: {line}")


def test_nothing_complete_is_an_error_that_names_every_folder(tmp_path, capsys):
    write_run(tmp_path / "runs/a", [], status="failed")
    assert main(["compare", "runs"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "hasten: compare: expected runs that are complete, found none in runs",
        "hasten: runs/a: left out: failed",
    ]


def test_help_and_mistakes_load_nothing_heavy():
    code = """
import sys
from hasten.cli import main
assert main(["compare", "--help"]) == 0 and main(["compare", "nowhere"]) == 1
heavy = {"torch", "lightning", "matplotlib", "numpy", "rich", "omegaconf", "hydra"} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "heavy: []" in done.stdout, done.stderr
