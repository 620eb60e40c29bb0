import math
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

from hasten.errors import HastenError
from hasten.formats import Trajectory, open_trajectories, recipe_hash, write_trajectory

NAMES, SHAPES = ["conv.weight", "conv.bias"], [(2, 1, 2, 2), (2,)]


def expert(folder, number=0, *, epochs=5, names=NAMES, shapes=SHAPES, **recipe):
    theta = torch.randn(epochs + 1, sum(math.prod(shape) for shape in shapes))
    path = folder / f"expert_{number:04d}.safetensors"
    accuracies = [epoch / 10 for epoch in range(epochs + 1)]
    recipe = {"optimizer": {"lr": 0.01}, "seed": 0} | recipe
    write_trajectory(
        path,
        theta,
        train_acc=accuracies,
        val_acc=[math.nan, *accuracies[1:]],
        names=names,
        shapes=shapes,
        recipe=recipe,
    )
    return path, theta


def test_what_was_written_is_read_again(tmp_path):
    path, theta = expert(tmp_path)
    read = Trajectory(path)
    assert (read.epochs, read.numel, read.names, read.shapes) == (5, 10, NAMES, SHAPES)
    assert read.recipe == {"optimizer": {"lr": 0.01}, "seed": 0}
    assert read.recipe_hash == recipe_hash(read.recipe)
    assert read.train_acc == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert math.isnan(read.val_acc[0]) and read.val_acc[1:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    torch.testing.assert_close(read.between(0, 5), theta, rtol=0, atol=0)


def test_a_slice_equals_its_rows_of_the_whole(tmp_path):
    path, theta = expert(tmp_path)
    read = Trajectory(path)
    for epoch in range(-6, 6):
        torch.testing.assert_close(read.at(epoch), theta[epoch], rtol=0, atol=0)
    torch.testing.assert_close(read.between(2, 4), theta[2:5], rtol=0, atol=0)


def test_a_row_outlives_its_file_and_its_neighbours(tmp_path):
    path, theta = expert(tmp_path)
    row = Trajectory(path).at(1)
    assert row.untyped_storage().nbytes() == 4 * row.numel()
    row.zero_()
    torch.testing.assert_close(Trajectory(path).at(1), theta[1], rtol=0, atol=0)


@pytest.mark.parametrize(("first", "last"), [(-7, -7), (0, 6), (3, 2), (6, 6)])
def test_epochs_that_are_not_there_are_refused(tmp_path, first, last):
    read = Trajectory(expert(tmp_path)[0])
    with pytest.raises(IndexError, match=r"expert_0000 has epochs 0\.\.5"):
        read.between(first, last)
    with pytest.raises(IndexError):
        read.at(-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": torch.zeros(3, 9)}, r"theta: expected \(E \+ 1, 10\) for 2 names and 2 shapes, got \(3, 9\)"),
        ({"names": ["conv.weight"]}, "for 1 names and 2 shapes"),
        ({"val_acc": [0.5] * 2}, "expected 3 as rows of theta, got 3 and 2"),
    ],
)
def test_what_does_not_fit_together_is_not_written(tmp_path, change, message):
    whole = {
        "theta": torch.zeros(3, 10),
        "train_acc": [0.5] * 3,
        "val_acc": [0.5] * 3,
        "names": NAMES,
        "shapes": SHAPES,
    }
    arguments = whole | change
    with pytest.raises(ValueError, match=message):
        write_trajectory(tmp_path / "expert_0000.safetensors", arguments.pop("theta"), **arguments, recipe={})
    assert list(tmp_path.iterdir()) == []


def test_experts_are_opened_in_the_order_of_their_numbers(tmp_path):
    for number in (2, 10, 0):
        expert(tmp_path, number)
    assert [each.path.stem for each in open_trajectories(tmp_path)] == ["expert_0000", "expert_0002", "expert_0010"]
    assert [each.path.stem for each in open_trajectories(tmp_path, max_experts=2)] == ["expert_0000", "expert_0002"]


@pytest.mark.parametrize(
    ("there", "wanted", "message"), [(0, None, "at least 1 expert, found 0"), (1, 3, "3 experts, found 1")]
)
def test_too_few_experts_are_refused_with_the_command_that_trains_them(tmp_path, there, wanted, message):
    for number in range(there):
        expert(tmp_path, number)
    with pytest.raises(HastenError, match=rf"{message}; train them: python train.py experiment=experts_digits"):
        open_trajectories(tmp_path, max_experts=wanted)


def test_experts_of_two_recipes_are_refused_and_the_difference_is_named(tmp_path):
    expert(tmp_path, 0)
    expert(tmp_path, 3, optimizer={"lr": 0.1})
    with pytest.raises(HastenError, match=r"expert_0003 and expert_0000 differ in optimizer\.lr \(0\.1 and 0\.01\)"):
        open_trajectories(tmp_path)


def test_experts_whose_parameters_stand_in_another_order_are_refused(tmp_path):
    expert(tmp_path, 0)
    expert(tmp_path, 1, names=NAMES[::-1], shapes=SHAPES[::-1])
    with pytest.raises(HastenError, match="expert_0001 and expert_0000 differ in names, order or shapes"):
        open_trajectories(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "junk", "foreign", "missing"])
def test_a_file_that_is_no_trajectory_is_named_in_one_line(tmp_path, damage):
    path, _ = expert(tmp_path)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "junk":
        path.write_bytes(b"no tensors")
    elif damage == "foreign":
        save_file({name: torch.zeros(2, 2) for name in ("theta", "train_acc", "val_acc")}, path)
    else:
        save_file({"weights": torch.zeros(2)}, path)
    with pytest.raises(HastenError, match=r"expert_0000.*delete it") as error:
        Trajectory(path)
    assert "\n" not in str(error.value)


def test_a_process_killed_while_it_writes_leaves_no_half_expert(tmp_path, monkeypatch):
    # all is written then, and nothing in place
    monkeypatch.setattr(os, "fsync", lambda file: os.kill(os.getpid(), signal.SIGKILL))
    if not (child := os.fork()):
        expert(tmp_path)
        os._exit(1)  # never reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(HastenError, match="found 0"):
        open_trajectories(tmp_path)
