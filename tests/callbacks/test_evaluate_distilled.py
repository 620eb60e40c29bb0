import json
from functools import partial

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader

from hasten.callbacks import EvaluateDistilled
from hasten.datamodules import ImageDataModule
from hasten.datamodules.images import Splits, TensorImages
from hasten.errors import HastenError
from hasten.formats import open_trajectories, write_trajectory
from hasten.nn import ConvNet, SyntheticSet
from hasten.nn.dataset_distillation.flat import FlatModel

NET = partial(ConvNet, 1, 4, 2, width=4, depth=1)


class Halves(ImageDataModule):
    """Class 0 is bright above, class 1 below, under noise; ``test_labels`` of one's own choice."""

    def __init__(self, train=40, val=40, test=40, shuffled_test=False):
        super().__init__((1, 4, 4), 2, batch_size=8)
        self.sizes = (train, val, test)
        self.shuffled_test = shuffled_test

    def read(self):
        generator = torch.Generator().manual_seed(0)
        parts = []
        for n in self.sizes:
            labels = torch.arange(n) % 2
            images = 0.3 * torch.rand(n, 1, 4, 4, generator=generator)
            images[labels == 0, :, :2] += 0.5
            images[labels == 1, :, 2:] += 0.5
            parts.append(TensorImages(images, labels, self.pixels))
        if self.shuffled_test:
            parts[2] = TensorImages(parts[2].images, 1 - parts[2].labels, self.pixels)
        return Splits(*parts)


class Distils(LightningModule):
    """At step i its set is the i-th of ``sets``: noise, or the two classes as they are."""

    def __init__(self, sets=("noise", "classes", "noise", "noise"), lr=0.1):
        super().__init__()
        self.synthetic = SyntheticSet(2, 1, (1, 4, 4), lr=lr)
        self.sets = sets
        labels = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        classes = -torch.ones(2, 1, 4, 4)
        classes[0, :, :2] = classes[1, :, 2:] = 0.3
        self.choices = {"noise": (noise, labels), "classes": (classes, labels), "swapped": (classes, labels.flip(1))}
        self.synthetic.fill(*self.choices["noise"])

    def training_step(self, batch, batch_idx):
        return 0.0 * self.synthetic.images.sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.synthetic.images], lr=0.0)

    def on_before_zero_grad(self, optimizer):
        # the set of this step is there before any callback's on_train_batch_end
        self.synthetic.fill(*self.choices[self.sets[min(self.global_step, len(self.sets) - 1)]])


def evaluation(folder=None, **changes):
    settings = {"every": 1, "seeds": 2, "epochs": 30, "baselines": ("random",), "augment": None, "folder": folder}
    return EvaluateDistilled({"convnet": NET}, **(settings | changes))


def attached(folder):
    return evaluation(folder, epochs=2), Distils(), Halves()


def fit(module, callback, *, steps=4, data=None, ckpt_path=None, callbacks=(), **settings):
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[callback, *callbacks], enable_progress_bar=False,
        enable_model_summary=False, **({"enable_checkpointing": bool(callbacks), "logger": False} | settings),
    )  # fmt: skip
    trainer.fit(module, datamodule=data or Halves(), ckpt_path=ckpt_path)
    return trainer


def test_the_set_that_is_best_on_the_holdout_is_kept():
    module, callback = Distils(), evaluation()
    metrics = fit(module, callback).callback_metrics
    assert callback.best_iteration == 2
    torch.testing.assert_close(callback.best.images, module.choices["classes"][0])
    assert metrics["eval/convnet/acc_best"] > 0.9 > metrics["eval/convnet/acc_final"]
    assert [iteration for iteration, _ in callback._history] == [0, 1, 2, 3, 4]


def test_the_best_set_is_never_worse_than_the_one_it_began_with():
    module = Distils(("noise",))
    module.synthetic.fill(*module.choices["classes"])
    callback = evaluation(every=2)
    metrics = fit(module, callback, steps=2).callback_metrics
    assert callback.best_iteration == 0
    assert torch.equal(callback.best.images, module.choices["classes"][0])
    assert metrics["eval/convnet/acc_best"] > 0.9 > metrics["eval/convnet/acc_final"]


def test_the_test_split_chooses_nothing():
    callbacks = [evaluation(), evaluation()]
    metrics = [
        fit(Distils(), callback, data=Halves(shuffled_test=shuffled)).callback_metrics
        for callback, shuffled in zip(callbacks, (False, True), strict=True)
    ]
    assert callbacks[0].best_iteration == callbacks[1].best_iteration == 2
    assert callbacks[0]._history == callbacks[1]._history
    assert [row.lr for row in callbacks[0].table.rows] == [row.lr for row in callbacks[1].table.rows]
    for name in ("eval/convnet/acc_best", "eval/random/acc"):
        assert metrics[0][name] + metrics[1][name] == pytest.approx(1)


