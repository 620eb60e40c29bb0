import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.io import read_image

from hasten.callbacks import EMA, ClassConsistency
from hasten.errors import HastenError

CLASSES = 4


def images_of(labels):
    """Class c lights row c, (n,) -> (n, 1, 8, 8) in [-1, 1]."""
    return torch.eye(8)[labels].view(-1, 1, 8, 1).expand(-1, 1, 8, 8) * 2 - 1


class Rows(LightningDataModule):
    def __init__(self, wrong=0):
        super().__init__()
        labels = torch.arange(CLASSES).repeat(10)
        self.train = TensorDataset(images_of(labels), labels)
        mislabelled = labels.clone()
        mislabelled[:wrong] = (labels[:wrong] + 1) % CLASSES
        self.val = TensorDataset(images_of(labels), mislabelled)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=8)


class Foreign(LightningModule):
    """Draws each class right, but ``confused`` classes as class 0; its one weight says whether EMA is in."""

    def __init__(self, confused=()):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.confused = confused
        self.asked = []

    def training_step(self, batch, batch_idx):
        return -self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def generate(self, n, labels=None, steps=None, generator=None):
        assert not self.training
        self.asked.append((n, self.weight.item()))
        shown = labels.clone()
        for label in self.confused:
            shown[labels == label] = 0
        return images_of(shown) + 0.01 * torch.randn(n, 1, 8, 8, generator=generator)


def foreign():
    return Foreign()


def attached(folder):
    return ClassConsistency(folder=folder), foreign(), Rows()


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step):
        self.logged.update(metrics)


def fit(module, *callbacks, data=None, **kwargs):
    trainer = Trainer(
        callbacks=list(callbacks),
        logger=kwargs.pop("logger", False),
        accelerator="cpu",
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data or Rows())
    return trainer


def test_the_share_read_as_its_own_class_lands_in_the_metrics(capsys):
    recorder = Recorder()
    trainer = fit(Foreign(confused=[3]), ClassConsistency(), data=Rows(wrong=8), logger=recorder)
    expected = {"sample/class_accuracy": 0.75, "sample/class_accuracy_real": 0.8}
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found == pytest.approx(expected)
    assert {name: recorder.logged[name] for name in expected} == pytest.approx(expected)
    assert (
        "sample/class_accuracy 75.0 %   (20 samples a class, read by a SVC that reads 80.0 % of 40 real validation "
        "images right)"
    ) in capsys.readouterr().out


def test_images_are_drawn_in_batches_and_n_of_each_class():
    module = foreign()
    fit(module, ClassConsistency(n_per_class=7, batch_size=10))
    assert [n for n, _ in module.asked] == [10, 10, 8]


def test_the_averaged_weights_draw_in_any_order():
    for order in (1, -1):
        module = foreign()
        fit(module, *[EMA(0.5), ClassConsistency()][::order])
        assert {drawn for _, drawn in module.asked} == {module.weight.item()}
        assert module.weight.item() < 0.5 - 0.01  # five steps of 0.1, and an average lags


def test_another_classifier_may_read():
    class Stubborn:
        def fit(self, X, y):
            assert X.min() >= 0
            assert X.max() <= 1
            assert X.shape == (16, 64)
            return self

        def predict(self, X):
            return torch.zeros(len(X)).numpy()

    trainer = fit(foreign(), ClassConsistency(Stubborn(), max_real=16))
    assert trainer.callback_metrics["sample/class_accuracy"] == 1 / CLASSES


def test_the_datamodule_says_what_the_pixels_mean():
    class Seen:
        def fit(self, X, y):
            assert set(X.flatten().tolist()) == {0.25, 0.75}
            return self

        def predict(self, X):
            return torch.zeros(len(X)).numpy()

    data = Rows()
    data.denormalize = lambda images: images / 4 + 0.5
    fit(foreign(), ClassConsistency(Seen()), data=data)


def test_the_picture_frames_what_was_misread(tmp_path):
    fit(Foreign(confused=[3]), ClassConsistency(folder=tmp_path / "pictures"))
    picture = read_image(tmp_path / "pictures" / "class_consistency.png")
    assert picture.shape == (3, CLASSES * 50 + 2, 10 * 50 + 2)
    corners = picture[:, 2::50, 2::50]
    assert (corners[0, 3] > 200).all()
    assert (corners[1, 3] < 50).all()
    assert (corners[0] == corners[1])[:3].all()


def test_training_does_not_notice():
    torch.manual_seed(0)
    module = foreign()
    fit(module, ClassConsistency())
    after = torch.rand(())
    assert module.training
    torch.manual_seed(0)
    fit(foreign())
    assert torch.rand(()) == after


def test_modules_that_cannot_draw_by_class_are_refused_in_one_line():
    trainer = Trainer(logger=False, accelerator="cpu")
    with pytest.raises(HastenError, match=r"^class_consistency: LightningModule: expected a method generate.*out$"):
        ClassConsistency().setup(trainer, LightningModule(), "fit")
    unconditional = foreign()
    unconditional.num_classes = None
    with pytest.raises(HastenError, match="expected a module that draws by class, got num_classes = None"):
        ClassConsistency().setup(trainer, unconditional, "fit")


def test_plain_loaders_are_refused():
    trainer = Trainer(callbacks=[ClassConsistency()], logger=False, accelerator="cpu", max_epochs=1)
    with pytest.raises(HastenError, match="expected a datamodule"):
        trainer.fit(foreign(), Rows().train_dataloader())


@pytest.mark.parametrize("arguments", [{"n_per_class": 0}, {"max_real": 0}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^class_consistency: "):
        ClassConsistency(**arguments)
