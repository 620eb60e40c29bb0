from functools import partial

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EvaluateDistilled, ExportDistilled
from hasten.errors import HastenError
from hasten.formats import Distilled, open_trajectories, write_trajectory
from hasten.formats.pixels import PixelRange
from hasten.nn import ConvNet, SyntheticSet
from hasten.nn.dataset_distillation.comparison import FewImages


class Halves(LightningDataModule):
    """Class 0 is bright above, class 1 below; someone else's datamodule, which says in which range its images are."""

    pixels = PixelRange(torch.tensor(0.25), torch.tensor(0.5))
    class_names = ("above", "below")

    def __init__(self):
        super().__init__()
        labels = torch.arange(20) % 2
        images = -torch.ones(20, 1, 4, 4)
        images[labels == 0, :, :2] = images[labels == 1, :, 2:] = 1.0
        self.images = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.images, batch_size=2)

    def val_dataloader(self):
        return DataLoader(self.images, batch_size=20)

    test_dataloader = val_dataloader


class Distils(LightningModule):
    """Its images are all zero before the first step, and then get brighter by 1 a step."""

    def __init__(self):
        super().__init__()
        self.synthetic = SyntheticSet(2, 1, (1, 4, 4), lr=0.1)

    def training_step(self, batch, batch_idx):
        return -self.synthetic.images.sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.synthetic.images], lr=1.0)


def attached(folder):
    return ExportDistilled(folder), Distils(), Halves()


def fit(*callbacks, steps=3, data=None, module=None):
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module or Distils(), datamodule=data or Halves())


def evaluation():
    nets = {"convnet": partial(ConvNet, 1, 4, 2, width=2, depth=1)}
    return EvaluateDistilled(nets, every=1, seeds=1, epochs=1, baselines=(), augment=None)


def test_the_final_set_is_written_without_any_evaluation(tmp_path):
    fit(ExportDistilled(tmp_path))
    found = Distilled.read(tmp_path / "final")
    assert torch.equal(found.images, torch.full((2, 1, 4, 4), 3.0))
    assert torch.equal(found.pixels.mean, torch.tensor(0.25))
    assert found.syn_lr == pytest.approx(0.1)
    assert (found.about["method"], found.about["classes"]) == ("Distils", ["above", "below"])
    assert (found.about["iteration"], found.about["evaluation"]) == (3, None)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


class Says(EvaluateDistilled):
    """Takes the set of step 2 for the best, whatever the holdout says."""

    def _evaluate(self, trainer, pl_module):
        super()._evaluate(trainer, pl_module)
        if trainer.global_step == 2:
            synthetic = pl_module.synthetic
            images, labels = synthetic.images.detach().clone(), synthetic.labels.detach().clone()
            self._chosen = FewImages(images, labels, synthetic.classes, 0.1)
        if trainer.global_step >= 2:
            self.best, self.best_iteration = self._chosen, 2


@pytest.mark.parametrize("export_first", [True, False])
def test_best_and_final_are_two_folders_in_whatever_order_the_callbacks_stand(tmp_path, export_first):
    nets = {"convnet": partial(ConvNet, 1, 4, 2, width=2, depth=1)}
    callbacks = [
        ExportDistilled(tmp_path),
        Says(nets, every=1, seeds=1, epochs=1, baselines=(), augment=None),
    ]
    fit(*(callbacks if export_first else reversed(callbacks)))
    best, final = (Distilled.read(tmp_path / name) for name in ("best", "final"))
    assert (best.images.unique().item(), best.about["iteration"]) == (2.0, 2)
    assert (final.images.unique().item(), final.about["iteration"]) == (3.0, 3)
    for found in (best, final):
        assert {row["arm"] for row in found.about["evaluation"]["table"]["rows"]} == {"final", "best"}


def test_the_best_set_is_on_disk_when_it_is_found(tmp_path):
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, *_):
            if (tmp_path / "best").exists():
                seen.append((trainer.global_step, Distilled.read(tmp_path / "best").about["iteration"]))

    fit(evaluation(), ExportDistilled(tmp_path), Looks())
    assert seen[0] == (1, 0)  # evaluated before the first step, and written after it


def test_it_says_of_which_images_it_is_made_and_who_taught_it(tmp_path):
    class Knows(Halves):
        """As a datamodule around another one."""

        def __init__(self):
            super().__init__()
            self.data = Halves()
            self.data.description = lambda: {"split": "1f"}
            about = {"train_acc": [0.1, 0.2], "val_acc": [0.1, 0.2], "names": ["w"], "shapes": [[2]]}
            path = tmp_path / "expert_0000.safetensors"
            write_trajectory(path, torch.eye(2), recipe={"imported": "replay_buffer"}, **about)
            self.experts = open_trajectories(tmp_path)

    fit(ExportDistilled(tmp_path), data=Knows(), steps=1)
    about = Distilled.read(tmp_path / "final").about
    assert about["data"] == {"split": "1f"}
    assert (about["experts"]["number"], about["experts"]["imported"]) == (1, True)


class Breaks(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            raise RuntimeError("in the middle")


def test_a_fit_that_breaks_leaves_its_set(tmp_path):
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(ExportDistilled(tmp_path), Breaks())
    assert Distilled.read(tmp_path / "final").about["iteration"] == 2


class Refuses(Callback):
    def on_fit_start(self, *_):
        raise HastenError("wrong set-up")


def test_a_fit_that_never_began_leaves_nothing(tmp_path):
    with pytest.raises(HastenError, match="wrong set-up"):
        fit(ExportDistilled(tmp_path / "distilled"), Refuses())
    assert not (tmp_path / "distilled").exists()


def test_the_config_goes_into_the_provenance(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {width: 32}\n")
    fit(ExportDistilled(tmp_path, config=tmp_path / "config.yaml"))
    about = Distilled.read(tmp_path / "final").about
    assert about["config"] == {"model": {"width": 32}}
    assert len(about["recipe_hash"]) == 12


def test_what_has_no_set_or_no_range_is_refused_in_one_line(tmp_path):
    class Bare(LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    class NoRange(LightningDataModule):
        train_dataloader = Halves.train_dataloader
        images = TensorDataset(torch.zeros(2))

    with pytest.raises(HastenError, match=r"^export_distilled: Bare: expected an attribute synthetic.*leave.*out$"):
        fit(ExportDistilled(tmp_path), module=Bare())
    with pytest.raises(HastenError, match=r"^export_distilled: NoRange: expected pixels, the range of its images"):
        fit(ExportDistilled(tmp_path), data=NoRange())
