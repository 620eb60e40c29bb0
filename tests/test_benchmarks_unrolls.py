"""The benchmark of the three ways to the gradients of trajectory matching, at a tiny size."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}
ARMS = {"sweep", "full", "tesla"}


@pytest.fixture(autouse=True)
def _threads_and_tf32():
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32  # every benchmark sets its own
    yield
    torch.set_num_threads(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def unrolls(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("unrolls")


@pytest.fixture
def results(unrolls, tmp_path):
    return importlib.import_module("common").Results(tmp_path / "x.json", {}, "")


def test_the_experts_way_is_the_same_for_a_seed_and_another_for_another(unrolls):
    (setting,) = unrolls.DRY_RUN.settings
    one, same, other = (unrolls.on_an_experts_way(setting, 2, "cpu", seed) for seed in (0, 0, 1))
    for name in ("start", "target", "images", "labels"):
        assert getattr(one, name).equal(getattr(same, name))
        assert not getattr(one, name).equal(getattr(other, name))
    assert len(one.images) == 20 and len(one.steps) == 4
    assert 0 < (one.target - one.start).norm() < (one.start.norm())


def test_gradients_are_compared_in_norm_and_direction(unrolls):
    (setting,) = unrolls.DRY_RUN.settings
    rows = {(row["claim"], row["arm"]): row for row in unrolls.accuracy(setting, 2, CPU, 0)}
    assert rows["error", "sweep, float64"]["value"] < 1e-12
    assert 1e-12 < rows["error", "sweep"]["value"] < 1e-4
    assert rows["error", "sweep"]["value"] == max(rows["error", "sweep"]["errors"].values())
    assert rows["error", "tesla"]["value"] > rows["error", "sweep"]["value"]
    assert 0.5 < rows["tesla against sweep", "images"]["value"] < 1


def full_table(results, setting, unrolls, *, sweep_ms=130.0, sweep_mb=25.0):
    time = {"claim": unrolls.claim(unrolls.TIME, setting), "unit": "ms, minimum", "value": 1.0}
    results.add({**time, "arm": "sweep", "median": sweep_ms}, {**time, "arm": "full", "median": 100.0})
    for what, value in ((unrolls.MEMORY, sweep_mb), (unrolls.ESTIMATE, 30.0)):
        results.add({"claim": unrolls.claim(what, setting), "arm": "sweep", "value": value})
        results.add({"claim": unrolls.claim(what, setting), "arm": "full", "value": 100.0})
    results.add({"claim": unrolls.ERROR, "arm": "sweep, float64", "seed": 0, "value": 1e-15})


def test_what_holds_passes_the_check(unrolls, results):
    full_table(results, unrolls.DRY_RUN.settings[0], unrolls)
    assert unrolls.failures(results, unrolls.DRY_RUN, CPU) == []


def test_the_check_names_time_memory_and_estimate(unrolls, results):
    (setting,) = unrolls.DRY_RUN.settings
    full_table(results, setting, unrolls, sweep_ms=150.0, sweep_mb=60.0)
    assert unrolls.failures(results, unrolls.DRY_RUN, CPU) == [
        "sweep: expected 1.4 times full's time, got 1.50",
        "sweep: expected 30% of full's memory, got 60%",
        f"sweep, {setting.name}: expected an estimate 40% off, got -50%",
    ]
    results.add({"claim": unrolls.ERROR, "arm": "sweep, float64", "seed": 0, "value": 1e-3})
    said = "sweep, float64: expected the full unroll's gradients within 1e-09, got 1.0e-03"
    assert unrolls.failures(results, unrolls.DRY_RUN, torch.device("cuda")) == [said]


def test_the_benchmark_writes_time_memory_and_errors_of_all_arms(unrolls, monkeypatch, tmp_path, capsys):
    def in_this_process(build, arguments, *, warm_up, device):  # a fresh one takes seconds to import everything
        return importlib.import_module("timing")._growth(build, arguments, warm_up, device)

    if Path("/proc/self/clear_refs").exists():
        monkeypatch.setattr(unrolls, "extra_memory", in_this_process)
    unrolls.main(["--dry-run", "--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "unrolls_cpu.json").read_text())["rows"]
    assert all(row.keys() >= KEYS for row in rows)
    (setting,) = unrolls.DRY_RUN.settings
    for what in (unrolls.TIME, unrolls.MEMORY, unrolls.ESTIMATE):
        assert {row["arm"] for row in rows if row["claim"] == unrolls.claim(what, setting)} == ARMS
    assert {row["seed"] for row in rows if row["claim"] == unrolls.BIAS} == {0, 1}
    assert "| sweep, float64 |" in capsys.readouterr().out
