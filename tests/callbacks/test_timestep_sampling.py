"""TimestepSampling on modules that have never heard of it; run as a script, the two processes of the DDP test."""

import subprocess
import sys
from collections import namedtuple
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EMA, TimestepSampling
from hasten.callbacks._timestep_adapter import TimestepAdapter
from hasten.errors import HastenError
from hasten.functional.draws import generator_of
from hasten.modules import Diffusion
from hasten.nn import (
    CLTSSampler,
    LossSecondMomentSampler,
    MinSNRSampler,
    SpeeDSampler,
    TimestepSampler,
    UniformSampler,
)

# Lightning's advice, on fits without validation, and on loaders that begin an epoch anew
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{advice}")
    for advice in ("You defined a `validation_step`", "Be aware that when using", "You're resuming from", "Found . mod")
]


class Net(nn.Module):
    """The smallest denoiser that knows its timestep."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.embedding = nn.Embedding(1000, channels)

    def forward(self, x, timestep):
        return self.conv(x) + self.embedding(timestep)[:, :, None, None]


def tensor_of(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


DRAWN = [375, 273, 348, 90, 497, 267, 369, 294]
"""The timesteps of the first batch of eight by seed 0, on any machine."""


class Stranger(LightningModule):
    """Written like most diffusion training code."""

    def __init__(self, net: nn.Module | None = None):
        super().__init__()
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.net = Net() if net is None else net
        self.batches = []  # (x, noise, t) of each training batch
        self.evaluated = []  # t of each validation and test batch

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise = torch.randn_like(x)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (x.shape[0],), device=x.device)
        noisy = self.scheduler.add_noise(x, noise, t)
        loss = F.mse_loss(tensor_of(self.net(noisy, t)), noise)
        self.batches.append((x, noise, t.clone()))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(0, 1000, (x.shape[0],), generator=generator)
        noisy = self.scheduler.add_noise(x, noise, t)
        self.evaluated.append(t)
        self.log("val_loss", F.mse_loss(tensor_of(self.net(noisy, t)), noise))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)  # a step changes each weight by its gradient


class Willing(Stranger):
    """A stranger after the two-line edit."""

    def __init__(self, net: nn.Module | None = None):
        super().__init__(net)
        self.timestep_sampler = UniformSampler(1000)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise = torch.randn_like(x)
        t, w = self.timestep_sampler(len(x))
        mse = (self.net(self.scheduler.add_noise(x, noise, t), t) - noise).pow(2).mean((1, 2, 3))
        self.batches.append((x, noise, t.clone()))
        return (w * mse).mean()

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(self.timestep_sampler)

    test_step = validation_step


def foreign(**methods) -> LightningModule:
    """What the callback attaches to: a diffusion module without any trace of hasten, with some methods its own."""
    return type("Stranger", (Stranger,), methods)()


def attached(folder: Path):
    return TimestepSampling(SpeeDSampler), foreign(), loader()


def loader(batches: int = 8, batch_size: int = 8) -> DataLoader:
    images = torch.randn(batches * batch_size, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images), batch_size=batch_size)


def trainer(*callbacks: Callback, steps: int = 1, **settings) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 1} | quiet | settings
    return Trainer(callbacks=list(callbacks), max_steps=steps, **settings)


def fit(module: LightningModule, *callbacks: Callback, steps: int = 1, data: DataLoader | None = None, **settings):
    trainer(*callbacks, steps=steps, **settings).fit(module, data or loader())
    return module


def timesteps(module) -> torch.Tensor:
    return torch.cat([t for _, _, t in module.batches])


def explicit_gradients(module, before, weights, channels=None, **autocast) -> dict[str, torch.Tensor]:
    """Of the mean over batches of an explicitly weighted loss, by name, for the batches that the module saw."""
    twin = deepcopy(module.net)
    twin.load_state_dict({name.removeprefix("net."): value for name, value in before.items()})
    losses = []
    for x, noise, t in module.batches:
        with torch.autocast("cpu", enabled=bool(autocast), **autocast):
            prediction = tensor_of(twin(module.scheduler.add_noise(x, noise, t), t))
        w = weights[t].view(-1, 1, 1, 1).expand_as(prediction).clone()
        if channels is not None:
            w[:, channels:] = 1
        losses.append((w * (prediction - noise.expand_as(prediction)) ** 2).mean())
    torch.stack(losses).mean().backward()
    return {f"net.{name}": parameter.grad for name, parameter in twin.named_parameters()}


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_changed_by(module, before, gradients, tolerance=1e-6):
    for name, gradient in gradients.items():
        change = before[name] - module.state_dict()[name]
        torch.testing.assert_close(change, gradient, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def traces(module) -> tuple:
    """Everything about a module that an attachment could leave behind."""
    hooks = [
        (name, list(child._forward_hooks), list(child._forward_pre_hooks), vars(child).get("_compiled_call_impl"))
        for name, child in module.named_modules()
    ]
    return sorted(vars(module)), sorted(vars(module.scheduler)), hooks, list(module.state_dict())


# ------------------------------------------------------------------ the adapter: gradients and draws


@pytest.mark.parametrize("make", [SpeeDSampler, MinSNRSampler])
def test_adapter_gradients_are_those_of_an_explicitly_weighted_loss(make):
    module = foreign()
    before = weights_of(module)
    fit(module, TimestepSampling(make))
    assert_changed_by(module, before, explicit_gradients(module, before, make(module.scheduler).weights))


@pytest.mark.parametrize("ema_first", [True, False])
def test_gradients_are_the_same_with_ema_attached(ema_first):
    module = foreign()
    before = weights_of(module)
    callbacks = [EMA(), TimestepSampling(SpeeDSampler)]
    fit(module, *(callbacks if ema_first else reversed(callbacks)))  # the first average is the weights themselves
    assert_changed_by(module, before, explicit_gradients(module, before, SpeeDSampler(module.scheduler).weights))
    assert not module.net._forward_hooks


def test_emas_copy_of_the_module_holds_no_copy_of_the_callback():
    ema, sampling, owners = EMA(), TimestepSampling(SpeeDSampler), []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            copy = ema._average_model.module.scheduler.add_noise
            owners.append(copy is pl_module.scheduler.add_noise)

    fit(foreign(), sampling, ema, Look())
    assert owners == [True]


def test_gradients_are_the_same_under_accumulation():
    module = foreign()
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler), accumulate_grad_batches=3)
    assert len(module.batches) == 3
    assert_changed_by(module, before, explicit_gradients(module, before, SpeeDSampler(module.scheduler).weights))


def test_gradients_are_near_in_bfloat16():
    class EndsInConv(Net):
        def forward(self, x, timestep):
            prediction = self.conv(x + self.embedding(timestep)[:, :, None, None])
            kinds.append(prediction.dtype)
            return prediction

    kinds = []
    module = Stranger(EndsInConv())
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler), precision="bf16-mixed")
    weights = SpeeDSampler(module.scheduler).weights
    assert_changed_by(module, before, explicit_gradients(module, before, weights, dtype=torch.bfloat16), tolerance=1e-2)
    assert set(kinds) == {torch.bfloat16}


def test_gradients_of_a_diffusers_unet_are_those_of_an_explicitly_weighted_loss():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    module = Stranger(UNet2DModel(4, 1, 1, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **blocks))
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler))
    assert_changed_by(module, before, explicit_gradients(module, before, SpeeDSampler(module.scheduler).weights), 1e-5)


Pair = namedtuple("Pair", ["prediction", "extra"])


@pytest.mark.parametrize("wrap", [lambda y: SimpleNamespace(sample=y), lambda y: (y,), lambda y: Pair(y, None)])
def test_every_kind_of_prediction_is_weighed(wrap):
    kinds = set()

    class Wrapping(Net):
        def forward(self, x, timestep):
            return wrap(super().forward(x, timestep))

    class Noting(Wrapping):
        def __call__(self, *args):
            output = super().__call__(*args)
            kinds.add(type(output))
            return output

    module = Stranger(Noting())
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler))
    assert kinds == {type(wrap(None))}
    assert_changed_by(module, before, explicit_gradients(module, before, SpeeDSampler(module.scheduler).weights))


def test_only_the_leading_channels_are_weighed_where_asked():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        prediction = self.net(self.scheduler.add_noise(x, noise, t), t)
        self.batches.append((x, noise, t.clone()))
        return F.mse_loss(prediction, noise.expand_as(prediction))

    module = foreign(training_step=training_step)
    module.net = Net(channels=4)
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler, weighted_channels=2))
    weights = SpeeDSampler(module.scheduler).weights
    assert_changed_by(module, before, explicit_gradients(module, before, weights, channels=2))


def test_a_module_may_change_its_prediction_in_place():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        prediction = self.net(self.scheduler.add_noise(x, noise, t), t)
        prediction.sub_(noise)
        return prediction.pow(2).mean()

    fit(foreign(training_step=training_step), TimestepSampling(SpeeDSampler))


def test_the_loss_a_module_logs_stays_unweighted():
    module, sampling = foreign(), TimestepSampling(SpeeDSampler)
    host = trainer(sampling)
    before = deepcopy(module.net)
    host.fit(module, loader())
    x, noise, t = module.batches[0]
    mse = F.mse_loss(before(module.scheduler.add_noise(x, noise, t), t), noise)
    torch.testing.assert_close(host.callback_metrics["train_loss"], mse)
    torch.testing.assert_close(host.callback_metrics["sampler/mean_t"], t.float().mean())
    weights = SpeeDSampler(module.scheduler).weights[t]
    torch.testing.assert_close(host.callback_metrics["sampler/mean_weight"], weights.mean())


def p_value(t: torch.Tensor, law: torch.Tensor) -> float:
    """Of Pearson's test that draws t follow the law, in 40 bins of equal mass or so."""
    edges = torch.searchsorted(law.cumsum(0), torch.arange(1, 40, dtype=torch.float64) / 40)
    bins = torch.bucketize(torch.arange(len(law)), edges, right=True)
    expected = torch.zeros(40, dtype=torch.float64).index_add_(0, bins, law.double()) * len(t)
    counts = torch.bincount(bins[t], minlength=40).double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return 1 - torch.special.gammainc(torch.tensor(39 / 2, dtype=torch.float64), statistic / 2).item()


