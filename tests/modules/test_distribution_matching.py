import math

import lightning
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from hasten.callbacks import SkipGuard
from hasten.errors import HastenError
from hasten.functional import dsa
from hasten.modules import DistributionMatching
from hasten.nn import DSA, ConvNet, SyntheticSet

CLASSES, IPC, SHAPE = 3, 2, (1, 8, 8)


class ByClass(LightningDataModule):
    """Real images of three classes, each bright in a place of its own; the same batch at every iteration."""

    num_classes, class_names, image_shape, per_class, experts = CLASSES, ["a", "b", "c"], SHAPE, 10, ()

    def __init__(self, iterations=8, real=None):
        super().__init__()
        self.train_labels = torch.arange(30) % CLASSES
        self.images = torch.randn(30, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.2
        self.images[torch.arange(30), 0, 2, 2 * self.train_labels] += 2
        self.iterations = iterations
        self.real = torch.stack([self.images[self.train_labels == label] for label in range(CLASSES)])
        if real is not None:
            self.real = real

    def train_images(self, indices):
        return self.images[indices]

    def train_dataloader(self):
        return DataLoader([self.real] * self.iterations, batch_size=None)

    def denormalize(self, images):
        return images / 4 + 0.5


def module(**options):
    torch.manual_seed(0)
    model = options.pop("model", None) or ConvNet(1, 8, CLASSES, width=4, depth=2)
    return DistributionMatching(model, SyntheticSet(CLASSES, IPC, SHAPE), **options)


def trainer(steps, **settings):
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **({"enable_checkpointing": False} | settings),
    )  # fmt: skip


def fitted(steps, data=None, **options):
    matched = module(**options)
    trainer(steps).fit(matched, data or ByClass(steps))
    return matched


def refusal(call):
    try:
        call()
    except HastenError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_an_iteration_is_one_step_of_sgd_on_the_distance_of_class_means_under_a_random_net():
    seen = []

    def noting(real, synthetic):
        seen.append((real, synthetic))
        return (real.mean(1) - synthetic.mean(1)).square().sum()

    matched, data = module(discrepancy=noting, lr_img=0.5, seed=3), ByClass(1)
    drawn = []
    fill = matched._flat.filled
    matched._flat.filled = lambda theta: drawn.append(fill(theta)) or drawn[-1]
    run = trainer(1)
    run.fit(matched, data)
    start = module(seed=3)
    trainer(0).fit(start, data)
    net, images = drawn[0], start.synthetic.images.detach().clone().requires_grad_()
    loss = torch.tensor(0.0)
    for label in range(CLASSES):
        mean = torch.stack([net.features(image[None])[0] for image in data.real[label]]).mean(0)
        own = torch.stack([net.features(images[None, label * IPC + i])[0] for i in range(IPC)]).mean(0)
        loss = loss + ((mean - own) ** 2).sum()
    loss.backward()
    torch.testing.assert_close(matched.synthetic.images.detach(), (images - 0.5 * images.grad).detach())
    torch.testing.assert_close(run.callback_metrics["train/matching_loss"], loss.detach())
    torch.testing.assert_close(run.callback_metrics["train/grad_norm_images"], images.grad.norm())
    assert not seen[0][0].requires_grad and seen[0][1].requires_grad


def test_synthetic_images_approach_the_means_of_their_classes():
    losses = []

    def noting(real, synthetic):
        losses.append(loss := (real.mean(1) - synthetic.mean(1)).square().sum())
        return loss

    fitted(60, discrepancy=noting, lr_img=10.0)
    assert torch.stack(losses[-20:]).mean() < 0.3 * torch.stack(losses[:5]).mean()


def test_it_starts_from_real_images_of_each_class_and_keeps_hard_labels():
    data = ByClass(2)
    start = fitted(0, data)
    for label, images in enumerate(start.synthetic.images.detach().split(IPC)):
        own = data.images[data.train_labels == label]
        assert all(any(torch.equal(image, other) for other in own) for image in images)
    after = fitted(2, data)
    assert not torch.equal(after.synthetic.images, start.synthetic.images)
    assert torch.equal(after.synthetic.labels.softmax(1).argmax(1), after.synthetic.classes)
    assert torch.equal(after.synthetic.labels, start.synthetic.labels)
    assert torch.equal(after.synthetic.lr, start.synthetic.lr)


def test_real_and_synthetic_images_of_a_class_have_one_augmentation_and_classes_have_their_own():
    draws = []

    class Noting(DSA):
        def __call__(self, images, draw):
            draws.append((draw, len(images)))
            return dsa(images, draw)

    fitted(1, augment=Noting(["crop", "rotate", "scale"], share="batch"))
    assert [count for _, count in draws] == [10, IPC] * CLASSES
    ops = [draw for draw, _ in draws]
    assert all(real is synthetic for real, synthetic in zip(ops[::2], ops[1::2], strict=True))
    assert len({str(draw) for draw in ops}) == CLASSES


