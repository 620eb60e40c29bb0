"""The benchmarks of the scan and of token merging at tiny sizes: what they measure, write and check."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from hasten.functional import merge_weighted, ordered_bipartite_matching

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()  # every benchmark sets it to 1
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def benchmark(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def timing(benchmark):
    return benchmark("timing")


@pytest.fixture
def scan(benchmark):
    return benchmark("scan")


@pytest.fixture
def merge_op(benchmark):
    return benchmark("merge_op")


@pytest.fixture
def merge_throughput(benchmark):
    return benchmark("merge_throughput")


@pytest.fixture
def results(benchmark, tmp_path):
    return benchmark("common").Results(tmp_path / "x.json", {}, "")


# ---------------------------------------------------------------------- time and memory


def test_works_take_turns_and_only_their_own_time_counts(timing):
    calls = []

    def work(name, steps):
        calls.append(name)
        sum(range(steps))

    works = {"short": partial(work, "short", 10), "long": partial(work, "long", 1_000_000)}
    times = timing.in_turns(works, CPU, repeats=3, before=lambda name: work(f"before {name}", 2_000_000))
    assert calls == ["before short", "short", "before long", "long"] * 4
    assert 0 <= times["short"].minimum <= times["short"].median < times["long"].minimum
    assert times["short"].repeats == 3


def test_the_row_of_a_time_is_its_minimum_in_ms(timing):
    row = timing.Times(minimum=0.25, median=0.5, repeats=3).row()
    assert row == {"value": 250, "unit": "ms, minimum", "median": 500, "repeats": 3}


@pytest.mark.slow
def test_extra_memory_is_the_peak_of_the_work_and_not_what_was_there_before(timing):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    arguments, warm_up = (torch.ones, 16_000_000), (torch.ones, 10)
    for _ in range(2):
        assert timing.extra_memory(partial, arguments, warm_up=warm_up, device=CPU) == pytest.approx(64, abs=2)


def test_versions_name_the_peers_that_are_installed(benchmark):
    versions = benchmark("common").versions()
    assert versions.keys() >= {"python", "hasten", "torch", "timm"}
    assert all(versions.values())


# ---------------------------------------------------------------------- the scan


def test_all_arms_compute_the_same_scan_with_the_same_gradients(scan):
    pytest.importorskip("mambapy")
    rows = scan.error_rows(scan.DRY_RUN, CPU)
    errors = {(row["claim"], row["arm"]): row["value"] for row in rows}
    for name in scan.ERRORS.values():
        assert {arm for claim, arm in errors if claim == name} >= {"chunked", "ref", "pscan", *scan.LOOPS}
    assert len(rows[0]["errors"]) == 9
    broken = scan.ERRORS["large"], "log-space cumsum"
    assert errors.pop(broken) > 0.1
    assert max(errors.values()) < 1e-5


def test_steps_are_around_eight_where_they_are_called_large(scan):
    usual, large = (scan.draw(scan.TINY, steps=steps).delta_bias for steps in ("usual", "large"))
    step = torch.nn.functional.softplus
    assert step(usual).min() >= 0.99e-3 and step(usual).max() <= 0.101
    assert torch.allclose(step(large), torch.tensor(8.0))


def test_an_absent_arm_says_why(scan, results):
    here, absent = scan.presence_rows(scan.Sizes(arms=("chunked", "triton")), CPU)
    assert (here["arm"], here["value"], here["reason"]) == ("chunked", True, None)
    assert absent["value"] is False
    assert "it needs tensors on cuda" in absent["reason"]
    results.add(here, absent)
    assert "chunked" not in scan.absent(results)
    assert "- triton: selective_scan: backend" in scan.absent(results)


def test_a_forwards_bandwidth_is_that_of_the_bytes_any_scan_has_to_move(scan):
    # float32: u, delta, z and y of 2 * 9 * 8 each, B and C of 2 * 9 * 4 each; read and written in the time of a copy
    moved = 4 * (4 * 2 * 9 * 8 + 2 * 2 * 9 * 4)
    copied_ms = 2 * scan.COPIED / moved
    rows = [{"arm": "triton", "value": 2.0}, {"arm": scan.COPY, "value": copied_ms}]
    scan.add_shares(rows, scan.TINY, "float32")
    assert rows[0]["bandwidth_share"] == pytest.approx(0.5)
    assert "bandwidth_share" not in rows[1]


def test_the_scan_benchmark_writes_times_memory_and_errors(scan, timing, monkeypatch, tmp_path, capsys):
    def in_this_process(build, arguments, *, warm_up, device):  # a fresh one takes seconds to import everything
        return timing._growth(build, arguments, warm_up, device)

    if Path("/proc/self/clear_refs").exists():
        monkeypatch.setattr(scan, "extra_memory", in_this_process)
    scan.main(["--dry-run", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "scan_cpu.json").read_text())
    assert all(row.keys() >= KEYS for row in found["rows"])
    assert str(tmp_path) not in json.dumps(found)
    first, second = scan.DRY_RUN.shapes
    arms = {
        claim: {row["arm"] for row in found["rows"] if row["claim"] == claim}
        for claim in {row["claim"] for row in found["rows"]}
    }
    assert arms[scan.claim(scan.BOTH, first, "float32")] >= {"chunked", "ref", *scan.LOOPS}
    assert not arms[scan.claim(scan.BOTH, second, "float32")] & set(scan.SLOW)
    assert "| chunked |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({("time", "chunked"): 26.0}, ["chunked: expected 4 times as fast as pscan, got 3.85"]),
        ({("time", "unbind loop"): 24.0}, ["native: expected 2.5 times as fast as unbind loop, got 2.40"]),
        ({("memory", "chunked"): 7.0}, ["chunked: expected 3 times less memory than unbind loop, got 2.86"]),
        ({("time", "pscan"): None}, ["chunked, as fast as pscan: not measured"]),
    ],
)
def test_the_check_of_the_scan_names_what_is_not_reached(scan, results, change, said):
    measured = {
        **{("time", arm): value for arm, value in {"chunked": 20.0, "native": 10.0, "pscan": 100.0}.items()},
        **{("time", loop): 50.0 for loop in scan.LOOPS},
        **{("memory", arm): value for arm, value in {"chunked": 5.0, "pscan": 40.0, "unbind loop": 20.0}.items()},
        **change,
    }
    claims = {"time": scan.BOTH, "memory": scan.MEMORY}
    for (what, arm), value in measured.items():
        if value is not None:
            claim = scan.claim(claims[what], scan.TINY, "float32")
            results.add({"claim": claim, "arm": arm, "value": value, "unit": "u"})
    assert scan.failures(results, scan.TINY) == said


def test_the_check_of_the_scan_names_backends_that_are_off_and_only_those(scan, results):
    row = {"claim": scan.ERRORS["large"], "unit": "relative error"}
    results.add({**row, "arm": "native", "value": float("nan")}, {**row, "arm": "chunked", "value": 9e-6})
    results.add({**row, "arm": "pscan", "value": 1.0}, {**row, "arm": "log-space cumsum", "value": 1.0})
    assert scan.error_failures(results) == [
        "native: expected an error below 1e-05, got nan (largest error, steps around 8)"
    ]


# ---------------------------------------------------------------------- merging


def test_a_merge_by_scatter_is_a_merge(merge_op):
    generator = torch.Generator().manual_seed(0)
    x, size = torch.randn(3, 11, 4, generator=generator), torch.rand(3, 11, 1, generator=generator) + 1
    plan = ordered_bipartite_matching(x, 4, cls_index=5)
    found, expected = merge_op.merge_by_scatter(x, size, plan), merge_weighted(x, size, plan)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_the_merge_benchmark_writes_shares_of_a_block(merge_op, tmp_path, capsys):
    merge_op.main(["--dry-run", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "merge_op_cpu.json").read_text())["rows"]
    assert all(row.keys() >= KEYS for row in rows)
    arms = {claim: [row["arm"] for row in rows if row["claim"] == claim] for claim in {row["claim"] for row in rows}}
    assert len(arms) == 3
    assert all(merge_op.OURS in forms for forms in arms.values())
    assert "two streams, scatter" in arms["vim_small_patch16_224, r = 11"]
    assert "two streams, scatter" not in arms["vit_small_patch16_224, r = 8"]
    assert all(row["share_of_block"] == 1 for row in rows if row["arm"] == merge_op.BLOCK)
    assert "| one stream, matmul |" in capsys.readouterr().out


def test_the_check_of_a_merge_names_the_model(merge_op, results):
    row = {"claim": "vim, r = 5", "value": 1.0, "unit": "ms"}
    results.add({**row, "arm": merge_op.OURS, "share_of_block": 0.12})
    results.add({**row, "arm": "two streams, matmul", "share_of_block": 0.5})
    assert merge_op.failures(results) == ["vim, r = 5: expected plan and merge within 10% of a block, got 12.0%"]


def test_a_vit_merges_as_many_as_can_where_r_are_too_many(merge_throughput):
    vit = merge_throughput.timm.create_model("deit_tiny_patch16_224")
    schedule = merge_throughput.merge_options(vit, 16).r
    assert schedule == [16] * 11 + [10]  # 196 - 11 * 16 = 20 are left, half of them have a partner
    assert merge_throughput.merge_options(vit, 8).r == [8] * 12


def test_a_prediction_is_about_the_share_of_tokens_left(merge_throughput):
    vim = merge_throughput.timm.create_model("vim_tiny_patch16_224", img_size=64, depth=6)
    predicted = merge_throughput.prediction(vim, 5, torch.zeros(1, 3, 64, 64))
    assert predicted["tokens_left"] == pytest.approx((17 * 2 + 12 * 2 + 7 * 2) / 6 / 17)
    # patches, head and what does not merge weigh against it
    assert 1 < predicted["predicted_ratio"] < 1 / predicted["tokens_left"]


def test_the_throughput_benchmark_writes_rows_and_a_plot_and_keeps_other_models(merge_throughput, tmp_path, capsys):
    for model in merge_throughput.DRY_RUN.models:
        merge_throughput.main(["--dry-run", "--out", str(tmp_path), "--models", model])
    path = tmp_path / "merge_throughput_cpu.json"
    rows = json.loads(path.read_text())["rows"]
    assert all(row.keys() >= KEYS for row in rows)
    arms = {(row["claim"], row["arm"]): row for row in rows}
    assert len(arms) == 2 * 2 * 3  # models, forward and step, arms
    plain, merging = (arms["forward, vim_tiny_patch16_224", arm] for arm in ("r = 0", "r = 1"))
    assert (plain["ratio"], plain["predicted_ratio"], plain["share_of_gain"]) == (1, 1, None)
    assert merging["ratio"] == pytest.approx(merging["value"] / plain["value"])
    expected = (merging["ratio"] - 1) / (merging["predicted_ratio"] - 1)
    assert merging["share_of_gain"] == pytest.approx(expected)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "| r = 0, again |" in capsys.readouterr().out


def test_the_check_of_the_throughput_is_at_seven_tenths_of_the_tokens(merge_throughput, results):
    row = {"unit": "images/s", "value": 1.0, "predicted_ratio": 1.4, "ratio": 1.3}
    results.add({**row, "claim": "forward, vim", "arm": "r = 0", "tokens_left": 1.0, "share_of_gain": None})
    results.add({**row, "claim": "forward, vim", "arm": "r = 3", "tokens_left": 0.9, "share_of_gain": 0.1})
    results.add({**row, "claim": "forward, vim", "arm": "r = 11", "tokens_left": 0.69, "share_of_gain": 0.81})
    assert merge_throughput.failures(results) == []
    results.add({**row, "claim": "forward, vim", "arm": "r = 11", "tokens_left": 0.69, "share_of_gain": 0.79})
    said = "forward, vim, r = 11: expected 80% of the predicted gain, got 79%"
    assert merge_throughput.failures(results) == [said]