def test_the_test_split_chooses_no_learning_rate():
    tables = []
    for shuffled in (False, True):
        module, callback = Distils(("classes",), lr=1e-6), evaluation(lr="holdout")
        fit(module, callback, steps=1, data=Halves(shuffled_test=shuffled))
        tables.append(callback.table)
    # on swapped labels nets that have learned are always wrong, those of the step size 1e-6 guess
    assert tables[1].row("best", "convnet").mean < 0.1
    assert [row.lr for row in tables[0].rows] == [row.lr for row in tables[1].rows]
    assert min(row.lr for row in tables[1].rows) > 1e-5


def test_the_metrics_are_in_reach_of_a_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="eval/acc", mode="max", every_n_train_steps=1, filename="{step}")
    fit(Distils(), evaluation(), callbacks=[checkpoint])
    assert checkpoint.best_model_path.endswith("step=2.ckpt")


def test_a_resumed_fit_knows_the_best_set(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = evaluation()
    fit(Distils(), whole, callbacks=[checkpoint])
    resumed = evaluation()
    fit(Distils(), resumed, ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.best_iteration == 2
    assert resumed._history == whole._history
    assert torch.equal(resumed.best.images, whole.best.images)
    assert resumed.table == whole.table


def test_training_does_not_notice():
    torch.manual_seed(0)
    module = Distils()
    fit(module, evaluation(epochs=2))
    after = torch.rand(())
    assert module.training
    torch.manual_seed(0)
    fit(Distils(), Callback())
    assert torch.rand(()) == after


def experts(folder, net=NET, recipe=None):
    """Two nets that were trained on Halves, the rows of whose trajectories are all alike."""
    data = Halves()
    for k in range(2):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_images(torch.arange(40))), data.train_labels).backward()
            optimizer.step()
        flat = FlatModel(model)
        theta = flat.flatten(model).expand(2, -1)
        about = {"train_acc": [0.0] * 2, "val_acc": [0.0] * 2, "names": flat.names, "shapes": flat.shapes}
        write_trajectory(folder / f"expert_{k:04d}.safetensors", theta, recipe=recipe or {"seed": 0}, **about)
    return folder


def test_the_table_has_every_row_and_lies_in_the_folder(tmp_path):
    nets = {"convnet": NET, "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2))}
    settings = {"every": 2, "seeds": 3, "epochs": 20, "augment": None, "folder": tmp_path / "tables"}
    baselines = ("random", "random_soft", "whole")
    callback = EvaluateDistilled(nets, baselines=baselines, experts=experts(tmp_path), whole_epochs=3, **settings)
    metrics = fit(Distils(), callback).callback_metrics
    found = {(row.arm, row.net) for row in callback.table.rows}
    arms = ["random", "random_soft", "final", "best"]
    first_alone = {("whole", "convnet"), ("best, hard labels", "convnet")}
    assert found == {(arm, net) for arm in arms for net in nets} | first_alone
    assert {row.lr_from for row in callback.table.rows if row.arm in ("random", "whole")} == {"holdout"}
    assert callback.table.row("best", "convnet").lr_from == "learned"
    assert callback.table.row("best", "linear").lr_from == "holdout"
    assert {"eval/hlr", "eval/ior", "eval/lrs", "eval/random_soft/acc", "eval/whole/acc"} <= metrics.keys()
    rows = {row.arm: row.mean for row in callback.table.rows if row.net == "convnet"}
    assert metrics["eval/ior"] == pytest.approx(rows["best"] - rows["random_soft"])
    assert metrics["eval/hlr"] == pytest.approx(rows["whole"] - rows["best, hard labels"])
    assert (tmp_path / "tables" / "table.md").read_text().count("\n| random") == 4
    assert len((tmp_path / "tables" / "table.csv").read_text().splitlines()) == 11
    written = json.loads((tmp_path / "tables" / "evaluation.json").read_text())
    assert len(written["table"]["rows"]) == 10
    assert written["best_iteration"] == 2


def test_the_last_set_is_not_trained_on_twice_where_it_is_the_best(capsys):
    callback = evaluation()
    fit(Distils(("noise", "classes")), callback, steps=2)
    final, best = (callback.table.row(arm, "convnet") for arm in ("final", "best"))
    assert callback.best_iteration == 2
    assert final.accuracies == best.accuracies
    assert "| final | convnet |" in callback.table.markdown()
    assert "random" in capsys.readouterr().out


class Tables(WandbLogger):
    """Keeps what Weights & Biases would be sent."""

    def __init__(self):
        self.sent = []

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.sent.append((key, columns, data, step))

    log_metrics = log_hyperparams = log_graph = save = finalize = after_save_checkpoint = lambda self, *_, **__: None
    experiment = save_dir = name = version = None


def test_weights_and_biases_get_the_table():
    logger, callback = Tables(), evaluation()
    fit(Distils(("classes",)), callback, steps=1, logger=logger)
    ((key, columns, data, step),) = logger.sent
    assert (key, step) == ("eval/table", 1)
    assert [row[0] for row in data] == ["random", "final", "best"]
    assert data[2][columns.index("mean")] == callback.table.row("best", "convnet").mean


def test_another_seed_of_a_baseline_is_other_images():
    callback = evaluation(seeds=2, epochs=1)
    seen = []

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 2)

        def forward(self, images):
            if self.training:
                seen.append(images.clone())
            return self.linear(images.flatten(1))

    callback.nets = {"counts": Counts}
    fit(Distils(("classes",)), callback, steps=1)
    seen = seen[2:]  # of the set as it began
    random = [images for images in seen if not torch.equal(images, Distils().choices["classes"][0])]
    assert len(random) == 11  # each of three learning rates on the same three draws, then two nets
    for trial in range(3):
        assert torch.equal(random[trial], random[trial + 3])
        assert torch.equal(random[trial], random[trial + 6])
    assert not any(torch.equal(random[9], other) for other in (*random[:3], random[10]))


