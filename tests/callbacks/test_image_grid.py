import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader
from torchvision.io import read_image

from hasten.callbacks import EMA, ImageGrid
from hasten.errors import HastenError


class Foreign(LightningModule):
    """One weight, which grows by 0.1 a step and is what its pictures show."""

    def __init__(self, shape=(2, 5, 1, 8, 8)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout()
        self.shape = shape
        self.drawn = []

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def pictures(self):
        self.drawn.append((self.global_step, round(self.weight.item(), 4)))
        assert not self.training
        assert not self.dropout.training
        assert not (self.weight * torch.rand(())).requires_grad
        return {"samples": self.weight.expand(self.shape)}


def foreign():
    return Foreign()


def attached(folder):
    return ImageGrid(folder, every_n_steps=1), foreign(), DataLoader(torch.zeros(3, 1))


def fit(module, *callbacks, steps=4, **kwargs):
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | kwargs
    trainer = Trainer(
        callbacks=list(callbacks), accelerator="cpu", max_steps=steps, enable_checkpointing=False, **settings
    )
    loader = DataLoader(torch.zeros(3, 1))
    trainer.fit(module, loader, loader)


def test_pictures_are_drawn_every_so_many_steps_and_at_the_end(tmp_path):
    module = foreign()
    fit(module, ImageGrid(tmp_path / "pictures", every_n_steps=2), steps=5)
    assert module.drawn == [(2, 0.2), (4, 0.4), (5, 0.5)]
    names = ["samples.png", "samples_000002.png", "samples_000004.png", "samples_000005.png"]
    assert sorted(path.name for path in tmp_path.joinpath("pictures").iterdir()) == names
    latest = (tmp_path / "pictures" / "samples.png").read_bytes()
    assert latest == (tmp_path / "pictures" / "samples_000005.png").read_bytes()


def test_the_last_step_is_drawn_once(tmp_path):
    module = foreign()
    fit(module, ImageGrid(tmp_path, every_n_steps=2), steps=4)
    assert [step for step, _ in module.drawn] == [2, 4]


def test_small_images_are_enlarged_by_a_whole_factor(tmp_path):
    fit(Foreign((2, 5, 1, 8, 8)), ImageGrid(tmp_path, every_n_steps=4))
    image = read_image(tmp_path / "samples.png")
    assert image.shape == (3, 2 * 50 + 2, 5 * 50 + 2)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 2, 2].tolist() == [102, 102, 102]  # the weight, 0.4


def test_large_images_stay_as_they_are(tmp_path):
    fit(Foreign((1, 2, 3, 64, 64)), ImageGrid(tmp_path, every_n_steps=4))
    assert read_image(tmp_path / "samples.png").shape == (3, 64 + 4, 2 * 66 + 2)


def test_stray_pixels_are_clipped_and_the_rest_is_stretched(tmp_path):
    images = torch.randn(1, 1, 1, 50, 50)
    module = foreign()
    module.pictures = lambda: {"samples": images}
    fit(module, ImageGrid(tmp_path, every_n_steps=4, clip_std=2.0))
    shown = read_image(tmp_path / "samples.png")[0] / 255
    expected = ((images[0, 0, 0] - images.mean()) / images.std() / 4 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown, expected, atol=0.5 / 255 + 1e-6, rtol=0)


def test_pictures_of_a_step_share_a_range_and_one_named_otherwise_stays_as_it_is(tmp_path):
    before, after, map_ = torch.rand(1, 2, 1, 50, 50), torch.randn(1, 2, 1, 50, 50) * 3, torch.rand(1, 2, 1, 50, 50)
    module = foreign()
    module.pictures = lambda: {"before": before, "after": after, "map": map_}
    fit(module, ImageGrid(tmp_path, every_n_steps=4, clip_std=2.0, unclipped=["map"]))
    pixels = torch.cat([before.flatten(), after.flatten()])
    expected = {
        "before": ((before - pixels.mean()) / pixels.std() / 4 + 0.5).clamp(0, 1),
        "after": ((after - pixels.mean()) / pixels.std() / 4 + 0.5).clamp(0, 1),
        "map": map_,
    }
    for name, images in expected.items():
        shown = read_image(tmp_path / f"{name}.png")[0, 2:52, 2:52] / 255
        torch.testing.assert_close(shown, images[0, 0, 0], atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("average", [EMA, EMAWeightAveraging])
@pytest.mark.parametrize("average_first", [True, False])
def test_the_averaged_weights_draw(tmp_path, average, average_first):
    module = foreign()
    callbacks = [average(decay=0.5), ImageGrid(tmp_path, every_n_steps=3)]
    fit(module, *(callbacks if average_first else reversed(callbacks)), steps=4)
    assert len(module.drawn) == 2
    for step, drawn in module.drawn:
        assert drawn < 0.1 * step - 0.01  # an average lags
    assert module.drawn[-1] == (4, round(module.weight.item(), 4))


def test_training_does_not_notice(tmp_path):
    torch.manual_seed(0)
    module = foreign()
    module.dropout.eval()  # a part that its user keeps frozen
    fit(module, ImageGrid(tmp_path, every_n_steps=1))
    assert module.training
    assert not module.dropout.training
    assert module.weight.requires_grad
    after = torch.rand(())
    torch.manual_seed(0)
    fit(foreign())
    assert torch.rand(()) == after


def test_a_drawing_that_fails_leaves_the_module_as_it_was(tmp_path):
    module, ema = foreign(), EMA(0.5)

    def broken():
        raise RuntimeError("broken")

    module.pictures = broken
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, ema, ImageGrid(tmp_path, every_n_steps=3))
    assert module.training
    assert module.weight.item() == pytest.approx(0.3)