@pytest.mark.parametrize("weighting", ["grad", "fold", "none"])
def test_the_timesteps_of_a_fit_follow_the_law(weighting):
    module = foreign()
    sampler = SpeeDSampler(module.scheduler, mode="paper")
    fit(module, TimestepSampling(sampler, weighting=weighting), steps=2, data=loader(2, 4000))
    law = sampler.folded().probs if weighting == "fold" else sampler.probs
    other = sampler.probs if weighting == "fold" else sampler.folded().probs
    assert p_value(timesteps(module), law) > 1e-4
    assert p_value(timesteps(module), other) < 1e-4


@pytest.mark.parametrize("weighting", ["fold", "none"])
def test_without_weighing_the_gradients_are_those_of_the_plain_loss(weighting):
    module = foreign()
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler, weighting=weighting))
    assert_changed_by(module, before, explicit_gradients(module, before, torch.ones(1000)))


def test_a_curriculum_moves_on_with_the_optimizer_steps():
    module = foreign()
    sampler = CLTSSampler(module.scheduler, std=0.1, mean=300, ramp_steps=2)
    fit(module, TimestepSampling(sampler, weighting="fold"), steps=3)
    assert module.batches[0][2].unique().numel() > 1
    assert module.batches[2][2].unique().tolist() == [300]


