import json
from functools import partial

import pytest
import torch
from lightning import LightningModule, Trainer

from hasten.callbacks import EvaluateDistilled, ExportDistilled
from hasten.datamodules import Digits, DistilledSet
from hasten.errors import HastenError
from hasten.formats import Distilled, write_trajectory
from hasten.formats.pixels import PixelRange
from hasten.nn import DSA, ConvNet, SyntheticSet
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.tasks.evaluate_distilled import evaluate_distilled

NET = partial(ConvNet, 1, 8, 10, width=4, depth=2)


class Distils(LightningModule):
    """Real images to which a little is added at every step."""

    def __init__(self):
        super().__init__()
        data = Digits()
        first = [int((data.train_labels == label).nonzero()[0]) for label in range(10)]
        self.synthetic = SyntheticSet(10, 1, (1, 8, 8), lr=0.05)
        self.synthetic.fill(data.train_images(torch.tensor(first)), 8 * torch.eye(10))

    def training_step(self, batch, batch_idx):
        return self.synthetic.images.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.synthetic.images], lr=1.0)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The folder of a fit that was evaluated and exported, and what the evaluation said."""
    folder = tmp_path_factory.mktemp("distilled")
    (folder / "config.yaml").write_text("model: {_target_: hasten.nn.ConvNet, width: 4, depth: 2}\n")
    augment = DSA(["crop", "rotate"])
    evaluate = EvaluateDistilled(
        {"convnet": NET}, every=2, seeds=2, epochs=8, whole_epochs=1, baselines=("random",), augment=augment, seed=3
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[evaluate, ExportDistilled(folder, config=folder / "config.yaml")],
    )  # fmt: skip
    trainer.fit(Distils(), datamodule=Digits())
    return folder, evaluate.table


@pytest.mark.parametrize("name", ["final", "best"])
def test_the_number_of_the_run_that_distilled_it_is_found_again(distilled, tmp_path, name):
    folder, table = distilled
    data = DistilledSet(folder / name, test=Digits())
    metrics = evaluate_distilled(tmp_path, distilled=folder / name, data=data, seeds=2)
    assert metrics["eval/convnet/acc"] == table.row(name, "convnet").mean
    rows = json.loads((tmp_path / "evaluation.json").read_text())["table"]["rows"]
    found = next(row for row in rows if row["arm"] == "distilled")
    assert found["accuracies"] == list(table.row(name, "convnet").accuracies)


def test_other_nets_and_the_experts_labels_are_measured_too(distilled, tmp_path):
    folder, _ = distilled
    flat = FlatModel(NET())
    theta = torch.stack([flat.flatten(NET()) for _ in range(2)])
    about = {"names": flat.names, "shapes": flat.shapes, "recipe": {}, "train_acc": [0.0] * 2, "val_acc": [0.0] * 2}
    write_trajectory(tmp_path / "experts" / "expert_0000.safetensors", theta, **about)
    metrics = evaluate_distilled(
        tmp_path,
        distilled=folder / "best",
        data=DistilledSet(folder / "best", test=Digits()),
        nets=["convnet", "convnet_batch"],
        seeds=1,
        epochs=2,
        baselines=["random", "random_soft", "whole"],
        experts=tmp_path / "experts",
    )
    wanted = {
        "convnet/acc",
        "convnet_batch/acc",
        "random/acc",
        "random_soft/acc",
        "whole/acc",
        "hlr",
        "ior",
        "lrs",
        "ars",
    }
    assert metrics.keys() == {f"eval/{name}" for name in wanted}
    table = (tmp_path / "table.md").read_text()
    rows = json.loads((tmp_path / "evaluation.json").read_text())["table"]["rows"]
    assert [row["epochs"] for row in rows if row["arm"] == "whole"] == [1]  # as when it was distilled
    assert "| distilled, no augmentation | convnet |" in table
    assert "may" not in table
    assert "| random_soft, no augmentation | convnet |" in table


def test_experts_of_another_split_are_refused_in_whatever_range(distilled, tmp_path):
    folder = distilled[0] / "best"

    def measure(name, trained_on):
        flat = FlatModel(NET())
        theta = flat.flatten(NET()).expand(2, -1)
        about = {"names": flat.names, "shapes": flat.shapes, "train_acc": [0.0] * 2, "val_acc": [0.0] * 2}
        recipe = {"data": trained_on.description()}
        write_trajectory(tmp_path / name / "expert_0000.safetensors", theta, recipe=recipe, **about)
        data = DistilledSet(folder, test=Digits(std=0.25))  # brought into the range of the set
        asked = {"baselines": ["random_soft"], "experts": tmp_path / name, "seeds": 1, "epochs": 1}
        evaluate_distilled(tmp_path, distilled=folder, data=data, **asked)

    measure("same", Digits())
    with pytest.raises(HastenError, match=r"^evaluate_distilled: expected data as .*they differ in split"):
        measure("other", Digits(split_seed=1))


def test_imported_experts_of_the_set_are_noted(distilled, tmp_path):
    found = Distilled.read(distilled[0] / "best")
    found.with_about({"experts": {"recipe_hash": "1f", "number": 1, "imported": True}}).write(tmp_path)
    data = DistilledSet(tmp_path, test=Digits())
    evaluate_distilled(tmp_path, distilled=tmp_path, data=data, seeds=1, epochs=1, baselines=())
    assert "- the experts are imported and may have seen the holdout" in (tmp_path / "table.md").read_text()


def test_what_does_not_fit_is_refused_in_one_line(distilled, tmp_path):
    folder = distilled[0] / "best"

    def error(**changes):
        given = {"distilled": folder, "data": DistilledSet(folder, test=Digits()), "epochs": 1} | changes
        with pytest.raises(HastenError) as caught:
            evaluate_distilled(tmp_path, **given)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "put hasten.datamodules.DistilledSet around it" in error(data=Digits(mean=0.3))
    assert "nets: got 'resnet'; did you mean 'resnet18'?" in error(nets=["resnet"])
    assert "set experts to their folder" in error(baselines=["random_soft"])
    elsewhere = tmp_path / "elsewhere"  # of a set that does not say how its images were split
    Distilled.read(folder).with_about({"data": None}).write(elsewhere)
    data = DistilledSet(elsewhere, test=Digits(val=0))
    assert "expected a val split, got none" in error(distilled=elsewhere, data=data)
    assert "seeds: expected >= 1, got 0" in error(seeds=0)
    assert "baselines: got 'randm'; did you mean 'random'?" in error(baselines=["randm"])
    assert "lr: expected learned, holdout or a number > 0, got 'foo'" in error(lr="foo")
    for other in (Digits(split_seed=1), DistilledSet(folder, test=Digits(split_seed=1))):
        assert "expected the data and the split that the set was distilled on, they differ in split" in error(
            data=other
        )


def test_a_set_that_says_nothing_of_its_evaluation_has_the_usual_one(tmp_path):
    plain = PixelRange(torch.tensor(0.5), torch.tensor(0.5))
    Distilled(torch.randn(10, 1, 8, 8), 5 * torch.eye(10), torch.arange(10), 0.05, plain).write(tmp_path)
    convnet = {"width": 2, "depth": 1}
    evaluate_distilled(tmp_path, distilled=tmp_path, data=Digits(), seeds=1, epochs=1, convnet=convnet, baselines=())
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["lr_from"] for row in found["table"]["rows"]] == ["learned"]
    assert "'color'" in "".join(found["table"]["notes"])
    assert "the set does not say of which images it is made" in found["table"]["notes"][-1]
