import re

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EMA, SampleDistance
from hasten.callbacks.sample_distance import feature_net
from hasten.nn.weights import weight_hash
from hasten.errors import HastenError


class Net(nn.Module):
    """Four features of an RGB image in [0, 1], by seeded weights; remembers what it was given."""

    num_features = 99  # not what it returns: torchmetrics must not believe it

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(3 * 4 * 4, 4)

    def forward(self, images):
        assert images.shape[1:] == (3, 4, 4)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        return self.body(images.flatten(1))[:, :, None, None]


class Noise(LightningDataModule):
    """Grey or colour noise in [-1, 1]."""

    def __init__(self, channels=1):
        super().__init__()
        images = 2 * torch.rand(300, channels, 4, 4, generator=torch.Generator().manual_seed(2)) - 1
        self.train, self.val = TensorDataset(images[:100], torch.zeros(100)), TensorDataset(images[100:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=64)


class Foreign(LightningModule):
    def __init__(self, channels=1):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.channels = channels
        self.asked = []

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def generate(self, n, labels=None, steps=None, generator=None):
        self.asked.append((n, steps, self.weight.item()))
        return torch.rand(n, self.channels, 4, 4, generator=generator) * 2 - 1.5


def foreign():
    return Foreign()


def attached(folder):
    return SampleDistance(Net(), name="net", n=10), foreign(), Noise()


def fit(module, *callbacks, data=None, **kwargs):
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0} | kwargs
    trainer = Trainer(
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, data or Noise(module.channels))
    return trainer


