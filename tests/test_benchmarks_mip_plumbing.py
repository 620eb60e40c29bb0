"""The benchmark of what a hypernetwork costs, at a tiny size: its arms, what it writes, and what its check names."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}


@pytest.fixture
def plumbing(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield importlib.import_module("mip_plumbing")
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "generated"), [("ConvNet", 56_320), ("ResNet-20", 267_696), ("UNet", 37_232)])
def test_the_networks_have_the_sizes_they_are_told_by(plumbing, name, generated):
    net = plumbing.network(name, 1 if name == "UNet" else 3)
    assert sum(net.get_parameter(each).numel() for each in plumbing.hyper_model(net).names) == generated
    again = plumbing.network(name, 1 if name == "UNet" else 3)
    assert all(a.equal(b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_the_peer_has_our_weights_and_our_outputs(plumbing):
    pytest.importorskip("hyperlight")
    assert 0 <= plumbing.difference((3, 3, 8, 8)) <= 1e-12


@pytest.mark.parametrize("arm", ["target", "floor", "hyperlight", "ours", "hyperlight's loop", "our loop", "our vmap"])
def test_every_arm_runs(plumbing, arm):
    if arm.startswith("hyperlight"):
        pytest.importorskip("hyperlight")
    plumbing.build(arm, "UNet", (2, 1, 8, 8), "cpu")()


@pytest.mark.parametrize("head", ["target", "dense"])
def test_a_step_moves_every_parameter_of_a_head(plumbing, head, monkeypatch):
    monkeypatch.setitem(plumbing.NETWORKS, "ResNet-20", plumbing.conv_net)  # small: what is tested is the step
    made = []
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr: made.append(adam(parameters, lr)) or made[0])
    work = plumbing.step_of(head, (2, 3, 8, 8), "cpu")
    parameters = made[0].param_groups[0]["params"]
    before = [p.detach().clone() for p in parameters]
    work()
    work()
    assert not any(a.equal(b) for a, b in zip(before, parameters, strict=True) if b.ndim > 1)


@pytest.mark.slow
def test_a_dry_run_writes_rows_prints_tables_and_does_nothing_twice(plumbing, tmp_path, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path)]
    plumbing.main(arguments)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "mip_plumbing_cpu.json").read_text())["rows"]
    assert all(row.keys() >= KEYS for row in rows)
    assert "| ResNet-20 |" in printed and "| basis |" in printed and "- construction: ours" in printed
    plumbing.main(arguments)
    assert json.loads((tmp_path / "mip_plumbing_cpu.json").read_text())["rows"] == rows


def _results(plumbing, ours, vmap, basis, error):
    results = importlib.import_module("common").Results(Path("none.json"), {}, "")

    def add(claim, **values):
        results.rows.extend({"claim": claim, "arm": arm, "value": value} for arm, value in values.items())

    for name in plumbing.FLOOR:
        add(f"{plumbing.TIMES}, {name}", floor=10.0, ours=ours)
        add(f"{plumbing.TIMES}, {name}", **{"hyperlight's loop": 16.0, "our vmap": vmap})
    add(plumbing.STEP, dense=40.0, basis=basis)
    add(plumbing.EQUAL, ours=error)
    return results


def test_the_check_names_what_is_not_shown(plumbing):
    assert plumbing.failures(_results(plumbing, 10.9, 10.0, 10.0, 1e-16)) == []
    found = plumbing.failures(_results(plumbing, 11.2, 10.1, 10.5, 2e-12))
    assert found == [
        "ConvNet, ours: expected at most 1.1 times floor, got 1.120",
        "ConvNet, our vmap: expected at most 0.625 times hyperlight's loop, got 0.631",
        "ResNet-20, ours: expected at most 1.1 times floor, got 1.120",
        "ResNet-20, our vmap: expected at most 0.625 times hyperlight's loop, got 0.631",
        "UNet, our vmap: expected at most 0.625 times hyperlight's loop, got 0.631",
        "basis: expected a step 4 times as cheap as dense, got 3.81",
        "largest difference from hyperlight in float64: expected at most 1e-12, got 2.0e-12",
    ]


def test_the_check_without_measurements_says_so(plumbing):
    results = importlib.import_module("common").Results(Path("none.json"), {}, "")
    found = plumbing.failures(results)
    assert "ConvNet, ours and floor: not measured" in found and "heads: not measured" in found
    assert found[-1] == "largest difference from hyperlight in float64: not measured; pip install hyperlight"
