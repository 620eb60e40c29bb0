"""The benchmarks of dataset distillation at a tiny size: who chooses what, what is written, what the check names."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}


@pytest.fixture
def edf(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("edf")


@pytest.fixture
def edf_gpu(edf):
    return importlib.import_module("edf_gpu")


@pytest.fixture
def results(edf, tmp_path):
    return edf.Results(tmp_path / "x.json", {}, "")


def _fill(edf, results, gain, *, seeds=(0, 1, 2), arms=None, **by_arm):
    """Rows of every arm at its first step size: random images reach 0.5 + seed / 100, an arm its gain more."""
    for seed in seeds:
        for arm in arms or edf.ARMS:
            _add(edf, results, arm, seed, test=0.5 + seed / 100 + by_arm.get(arm, gain)[seed])


def _add(edf, results, arm, seed, *, test, holdout=0.5, rate=None):
    run = edf.Run(arm, edf.ARMS[arm].rates[0] if rate is None else rate, seed, 1, False)
    metrics = {"eval/convnet/acc_final": test, "eval/convnet/acc_best": test - 0.1, "eval/acc": holdout}
    metrics |= {"eval/random/acc": 0.5 + seed / 100, "eval/random_soft/acc": 0.6, "train/loss": 0.0}
    results.add(edf.row_of(run, metrics))


# ---------------------------------------------------------------------- what is reported


def test_the_holdout_chooses_the_step_size_and_the_test_images_never(edf, results):
    for seed in (0, 1):
        _add(edf, results, "edf", seed, rate=10.0, test=0.5, holdout=0.8)
        _add(edf, results, "edf", seed, rate=100.0, test=0.9, holdout=0.7)
    assert edf.found(results, "edf", 1) == (10.0, {0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.4})


def test_the_first_seed_chooses_for_all(edf, results):
    for seed, holdouts in enumerate([(0.8, 0.7), (0.6, 0.9)]):
        for rate, holdout in zip((10.0, 100.0), holdouts, strict=True):
            _add(edf, results, "edf", seed, rate=rate, test=rate / 1000, holdout=holdout)
    assert edf.found(results, "edf", 1).rate == 10.0


def test_the_other_seeds_are_run_at_the_chosen_step_size_and_nothing_twice(edf, results):
    asked = []

    def measured(runs):
        asked.append([(run.arm, run.rate, run.seed) for run in runs])
        metrics = {"eval/convnet/acc_final": 0.5, "eval/convnet/acc_best": 0.5}
        return [edf.row_of(run, metrics | {"eval/acc": 0.9 if run.rate == 100 else 0.8}) for run in runs]

    arms = {"edf": edf.ARMS["edf"], "datm": edf.ARMS["datm"]}
    for seeds in ([0, 1], [0, 1, 2]):
        edf.complete(results, arms, seeds, measured, ipc=1, dry=False)
    tuning = [("edf", 10, 0), ("edf", 100, 0), ("datm", 10, 0), ("datm", 100, 0)]
    assert asked == [tuning, [("edf", 100, 1), ("datm", 100, 1)], [], [("edf", 100, 2), ("datm", 100, 2)]]


def test_what_was_not_measured_is_not_found(edf, results):
    _add(edf, results, "datm", 0, test=0.5)
    assert edf.found(results, "datm", 1) is not None
    assert edf.found(results, "random", 1).final == {0: 0.5}
    assert edf.found(results, "whole", 1) is None
    assert edf.found(results, "edf", 1) is None
    assert edf.found(results, "datm", 10) is None


def test_the_report_has_a_line_an_arm_with_every_seed(edf, results):
    _fill(edf, results, (0.2, 0.2, 0.2))
    lines = edf.report(results, 1).splitlines()
    assert lines[2] == "| random |  | 51.0 ± 1.0 (50.0, 51.0, 52.0) |  |"
    assert "| edf | 10 | 71.0 ± 1.0 (70.0, 71.0, 72.0) | 61.0 ± 1.0 (60.0, 61.0, 62.0) |" in lines


# ---------------------------------------------------------------------- what is checked


def test_what_holds_passes_the_check(edf, results):
    _fill(edf, results, (0.2, 0.21, 0.19))
    assert edf.failures(results, 1) == []


def test_the_check_names_an_arm_that_is_not_clearly_above_random_images(edf, results):
    _fill(edf, results, (0.2, 0.21, 0.19), dm=(0.0, 0.1, 0.2))
    said = "dm, 1 a class: expected more than three standard deviations above random images, got 10.0 ± 10.0 points"
    assert edf.failures(results, 1) == [said]


def test_the_check_asks_for_all_arms_and_three_seeds(edf, results):
    _fill(edf, results, (0.2, 0.21, 0.19), seeds=(0, 1))
    said = ["check: expected all arms with at least three seeds; run them first"]
    assert edf.failures(results, 1) == said
    _fill(edf, results, (0.2, 0.21, 0.19), arms=["dm", "datm"])
    assert edf.failures(results, 1, arms=["dm", "datm"]) == []
    assert edf.failures(results, 1, arms=["dm", "datm", "edf"]) == said


@pytest.mark.parametrize("benchmark_name", ["edf", "edf_gpu"])
def test_an_arm_that_there_is_not_is_refused(edf, benchmark_name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(benchmark_name).main(["--arms", "eddf"])
    assert "got eddf" in capsys.readouterr().err


def test_a_folder_without_images_is_refused(edf_gpu, tmp_path):
    (tmp_path / "x" / "train").mkdir(parents=True)
    with pytest.raises(SystemExit, match="x: expected a folder with train/ and test/ in it, got none"):
        edf_gpu.main(["--data", str(tmp_path / "x")])


# ---------------------------------------------------------------------- what is run


def test_the_arms_of_a_seed_differ_from_a_shipped_experiment_in_their_words_alone(edf):
    assert "experiment=edf_digits" in edf.words(edf.Run("edf", 10.0, 0, 1, False))
    with_dropout, without = (set(edf.words(edf.Run(arm, 10.0, 0, 1, False))) for arm in ("edf_dropout", "edf"))
    assert {word for word in with_dropout ^ without if not word.startswith("run_dir=")} == {"module.mask=null"}


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped_and_writes_rows_a_plot_and_a_table(edf, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # where the experts go
    monkeypatch.setattr(edf, "ROOT", tmp_path)
    arguments = ["--dry-run", "--workers", "1", "--seeds", "0", "--out", str(tmp_path), "--arms"]
    edf.main([*arguments, "datm"])
    kept = json.loads((tmp_path / "edf_digits_ipc1.json").read_text())["rows"]
    edf.main([*arguments, "datm,dm"])
    rows = json.loads((tmp_path / "edf_digits_ipc1.json").read_text())["rows"]
    assert rows[: len(kept)] == kept
    assert [(row["name"], row["rate"]) for row in rows] == [("datm", 10), ("datm", 100), ("dm", 1), ("dm", 10)]
    assert all(row.keys() >= KEYS and row["value"] == row["metrics"]["eval/convnet/acc_final"] for row in rows)
    assert all("eval/random/acc" in row["metrics"] for row in kept)
    assert (tmp_path / "edf_digits_ipc1.png").stat().st_size > 10_000
    assert "| random_soft |" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/benchmark_edf/*"))  # runs, experts aside, are measured and gone


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_trains_its_experts_once_for_all_arms(edf_gpu, monkeypatch, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", 10), ("test", 4)):
        for image in range(3 * number):
            folder = tmp_path / "data-x" / part / "abc"[image % 3]
            folder.mkdir(parents=True, exist_ok=True)
            save_image(torch.rand(3, 8, 8, generator=generator), folder / f"{image}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edf_gpu, "ARMS", {name: arm._replace(rates=(1.0,)) for name, arm in edf_gpu.ARMS.items()})
    words = ["--data", "data-x", "--accelerator", "cpu", "--out", "out", "--dry-run", "--workers", "1", "--seeds", "0"]
    edf_gpu.main([*words, "--arms", "datm"])
    experts = list(tmp_path.glob("out/benchmark_edf_data_x_dry/*/experts/*.safetensors"))
    written = [path.stat().st_mtime_ns for path in experts]
    edf_gpu.main([*words, "--arms", "datm,mtt,dm,edf_dropout"])
    assert len(experts) == 2 and [path.stat().st_mtime_ns for path in experts] == written
    rows = json.loads((tmp_path / "out" / "edf_cpu_data_x_ipc1.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["datm", "mtt", "dm", "edf_dropout"]
    assert all(row.keys() >= KEYS and row["seconds"] > 0 for row in rows)
    assert edf_gpu._resident.cache_info().misses == 1
    assert "| random |" in capsys.readouterr().out