def test_a_curriculum_waits_for_the_steps_of_accumulated_batches():
    module = foreign()
    sampler = CLTSSampler(module.scheduler, std=0.1, mean=300, ramp_steps=2)
    fit(module, TimestepSampling(sampler, weighting="fold"), steps=3, accumulate_grad_batches=2)
    assert [t.unique().tolist() == [300] for _, _, t in module.batches] == [False] * 4 + [True] * 2


def test_the_timesteps_are_those_of_the_sampler_under_the_seed():
    module = fit(foreign(), TimestepSampling(SpeeDSampler, seed=0))
    assert timesteps(module).tolist() == DRAWN


def test_without_a_seed_the_global_one_decides():
    first, again, other = foreign(), foreign(), foreign()
    for module, seed in ((first, 1), (again, 1), (other, 2)):
        torch.manual_seed(seed)
        fit(module, TimestepSampling(SpeeDSampler), steps=2)
    assert torch.equal(timesteps(first), timesteps(again))
    assert not torch.equal(timesteps(first), timesteps(other))


def test_velocity_reads_the_same_draw_whichever_is_called_first():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        velocity = self.scheduler.get_velocity(x, noise, t)
        noisy = self.scheduler.add_noise(x, noise, t)
        abar = self.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        torch.testing.assert_close(velocity, abar.sqrt() * noise - (1 - abar).sqrt() * x)
        self.batches.append((x, noise, t.clone()))
        return F.mse_loss(self.net(noisy, t), velocity)

    module = fit(foreign(training_step=training_step), TimestepSampling(SpeeDSampler, seed=0))
    assert timesteps(module).tolist() == DRAWN


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_timesteps_of_any_integer_width_are_rewritten(dtype):
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), dtype=dtype)
        loss = F.mse_loss(self.net(timestep=t, x=self.scheduler.add_noise(noise=noise, original_samples=x, timesteps=t)), noise)  # fmt: skip  # noqa: E501
        self.batches.append((x, noise, t.clone()))
        return loss

    module = foreign(training_step=training_step)
    module.scheduler.add_noise(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    fit(module, TimestepSampling(SpeeDSampler, seed=0))
    assert timesteps(module).tolist() == DRAWN
    assert timesteps(module).dtype == dtype


def test_previews_without_gradients_are_left_alone():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        noisy = self.scheduler.add_noise(x, noise, t)
        with torch.no_grad():
            self.net(torch.cat([noisy, noisy]), torch.zeros(2 * len(x), dtype=torch.int64))
        self.batches.append((x, noise, t.clone()))
        return F.mse_loss(self.net(noisy, t), noise)

    module = foreign(training_step=training_step)
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler))
    assert_changed_by(module, before, explicit_gradients(module, before, SpeeDSampler(module.scheduler).weights))


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.enable_grad])
def test_noise_may_be_added_without_gradients_and_again_for_a_preview(quiet):
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        with quiet():
            noisy = self.scheduler.add_noise(x, noise, t)
        with torch.no_grad():
            late = torch.full((2,), 999)
            self.net(self.scheduler.add_noise(x[:2], noise[:2], late), late)
            assert late.tolist() == [999, 999]
        self.batches.append((x, noise, t.clone()))
        return F.mse_loss(self.net(noisy, t), noise)

    module = foreign(training_step=training_step)
    before = weights_of(module)
    fit(module, TimestepSampling(SpeeDSampler, seed=0))
    assert timesteps(module).tolist() == DRAWN
    assert_changed_by(module, before, explicit_gradients(module, before, SpeeDSampler(module.scheduler).weights))