def test_experts_of_another_split_are_refused(tmp_path):
    folder = experts(tmp_path, recipe={"data": Halves(train=38).description()})
    callback = evaluation(baselines=("random_soft",), experts=folder)
    with pytest.raises(
        HastenError, match=r"^evaluate_distilled: expected data as .*expert_0000.*differ in split"
    ) as error:
        fit(Distils(), callback)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", [{"imported": "replay_buffer"}, {"seed": 0}])
def test_imported_experts_are_noted_whatever_the_baselines_are(tmp_path, recipe):
    data = Halves()
    data.experts = open_trajectories(experts(tmp_path, recipe=recipe))
    callback = evaluation(epochs=1, baselines=())
    fit(Distils(), callback, steps=1, data=data)
    assert ("may have seen the holdout" in callback.table.markdown()) == ("imported" in recipe)


def test_what_was_not_measured_is_noted(tmp_path):
    def notes(*baselines):
        callback = evaluation(epochs=1, whole_epochs=1, baselines=baselines, experts=folder)
        fit(Distils(("classes",)), callback, steps=1)
        return callback.table.markdown()

    folder = experts(tmp_path)
    assert "not measured: random_soft and whole, and without them no HLR, IOR, LRS; add" in notes("random")
    assert "not measured: whole, and without them no HLR, LRS; add" in notes("random_soft")
    assert "not measured" not in notes("random_soft", "whole")


def test_what_cannot_be_evaluated_is_refused_in_one_line(tmp_path):
    def error(module=None, data=None, **changes):
        with pytest.raises(HastenError) as caught:
            fit(module or Distils(), evaluation(**changes), data=data)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    class Bare(LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    class NoImages(Halves):
        train_images = None

    assert "expected an attribute synthetic with a SyntheticSet" in error(Bare())
    assert "expected a val split" in error(data=Halves(val=0))
    assert "expected a test split" in error(data=Halves(test=0))
    assert "expected train_images(indices)" in error(data=NoImages())
    assert "at least ipc = 1 training images of each class, got 0 of '1'" in error(data=Halves(train=1))
    assert "experts: expected those who label" in error(baselines=("random_soft",))
    folder = experts(tmp_path, partial(ConvNet, 1, 4, 2, width=3, depth=1))
    assert "parameter 0 of the first net: expected blocks.0.0.weight (3, 1, 3, 3) as in expert_0000" in error(
        baselines=("random_soft",), experts=folder
    )
    assert "use norm=instance" in error(baselines=("random_soft",), experts=folder, student=partial(NET, norm="batch"))


def test_a_fit_without_datamodule_is_refused_in_one_line():
    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[evaluation()], logger=False)
    with pytest.raises(HastenError, match="expected a val split"):
        trainer.fit(Distils(), DataLoader(torch.zeros(2, 1)))


@pytest.mark.parametrize(
    "changes",
    [
        {"every": 0},
        {"seeds": 0},
        {"epochs": 0},
        {"whole_epochs": 0},
        {"lr": "best"},
        {"lr": 0},
        {"baselines": ["soft"]},
    ],
)
def test_arguments_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"^evaluate_distilled: "):
        evaluation(**changes)


def test_no_net_is_refused():
    with pytest.raises(ValueError, match="nets: expected at least one"):
        EvaluateDistilled({})
