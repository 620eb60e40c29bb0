from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule

from hasten.datamodules import ClassBatches, Digits
from hasten.errors import HastenError
from hasten.formats import write_trajectory


class Numbered(LightningDataModule):
    """Two classes of "images" whose one pixel is their number: 0 to 4 are of class a, 5 to 7 of class b."""

    num_classes, class_names, image_shape, pixels = 2, ["a", "b"], (1, 1, 1), None

    def __init__(self, labels=(0, 0, 0, 0, 0, 1, 1, 1)):
        super().__init__()
        self.train_labels = torch.tensor(labels)

    def train_images(self, indices):
        return torch.as_tensor(indices).float().view(-1, 1, 1, 1)

    def normalize(self, images):
        return images

    denormalize = normalize


def refusal(call):
    try:
        call()
    except HastenError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def batches(**options):
    return [batch.flatten(1).tolist() for batch in ClassBatches(Numbered(), **options).train_dataloader()]


def test_a_batch_holds_images_of_every_class_each_once():
    drawn = batches(per_class=3, iterations=20)
    assert len(drawn) == 20
    for a, b in drawn:
        assert len({*a}) == len({*b}) == 3
        assert {*a} <= {0, 1, 2, 3, 4} and {*b} == {5, 6, 7}


def test_a_small_class_gives_all_of_its_images_and_then_again():
    for a, b in batches(per_class=8, iterations=5):
        assert all(a.count(image) in (1, 2) for image in range(5))
        assert all(b.count(image) in (2, 3) for image in (5, 6, 7))


def test_a_batch_is_a_function_of_seed_and_iteration():
    first = batches(per_class=4, iterations=6)
    assert len({str(batch) for batch in first}) > 1
    assert batches(per_class=4, iterations=9)[:6] == first
    assert batches(per_class=4, iterations=6, seed=1) != first


def test_an_interrupted_pass_goes_on_with_the_very_next_batch():
    whole = batches(per_class=4, iterations=6)
    loader = ClassBatches(Numbered(), per_class=4, iterations=6).train_dataloader()
    began = iter(loader)
    next(began), next(began)
    resumed = ClassBatches(Numbered(), per_class=4, iterations=6).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [batch.flatten(1).tolist() for batch in resumed] == whole[2:]


def test_images_are_in_the_range_of_the_model_and_the_held_out_splits_are_those_of_the_data():
    data = Digits()
    wrapped = ClassBatches(data, per_class=5, iterations=2)
    batch = next(iter(wrapped.train_dataloader()))
    assert batch.shape == (10, 5, 1, 8, 8) and batch.dtype == torch.float32
    for label, images in enumerate(batch):
        own = data.train_images((data.train_labels == label).nonzero().flatten())
        assert all((image == own).flatten(1).all(1).any() for image in images)
    for mine, theirs in (
        (wrapped.val_dataloader(), data.val_dataloader()),
        (wrapped.test_dataloader(), data.test_dataloader()),
    ):
        assert torch.equal(next(iter(mine))[0], next(iter(theirs))[0])


def test_experts_are_opened_where_a_folder_is_given(tmp_path):
    assert ClassBatches(Numbered()).experts == []
    about = {"train_acc": [0.1, 0.2], "val_acc": [0.1, 0.2], "names": ["w"], "shapes": [[2]], "recipe": {}}
    write_trajectory(tmp_path / "expert_0000.safetensors", torch.eye(2), **about)
    assert [expert.numel for expert in ClassBatches(Numbered(), experts=tmp_path).experts] == [2]


def test_experts_of_other_images_are_refused(tmp_path):
    about = {"train_acc": [0.1, 0.2], "val_acc": [0.1, 0.2], "names": ["w"], "shapes": [[2]]}
    recipe = {"data": Digits().description()}
    write_trajectory(tmp_path / "expert_0000.safetensors", torch.eye(2), recipe=recipe, **about)
    assert len(ClassBatches(Digits(), experts=tmp_path).experts) == 1
    with pytest.raises(HastenError, match=r"^class_batches: expected data as .*they differ in split"):
        _ = ClassBatches(Digits(split_seed=1), experts=tmp_path).experts


@pytest.mark.parametrize("options", [{"per_class": 0}, {"iterations": 0}, {"seed": -1}])
def test_a_number_out_of_its_range_is_named(options):
    ((name, value),) = options.items()
    message = refusal(lambda: ClassBatches(Numbered(), **options))
    assert name in message and str(value) in message


def test_a_class_without_images_is_named():
    wrapped = ClassBatches(Numbered(labels=[0, 0]))
    assert "'b'" in refusal(wrapped.train_dataloader)


def attached(processes=1, **settings):
    """Eight batches, in a run of so many processes."""
    wrapped = ClassBatches(Numbered(), per_class=2, iterations=8)
    wrapped.trainer = SimpleNamespace(**({"max_steps": -1, "max_epochs": -1} | settings), world_size=processes)
    return wrapped


def test_a_fit_of_more_steps_than_batches_is_refused_with_what_to_type():
    attached(max_steps=8).setup("fit")
    message = refusal(lambda: attached(max_steps=9).setup("fit"))
    assert message.startswith("class_batches: expected trainer.max_steps <= iterations = 8, got 9; ")
    assert message.endswith("set +datamodule.iterations=9")


def test_every_process_has_as_many_batches_as_there_are_iterations():
    samples = attached(processes=2).train_dataloader().dataset
    assert len(samples) == 2 * len(attached().train_dataloader().dataset) == 16
    assert samples.batch([3]).equal(attached().train_dataloader().dataset.batch([3]))