@pytest.mark.parametrize("compiled", ["outer", "in place", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_compiled_module_is_weighed(compiled):
    torch._dynamo.reset()
    module = foreign()
    before = weights_of(module)
    plain = deepcopy(module.net)
    target = module
    if compiled == "outer":
        module.net = torch.compile(module.net, backend="eager")
        module.net(torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64))  # a hook inside would come too late
    elif compiled == "in place":
        module.net.compile(backend="eager", fullgraph=True)
    else:
        target = torch.compile(module, backend="eager")
    found = traces(module)
    fit(target, TimestepSampling(SpeeDSampler))
    assert traces(module)[1:] == found[1:]
    reference = SimpleNamespace(net=plain, scheduler=module.scheduler, batches=module.batches)
    gradients = explicit_gradients(reference, before, SpeeDSampler(module.scheduler).weights)
    after = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    assert_changed_by(SimpleNamespace(state_dict=lambda: after), before, gradients)


def test_after_the_first_batch_nothing_waits_for_the_device():
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read.append(function is torch.ops.aten._local_scalar_dense.default)
            return function(*args, **(kwargs or {}))

    module = foreign()
    module.log = lambda *_: None
    adapter = TimestepAdapter(SpeeDSampler(module.scheduler), module, module.scheduler, module.net)
    for reads in (True, False):
        read.clear()
        adapter.start()
        with Reads():
            module.training_step([torch.randn(8, 1, 4, 4)], 0).backward()
        adapter.stop(skipped=False)
        assert len(read) > 10
        assert any(read) == reads


# ------------------------------------------------------------------ the protocol


def test_the_protocol_draws_and_weighs_by_the_given_sampler():
    module = Willing()
    before = weights_of(module)
    sampler = SpeeDSampler(module.scheduler)
    fit(module, TimestepSampling(sampler, seed=0))
    assert timesteps(module).tolist() == DRAWN
    assert_changed_by(module, before, explicit_gradients(module, before, sampler.weights))
    assert not sampler._forward_hooks


def test_the_protocol_leaves_evaluation_its_own_sampler():
    module, data = Willing(), loader(2)
    own = module.timestep_sampler
    host = trainer(TimestepSampling(SpeeDSampler), EMA(), steps=4, val_check_interval=1)
    host.fit(module, data, data)
    host.test(module, data, verbose=False)
    assert len(module.evaluated) > 4
    assert all(sampler is own for sampler in module.evaluated)


def test_the_adapter_may_be_asked_for_where_the_protocol_is_offered():
    module = Willing()
    before = weights_of(module)
    sampler = SpeeDSampler(module.scheduler)
    fit(module, TimestepSampling(sampler, attach="adapter"))
    gradients = explicit_gradients(module, before, sampler.weights)
    assert_changed_by(module, before, gradients)


def test_hastens_own_diffusion_takes_the_protocol():
    module = Diffusion(Net(), DDPMScheduler())
    labelled = TensorDataset(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64))
    sampling = TimestepSampling(LossSecondMomentSampler)
    fit(module, sampling, data=DataLoader(labelled, batch_size=8))
    assert sampling.state_dict()["sampler"]["seen"].sum() == 8
    assert isinstance(module.timestep_sampler, UniformSampler)


def test_a_sampler_that_is_a_plain_function_comes_back_after_the_fit():
    def own(n):
        return torch.zeros(n, dtype=torch.int64), torch.ones(n)

    module = Willing()
    del module.timestep_sampler
    module.timestep_sampler = own
    fit(module, TimestepSampling(SpeeDSampler))
    assert module.timestep_sampler is own
    assert timesteps(module).any()


# ------------------------------------------------------------------ what must not change


def test_validation_sanity_check_and_test_draw_as_ever():
    plain, attached, data = foreign(), foreign(), loader(2)
    for module, callbacks in ((plain, []), (attached, [TimestepSampling(UniformSampler)])):
        host = trainer(*callbacks, steps=2, val_check_interval=1, num_sanity_val_steps=2)
        host.fit(module, data, data)
        host.validate(module, data, verbose=False)
        host.test(module, data, verbose=False)
    assert len(attached.evaluated) == 2 + 2 * 2 + 2 + 2
    assert all(torch.equal(a, b) for a, b in zip(plain.evaluated, attached.evaluated, strict=True))


def test_gradients_of_a_validation_are_not_weighed():
    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            Stranger.training_step(self, batch, batch_idx).backward()
        self.norms.append(self.net.conv.weight.grad.norm())
        self.zero_grad()

    module = foreign(validation_step=validation_step)
    module.norms = []
    nothing = TimestepSampler(torch.ones(1000), torch.zeros(1000))
    trainer(TimestepSampling(nothing), inference_mode=False, val_check_interval=1).fit(module, loader(), loader(1))
    assert len(module.norms) == 2
    assert all(norm > 0 for norm in module.norms)


@pytest.mark.parametrize("make", [foreign, Willing])
def test_nothing_stays_after_one_fit_or_two(make):
    module = make()
    fit(module)  # Lightning leaves traces of its own
    found, sampling = traces(module), TimestepSampling(SpeeDSampler)
    for _ in range(2):
        fit(module, sampling, EMA())
        assert traces(module) == found
    fit(module)
    assert len(module.batches) == 4


@pytest.mark.parametrize("make", [foreign, Willing])
@pytest.mark.parametrize("hook", ["on_before_backward", "on_train_start", "on_validation_start", "setup"])
def test_nothing_stays_after_an_exception(make, hook):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of luck")

    module = make()
    fit(module)
    found, sampling = traces(module), TimestepSampling(SpeeDSampler)
    host = trainer(sampling, type("Failing", (Callback,), {hook: fail})(), steps=3, val_check_interval=1)
    with pytest.raises(RuntimeError, match="out of luck"):
        host.fit(module, loader(), loader(1))
    assert traces(module) == found
    fit(module, sampling)
    assert traces(module) == found


def test_undoing_needs_no_setup_and_may_be_repeated():
    module, sampling, host = foreign(), TimestepSampling(SpeeDSampler), trainer()
    found = traces(module)
    sampling.teardown(host, module, "fit")
    sampling.setup(host, module, "fit")
    assert traces(module) != found
    sampling.on_exception(host, module, RuntimeError())
    sampling.teardown(host, module, "fit")
    assert traces(module) == found


