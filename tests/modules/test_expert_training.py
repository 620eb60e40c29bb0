import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD

from hasten.datamodules import EpochLoader
from hasten.errors import HastenError
from hasten.modules import ExpertTraining
from hasten.nn import DSA, ConvNet
from hasten.nn.protocols import TrainsExperts
from hasten.optim import GSAM

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
}


class Noise(LightningDataModule):
    """Twelve images of three classes, in batches of four; may show a subset of them."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.images, self.train_labels = torch.randn(12, 1, 8, 8, generator=generator), torch.arange(12) % 3
        self.seed = seed
        self.train_subset = None

    def train_dataloader(self):
        shown = torch.arange(12) if self.train_subset is None else self.train_subset()
        pairs = [(self.images[i], self.train_labels[i]) for i in shown.tolist()]
        return EpochLoader(pairs, 4, seed=self.seed)

    def val_dataloader(self):
        return EpochLoader([(self.images[i], self.train_labels[i]) for i in range(12)], 5, shuffle=False)

    test_dataloader = val_dataloader


class Watch(Callback):
    """Where each expert stood at the beginning of its batches and at the end of its epochs."""

    def __init__(self):
        self.thetas, self.begun, self.labels, self.val_accs = {}, {}, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        at = (pl_module.expert, pl_module.epoch)
        self.begun.setdefault(at, pl_module.theta())
        self.labels.setdefault(at, []).extend(batch[1].tolist())

    def on_train_epoch_end(self, trainer, pl_module):
        self.thetas[pl_module.expert, pl_module.epoch] = pl_module.theta()

    def on_validation_end(self, trainer, pl_module):
        self.val_accs.append((pl_module.expert, pl_module.epoch, trainer.callback_metrics["val/acc"].item()))


def convnet(width=4):
    return ConvNet(1, 8, 3, width=width, depth=2)


def module_of(optimizer=None, model=None, **settings):
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9)
    return ExpertTraining(model or convnet(), optimizer, **{"experts": 2, "epochs": 3} | settings)


def fitted(module, *, data=None, **settings):
    watch = Watch()
    trainer = Trainer(**QUIET | settings, callbacks=[watch])
    trainer.fit(module, datamodule=data or Noise())
    return trainer, watch


def test_all_experts_are_trained_in_one_fit_whatever_max_epochs_says():
    trainer, watch = fitted(module_of(), max_epochs=1)
    assert list(watch.thetas) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert trainer.global_step == 2 * 3 * 3


def test_an_expert_equals_a_plain_loop_of_its_own():
    _, watch = fitted(module_of())
    module, data = module_of(), Noise()
    for expert in (0, 1):
        net = module.form.filled(watch.begun[expert, 0])
        optimizer, loader = SGD(net.parameters(), lr=0.1, momentum=0.9), data.train_dataloader()
        for epoch in range(3):
            loader.epoch = 3 * expert + epoch
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                optimizer.step()
            torch.testing.assert_close(watch.thetas[expert, epoch], module.form.flatten(net), rtol=0, atol=0)


def test_experts_begin_apart_and_another_seed_is_another_expert():
    _, watch = fitted(module_of())
    _, again = fitted(module_of(model=convnet()))  # the weights of the model that is handed in are of no account
    _, other = fitted(module_of(seed=1))
    torch.testing.assert_close(again.begun, watch.begun, rtol=0, atol=0)
    first = [watch.begun[0, 0], watch.begun[1, 0], other.begun[0, 0]]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(first[i], first[j])


def test_an_expert_does_not_depend_on_which_were_trained_before_it():
    settings = {"experts": 4, "augment": DSA(["crop", "scale"])}
    _, all_of_them = fitted(module_of(partial(GSAM, base=partial(SGD, lr=0.1, momentum=0.9), rho=0.1), **settings))
    module = module_of(partial(GSAM, base=partial(SGD, lr=0.1, momentum=0.9), rho=0.1), **settings)
    module.train_only([1, 3], epochs=2)
    _, some = fitted(module)
    assert list(some.thetas) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for at, theta in some.thetas.items():
        torch.testing.assert_close(theta, all_of_them.thetas[at], rtol=0, atol=0)


def test_training_none_ends_at_once_and_the_next_fit_trains_all():
    module = module_of()
    module.train_only([], epochs=3)
    trainer, watch = fitted(module)
    assert (trainer.global_step, watch.thetas) == (0, {})
    assert len(fitted(module)[1].thetas) == 6


class Records(nn.Module):
    """A net that remembers the training images it was shown and the loss that would come of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3)
        self.shown = []

    def forward(self, images):
        if self.training:
            self.shown.append(images.detach().clone())
        return self.layer(images.flatten(1))