class Images(WandbLogger):
    """Keeps what Weights & Biases would be sent."""

    def __init__(self):
        self.sent = []

    def log_image(self, key, images, step=None, **kwargs):
        self.sent.append((key, images[0].shape, images[0].dtype.name, step))

    def log_files(self, kind, files):
        self.sent.append((kind, files))

    def log_metrics(self, metrics, step=None):
        pass

    experiment = save_dir = name = version = None
    save = finalize = after_save_checkpoint = log_hyperparams = log_graph = lambda self, *_: None


def test_weights_and_biases_gets_the_image_and_the_last_one_as_a_file(tmp_path):
    logger = Images()
    fit(foreign(), ImageGrid(tmp_path, every_n_steps=4), logger=logger)
    assert logger.sent == [
        ("pictures/samples", (102, 252, 3), "uint8", 4),
        ("pictures", {"samples.png": tmp_path / "samples.png"}),
    ]


def test_tensorboard_gets_the_image(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(foreign(), ImageGrid(tmp_path, every_n_steps=4), logger=TensorBoardLogger(tmp_path, "tb", ""))
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    (image,) = events.Images("pictures/samples")
    assert (image.step, image.height, image.width) == (4, 102, 252)


class Named(LightningDataModule):
    class_names = ["a", "a much longer name"]

    def train_dataloader(self):
        return DataLoader(torch.zeros(3, 1))

    val_dataloader = train_dataloader


@pytest.mark.parametrize(("rows", "named"), [(2, True), (3, False)])
def test_the_names_of_the_classes_stand_beside_as_many_rows(tmp_path, rows, named):
    trainer = Trainer(
        callbacks=[ImageGrid(tmp_path, every_n_steps=4)], accelerator="cpu", max_steps=4, enable_checkpointing=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Foreign((rows, 5, 1, 8, 8)), datamodule=Named())
    image = read_image(tmp_path / "samples.png")
    margin = image.size(2) - (5 * 50 + 2)
    assert image.size(1) == rows * 50 + 2 and (margin > 0) == named
    assert image[:, 2, margin + 2].tolist() == [102, 102, 102]  # the grid is where it was, only farther right
    if named:
        strip = image[0, :, :margin].float() / 255
        ink = [(1 - row).sum() for row in (strip[:51], strip[51:])]
        assert 0 < ink[0] < ink[1]
        rows_with_ink = (strip.min(1).values < 0.5).nonzero().flatten()
        centres = [rows_with_ink[rows_with_ink < 51].float().mean(), rows_with_ink[rows_with_ink >= 51].float().mean()]
        assert [round(float(centre)) for centre in centres] == [pytest.approx(26, abs=3), pytest.approx(76, abs=3)]


def test_a_module_without_pictures_is_refused_in_one_line(tmp_path):
    with pytest.raises(HastenError, match=r"^image_grid: LightningModule: expected a method pictures\(\) .* leave .*$"):
        ImageGrid(tmp_path, every_n_steps=1).setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")


def test_pictures_of_another_shape_are_refused(tmp_path):
    with pytest.raises(HastenError, match=r"pictures\(\)\['samples'\]: expected .* got \(5, 1, 8, 8\)"):
        fit(Foreign((5, 1, 8, 8)), ImageGrid(tmp_path, every_n_steps=1))


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"min_cell_px": 0}, {"clip_std": 0.0}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^image_grid: "):
        ImageGrid("pictures", **({"every_n_steps": 1} | arguments))