def frechet(real, fake):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the root by the symmetric form."""
    c1, c2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross


def kernel(real, fake):
    """The unbiased squared maximum mean discrepancy with (x . y / d + 1)^3."""

    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(a):
        return (k(a, a).sum() - np.trace(k(a, a))) / (len(a) * (len(a) - 1))

    return off_diagonal(real) + off_diagonal(fake) - 2 * k(real, fake).mean()


def features(net, images):
    images = ((images + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
    with torch.no_grad():
        return net(images).flatten(1).double().numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_distances_are_those_of_the_formulas(channels):
    net, data = Net(), Noise(channels)
    trainer = fit(Foreign(channels), SampleDistance(net, name="net", n=200, batch_size=200), data=data)
    real = features(net, data.val.tensors[0])
    generator = torch.Generator().manual_seed(0)
    fake = features(net, torch.rand(200, channels, 4, 4, generator=generator) * 2 - 1.5)
    metrics = trainer.callback_metrics
    assert metrics["val/fd_net"].item() == pytest.approx(frechet(real, fake), rel=1e-4)
    assert metrics["val/kid_net"].item() == pytest.approx(kernel(real, fake), rel=1e-3)


def test_one_line_names_all_the_numbers_depend_on(capsys):
    net = Net()
    module = foreign()
    module.solver, module.sample_steps = "ddim", 25
    fit(module, SampleDistance(net, name="net", n=50))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("val/fd_net")]
    pattern = (
        rf"val/fd_net \S+   val/kid_net \S+   \(net net {weight_hash(net)}, 50 samples, ddim, 25 steps, "
        r"reference val: 200 images\)"
    )
    assert re.fullmatch(pattern, line)
    assert "FID" not in line


def test_images_are_drawn_in_batches_with_the_steps_asked_for():
    module = foreign()
    fit(module, SampleDistance(Net(), name="net", n=50, batch_size=20, steps=7))
    assert [asked[:2] for asked in module.asked] == [(20, 7), (20, 7), (10, 7)]


def test_another_split_or_a_loader_may_be_the_reference(capsys):
    fit(foreign(), SampleDistance(Net(), name="net", n=50, split="train"))
    assert "reference train: 100 images" in capsys.readouterr().out
    fit(foreign(), SampleDistance(Net(), name="net", n=50, reference=[torch.rand(30, 1, 4, 4)]))
    assert "reference given: 30 images" in capsys.readouterr().out


def test_it_may_report_after_validations_as_well():
    module = foreign()
    callbacks = [EMA(0.5), SampleDistance(Net(), name="net", n=10, every_n_validations=2)]
    trainer = fit(module, *callbacks, max_epochs=4, limit_train_batches=1)
    drawn = [weight for _, _, weight in module.asked]
    assert len(drawn) == 3
    assert drawn[0] < 0.2 - 0.01  # two steps of 0.1, and an average lags
    assert drawn[1] == drawn[2] == module.weight.item()
    assert trainer.callback_metrics.keys() == {"val/fd_net", "val/kid_net"}


def test_a_checkpoint_may_monitor_it(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    distance = SampleDistance(Net(), name="net", n=10, every_n_validations=1)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/fd_net", save_on_train_epoch_end=False)
    trainer = Trainer(callbacks=[distance, checkpoint], logger=False, accelerator="cpu", max_epochs=1)
    trainer.fit(foreign(), Noise())
    assert checkpoint.best_model_score == trainer.callback_metrics["val/fd_net"]


def test_training_and_the_net_do_not_notice():
    torch.manual_seed(0)
    module, net = foreign(), Net()
    fit(module, SampleDistance(net, name="net", n=10))
    after = torch.rand(())
    assert module.training
    assert net.training
    assert net.body.weight.requires_grad
    torch.manual_seed(0)
    foreign(), Net()
    fit(foreign())
    assert torch.rand(()) == after


def test_the_hash_is_of_all_weights():
    net = Net()
    before = weight_hash(net)
    assert re.fullmatch("[0-9a-f]{8}", before)
    assert weight_hash(Net()) == before
    with torch.no_grad():
        net.body.bias[0] += 1e-6
    assert weight_hash(net) != before


def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_trained_classifier_becomes_a_feature_net(tmp_path, suffix):
    trained, path = classifier(), tmp_path / f"net{suffix}"
    if suffix == ".ckpt":
        state = {f"model.{key}": value for key, value in trained.state_dict().items()}
        torch.save({"state_dict": state | {"val_acc.total": torch.zeros(())}}, path)
    else:
        save_file(trained.state_dict(), path)
    net = feature_net(classifier(), path, head="3", channels=1)
    grey = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(net(grey.expand(-1, 3, -1, -1)), trained[:3](2 * grey - 1))


def test_a_colour_classifier_takes_colours_and_its_own_normalisation(tmp_path):
    trained = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    net = feature_net(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), tmp_path / "net.safetensors", mean=0.4, std=0.2)
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(net(images), trained((images - 0.4) / 0.2))


def test_what_is_no_checkpoint_of_the_classifier_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.ckpt").write_text("broken")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, says in {
        "missing.ckpt": "expected a file, got .*, which does not exist",
        "broken.ckpt": "cannot be read as plain weights",
        "other.safetensors": "expected names such as 1.weight in .*, got other",
    }.items():
        with pytest.raises(HastenError, match=rf"^feature_net: checkpoint: .*{says}[^\n]*$"):
            feature_net(classifier(), tmp_path / name)
    save_file(classifier().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(HastenError, match="head: expected a layer, got 'fc'; the model has 0, 1, 2, 3"):
        feature_net(classifier(), tmp_path / "net.safetensors", head="fc")


def test_modules_that_cannot_draw_are_refused_in_one_line():
    trainer = Trainer(logger=False, accelerator="cpu")
    with pytest.raises(HastenError, match=r"^sample_distance: LightningModule: expected a method generate.*out$"):
        SampleDistance(Net(), name="net").setup(trainer, LightningModule(), "fit")


def test_a_fit_without_a_reference_is_refused():
    trainer = Trainer(callbacks=[SampleDistance(Net(), name="net")], logger=False, accelerator="cpu", max_epochs=1)
    with pytest.raises(HastenError, match="expected a datamodule or reference=LOADER"):
        trainer.fit(foreign(), Noise().train_dataloader())


@pytest.mark.parametrize("arguments", [{"n": 1}, {"batch_size": 0}, {"split": "eval"}, {"every_n_validations": 0}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^sample_distance: "):
        SampleDistance(Net(), name="net", **arguments)
