import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten.modules import Classification


def _net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def _sgd(groups):
    return torch.optim.SGD(groups, lr=0.5)


def _loader(n=32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 1, 4, 4, generator=generator) * 0.1
    images[torch.arange(n), 0, 0, labels] += 3
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def _fit(module, **kwargs):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **({"max_epochs": 20} | kwargs),
    )  # fmt: skip
    trainer.fit(module, _loader(), _loader())
    metrics = dict(trainer.callback_metrics)
    trainer.test(module, _loader(), verbose=False)
    return {name: float(value) for name, value in (metrics | trainer.callback_metrics).items()}


def test_it_learns_and_logs_loss_and_accuracy_under_the_names_of_the_frame():
    metrics = _fit(Classification(_net(), _sgd, num_classes=3))
    assert metrics.keys() >= {"train/loss", "val/loss", "val/acc", "test/loss", "test/acc"}
    assert metrics["test/acc"] == 1.0


def test_the_logged_numbers_equal_a_plain_evaluation_over_ragged_batches():
    module = Classification(_net(), _sgd, num_classes=3)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )  # fmt: skip
    loader = _loader(21)
    trainer.validate(module, loader, verbose=False)
    images, labels = loader.dataset.tensors
    logits = module(images).detach()
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        float(F.cross_entropy(logits, labels)), rel=1e-5
    )
    assert float(trainer.callback_metrics["val/acc"]) == pytest.approx(
        float((logits.argmax(1) == labels).float().mean())
    )


def test_every_loss_term_is_added_and_logged():
    module = Classification(_net(), _sgd, num_classes=3)
    seen = []

    def term(images, logits, targets):
        seen.append((images.shape, logits.shape, targets.shape))
        return logits.sum() * 0 + 5.0

    module.loss_terms["hint"] = term
    metrics = _fit(module, max_steps=1, max_epochs=-1)
    assert metrics["train/hint"] == 5.0 and metrics["train/loss"] > 5.0
    assert seen == [((8, 1, 4, 4), (8, 3), (8,))]


def test_mixing_gives_soft_targets_that_sum_to_one_and_leaves_the_loaders_images_alone():
    module = Classification(_net(), _sgd, num_classes=3, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    targets = []
    module.loss_terms["watch"] = lambda images, logits, mixed: targets.append(mixed) or logits.sum() * 0
    loader = _loader()
    images = loader.dataset.tensors[0]
    before = images.clone()
    _fit(module, max_steps=3, max_epochs=-1)
    assert torch.equal(images, before)
    for mixed in targets:
        assert mixed.shape == (8, 3)
        torch.testing.assert_close(mixed.sum(1), torch.ones(8))


def test_a_timm_name_is_enough():
    module = Classification("test_vit", num_classes=3)
    assert module(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"num_classes": 1}, "classification: num_classes: expected >= 2, got 1"),
        ({"num_classes": 3, "label_smoothing": 1.0}, r"classification: label_smoothing: expected in \[0, 1\), got 1.0"),
        ({"num_classes": 3, "mixup": -1.0}, "classification: mixup and cutmix: expected >= 0, got -1.0 and 0.0"),
        ({"num_classes": 3, "model": "resnet_18x"}, "model: timm has no 'resnet_18x'; near: "),
    ],
)
def test_bad_arguments_are_one_line(kwargs, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        Classification(**({"model": _net()} | kwargs))


def test_training_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer: required to train"):
        _fit(Classification(_net(), num_classes=3))


@pytest.mark.parametrize("n", [1, 4, 5])
def test_mixing_takes_batches_of_any_length_and_leaves_a_single_image_alone(n):
    module = Classification(nn.Flatten(), num_classes=4, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, labels = torch.rand(n, 1, 4, 4), torch.arange(n) % 4
    kept = images.clone()
    mixed, targets = module._mixed(images, labels)
    assert mixed.shape == images.shape and targets.shape == (n, 4)
    assert torch.equal(images, kept)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    if n % 2:
        assert torch.equal(mixed[-1], images[-1])
        smoothed = torch.full((4,), 0.1 / 4)
        smoothed[labels[-1]] += 0.9
        torch.testing.assert_close(targets[-1], smoothed)