def test_both_passes_of_gsam_see_the_same_augmented_images_and_every_batch_others():
    model = Records()
    fitted(module_of(partial(GSAM, base=partial(SGD, lr=0.1)), model, augment=DSA(["crop", "rotate"])))
    first, second = model.shown[::2], model.shown[1::2]
    assert len(first) == len(second) == 18
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    plain = Noise().images
    for images in first:
        assert not any(torch.equal(images[0], image) for image in plain)


def test_what_is_logged_is_the_loss_before_the_step_and_the_accuracy_of_the_epoch():
    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                logits = pl_module.model(batch[0])
            self.loss = F.cross_entropy(logits, batch[1])
            right = (logits.argmax(1) == batch[1]).sum().item()
            self.right = right + (self.right if batch_idx else 0)

        def on_train_batch_end(self, trainer, *_):
            torch.testing.assert_close(trainer.callback_metrics["train/loss"], self.loss)

        def on_train_epoch_end(self, trainer, pl_module):
            assert trainer.callback_metrics["train/acc"].item() == pytest.approx(self.right / 12)
            assert trainer.callback_metrics["expert"].item() == pl_module.expert

    trainer = Trainer(**QUIET, callbacks=[Check()])
    trainer.fit(module_of(partial(GSAM, base=partial(SGD, lr=0.1), rho=2.0)), datamodule=Noise())


def test_validation_and_test_measure_the_expert_in_training():
    data, module = Noise(), module_of()
    trainer, watch = fitted(module, data=data)
    for expert, epoch, accuracy in watch.val_accs:
        net = module.form.filled(watch.thetas[expert, epoch])
        assert accuracy == pytest.approx((net(data.images).argmax(1) == data.train_labels).float().mean().item())
    assert len(watch.val_accs) == 6
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    assert tested["test/acc"] == pytest.approx(watch.val_accs[-1][2])


def test_a_curriculum_chooses_the_images_of_each_epoch_of_each_expert():
    def easy_first(epoch, labels):
        return (labels <= epoch).nonzero().flatten()

    data = Noise()
    _, watch = fitted(module_of(curriculum=easy_first), data=data)
    seen = {at: sorted(labels) for at, labels in watch.labels.items()}
    for expert in (0, 1):
        assert seen[expert, 0] == [0] * 4
        assert seen[expert, 1] == [0] * 4 + [1] * 4
        assert seen[expert, 2] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(watch.val_accs) == 6  # an epoch that is shorter is validated as well
    assert data.train_subset is None


def recipe_of(module, data=None, **settings):
    module.trainer = trainer = Trainer(**QUIET | settings)
    trainer.datamodule = data or Noise()
    return json.loads(json.dumps(module.recipe()))


def test_a_recipe_says_everything_that_decides_what_an_expert_is():
    gsam = partial(GSAM, base=partial(SGD, lr=0.1))
    recipe = recipe_of(module_of(gsam, augment=DSA(["crop"])))
    others = [
        recipe_of(module_of(partial(GSAM, base=partial(SGD, lr=0.2)), augment=DSA(["crop"]))),
        recipe_of(module_of(partial(GSAM, base=partial(SGD, lr=0.1), rho=0.5), augment=DSA(["crop"]))),
        recipe_of(module_of(partial(GSAM, base=partial(torch.optim.Adam, lr=0.1)), augment=DSA(["crop"]))),
        recipe_of(module_of(partial(SGD, lr=0.1), augment=DSA(["crop"]))),
        recipe_of(module_of(gsam, augment=DSA(["crop", "rotate"]))),
        recipe_of(module_of(gsam)),
        recipe_of(module_of(gsam, convnet(width=5), augment=DSA(["crop"]))),
        recipe_of(module_of(gsam, epochs=4, augment=DSA(["crop"]))),
        recipe_of(module_of(gsam, seed=1, augment=DSA(["crop"]))),
        recipe_of(module_of(gsam, augment=DSA(["crop"])), precision="bf16-mixed"),
        recipe_of(module_of(gsam, augment=DSA(["crop"])), limit_train_batches=2),
    ]
    texts = {json.dumps(each, sort_keys=True) for each in (recipe, *others)}
    assert len(texts) == 12
    assert recipe_of(module_of(gsam, experts=9, augment=DSA(["crop"]))) == recipe  # more experts are more of the same
    assert " at 0x" not in json.dumps(recipe)


