import math
from collections import Counter

import pytest
import torch
from lightning import LightningModule, Trainer

from hasten.datamodules import Digits, ExpertTrajectories
from hasten.errors import HastenError
from hasten.formats import write_trajectory

P = 6
DIGITS = Digits()


def experts(folder, *, number=3, epochs=12, **recipe):
    """Files whose row e of expert k is filled with 100 k + e."""
    for k in range(number):
        theta = (100 * k + torch.arange(epochs + 1.0)).repeat(P, 1).T
        accuracies = [math.nan] * (epochs + 1)
        write_trajectory(
            folder / f"expert_{k:04d}.safetensors", theta,
            train_acc=accuracies, val_acc=accuracies, names=["weight"], shapes=[[2, 3]], recipe=recipe,
        )  # fmt: skip
    return folder


def segments(folder, **settings):
    settings = {"iterations": 60, "max_start": 5} | settings
    return list(ExpertTrajectories(DIGITS, folder, **settings).train_dataloader())


@pytest.mark.parametrize("preload", [True, False, "auto"])
def test_a_segment_is_where_an_expert_was_and_where_it_was_some_epochs_on(tmp_path, preload):
    for segment in segments(experts(tmp_path), expert_epochs=3, preload=preload):
        at = 100 * segment["expert"] + segment["epoch"]
        torch.testing.assert_close(segment["start"], torch.full((P,), float(at)), rtol=0, atol=0)
        torch.testing.assert_close(segment["target"], torch.full((P,), float(at + 3)), rtol=0, atol=0)


def test_slices_and_resident_epochs_are_the_same_segments(tmp_path):
    experts(tmp_path)
    torch.testing.assert_close(segments(tmp_path, preload=True), segments(tmp_path, preload=False), rtol=0, atol=0)


def test_experts_take_turns_in_an_order_that_changes(tmp_path):
    order = [segment["expert"] for segment in segments(experts(tmp_path, number=4), iterations=400)]
    rounds = [tuple(order[i : i + 4]) for i in range(0, 400, 4)]
    assert all(sorted(each) == [0, 1, 2, 3] for each in rounds)
    assert len(set(rounds)) == 24  # of 100 rounds


def test_a_start_is_drawn_evenly_from_the_whole_window_and_no_more(tmp_path):
    drawn = segments(experts(tmp_path), iterations=3000, min_start=2, max_start=7)
    counts = Counter(segment["epoch"] for segment in drawn)
    assert sorted(counts) == [2, 3, 4, 5, 6]
    # five standard deviations of a count
    assert all(abs(count - 600) < 5 * math.sqrt(3000 * 0.2 * 0.8) for count in counts.values())


def test_the_window_grows_and_then_stays(tmp_path):
    drawn = segments(experts(tmp_path), iterations=500, max_start=10, initial_max_start=4, expansion=100)
    assert [drawn[i]["upper"] for i in (0, 16, 17, 99, 100, 499)] == [4, 4, 5, 9, 10, 10]
    assert all(segment["epoch"] < segment["upper"] for segment in drawn)
    assert max(segment["epoch"] for segment in drawn[200:]) == 9


def test_with_several_processes_the_window_still_grows_by_the_iteration(tmp_path):
    growing = {"max_start": 5, "initial_max_start": 2, "expansion": 20, "iterations": 30}
    alone, shared = (ExpertTrajectories(DIGITS, experts(tmp_path), **growing)._segments for _ in range(2))
    shared.processes = 2
    assert len(shared) == 60
    uppers = [alone.batch([i])["upper"] for i in range(30)]
    assert [shared.batch([i])["upper"] for i in range(60)] == [upper for upper in uppers for _ in range(2)]