def test_every_iteration_draws_another_net_and_the_seed_decides_which():
    def nets(seed):
        matched, found = module(seed=seed), []
        fill = matched._flat.filled
        matched._flat.filled = lambda theta: found.append(fill(theta)) or found[-1]
        trainer(3).fit(matched, ByClass(3))
        return torch.stack([nn.utils.parameters_to_vector(net.parameters()) for net in found])

    before = torch.get_rng_state()
    first = nets(0)
    assert len(first.unique(dim=0)) == 3
    torch.manual_seed(9)
    assert nets(0).equal(first) and not nets(1).equal(first)
    torch.set_rng_state(before)


def test_every_process_draws_its_own_nets_and_augmentation(monkeypatch):
    def drawn(rank):
        monkeypatch.setattr(DistributionMatching, "global_rank", rank)
        augment = DSA(["crop"], share="batch")
        matched, nets, draws = module(augment=augment), [], []
        fill, draw = matched._flat.filled, augment.draw
        matched._flat.filled = lambda theta: nets.append(theta) or fill(theta)
        augment.draw = lambda *arguments: draws.append(draw(*arguments)) or draws[-1]
        trainer(1).fit(matched, ByClass(1))
        return nets[0], str(draws)

    (one, crops), (same, same_crops), (other, other_crops) = (drawn(rank) for rank in (0, 0, 1))
    assert one.equal(same) and crops == same_crops
    assert not one.equal(other) and crops != other_crops


def test_neither_nets_nor_their_weights_are_in_the_state_dict_or_the_optimizer():
    matched = module()
    assert {name.partition(".")[0] for name in matched.state_dict()} == {"synthetic", "iteration", "initial"}
    (group,) = matched.configure_optimizers().param_groups
    assert [parameter is matched.synthetic.images for parameter in group["params"]] == [True]
    assert (group["lr"], group["momentum"]) == (1.0, 0.5)


def test_an_interrupted_run_ends_as_one_that_was_not_bit_for_bit(tmp_path):
    augment = DSA(["crop", "color", "scale"], share="batch")
    whole = fitted(6, augment=augment)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(6, enable_checkpointing=True, callbacks=[saving]).fit(module(augment=augment), ByClass(6))
    for step in (1, 4):
        resumed = module(augment=augment)
        # the last: a fresh initialisation that the checkpoint must replace
        trainer(6).fit(resumed, ByClass(6), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert torch.equal(resumed.synthetic.images, whole.synthetic.images)


def test_under_a_guard_a_gradient_that_is_not_finite_changes_nothing():
    matched, data = module(), ByClass(3, torch.full((CLASSES, 4, *SHAPE), math.nan))
    run = trainer(3, callbacks=[SkipGuard()])
    run.fit(matched, data)
    assert torch.equal(matched.synthetic.images, fitted(0, data).synthetic.images)
    assert run.global_step == 3 and run.callback_metrics["train/non_finite"] == 3
    assert not run.optimizers[0].state


def test_a_fit_that_learns_nothing_stops_and_says_which_number_to_lower():
    data = ByClass(9, torch.full((CLASSES, 4, *SHAPE), math.nan))
    assert "lr_img (2)" in refusal(lambda: trainer(9, callbacks=[SkipGuard(patience=2)]).fit(module(lr_img=2.0), data))


def test_pictures_show_a_row_a_class_as_pixels():
    matched, data = module(), ByClass(2)
    trainer(2).fit(matched, data)
    pictures = matched.pictures()
    assert pictures["synthetic"].shape == pictures["initial"].shape == (CLASSES, IPC, *SHAPE)
    for name, images in (("synthetic", matched.synthetic.images), ("initial", fitted(0, data).synthetic.images)):
        torch.testing.assert_close(pictures[name].flatten(0, 1), data.denormalize(images.detach()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_img": 0.0}, ["lr_img", "0.0"]),
        ({"momentum": 1.0}, ["momentum", "1.0"]),
        ({"augment": DSA()}, ["augment", "batch", "sample"]),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, ["model", "features", "Sequential"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, words):
    message = refusal(lambda: module(**options))
    assert all(word in message for word in words) and "\n" not in message


def test_a_layer_that_cannot_be_drawn_anew_is_named():
    model = ConvNet(1, 8, CLASSES, width=4, depth=2)
    model.scale = nn.ParameterList([nn.Parameter(torch.ones(1))])
    assert "'scale'" in refusal(lambda: module(model=model))


def test_data_that_are_not_by_class_are_refused():
    loader = DataLoader(torch.zeros(4, *SHAPE))
    assert "ClassBatches" in refusal(lambda: trainer(1).fit(module(), loader))


def test_data_of_another_shape_and_classes_with_too_few_images_are_refused():
    data = ByClass(1)
    data.image_shape = (1, 9, 9)
    assert "(1, 9, 9)" in refusal(lambda: trainer(1).fit(module(), data))
    data = ByClass(1)
    data.train_labels = data.train_labels.clamp(max=1)
    assert "'c'" in refusal(lambda: trainer(1).fit(module(), data))