def test_a_test_without_a_fit_attaches_nothing():
    module, sampling = foreign(), TimestepSampling(SpeeDSampler)
    trainer(sampling).test(module, loader(1), verbose=False)
    assert sampling.state_dict() == {}


# ------------------------------------------------------------------ guards


def refusal(module, sampling: TimestepSampling, **settings) -> str:
    """The one line with which a fit is refused; nothing may stay behind."""
    before = sorted(vars(module.scheduler)) if hasattr(module, "scheduler") else None
    with pytest.raises(HastenError) as error:
        fit(module, sampling, **settings)
    if before is not None:
        assert sorted(vars(module.scheduler)) == before
    assert not any(child._forward_hooks for child in module.modules())
    message = str(error.value)
    assert message.startswith("timestep_sampling: ")
    assert "\n" not in message
    return message


def test_no_scheduler_is_refused():
    module = foreign()
    del module.scheduler
    message = refusal(module, TimestepSampling(SpeeDSampler))
    assert "scheduler: expected one in Stranger, with add_noise and betas, got none; pass noise_scheduler=" in message


def test_a_scheduler_out_of_sight_is_refused_with_what_would_help():
    module = foreign()
    module.parts = {"scheduler": module.scheduler}
    del module.scheduler
    help = "dots allowed; keep it as an attribute"
    assert "got none; pass noise_scheduler='<attribute>', " + help in refusal(module, TimestepSampling(SpeeDSampler))
    message = refusal(module, TimestepSampling(SpeeDSampler, noise_scheduler="parts.scheduler"))
    assert "expected an attribute of Stranger, got 'parts.scheduler'; " + help in message


def test_several_schedulers_are_refused_until_one_is_named():
    module = foreign()
    module.sampling_scheduler = DDIMScheduler(num_train_timesteps=1000)
    assert "got scheduler, sampling_scheduler; pass noise_scheduler=" in refusal(module, TimestepSampling(SpeeDSampler))
    fit(module, TimestepSampling(SpeeDSampler, noise_scheduler="scheduler"))


def test_one_scheduler_by_two_names_is_one():
    module = foreign()
    module.noise_scheduler = module.scheduler
    fit(module, TimestepSampling(SpeeDSampler))


def test_no_denoiser_is_refused():
    class Plain(Net):
        def forward(self, x, t):
            return super().forward(x, t)

    message = refusal(Stranger(Plain()), TimestepSampling(SpeeDSampler))
    assert "denoiser: expected one in Stranger" in message
    assert "got none; pass denoiser=" in message
    fit(Stranger(Plain()), TimestepSampling(SpeeDSampler, denoiser="net"))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_traced_child_whose_forward_has_no_signature_is_no_denoiser():
    module = foreign()
    module.teacher = torch.jit.trace(nn.Identity(), torch.zeros(1))
    fit(module, TimestepSampling(SpeeDSampler))


def test_several_denoisers_are_refused_until_one_is_named():
    module = foreign()
    module.teacher = Net()
    assert "got net, teacher; pass denoiser=" in refusal(module, TimestepSampling(SpeeDSampler))
    fit(module, TimestepSampling(SpeeDSampler, denoiser="net"))


def test_dotted_names_are_followed():
    def training_step(self, batch, batch_idx):
        self.scheduler, self.net = self.parts.scheduler, self.parts.net
        loss = Stranger.training_step(self, batch, batch_idx)
        del self.scheduler, self.net
        return loss

    module = foreign(training_step=training_step)
    module.parts = nn.Module()
    module.parts.scheduler, module.parts.net = module.scheduler, module.net
    del module.scheduler, module.net
    fit(module, TimestepSampling(SpeeDSampler, noise_scheduler="parts.scheduler", denoiser="parts.net", seed=0))
    assert timesteps(module).tolist() == DRAWN


def test_a_misspelt_name_is_refused_with_the_nearest():
    message = refusal(foreign(), TimestepSampling(SpeeDSampler, noise_scheduler="schedular"))
    assert "scheduler: expected an attribute of Stranger, got 'schedular'; did you mean 'scheduler'?" in message
    assert "got 'nett'; did you mean 'net'?" in refusal(foreign(), TimestepSampling(SpeeDSampler, denoiser="nett"))
    assert "to be an nn.Module, got list" in refusal(foreign(), TimestepSampling(SpeeDSampler, denoiser="batches"))


def test_a_module_that_adds_its_noise_itself_is_refused():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        return self.net(x, torch.randint(0, 1000, (len(x),))).mean()

    module = foreign(training_step=training_step)
    assert "attach='protocol'" in refusal(module, TimestepSampling(SpeeDSampler))
    message = refusal(module, TimestepSampling(SpeeDSampler, weighting="none"))
    assert "add_noise: expected the scheduler to be called in a training batch, got no call" in message


@pytest.mark.parametrize("make", [foreign, Willing])
def test_a_skipped_first_batch_leaves_the_proof_to_the_next(make):
    module = make()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) if batch_idx else None
    sampling = TimestepSampling(SpeeDSampler, attach="protocol" if make is Willing else "adapter")
    trainer(sampling, steps=2, max_epochs=1).fit(module, loader(2))
    assert len(module.batches) == 1

    module = foreign(training_step=lambda self, batch, batch_idx: self.net.conv(batch[0]).mean() if batch_idx else None)
    module.timestep_sampler = UniformSampler(1000)
    assert "got no call" in refusal(module, sampling, steps=2)