def test_a_segment_is_a_function_of_seed_and_iteration(tmp_path):
    experts(tmp_path)
    whole, other = segments(tmp_path), segments(tmp_path, seed=1)
    state = torch.get_rng_state()
    torch.testing.assert_close(segments(tmp_path), whole, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    places = [[(segment["expert"], segment["epoch"]) for segment in each] for each in (whole, other)]
    assert places[0] != places[1]
    torch.testing.assert_close(segments(tmp_path, iterations=20), whole[:20], rtol=0, atol=0)


def test_a_loader_goes_on_from_where_another_stood(tmp_path):
    data = ExpertTrajectories(DIGITS, experts(tmp_path), iterations=9, max_start=5)
    loader, resumed = data.train_dataloader(), data.train_dataloader()
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    resumed.load_state_dict(loader.state_dict())
    torch.testing.assert_close(list(resumed), list(batches), rtol=0, atol=0)


def test_the_first_so_many_experts_can_be_taken(tmp_path):
    experts(tmp_path)
    assert {segment["expert"] for segment in segments(tmp_path, max_experts=2)} == {0, 1}
    assert len(ExpertTrajectories(DIGITS, tmp_path, max_start=5, max_experts=2).experts) == 2


def test_one_epoch_to_start_from_and_one_expert_are_enough(tmp_path):
    experts(tmp_path, number=1, epochs=1)
    drawn = segments(tmp_path, max_start=1, expert_epochs=1)
    assert {(segment["expert"], segment["epoch"], segment["upper"]) for segment in drawn} == {(0, 0, 1)}


def test_what_is_too_large_for_half_of_the_free_memory_is_read_by_slices(tmp_path, monkeypatch):
    experts(tmp_path)
    from hasten.datamodules import expert_trajectories

    needed = 3 * (5 - 1 + 2 + 1) * P * 4
    for free, wanted in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(expert_trajectories, "free_bytes", lambda free=free: free)
        data = ExpertTrajectories(DIGITS, tmp_path, max_start=5)
        for path in [each.path for each in data.experts]:
            path.rename(path.with_suffix(".away"))
        try:
            if wanted:
                list(data.train_dataloader())
            else:
                with pytest.raises(FileNotFoundError):
                    list(data.train_dataloader())
        finally:
            for path in [each.path for each in data.experts]:
                path.with_suffix(".away").rename(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations: expected >= 1, got 0"),
        ({"expert_epochs": 0}, "expert_epochs: expected >= 1, got 0"),
        ({"seed": -1}, "seed: expected >= 0, got -1"),
        ({"min_start": 5}, "min_start < .*got 5, 5 and 5"),
        ({"initial_max_start": 6}, "min_start < .*got 0, 6 and 5"),
        ({"min_start": 3, "initial_max_start": 3}, "got 3, 3 and 5"),
        ({"expansion": 0}, "expansion: expected >= 1"),
        ({"preload": "yes"}, "preload: expected auto, true or false, got 'yes'"),
        ({"max_experts": 7}, "expected at least 7 experts, found 3"),
        ({"max_experts": 0}, "max_experts: expected >= 1 or null, got 0"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused_in_one_line(tmp_path, settings, message):
    with pytest.raises(HastenError, match=message) as error:
        segments(experts(tmp_path), **settings)
    assert "\n" not in str(error.value)


def test_experts_that_are_too_short_are_refused_with_both_remedies(tmp_path):
    experts(tmp_path, epochs=20)
    segments(tmp_path, max_start=19, expert_epochs=2)
    with pytest.raises(
        HastenError,
        match=r"needs epochs 0\.\.41, expert_0000 has 0\.\.20; set datamodule\.max_start=19, or train longer ones by "
        r"experiment=EXPERTS module\.epochs=41, then add first=\[\] datamodule\.path=FOLDER/experts$",
    ):
        segments(tmp_path, max_start=40, expert_epochs=2)
    with pytest.raises(
        HastenError, match=r"0\.\.20; train longer ones by .* module\.epochs=41, "
    ):  # no smaller window is left
        segments(tmp_path, max_start=40, min_start=19, expert_epochs=2)


class Blind(LightningModule):
    """Takes segments, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(P))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["expert"], batch["epoch"]))
        return (self.weight * batch["start"]).sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(data, **settings):
    module = Blind()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", **quiet, **settings).fit(module, datamodule=data)
    return module


def test_a_fit_takes_as_many_segments_as_max_steps_says(tmp_path):
    experts(tmp_path)
    drawn = [(segment["expert"], segment["epoch"]) for segment in segments(tmp_path)]
    data = ExpertTrajectories(DIGITS, tmp_path, iterations=60, max_start=5)
    assert fit(data, max_steps=7).seen == drawn[:7]
    assert fit(data, max_epochs=1).seen == drawn


@pytest.mark.parametrize(
    ("settings", "got", "remedy"),
    [
        ({"max_steps": 61}, "61", r"\+datamodule.iterations=61"),
        ({"max_epochs": 2}, "120", "trainer.max_epochs=1"),
        ({"max_epochs": -1}, "inf", "trainer.max_epochs=1"),
    ],
)
def test_a_fit_of_more_steps_than_segments_is_refused(tmp_path, settings, got, remedy):
    data = ExpertTrajectories(DIGITS, experts(tmp_path), iterations=60, max_start=5)
    with pytest.raises(HastenError, match=rf"expected trainer.max_steps <= iterations = 60, got {got}; set {remedy}$"):
        fit(data, **settings)


def test_experts_of_other_images_are_refused_and_of_other_batches_are_not(tmp_path):
    about = DIGITS.description()
    data = ExpertTrajectories(DIGITS, experts(tmp_path, data=about | {"batch_size": 256, "seed": 5}), max_start=5)
    data.setup("fit")
    other = ExpertTrajectories(Digits(std=0.25), tmp_path, max_start=5)
    with pytest.raises(HastenError, match=r"expert_0000.*differ in transform\.std.*0\.25.*0\.5") as error:
        other.setup("fit")
    assert "\n" not in str(error.value)
    other.setup("test")


def test_the_real_images_are_there_too(tmp_path):
    data = ExpertTrajectories(DIGITS, experts(tmp_path), max_start=5)
    assert torch.equal(data.train_labels, DIGITS.train_labels)
    assert len(data.val_dataloader()) == len(DIGITS.val_dataloader())
