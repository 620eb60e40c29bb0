import pickle

import pytest
import torch

from hasten.errors import HastenError
from hasten.formats import Distilled, open_trajectories, write_trajectory
from hasten.formats.pixels import PixelRange
from hasten.formats.released import (
    buffer_paths,
    read_buffer,
    read_released,
    released_tags,
    write_buffer,
    write_released,
)
from hasten.functional.matching import hard_logits
from hasten.nn import ConvNet

PLAIN = PixelRange(torch.tensor(0.5), torch.tensor(0.5))


def network():
    model = ConvNet(1, 8, 3, width=2, depth=1)
    return [name for name, _ in model.named_parameters()], [tuple(p.shape) for p in model.parameters()]


NAMES, SHAPES = network()


def experts(count=2, epochs=3):
    """As the authors' program saves them: experts, epochs, parameters."""
    return [[[torch.randn(shape) for shape in SHAPES] for _ in range(epochs + 1)] for _ in range(count)]


def read(path):
    return list(read_buffer(path, names=NAMES, shapes=SHAPES))


def test_a_buffer_of_the_authors_goes_through_ours_and_back(tmp_path):
    original = experts()
    torch.save(original, tmp_path / "replay_buffer_0.pt")
    for k, theta in enumerate(read(tmp_path / "replay_buffer_0.pt")):
        acc = [float("nan")] * len(theta)
        about = {"names": NAMES, "shapes": SHAPES, "recipe": {"imported": "replay_buffer"}}
        write_trajectory(tmp_path / f"expert_{k:04d}.safetensors", theta, train_acc=acc, val_acc=acc, **about)
    write_buffer(tmp_path / "replay_buffer_1.pt", open_trajectories(tmp_path))
    again = torch.load(tmp_path / "replay_buffer_1.pt", weights_only=True)
    for one, other in zip(original, again, strict=True):
        for epoch, same in zip(one, other, strict=True):
            assert all(torch.equal(*pair) for pair in zip(epoch, same, strict=True))


def test_what_is_written_for_the_authors_is_no_larger_than_its_numbers(tmp_path):
    theta = torch.randn(50, sum(torch.Size(shape).numel() for shape in SHAPES))
    about = {"names": NAMES, "shapes": SHAPES, "recipe": {}, "train_acc": [0.0] * 50, "val_acc": [0.0] * 50}
    write_trajectory(tmp_path / "expert_0000.safetensors", theta, **about)
    write_buffer(tmp_path / "replay_buffer_0.pt", open_trajectories(tmp_path))
    tensors = 50 * len(SHAPES)
    assert (tmp_path / "replay_buffer_0.pt").stat().st_size < theta.numel() * 4 + 500 * tensors


def test_parameters_and_files_of_old_versions_are_read_too(tmp_path):
    original = [[[torch.nn.Parameter(tensor) for tensor in epoch] for epoch in expert] for expert in experts()]
    torch.save(original, tmp_path / "replay_buffer_0.pt", _use_new_zipfile_serialization=False)
    found = read(tmp_path / "replay_buffer_0.pt")
    assert torch.equal(found[1][2], torch.cat([tensor.detach().flatten() for tensor in original[1][2]]))


def test_buffers_are_found_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 0):
        torch.save([], tmp_path / f"replay_buffer_{number}.pt")
    assert [path.stem for path in buffer_paths(tmp_path)] == ["replay_buffer_0", "replay_buffer_2", "replay_buffer_10"]
    assert buffer_paths(tmp_path / "replay_buffer_2.pt") == [tmp_path / "replay_buffer_2.pt"]