def test_a_recipe_holds_what_the_data_says_of_itself():
    class Described(Noise):
        def description(self):
            return {"name": "noise", "split": "abc"}

    assert recipe_of(module_of(), Described())["data"] == {"name": "noise", "split": "abc"}
    assert recipe_of(module_of(), Noise())["data"] == {"name": "Noise"}


def scored(epoch, labels, *, scores):
    return scores.argsort()


def test_a_recipe_describes_a_curriculum_by_its_function_and_numbers():
    def of(scores):
        return recipe_of(module_of(curriculum=partial(scored, scores=scores)))["curriculum"]

    assert of(torch.arange(3.0)) == of(torch.arange(3.0))
    assert of(torch.arange(3.0)) != of(torch.tensor([0.0, 1.0, 3.0]))
    assert of(torch.arange(3.0))["function"].endswith("scored")


def test_it_offers_what_a_callback_asks_of_a_module_that_trains_experts():
    module = module_of()
    assert isinstance(module, TrainsExperts)
    theta = module.theta()
    module.load_theta(theta + 1)
    torch.testing.assert_close(module.theta(), theta + 1)
    torch.testing.assert_close(module.form.flatten(module.model), theta + 1)
    copied = theta.clone()
    with torch.no_grad():
        next(module.parameters()).zero_()
    torch.testing.assert_close(theta, copied, rtol=0, atol=0)  # a copy, no view


def test_the_network_is_in_the_state_dict_and_what_draws_it_is_not():
    assert list(module_of().state_dict()) == [f"model.{name}" for name in convnet().state_dict()]


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: module_of(experts=0), "experts: expected >= 1, got 0"),
        (lambda: module_of(epochs=0), "epochs: expected >= 1, got 0"),
        (lambda: module_of(model=nn.Sequential(Scale())), "reset_parameters.*Scale at '0'"),
        (lambda: module_of(model=nn.Sequential(nn.BatchNorm2d(1))), "batch norm.*'0'.*norm=instance"),
        (lambda: fitted(ExpertTraining(convnet())), "optimizer: required to train"),
        (lambda: fitted(module_of(), accumulate_grad_batches=2), "accumulate_grad_batches: expected 1, got 2"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(make, message):
    with pytest.raises((HastenError, ValueError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_several_processes_are_refused():
    module = module_of()
    module.trainer = Trainer(**QUIET | {"devices": 2, "strategy": "ddp"})
    with pytest.raises(HastenError, match="expected one process, got 2"):
        module.setup("fit")


def test_a_curriculum_needs_data_that_can_be_cut():
    class Whole(Noise):
        def __init__(self):
            super().__init__()
            del self.train_subset

    with pytest.raises(HastenError, match="expected a datamodule with train_subset, got Whole"):
        fitted(module_of(curriculum=lambda epoch, labels: labels), data=Whole())


def test_resuming_from_a_checkpoint_is_refused_and_testing_one_is_not(tmp_path):
    module, path = module_of(epochs=1), tmp_path / "last.ckpt"
    trainer = Trainer(**QUIET | {"enable_checkpointing": True}, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=Noise())
    trainer.save_checkpoint(path)
    with pytest.raises(HastenError, match="run it again with run_dir=FOLDER"):
        Trainer(**QUIET).fit(module_of(epochs=1), datamodule=Noise(), ckpt_path=path, weights_only=True)
    fresh = module_of(epochs=1)
    Trainer(**QUIET).test(fresh, datamodule=Noise(), ckpt_path=path, weights_only=True, verbose=False)
    torch.testing.assert_close(fresh.theta(), module.theta(), rtol=0, atol=0)


def test_the_curves_of_experts_on_other_loaders_are_trained_too():
    class Foreign(LightningDataModule):
        def train_dataloader(self):
            data = Noise()
            return torch.utils.data.DataLoader(list(zip(data.images, data.train_labels, strict=True)), batch_size=6)

    trainer, watch = fitted(module_of(), data=Foreign())
    assert trainer.global_step == 12
    assert not torch.equal(watch.thetas[0, 2], watch.thetas[1, 2])


def test_the_optimizer_begins_anew_with_every_expert():
    class Momentum(Callback):
        def __init__(self):
            self.at_start = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == pl_module.epoch == 0:
                self.at_start.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    momentum = Momentum()
    Trainer(**QUIET, callbacks=[momentum]).fit(module_of(), datamodule=Noise())
    assert momentum.at_start == [{}, {}]