@pytest.mark.parametrize("attach", ["adapter", "protocol"])
def test_a_step_that_optimizes_by_hand_is_not_taken_for_a_skipped_batch(attach):
    module = foreign(training_step=lambda self, batch, batch_idx: None)
    module.timestep_sampler = UniformSampler(1000)
    module.automatic_optimization = False
    assert "got no call" in refusal(module, TimestepSampling(SpeeDSampler, attach=attach))


def with_timesteps(draw):
    """A training step that gives the scheduler what ``draw(n)`` returns."""

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), draw(len(x))
        return F.mse_loss(self.net(self.scheduler.add_noise(x, noise, t), t), noise)

    return training_step


def in_inference_mode(n):
    with torch.inference_mode():
        return torch.randint(0, 1000, (n,))


@pytest.mark.parametrize(
    ("draw", "got"),
    [
        (lambda n: torch.rand(n) * 999, "got float32 of shape (8,)"),
        (lambda n: torch.tensor(7), "got int64 of shape ()"),
        (lambda n: torch.randint(0, 1000, (1,)), "got int64 of shape (1,)"),
        (lambda n: torch.randint(0, 1000, (n, 1)), "got int64 of shape (8, 1)"),
        (lambda n: torch.randint(0, 1000, (1,)).expand(n), "got an expanded view of one number"),
        (in_inference_mode, "got a tensor made in inference mode"),
        (lambda n: 7, "got int"),
    ],
)
def test_timesteps_that_cannot_be_rewritten_are_refused(draw, got):
    module = foreign(training_step=with_timesteps(draw))
    message = refusal(module, TimestepSampling(SpeeDSampler))
    assert "add_noise: timesteps: expected integers of shape (8,) that can be rewritten in place, " + got in message


@pytest.mark.parametrize("part", [slice(None), slice(8)], ids=["whole", "view"])
def test_timesteps_that_the_module_owns_are_refused_and_stay(part):
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noisy = self.scheduler.add_noise(x, x, self.t_fixed[part])
        return self.net(noisy, self.t_fixed[part]).mean()

    module = foreign(training_step=training_step)
    module.register_buffer("t_fixed", torch.arange(8 if part == slice(None) else 9))
    message = refusal(module, TimestepSampling(SpeeDSampler))
    assert "got memory of Stranger's own t_fixed, which would be overwritten; pass a copy (t.clone())" in message
    assert torch.equal(module.t_fixed, torch.arange(len(module.t_fixed)))


@pytest.mark.parametrize("second", ["add_noise", "get_velocity"])
def test_a_second_tensor_of_timesteps_in_one_batch_is_refused(second):
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        self.scheduler.add_noise(x, noise, t)
        return getattr(self.scheduler, second)(x, noise, torch.randint(0, 1000, (len(x),)))

    message = refusal(foreign(training_step=training_step), TimestepSampling(SpeeDSampler))
    assert f"{second}: expected the timesteps of the first call in this batch, got another tensor" in message
    assert "two loaders in one step, or an optimizer such as LBFGS" in message


@pytest.mark.parametrize("weighting", ["grad", "fold"])
def test_a_second_part_of_the_training_batch_is_no_preview(weighting):
    def training_step(self, batch, batch_idx):
        (x,) = batch
        losses = []
        for _ in range(2):
            noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
            with torch.no_grad():
                noisy = self.scheduler.add_noise(x, noise, t)
            losses.append(F.mse_loss(self.net(noisy, t), noise))
        return sum(losses)

    message = refusal(foreign(training_step=training_step), TimestepSampling(SpeeDSampler, weighting=weighting))
    assert ("given the timesteps that add_noise was given" if weighting == "grad" else "got another tensor") in message


@pytest.mark.parametrize("given", [lambda t: t / 1000, lambda t: t.clone()], ids=["scaled", "copied"])
def test_a_denoiser_that_is_given_other_timesteps_is_refused(given):
    class Loose(Net):
        def forward(self, x, timestep):
            return self.conv(x)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        early = given(t)
        return F.mse_loss(self.net(self.scheduler.add_noise(x, noise, t), early), noise)

    module = foreign(training_step=training_step)
    module.net = Loose()
    message = refusal(module, TimestepSampling(SpeeDSampler))
    assert "denoiser: expected to be given the timesteps that add_noise was given, got others" in message


def test_timesteps_in_another_dtype_or_shape_are_the_same_timesteps():
    class Loose(Net):
        def forward(self, x, timestep):
            return self.conv(x) + timestep["t"].float() / 1000

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        noisy = self.scheduler.add_noise(x, noise, t)
        return F.mse_loss(self.net(noisy, {"t": t.view(-1, 1, 1, 1).bfloat16()}), noise)

    module = foreign(training_step=training_step)
    module.net = Loose()
    fit(module, TimestepSampling(SpeeDSampler))


def test_predictions_of_another_batch_size_are_refused():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        noisy = self.scheduler.add_noise(x, noise, t)
        both = self.net(torch.cat([noisy, noisy]), torch.cat([t, t]))
        return both.mean()

    class Doubling(Net):
        def forward(self, x, timestep):
            return super().forward(x, timestep).repeat(2, 1, 1, 1)

    message = refusal(Stranger(Doubling()), TimestepSampling(SpeeDSampler))
    assert "denoiser: expected predictions for the 8 samples given to add_noise, got shape (16, 1, 4, 4)" in message
    refusal(foreign(training_step=training_step), TimestepSampling(SpeeDSampler))