def error(read, *args, **kwargs):
    with pytest.raises(HastenError) as caught:
        read(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    torch.save([[[Malicious(tmp_path / "pwned")]]], tmp_path / "replay_buffer_0.pt")
    with (tmp_path / "images_best.pt").open("wb") as file:
        pickle.dump(Malicious(tmp_path / "pwned"), file)
    assert "found a pickled object" in error(read, tmp_path / "replay_buffer_0.pt")
    assert "could run code" in error(read, tmp_path / "replay_buffer_0.pt")
    error(read_released, tmp_path, pixels=PLAIN, num_classes=2)
    assert not (tmp_path / "pwned").exists()


def test_epochs_that_are_all_the_same_are_refused(tmp_path):
    one = [torch.randn(shape) for shape in SHAPES]
    torch.save([experts(1)[0], [one] * 4], tmp_path / "replay_buffer_0.pt")
    assert "expert 1: expected epochs that differ, the first of 4" in error(read, tmp_path / "replay_buffer_0.pt")


def test_the_first_tensor_that_differs_is_named(tmp_path):
    path = tmp_path / "replay_buffer_0.pt"
    wrong = experts()
    wrong[1][2][3] = torch.zeros(5)
    torch.save(wrong, path)
    assert f"expert 1, epoch 2, tensor 3 ({NAMES[3]}): expected (2,), got (5,)" in error(read, path)
    wrong[1][2] = wrong[0][0][:-1]
    torch.save(wrong, path)
    assert f"tensor 5 ({NAMES[5]}): expected (3,), got nothing" in error(read, path)
    wrong[1][2] = [*wrong[0][0], torch.zeros(1)]
    torch.save(wrong, path)
    assert "expected 6 tensors, got 7" in error(read, path)


@pytest.mark.parametrize("content", [torch.zeros(3), [], [[]], {"a": torch.zeros(1)}, [[torch.zeros(2)]]])
def test_what_is_no_buffer_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    assert "expected a list" in error(read, tmp_path / "replay_buffer_0.pt")


def test_half_a_buffer_and_none_are_refused(tmp_path):
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(experts(), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no whole file of torch" in error(read, path)
    assert "there is none" in error(read, tmp_path / "replay_buffer_7.pt")


def soft():
    return Distilled(torch.randn(6, 1, 8, 8), torch.randn(6, 3), torch.arange(3).repeat_interleave(2), 0.03, PLAIN)


@pytest.mark.parametrize("hard", [False, True])
def test_a_set_goes_to_the_authors_layout_and_back(tmp_path, hard):
    made = soft()
    if hard:
        made = Distilled(made.images, hard_logits(made.hard_labels, 3), made.hard_labels, 0.03, PLAIN)
    write_released(tmp_path, made)
    assert torch.load(tmp_path / "labels_best.pt", weights_only=True).dtype == (torch.int64 if hard else torch.float32)
    found = read_released(tmp_path, pixels=PLAIN, num_classes=3)
    for name in ("images", "label_logits", "hard_labels"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    assert found.syn_lr == pytest.approx(0.03)
    assert found.about["imported"] == "images_best.pt"


def test_hard_labels_in_any_order_become_class_by_class(tmp_path):
    images = torch.randn(6, 1, 8, 8)
    torch.save(images, tmp_path / "images_100.pt")
    torch.save(torch.tensor([2, 0, 1, 0, 2, 1]), tmp_path / "labels_100.pt")
    torch.save(torch.tensor(0.01, requires_grad=True), tmp_path / "lr_100.pt")
    found = read_released(tmp_path, pixels=PLAIN, num_classes=3)
    assert torch.equal(found.images, images[[1, 3, 2, 5, 0, 4]])
    assert found.hard_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_soft_labels_of_no_whole_number_of_images_a_class_are_refused_by_the_file(tmp_path):
    for name, content in (
        ("images", torch.zeros(7, 1, 8, 8)),
        ("labels", torch.zeros(7, 3)),
        ("lr", torch.tensor(0.1)),
    ):
        torch.save(content, tmp_path / f"{name}_best.pt")
    with pytest.raises(
        HastenError, match=r"^import: .*images_best\.pt: expected as many .* of 3 classes, got 7 in all"
    ):
        read_released(tmp_path, pixels=PLAIN, num_classes=3)


def test_the_best_set_is_taken_before_the_last(tmp_path):
    for tag in ("500", "1000", "zca_1000"):
        torch.save(torch.zeros(1), tmp_path / f"images_{tag}.pt")
    assert released_tags(tmp_path) == ["1000", "500"]
    torch.save(torch.zeros(1), tmp_path / "images_best.pt")
    assert released_tags(tmp_path)[0] == "best"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("labels", torch.zeros(5, 3), r"expected 6 labels as there are images, got (5, 3)"),
        ("labels", torch.zeros(6, 4), r"expected logits (6, 3), got (6, 4)"),
        ("labels", torch.tensor([0, 0, 1, 1, 2, 7]), r"expected (6,) classes below 3"),
        ("labels", torch.tensor([0, 0, 1, 1, 2, 1]), r"2 images of each class, class 0 first, got 2, 3, 1"),
        ("lr", torch.zeros(2), r"expected one number, got (2,)"),
        ("lr", [1], r"expected one tensor, got list of 1"),
        ("images", torch.full((6, 1, 8, 8), torch.nan), r"expected finite pixels, got 384 of 384"),
    ],
)
def test_what_does_not_make_a_set_is_refused(tmp_path, name, content, says):
    write_released(tmp_path, soft())
    torch.save(content, tmp_path / f"{name}_best.pt")
    assert says in error(read_released, tmp_path, pixels=PLAIN, num_classes=3)


def test_a_folder_without_a_set_is_refused(tmp_path):
    assert "expected images_best.pt or" in error(read_released, tmp_path, pixels=PLAIN, num_classes=3)
    torch.save(torch.zeros(6, 1, 8, 8), tmp_path / "images_best.pt")
    assert "labels_best.pt', there is none" in error(read_released, tmp_path, pixels=PLAIN, num_classes=3)
