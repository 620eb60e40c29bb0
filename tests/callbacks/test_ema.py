import copy
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from hasten.callbacks import EMA
from hasten.errors import HastenError
from hasten.nn.protocols import TrainsExperts


class Foreign(LightningModule):
    """A regression with a batch norm, so with float and integer buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/weight", self.net[0].weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def foreign():
    torch.manual_seed(0)
    return Foreign()


class Weights(Callback):
    """Notes the trained weights after each step, and the weights that validation runs on."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(copy.deepcopy(pl_module.state_dict()))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(copy.deepcopy(pl_module.state_dict()))


def loader():
    return DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), batch_size=4)


def trainer(*callbacks, **kwargs):
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **(settings | kwargs),
    )


def attached(folder):
    return EMA(0.9), foreign(), loader()


def average(trained, decay):
    """The formula, one number at a time."""
    result = dict(trained[0])
    for n, state in enumerate(trained[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        for name, value in state.items():
            result[name] = d * result[name] + (1 - d) * value if value.is_floating_point() else value
    return result


def assert_same(states, others, **tolerance):
    assert states.keys() == others.keys()
    for name in states:
        torch.testing.assert_close(states[name], others[name], **tolerance)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_after_the_fit_the_module_holds_the_average_with_the_warmed_up_decay(decay):
    module, weights = foreign(), Weights()
    trainer(weights, EMA(decay)).fit(module, loader())
    assert len(weights.trained) == 8
    assert_same(module.state_dict(), average(weights.trained, decay))


def test_the_first_update_takes_the_weights_as_they_are():
    module, weights = foreign(), Weights()
    trainer(weights, EMA(), max_epochs=-1, max_steps=1).fit(module, loader())
    assert_same(module.state_dict(), weights.trained[0], rtol=0, atol=0)


def test_integer_buffers_keep_their_present_value():
    module = foreign()
    trainer(EMA(0.9)).fit(module, loader())
    assert module.net[1].num_batches_tracked == 8


def test_derived_tables_are_neither_averaged_nor_swapped():
    tables = []

    class Scheduled(Foreign):
        def __init__(self):
            super().__init__()
            self.net[0].register_buffer("table", torch.zeros(1), persistent=False)

        def training_step(self, batch, batch_idx):
            self.net[0].table += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            tables.append(self.net[0].table.item())

    module, weights = Scheduled(), Weights()
    trainer(weights, EMA(0.9, update_every_n_steps=3)).fit(module, loader(), loader())
    assert tables == 4 * [4] + 4 * [8]
    assert module.net[0].table == 8
    assert_same(module.state_dict(), average(weights.trained[::3], 0.9))


def test_validation_runs_on_the_average_and_training_goes_on_with_the_trained_weights():
    plain, averaged = Weights(), Weights()
    trainer(plain).fit(foreign(), loader(), loader())
    trainer(averaged, EMA(0.9)).fit(foreign(), loader(), loader())
    for expected, found in zip(plain.trained, averaged.trained, strict=True):
        assert_same(expected, found, rtol=0, atol=0)
    assert_same(averaged.validated[0], average(averaged.trained[:4], 0.9))
    assert_same(averaged.validated[-1], average(averaged.trained, 0.9))


def test_updates_come_every_so_many_steps():
    module, weights = foreign(), Weights()
    trainer(weights, EMA(0.9, update_every_n_steps=3)).fit(module, loader())
    assert_same(module.state_dict(), average(weights.trained[::3], 0.9))


def test_an_accumulated_step_is_one_update():
    module, weights = foreign(), Weights()
    trainer(weights, EMA(0.9), accumulate_grad_batches=2).fit(module, loader())
    parameters = dict(module.named_parameters())
    expected = average(weights.trained[1::2], 0.9)
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach(), expected[name])


def test_a_checkpoint_holds_both_loads_weights_only_and_resumes_exactly(tmp_path):
    whole, weights = foreign(), Weights()
    trainer(weights, EMA(0.9)).fit(whole, loader())
    saving = {"enable_checkpointing": True, "max_epochs": 1}
    trainer(EMA(0.9), ModelCheckpoint(tmp_path, filename="half"), **saving).fit(foreign(), loader())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert_same(saved["state_dict"], average(weights.trained[:4], 0.9))
    assert_same(saved["current_model_state"], weights.trained[3], rtol=0, atol=0)
    resumed = foreign()
    trainer(EMA(0.9)).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_written_when_training_ends_holds_both(tmp_path):
    module, weights = foreign(), Weights()
    at_the_end = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, every_n_epochs=0)
    trainer(weights, EMA(0.9), at_the_end, enable_checkpointing=True).fit(module, loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(saved["state_dict"], average(weights.trained, 0.9))
    assert_same(saved["current_model_state"], weights.trained[-1], rtol=0, atol=0)
    assert_same(module.state_dict(), saved["state_dict"], rtol=0, atol=0)


def test_a_test_of_the_checkpoint_runs_on_the_average(tmp_path):
    fit = trainer(EMA(0.9), ModelCheckpoint(tmp_path, filename="end"), enable_checkpointing=True)
    module = foreign()
    fit.fit(module, loader())
    kept = module.net[0].weight.sum().item()
    (result,) = fit.test(module, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True)
    assert result["test/weight"] == pytest.approx(kept)


def test_a_validation_that_breaks_off_leaves_the_trained_weights():
    module, weights = foreign(), Weights()

    def broken(batch, batch_idx):
        raise RuntimeError("broken")

    module.validation_step = broken
    with pytest.raises(RuntimeError, match="broken"):
        trainer(weights, EMA(0.9)).fit(module, loader(), loader())
    assert_same(module.state_dict(), weights.trained[-1], rtol=0, atol=0)


def test_one_callback_serves_two_fits():
    ema = EMA(0.9)
    for _ in range(2):
        module, weights = foreign(), Weights()
        trainer(weights, ema).fit(module, loader())
        assert_same(module.state_dict(), average(weights.trained, 0.9))


def test_nothing_stays_behind():
    plain, module, ema = foreign(), foreign(), EMA()
    trainer().fit(plain, loader())
    trainer(ema).fit(module, loader())
    assert list(module.state_dict()) == list(plain.state_dict())
    assert vars(module).keys() == vars(plain).keys()
    assert ema._average_model is None


def test_it_is_safe_to_undo_what_was_never_set_up():
    ema, module = EMA(), foreign()
    ema.on_exception(trainer(), module, RuntimeError())
    ema.teardown(trainer(), module, "fit")
    ema.teardown(trainer(), module, "fit")


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_models_are_refused_in_one_line(strategy):
    fit = SimpleNamespace(strategy=strategy(), checkpoint_callbacks=[])
    with pytest.raises(HastenError, match=rf"^ema: strategy: .*{strategy.__name__}.*use ddp.*$"):
        EMA().setup(fit, foreign(), "fit")


def test_weights_only_checkpoints_are_refused():
    checkpoint = ModelCheckpoint(save_weights_only=True)
    with pytest.raises(HastenError, match="save_weights_only=False, got True"):
        trainer(EMA(), checkpoint, enable_checkpointing=True).fit(foreign(), loader())


def test_layers_built_in_setup_are_refused():
    module = foreign()
    module.setup = lambda stage: module.add_module("late", nn.Linear(1, 1))
    with pytest.raises(HastenError, match=r"^ema: late\.weight: expected nothing .* got \(1, 1\) float32; build"):
        trainer(EMA()).fit(module, loader())


def test_true_half_precision_is_refused():
    with pytest.raises(HastenError, match=r"expected \(3, 4\) float32 .* got \(3, 4\) bfloat16"):
        trainer(EMA(), precision="bf16-true").fit(foreign(), loader())


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"update_every_n_steps": 0}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^ema: "):
        EMA(**arguments)


def test_a_parameter_without_gradient_keeps_its_present_value_even_where_that_is_infinite():
    module = foreign()
    module.labels = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)
    trainer(EMA(0.9)).fit(module, loader())
    assert module.labels.tolist() == [0.0, -torch.inf]


def test_a_module_that_trains_experts_is_refused():
    class Experts(Foreign):
        experts, epochs, expert, epoch, form = 2, 1, 0, 0, None
        recipe = train_only = theta = load_theta = lambda self: None

    assert isinstance(Experts(), TrainsExperts)
    with pytest.raises(HastenError, match="ema: expected one network a fit, got Experts"):
        trainer(EMA(0.9)).fit(Experts(), loader())