def test_a_batch_in_parts_is_refused_and_folding_serves_it():
    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        noisy = self.scheduler.add_noise(x, noise, t)
        return F.mse_loss(torch.cat([self.net(noisy[:4], t[:4]), self.net(noisy[4:], t[4:])]), noise)

    message = refusal(foreign(training_step=training_step), TimestepSampling(SpeeDSampler))
    assert (
        "expected predictions for the 8 samples given to add_noise, got shape (4, 1, 4, 4); pass weighting='fold'"
        in (message)
    )
    fit(foreign(training_step=training_step), TimestepSampling(SpeeDSampler, weighting="fold"))


def test_an_unusual_output_is_refused_and_folding_serves_it():
    class Unusual(Net):
        def forward(self, x, timestep):
            return {"eps": super().forward(x, timestep)}

    class Reading(Stranger):
        def training_step(self, batch, batch_idx):
            (x,) = batch
            noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
            return F.mse_loss(self.net(self.scheduler.add_noise(x, noise, t), t)["eps"], noise)

    message = refusal(Reading(Unusual()), TimestepSampling(SpeeDSampler))
    assert "a tuple led by a tensor, got dict; pass weighting='fold'" in message
    fit(Reading(Unusual()), TimestepSampling(SpeeDSampler, weighting="fold"))


@pytest.mark.parametrize("call", ["forward", "inner"])
def test_a_denoiser_whose_hook_never_fires_is_refused(call):
    torch._dynamo.reset()

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        noisy = self.scheduler.add_noise(x, noise, t)
        prediction = self.net.forward(noisy, t) if call == "forward" else self.fast(noisy, t)
        return F.mse_loss(prediction, noise)

    module = foreign(training_step=training_step)
    if call == "inner":
        module.fast = torch.compile(deepcopy(module.net), backend="eager")
    message = refusal(module, TimestepSampling(SpeeDSampler, denoiser="net"))
    assert "denoiser: expected the training batch to call Net, got no call that its hooks see" in message


def test_too_many_weighted_channels_are_refused():
    message = refusal(foreign(), TimestepSampling(SpeeDSampler, weighted_channels=2))
    assert "weighted_channels: expected at most 1, those of the denoiser's prediction, got 2" in message


@pytest.mark.parametrize("make", [foreign, Willing])
def test_a_sampler_for_another_number_of_timesteps_is_refused(make):
    sampler = UniformSampler(500)
    message = refusal(make(), TimestepSampling(sampler))
    assert "sampler: expected T = 1000 as in the module's scheduler, got 500" in message


def test_a_scheduler_without_alphas_cumprod_is_refused():
    module = foreign()
    del module.scheduler.alphas_cumprod
    message = refusal(module, TimestepSampling(UniformSampler(1000)))
    assert "scheduler: expected add_noise and alphas_cumprod over integer timesteps, got DDPMScheduler" in message
    module.flow = FlowMatchEulerDiscreteScheduler()
    assert "got FlowMatch" in refusal(module, TimestepSampling(UniformSampler(1000), noise_scheduler="flow"))


def test_a_scheduler_with_other_arguments_is_refused():
    class Custom:
        betas = torch.linspace(1e-4, 0.02, 1000)
        alphas_cumprod = torch.cumprod(1 - betas, 0)

        def add_noise(self, x, t):
            return x

    module = foreign()
    module.scheduler = Custom()
    message = refusal(module, TimestepSampling(SpeeDSampler))
    assert "scheduler: expected add_noise(samples, noise, timesteps), got add_noise(x, t)" in message


@pytest.mark.parametrize("make", [foreign, Willing])
def test_a_module_with_an_attachment_is_refused(make):
    module, first = make(), TimestepSampling(SpeeDSampler)
    host = trainer()
    first.setup(host, module, "fit")
    first.on_train_batch_start(host, module, None, 0)
    second = TimestepSampling(SpeeDSampler)
    with pytest.raises(HastenError, match="another TimestepSampling"):
        second.setup(host, module, "fit")
    second.on_exception(host, module, RuntimeError())
    first.teardown(host, module, "fit")
    second.setup(host, module, "fit")
    second.teardown(host, module, "fit")


def test_the_protocol_asked_of_a_module_without_it_is_refused():
    message = refusal(foreign(), TimestepSampling(SpeeDSampler, attach="protocol"))
    assert "attach: expected Stranger to have a callable timestep_sampler, got none" in message


def test_a_module_that_never_asks_its_timestep_sampler_is_refused():
    module = foreign()
    module.timestep_sampler = UniformSampler(1000)
    assert "expected the training batch to call self.timestep_sampler, got no call" in refusal(
        module, TimestepSampling(SpeeDSampler)
    )


@pytest.mark.parametrize("setting", [{"weighting": "fold"}, {"denoiser": "net"}, {"weighted_channels": 1}])
def test_settings_of_the_adapter_are_refused_by_the_protocol(setting):
    message = refusal(Willing(), TimestepSampling(SpeeDSampler, **setting))
    assert "by the protocol, in which Willing weighs its own loss" in message


def test_a_sampler_that_needs_losses_is_refused_by_the_adapter():
    message = refusal(foreign(), TimestepSampling(LossSecondMomentSampler))
    assert "sampler: expected one that needs no losses, got LossSecondMomentSampler" in message
    fit(Willing(), TimestepSampling(LossSecondMomentSampler))


