"""The benchmark of re-training after token merging at tiny sizes: what its arms share, and that it goes on."""

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}


@pytest.fixture
def recovery(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("rmeeto_recovery")


@pytest.fixture
def results(recovery, tmp_path):
    protocol = {"images": {"held_out": 100}, "retraining": {"epochs": 1, "lrs": [1e-3]}}
    return recovery.Results(tmp_path / "x.json", protocol, "")


@pytest.fixture
def base(recovery, tmp_path):
    """A base of untrained weights, with the images it is measured on."""
    sizes = recovery.DRY_RUN
    data, _ = recovery.load("digits", sizes)
    model = recovery.build(0, data, sizes.base)
    torch.save({"model": model.state_dict(), "last_epochs": [0.5]}, tmp_path / "base.pt")
    return recovery.trained_base(model, 0, data, sizes.base, tmp_path / "base.pt", lambda: None), data


class _Linear(nn.Module):
    """Remembers the images of every training step."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.linear(x.flatten(1))


def _images(recovery, n):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 2, 2), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    return recovery.Images("x", images, labels, images, labels)


def _fill(recovery, results, accuracies, *, seed=0, last_epochs=(0.9, 0.9, 0.9)):
    """Rows of a complete seed; ``accuracies`` is (stage, kind) -> value, 0.9 where it says nothing."""
    for stage in recovery.STAGES:
        for kind in recovery.KINDS:
            row = {"claim": stage, "arm": kind, "seed": seed, "unit": "accuracy", "agreement": 1.0, "loss": 0.1}
            row["value"] = accuracies.get((stage, kind), 0.9)
            results.add(row | ({"last_epochs": list(last_epochs)} if (stage, kind) == (recovery.AS_IS, "none") else {}))


# ---------------------------------------------------------------------- what is measured


def test_no_image_is_trained_on_and_tested_on(recovery):
    data, for_lr = recovery.load("digits", recovery.DIGITS)
    parts = (data.train, for_lr.held_out, data.held_out)
    assert [len(part) for part in parts] == [1000, 200, 597]
    every = torch.cat(parts).flatten(1)
    assert every.shape[1] == 16 * 16
    assert len(every.unique(dim=0)) == 1797  # no two digits are the same picture
    assert data.train is for_lr.train


def test_too_few_images_are_said(recovery):
    sizes = replace(recovery.DIGITS, base=replace(recovery.DIGITS.base, images=1300))
    with pytest.raises(SystemExit, match="expected 1300 images to train on and 200 to choose lr on, got 1397"):
        recovery.load("digits", sizes)


def test_arms_of_a_seed_see_the_same_images_whatever_they_start_from(recovery):
    data, seen = _images(recovery, 20), {}
    for arm, seed in (("one", 3), ("other", 3), ("another", 4)):
        model = _Linear()
        teacher = _Linear() if arm == "other" else None
        options = {"epochs": range(2, 4), "batch": 8, "lr": 0.1, "flip": True, "teacher": teacher}
        assert list(recovery.training(model, data, seed=seed, **options)) == [2, 3]
        seen[arm] = torch.stack(model.seen)
    assert seen["one"].shape[:2] == (2 * 2, 8)  # the last four of twenty images wait for another epoch
    assert seen["one"].equal(seen["other"])
    assert not seen["one"].equal(seen["another"])
    assert not seen["one"][:2].equal(seen["one"][2:])


def test_the_loss_is_cross_entropy_and_with_a_teacher_half_of_the_divergence_from_it(recovery):
    data = _images(recovery, 8)
    x, labels = data.train.flatten(1) / 127.5 - 1, data.train_labels
    teacher = _Linear()
    for kd_weight in (0.0, 0.5):
        model = _Linear()
        weight = model.linear.weight.detach().clone().requires_grad_()
        student = torch.log_softmax(x @ weight.T + model.linear.bias.detach(), dim=1)
        wanted = torch.log_softmax(teacher.linear(x.float()), dim=1).detach()
        divergence = (wanted.exp() * (wanted - student)).sum() / 8
        (-student[range(8), labels].mean() + kd_weight * divergence).backward()
        options = {"teacher": teacher if kd_weight else None, "kd_weight": kd_weight}
        list(recovery.training(model, data, seed=0, epochs=range(1), batch=8, lr=0.1, **options))
        assert torch.allclose(model.linear.weight.grad, weight.grad, atol=1e-6)
    assert teacher.linear.weight.grad is None


def test_arms_differ_in_what_they_merge_alone(recovery, base):
    model = base[0].model
    mergings = {}
    for kind in recovery.KINDS:
        with recovery.attach(model, kind, 6) as handle:
            mergings[kind] = handle.merging
    merge = mergings["merge"]
    assert (merge.r, merge.preserve_order, merge.prune) == ((0, 0, 6), True, False)
    assert mergings["unordered"] == replace(merge, preserve_order=False)
    assert mergings["prune"] == replace(merge, prune=True)
    assert mergings["none"].removed == 0


def test_re_training_leaves_the_base_as_it_is(recovery, base):
    start, data = base
    arms = {}
    for stage in recovery.STAGES:
        for kind in ("merge", "none"):
            arms[stage, kind] = recovery.arm_logits(start, stage, kind, data, recovery.DRY_RUN, lr=1e-2)
    assert recovery.weight_hash(start.model) == start.hash
    assert arms[recovery.AS_IS, "none"].equal(start.logits)
    every = list(arms.values())
    assert not any(a.equal(b) for i, a in enumerate(every) for b in every[:i])


def test_a_row_says_how_often_an_arm_agrees_with_its_base(recovery, base):
    start, data = base
    start = replace(start, logits=F.one_hot(torch.arange(40) % 10).float())
    labels = torch.where(torch.arange(40) < 30, torch.arange(40) % 10, 9 - torch.arange(40) % 10)
    data = replace(data, held_out_labels=labels)
    row = recovery.arm_row(start, recovery.AS_IS, "merge", data, start.logits.roll(20, 0))
    assert (row["value"], row["agreement"]) == (0.75, 1.0)
    wrong = recovery.arm_row(start, recovery.AS_IS, "merge", data, start.logits.roll(1, 0))
    assert wrong["agreement"] == 0
    assert "last_epochs" not in row
    assert recovery.arm_row(start, recovery.AS_IS, "none", data, start.logits)["last_epochs"] == [0.5]


# ---------------------------------------------------------------------- what is written


def test_an_interrupted_recovery_goes_on_from_the_same_bases(recovery, tmp_path, monkeypatch, capsys):
    arguments = ["--dry-run", "--seeds", "0", "--workers", "1", "--out", str(tmp_path)]
    path = tmp_path / "rmeeto_recovery_cpu_digits.json"
    begun, arm_logits = [], recovery.arm_logits

    def stopped(base, stage, kind, *rest, **options):
        begun.append((stage, kind))
        if len(begun) == 2 * 4 + 6:  # two learning rates of four arms, four arms as they are, one that is re-trained
            deadline = time.monotonic() + 20
            while recovery.AS_IS not in path.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)  # another thread writes what is finished
            raise KeyboardInterrupt
        return arm_logits(base, stage, kind, *rest, **options)

    monkeypatch.setattr(recovery, "arm_logits", stopped)
    with pytest.raises(KeyboardInterrupt):
        recovery.main(arguments)
    kept = json.loads(path.read_text())["rows"]
    [base] = tmp_path.glob("rmeeto_recovery/digits_*/seed_0.pt")
    written = base.stat().st_mtime_ns
    begun.clear()
    monkeypatch.setattr(recovery, "arm_logits", lambda *a, **k: begun.append(a[1:3]) or arm_logits(*a, **k))
    recovery.main(arguments)
    done = {(row["claim"], row["arm"]) for row in kept}
    arms = {(stage, kind) for stage in recovery.STAGES for kind in recovery.KINDS}
    assert set(begun) == arms - done and len(begun) == len(arms - done) < 12
    assert base.stat().st_mtime_ns == written

    found = json.loads(path.read_text())
    assert all(row in found["rows"] for row in kept)
    assert all(row.keys() >= KEYS for row in found["rows"])
    assert {(row["claim"], row["arm"]) for row in found["rows"]} == arms | {
        *((recovery.LR, kind) for kind in recovery.KINDS),
        *((recovery.THROUGHPUT, kind) for kind in ("merge", "unordered", "prune")),
    }
    assert str(tmp_path) not in json.dumps(found)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "| re-trained with KD | merge |" in capsys.readouterr().out

    # arms of another base are measured again once one of them is
    for row in found["rows"]:
        row["base"] = "other"
    found["rows"] = [row for row in found["rows"] if (row["claim"], row["arm"]) != (recovery.AS_IS, "merge")]
    path.write_text(json.dumps(found))
    begun.clear()
    recovery.main(arguments)
    assert set(begun) == arms


def test_differences_are_paired_by_seed(recovery, results):
    for seed, offset in enumerate((0.0, 0.2, 0.1)):
        accuracies = {(recovery.RETRAINED, "merge"): 0.62 + offset, (recovery.RETRAINED, "prune"): 0.6 + offset}
        _fill(recovery, results, accuracies, seed=seed)
    results.add({"claim": recovery.RETRAINED, "arm": "merge", "seed": 3, "value": 0.0, "unit": "accuracy"})
    assert recovery.seeds_of(results) == [0, 1, 2]
    arms = [(recovery.RETRAINED, kind) for kind in ("merge", "prune")]
    assert recovery.paired(results, *arms) == "+2.0 ± 0.0"
    assert recovery.mean_sd(recovery.column(results, *arms[0])) == "72.0 ± 10.0"
    assert recovery.mean_sd([0.5]) == "50.0"


@pytest.mark.parametrize(("share", "n"), [(0.5, 40), (0.97, 597), (1.0, 20)])
def test_the_ends_of_the_interval_are_1_96_standard_errors_away(recovery, share, n):
    low, high = recovery.binomial_interval(share, n)
    assert low < share <= high + 1e-12
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, abs=1e-9)


def test_the_learning_rate_is_the_best_mean_over_all_arms(recovery, results):
    assert recovery.chosen_lr(results) == 1e-3  # the only one of the protocol
    for lr, accuracies in ((1e-3, (0.9, 0.5)), (2e-3, (0.75, 0.75)), (5e-4, (0.75, 0.75))):
        for kind, value in zip(("merge", "none"), accuracies, strict=True):
            results.add({"claim": recovery.LR, "arm": kind, "seed": 0, "step": lr, "value": value, "unit": "u"})
    assert recovery.chosen_lr(results) == 5e-4


# ---------------------------------------------------------------------- what is checked


@pytest.mark.parametrize(
    ("accuracies", "last_epochs", "said"),
    [
        ({"as it is": 0.5, "re-trained": 0.71, "re-trained with KD": 0.8}, (0.9, 0.9, 0.901), []),
        ({"as it is": 0.885, "re-trained": 0.8, "re-trained with KD": 0.8}, (0.9, 0.9, 0.9), []),  # too little to tell
        (
            {"as it is": 0.5, "re-trained": 0.6, "re-trained with KD": 0.8},
            (0.9, 0.9, 0.9),
            ["merge, re-trained: expected half of the lost accuracy back, got 25%"],
        ),
        (
            {},
            (0.88, 0.9, 0.9),
            ["base of seed 0: expected an accuracy that moves by less than 0.3 points, got 2.00; give it more epochs"],
        ),
    ],
)
def test_the_check_names_what_is_not_shown(recovery, results, accuracies, last_epochs, said):
    merge = {(stage, "merge"): value for stage, value in accuracies.items()}
    _fill(recovery, results, merge, last_epochs=last_epochs)
    assert recovery.failures(results) == said


def test_digits_are_refused_on_a_gpu(recovery):
    with pytest.raises(SystemExit, match="expected a folder for a GPU, got digits"):
        recovery.main(["--device", "cuda"])