def test_what_makes_no_sampler_is_refused():
    assert "sampler: expected a function that returns a TimestepSampler, got int" in refusal(
        foreign(), TimestepSampling(lambda scheduler: 1000)
    )
    with pytest.raises(TypeError, match="sampler: expected a TimestepSampler or a function of the noise scheduler"):
        TimestepSampling(1000)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"attach": "patch"}, "attach: expected one of auto, protocol, adapter, got 'patch'"),
        ({"weighting": "loss"}, "weighting: expected one of grad, fold, none, got 'loss'"),
        ({"weighted_channels": 0}, "weighted_channels: expected >= 1 or None, got 0"),
        ({"weighting": "fold", "denoiser": "net"}, "weighting: expected 'grad' with denoiser= or weighted_channels="),
    ],
)
def test_bad_arguments_are_refused_at_once(setting, message):
    with pytest.raises(ValueError, match=message):
        TimestepSampling(SpeeDSampler, **setting)


# ------------------------------------------------------------------ resuming


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("make", [foreign, Willing])
@pytest.mark.parametrize("batches", [4, 3], ids=["mid-epoch", "between epochs"])
def test_three_steps_and_three_more_draw_the_timesteps_of_six(make, batches, tmp_path):
    whole, first, second = make(), make(), make()

    def go(module, steps, *callbacks, **where):
        saving = {"enable_checkpointing": True} if callbacks else {}
        host = trainer(TimestepSampling(SpeeDSampler, seed=7), *callbacks, steps=steps, **saving)
        host.fit(module, loader(batches), weights_only=True, **where)

    go(whole, 6)
    go(first, 3, every_step(tmp_path))
    go(second, 6, ckpt_path=tmp_path / "step=3.ckpt")
    assert torch.equal(timesteps(whole), torch.cat([timesteps(first), timesteps(second)]))


def test_what_a_sampler_has_seen_is_resumed(tmp_path):
    class Telling(Willing):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            t = self.batches[-1][2]
            self.timestep_sampler.update(t, torch.ones(len(t)))
            return loss

    fit(Telling(), TimestepSampling(LossSecondMomentSampler), every_step(tmp_path), steps=2, enable_checkpointing=True)
    sampling = TimestepSampling(LossSecondMomentSampler)
    trainer(sampling, steps=3).fit(Telling(), loader(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert sampling.state_dict()["sampler"]["seen"].sum() == 3 * 8


@pytest.mark.parametrize(
    ("processes", "device", "is_of"), [(2, "cpu", "2 processes on cpu"), (1, "cuda", "1 processes on cuda")]
)
def test_a_checkpoint_of_other_processes_reseeds_with_one_warning(processes, device, is_of, tmp_path):
    fit(foreign(), TimestepSampling(SpeeDSampler, seed=0), every_step(tmp_path), steps=2, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    checkpoint["callbacks"]["TimestepSampling"]["generators"] *= processes
    checkpoint["callbacks"]["TimestepSampling"]["device"] = device
    torch.save(checkpoint, tmp_path / "other.ckpt")
    module, sampling = foreign(), TimestepSampling(SpeeDSampler, seed=0)
    with pytest.warns(UserWarning, match=f"the checkpoint is of {is_of}, this run has 1 on cpu") as caught:
        trainer(sampling, steps=3).fit(module, loader(), ckpt_path=tmp_path / "other.ckpt", weights_only=True)
    assert sum("timestep_sampling" in str(warning.message) for warning in caught) == 1
    expected = SpeeDSampler(module.scheduler).sample(8, generator_of(0, 0, 2))  # seed, rank, step
    assert torch.equal(timesteps(module), expected)


def test_a_run_that_began_without_goes_on_with_the_seed_of_its_step(tmp_path):
    fit(foreign(), every_step(tmp_path), steps=2, enable_checkpointing=True)
    module = foreign()
    host = trainer(TimestepSampling(SpeeDSampler, seed=0), steps=3)
    host.fit(module, loader(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    expected = SpeeDSampler(module.scheduler).sample(8, generator_of(0, 0, 2))  # seed, rank, step
    assert torch.equal(timesteps(module), expected)


def test_a_second_fit_does_not_take_up_an_old_checkpoint(tmp_path):
    sampling = TimestepSampling(SpeeDSampler, seed=0)
    fit(foreign(), sampling, every_step(tmp_path), steps=2, enable_checkpointing=True)
    trainer(sampling, steps=3).fit(foreign(), loader(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    module = fit(foreign(), sampling)
    assert timesteps(module).tolist() == DRAWN


def two_processes(folder: Path) -> None:
    """On each rank: four steps; two steps, saved; two more from there. Writes the timesteps of each."""

    def go(steps, *callbacks, **where):
        module = foreign()
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
        host = trainer(TimestepSampling(SpeeDSampler, seed=5), *callbacks, steps=steps, **settings)
        host.fit(module, loader(), weights_only=True, **where)
        return timesteps(module), host.global_rank

    whole, rank = go(4)
    first, _ = go(2, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2))
    second, _ = go(4, ckpt_path=folder / "step=2.ckpt")
    torch.save({"whole": whole, "parts": torch.cat([first, second])}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_draw_differently_and_each_resumes_its_own(tmp_path):
    words = [sys.executable, __file__, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not torch.equal(ranks[0]["whole"], ranks[1]["whole"])
    for rank in ranks:
        assert torch.equal(rank["whole"], rank["parts"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    two_processes(Path(sys.argv[1]))
