import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    UniPCMultistepScheduler,
)
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten.check import build
from hasten.errors import HastenError
from hasten.functional import noise_zones
from hasten.modules import Diffusion
from hasten.nn import (
    LinearSkip,
    LossSecondMomentSampler,
    SpeeDSampler,
    TimestepSampler,
    UniformSampler,
    alphas_cumprod,
    unet,
)
from hasten.nn.protocols import GeneratesImages, HasPictures
from hasten.run import compose

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

# Lightning's advice on loaders, and numpy's to diffusers
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|logging interval|no `val_dataloader`|recommended to use|isinstance.treespec)",
    "ignore:__array__ implementation:DeprecationWarning",
)

T = 20


class Denoiser(nn.Module):
    """Smallest denoiser that depends on everything it is given, and remembers the labels."""

    def __init__(self, classes: int | None = 3):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.label = nn.Embedding(classes + 1, 1) if classes is not None else None
        self.seen: list[torch.Tensor] = []

    def forward(self, x, t, class_labels=None):
        out = self.scale * x + t.view(-1, 1, 1, 1) / T
        if self.label is None:
            return out
        self.seen.append(class_labels)
        return out + self.label(class_labels).view(-1, 1, 1, 1)


def schedule(**kwargs):
    return DDPMScheduler(T, beta_start=0.01, beta_end=0.5, **kwargs)


def diffusion(classes=3, **kwargs):
    kwargs = {"noise_scheduler": schedule(), "val_timesteps": 10, "val_stride": 2, "sample_steps": 5, **kwargs}
    return Diffusion(kwargs.pop("model", Denoiser(classes)), num_classes=classes, image_shape=(1, 2, 2), **kwargs)


def images(n=11):
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1, torch.arange(n) % 3


def loader(batch_size, n=11):
    return DataLoader(TensorDataset(*images(n)), batch_size=batch_size)


def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **kwargs})


def logged(module):
    """What training_step logs, without a trainer."""
    values = {}
    module.log = lambda name, value, **kwargs: values.__setitem__(name, float(torch.as_tensor(value).detach()))
    return values


# ------------------------------------------------------------------ training


def slow_target(kind, x0, noise, abar):
    if kind == "v_prediction":
        return abar**0.5 * noise - (1 - abar) ** 0.5 * x0
    return noise if kind == "epsilon" else x0


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_weighted_mean_of_per_sample_errors(kind):
    scheduler = schedule(prediction_type=kind)
    sampler = TimestepSampler(torch.ones(T), torch.linspace(0.2, 2, T))
    module = diffusion(noise_scheduler=scheduler, timestep_sampler=sampler, class_dropout=0.0)
    values, (x0, labels) = logged(module), images(5)
    torch.manual_seed(3)
    loss = module.training_step((x0, labels), 0)

    torch.manual_seed(3)
    t = torch.multinomial(torch.ones(T), 5, replacement=True)
    noise = torch.randn_like(x0)
    errors, weights = [], []
    for i in range(5):
        abar = torch.prod(1 - scheduler.betas[: t[i] + 1])
        noisy = abar**0.5 * x0[i] + (1 - abar) ** 0.5 * noise[i]
        out = 0.5 * noisy + t[i] / T + module.model.label.weight[labels[i]]
        errors.append((out - slow_target(kind, x0[i], noise[i], abar)).square().mean())
        weights.append(0.2 + 1.8 * t[i] / (T - 1))
    errors, weights = torch.stack(errors), torch.stack(weights)
    torch.testing.assert_close(loss, (weights * errors).mean())
    assert values["train/loss"] == pytest.approx((weights * errors).mean().item(), rel=1e-5)
    assert values["train/mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert values["sampler/mean_t"] == pytest.approx(t.float().mean().item())
    assert values["sampler/mean_weight"] == pytest.approx(weights.mean().item(), rel=1e-5)


def test_labels_are_dropped_once_a_batch_to_the_id_after_the_last_class():
    module = diffusion(class_dropout=0.25)
    logged(module)
    labels = torch.arange(4000) % 3
    module.training_step((torch.zeros(4000, 1, 2, 2), labels), 0)
    (seen,) = module.model.seen
    dropped = seen == 3
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_an_unconditional_model_takes_images_with_or_without_labels():
    module = diffusion(classes=None)
    logged(module)
    x0, labels = images(4)
    for batch in ((x0, labels), (x0,), x0):
        assert module.training_step(batch, 0).isfinite()


def test_the_sampler_is_told_the_step_and_the_unweighted_errors():
    class Listening(TimestepSampler):
        def __init__(self):
            super().__init__(torch.ones(T), torch.full((T,), 0.3))
            self.steps = []

        def step(self, global_step):
            self.steps.append(global_step)

        def update(self, t, per_sample_loss):
            self.heard = t, per_sample_loss

    module = diffusion(timestep_sampler=Listening())
    fit = trainer(max_steps=3, log_every_n_steps=1)
    fit.fit(module, loader(4, n=4))
    assert module.timestep_sampler.steps == [0, 1, 2]
    t, losses = module.timestep_sampler.heard
    assert t.shape == losses.shape == (4,)
    assert not losses.requires_grad
    assert losses.mean().item() == pytest.approx(fit.callback_metrics["train/mse"].item())


def test_the_sampler_defaults_to_uniform_and_is_built_for_the_schedule():
    assert isinstance(diffusion().timestep_sampler, UniformSampler)
    speed = Diffusion(Denoiser(None), DDPMScheduler(), SpeeDSampler).timestep_sampler
    assert speed.tau == 700


def test_nothing_of_the_sampler_enters_the_state_dict():
    assert all(name.startswith("model.") for name in diffusion().state_dict())


def test_a_resumed_run_has_the_samplers_state(tmp_path):
    def fresh():
        return diffusion(timestep_sampler=lambda noise_scheduler: LossSecondMomentSampler(noise_scheduler, history=1))

    path, module = tmp_path / "last.ckpt", fresh()
    fit = trainer(max_steps=60)
    fit.fit(module, loader(11))
    fit.save_checkpoint(path)
    assert module.timestep_sampler.probs.std() > 0, "expected a law that has moved away from the uniform one"
    resumed = fresh()
    trainer(max_steps=60).fit(resumed, loader(11), ckpt_path=path, weights_only=True)
    torch.testing.assert_close(resumed.timestep_sampler.probs, module.timestep_sampler.probs)


@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_run_draws_other_noise_and_timesteps_than_its_first_steps(own, tmp_path):
    def fit(max_steps, ckpt_path=None):
        """The noisy images and timesteps of every step."""
        torch.manual_seed(5)
        module, drawn = diffusion(), []
        if own:
            module.timestep_sampler.generator = torch.Generator().manual_seed(6)
        module.model.register_forward_hook(lambda model, args, out: drawn.append(args[:2]))
        run = trainer(max_steps=max_steps)
        run.fit(module, loader(64, n=64), ckpt_path=ckpt_path, weights_only=True)
        run.save_checkpoint(tmp_path / "last.ckpt")
        return drawn

    first = fit(3)
    assert all(torch.equal(x, y) for one, two in zip(first, fit(3), strict=True) for x, y in zip(one, two, strict=True))
    rest = fit(6, tmp_path / "last.ckpt")
    assert len(rest) == 3
    for x, t in rest:
        assert not any(torch.equal(x, earlier) for earlier, _ in first)
        assert not any(torch.equal(t, earlier) for _, earlier in first)


def test_a_checkpoint_has_no_generator_which_would_be_one_for_all_ranks():
    module, checkpoint = diffusion(), {}
    module.timestep_sampler.generator = torch.Generator()
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"timestep_sampler": {}}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_and_evaluates_with_errors_in_float32(precision):
    module = diffusion(guidance=2.0)
    fit = trainer(max_steps=2, precision=precision, log_every_n_steps=1)
    fit.fit(module, loader(11), loader(11))
    for name in ("train/mse", "val/mse"):
        assert fit.callback_metrics[name].dtype == torch.float32
        assert fit.callback_metrics[name].isfinite()
    assert module.generate(2).dtype == torch.float32


def _two_ranks(_: int, folder: Path) -> None:
    class Noting(UniformSampler):
        def forward(self, n):
            t, w = super().forward(n)
            rank = torch.distributed.get_rank()
            torch.save((t, torch.randn(3)), folder / f"{rank}.pt")
            return t, w

    class Sharded(LightningDataModule):
        def val_dataloader(self):
            rank = torch.distributed.get_rank()
            return DataLoader(TensorDataset(*(part[rank::2] for part in images())), batch_size=3)

        def train_dataloader(self):
            return loader(11)

    module = diffusion()
    alone = trainer().validate(module, loader(11), verbose=False)[0]
    torch.manual_seed(7)
    fit = trainer(max_steps=1, devices=2, strategy="ddp_fork", use_distributed_sampler=False, limit_val_batches=0)
    fit.fit(diffusion(timestep_sampler=Noting), Sharded())
    (t0, noise0), (t1, noise1) = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(t0, t1)
    assert not torch.equal(noise0, noise1)
    both = trainer(devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    assert both.validate(module, Sharded(), verbose=False)[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_two_ranks_draw_differently_and_validate_as_one(tmp_path):
    # in a process of its own: the ranks are forks, and nothing may be forked where autograd has had threads
    torch.multiprocessing.spawn(_two_ranks, args=(tmp_path,), nprocs=1)


# ------------------------------------------------------------------ evaluation


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def slow_grid(module, x0, labels, grid, stride):
    """The mean error of each timestep of the grid."""
    abars = torch.cumprod(1 - module.noise_scheduler.betas, 0)
    errors = {t: [] for t in grid}
    for i in range(len(x0)):
        noise = torch.randn(len(grid) // stride, *x0.shape[1:], generator=torch.Generator().manual_seed(i))
        for eps, t in zip(noise, grid[i % stride :: stride], strict=True):
            noisy = abars[t] ** 0.5 * x0[i] + (1 - abars[t]) ** 0.5 * eps
            out = module.model(noisy[None], torch.tensor([t]), labels[i : i + 1])
            errors[t].append((out[0] - eps).square().mean().item())
    return {t: mean(errors[t]) for t in grid}


@pytest.mark.parametrize("batch_size", [1, 4, 11])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_validation_is_the_error_on_a_grid_whatever_the_batch_size(batch_size, stride):
    module = diffusion(val_stride=stride)
    found = trainer().validate(module, loader(batch_size), verbose=False)[0]
    errors = slow_grid(module, *images(), list(range(1, T, 2)), stride)
    wanted = {"mse": mean(errors.values())}
    for name, (start, stop) in noise_zones(alphas_cumprod(module.noise_scheduler)).items():
        wanted[f"mse_{name}"] = mean(error for t, error in errors.items() if start <= t < stop)
    assert found == pytest.approx({f"val/{name}": value for name, value in wanted.items()}, rel=1e-4)
    tested = trainer().test(module, loader(batch_size), verbose=False)[0]
    assert tested == pytest.approx({f"test/{name}": value for name, value in wanted.items()}, rel=1e-4)


def test_the_zones_are_speeds_areas_of_the_schedule_whatever_the_sampler():
    module = Diffusion(
        Denoiser(None), DDPMScheduler(), lambda noise_scheduler: SpeeDSampler(noise_scheduler, tau=100, mode="paper")
    )
    assert module._zones == {"acceleration": (0, 219), "deceleration": (219, 703), "convergence": (703, 1000)}
    assert module._val_grid.tolist() == list(range(25, 1000, 50))


def test_validation_draws_nothing_and_never_asks_the_sampler():
    class Silent(UniformSampler):
        def forward(self, n):
            raise AssertionError("the sampler was asked")

    module = diffusion(timestep_sampler=Silent)
    before = torch.get_rng_state()
    trainer().validate(module, DataLoader(TensorDataset(*images()), generator=torch.Generator()), verbose=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_shorter_than_the_stride_still_gives_numbers():
    found = trainer().validate(diffusion(val_stride=5), loader(1, n=1), verbose=False)[0]
    assert found["val/mse"] > 0


# ------------------------------------------------------------------ sampling


def slow_ddim(module, x, labels, steps, guidance):
    abars = torch.cumprod(1 - module.noise_scheduler.betas, 0)
    for t in range(T - 1, -1, -T // steps):
        time, no_label = torch.full((len(x),), t), torch.full_like(labels, 3)
        without = module.model(x, time, no_label)
        eps = without + guidance * (module.model(x, time, labels) - without)
        abar, before = abars[t], abars[t - T // steps] if t >= T // steps else torch.tensor(1.0)
        x0 = ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).clamp(-1, 1)
        eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
        x = before**0.5 * x0 + (1 - before) ** 0.5 * eps
    return x


@pytest.mark.parametrize(("guidance", "scale"), [(None, 1.0), (1.0, 1.0), (3.0, 3.0), (0.0, 0.0)])
def test_generate_is_ddim_with_classifier_free_guidance(guidance, scale):
    module, labels = diffusion(guidance=guidance), torch.tensor([2, 0])
    found = module.generate(2, labels, generator=torch.Generator().manual_seed(4))
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, slow_ddim(module, x, labels, 5, scale).detach(), atol=1e-5, rtol=1e-4)


def test_guidance_is_one_forward_pass_a_step():
    module = diffusion(guidance=2.0)
    module.generate(2, torch.tensor([2, 0]))
    assert [seen.tolist() for seen in module.model.seen] == [[2, 0, 3, 3]] * 5


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_either_solver_recovers_gaussian_data_from_its_best_denoiser_which_is_linear(solver, kind):
    class Nothing(nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    model = LinearSkip(Nothing(), scheduler, data_var=0.04)
    module = Diffusion(model, scheduler, image_shape=(1, 8, 8), solver=solver, sample_steps=500)
    found = module.generate(50, generator=torch.Generator().manual_seed(0))
    assert found.std().item() == pytest.approx(0.2, rel=0.05)
    assert found.mean().item() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver"])
def test_pixels_are_clipped_at_every_step_whatever_the_scheduler_says(solver):
    module = diffusion(noise_scheduler=schedule(clip_sample=False), solver=solver, guidance=50.0)
    steps = []
    module.model.register_forward_hook(lambda model, args, out: steps.append(args[0]))
    module.generate(6)
    assert max(x.abs().max() for x in steps) < 6  # without clipping guidance drives x to several hundred


def test_generate_leaves_modes_and_gradients_as_they_were():
    module = diffusion(model=unet(1, 2, num_classes=3, widths=(8,), dropout=0.5))
    module.train()
    module.model.mid_block.eval()
    before = {name: part.training for name, part in module.named_modules()}
    one, two = (module.generate(2, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two)
    assert not one.requires_grad
    assert {name: part.training for name, part in module.named_modules()} == before


def test_the_modes_come_back_after_an_error_too():
    module = diffusion()
    module.train()
    with pytest.raises(IndexError):
        module.generate(1, torch.tensor([17]))
    assert module.model.training


def test_labels_that_nobody_gives_are_the_classes_in_turn():
    module = diffusion()
    module.generate(5)
    assert module.model.seen[0].tolist() == [0, 1, 2, 0, 1]


def test_the_shape_is_that_of_the_first_batch_where_it_is_not_given():
    module = diffusion(classes=None)
    module.image_shape = None
    with pytest.raises(HastenError, match=r"image_shape: unknown before the first batch; pass image_shape"):
        module.generate(1)
    logged(module)
    module.training_step(images(4), 0)
    assert module.generate(2).shape == (2, 1, 2, 2)


def test_pictures_are_one_row_a_class_and_the_same_at_every_call():
    module = diffusion(picture_grid=(10, 4))
    torch.manual_seed(1)
    first = module.pictures()["samples"]
    torch.manual_seed(2)
    assert torch.equal(module.pictures()["samples"], first)
    assert first.shape == (3, 4, 1, 2, 2)
    assert 0 <= first.min() <= first.max() <= 1
    assert module.model.seen[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert diffusion(classes=None, picture_grid=(2, 5)).pictures()["samples"].shape == (2, 5, 1, 2, 2)


def test_the_module_meets_the_callbacks_protocols():
    module = diffusion()
    assert isinstance(module, GeneratesImages)
    assert isinstance(module, HasPictures)
    t, w = module.timestep_sampler(4)  # SupportsTimestepSampler, which cannot be asked at run time
    assert t.shape == w.shape == (4,)


@pytest.mark.parametrize("noise_scheduler", ["linear", "cosine", "v_prediction"])
def test_a_config_gives_the_module_and_the_skip_one_schedule(noise_scheduler):
    words = ["experiment=speed_digits", "timestep_sampler=uniform", f"noise_scheduler={noise_scheduler}"]
    module = build(compose(words), "module")
    again = LinearSkip(module.model.model, module.noise_scheduler, data_var=0.717)
    assert torch.equal(module.model.coefficients, again.coefficients)


# ------------------------------------------------------------------ latents


def latent_diffusion(**kwargs):
    autoencoder = AutoencoderKL(
        1,
        1,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        latent_channels=2,
        norm_num_groups=2,
    )
    module = diffusion(classes=None, autoencoder=autoencoder, latent_scale=0.3, **kwargs)
    module.image_shape = (1, 8, 8)
    return module, autoencoder


def test_a_frozen_autoencoder_is_no_part_of_the_module_or_its_copies():
    module, autoencoder = latent_diffusion()
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert {name for name, _ in module.named_parameters()} == {"model.scale"}
    assert set(module.state_dict()) == {"model.scale"}
    assert copy.deepcopy(module)._autoencoder.module is autoencoder


def test_the_model_trains_on_scaled_draws_of_the_posterior_and_evaluates_on_its_mode():
    module, autoencoder = latent_diffusion()
    x = torch.randn(3, 1, 8, 8)
    posterior = autoencoder.encode(x).latent_dist
    torch.testing.assert_close(module._encode(x, draw=False), posterior.mode() * 0.3)
    torch.manual_seed(1)
    drawn = module._encode(x, draw=True)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, posterior.sample() * 0.3)


def test_generated_latents_are_decoded_and_never_clipped():
    module, autoencoder = latent_diffusion()
    module.model.scale.data.fill_(-3.0)  # a bad model, whose latents leave [-1, 1]
    found = module.generate(2, generator=torch.Generator().manual_seed(0))
    x, abars = (
        torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        module.noise_scheduler.alphas_cumprod,
    )
    for t, before in zip([19, 15, 11, 7, 3], [*abars[[15, 11, 7, 3]], torch.tensor(1.0)], strict=True):
        eps = -3 * x + t / T
        x = before**0.5 * (x - (1 - abars[t]) ** 0.5 * eps) / abars[t] ** 0.5 + (1 - before) ** 0.5 * eps
    assert x.abs().max() > 5
    torch.testing.assert_close(found, autoencoder.decode(x / 0.3).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.float32), ("bf16-mixed", torch.float32), ("32-true", torch.bfloat16)],
)
def test_the_autoencoder_works_in_its_own_dtype_whatever_the_precision(precision, dtype):
    module, autoencoder = latent_diffusion()
    module.latent_scale = 0.9  # of standard deviation about 1
    autoencoder.to(dtype)
    inner = []
    autoencoder.encoder.conv_out.register_forward_hook(lambda conv, args, out: inner.append(out.dtype))
    data = DataLoader(TensorDataset(torch.randn(4, 1, 8, 8)), batch_size=2)
    fit = trainer(max_steps=2, precision=precision)
    fit.fit(module, data, data)
    assert fit.callback_metrics["val/mse"].isfinite()
    assert set(inner) == {dtype}
    assert module._encode(torch.randn(2, 1, 8, 8), draw=True).dtype == torch.float32
    assert module.generate(2).dtype == torch.float32


def test_latents_of_the_wrong_scale_are_named_once():
    module, _ = latent_diffusion()
    logged(module)
    module.latent_scale = 1e-3
    batch = (torch.randn(4, 1, 8, 8), None)
    with pytest.warns(UserWarning, match=r"latent_scale: expected latents of standard deviation about 1, got 0.00"):
        module.training_step(batch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.training_step(batch, 1)


# ------------------------------------------------------------------ refusals


class Diffusers(nn.Module):
    """A network that says of its labels what a diffusers model says."""

    def __init__(self, **config):
        super().__init__()
        self.config = config


def plain_dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4, num_embeds_ada_norm=3
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_scheduler": FlowMatchEulerDiscreteScheduler()}, "got FlowMatchEulerDiscreteScheduler; use DDPM"),
        ({"noise_scheduler": schedule(prediction_type="flow")}, "prediction_type: expected epsilon, sample or"),
        ({"noise_scheduler": schedule(rescale_betas_zero_snr=True)}, "zero terminal SNR leaves no image"),
        ({"timestep_sampler": UniformSampler(1000)}, r"expected one for the noise scheduler's T = 20, got T = 1000"),
        ({"timestep_sampler": lambda noise_scheduler: 3}, r"expected a TimestepSampler or a function .*, got int"),
        ({"classes": 0, "model": Denoiser()}, "num_classes: expected >= 1 or null, got 0"),
        ({"class_dropout": 1.0}, r"class_dropout: expected in \[0, 1\), got 1.0"),
        ({"guidance": -1.0}, "guidance: expected >= 0, got -1.0"),
        ({"guidance": 2.0, "class_dropout": 0.0}, "guidance: expected null with class_dropout = 0, got 2.0"),
        ({"guidance": 2.0, "classes": None}, "guidance: expected null without num_classes, got 2.0"),
        ({"sample_steps": 0}, "sample_steps: expected a divisor of T = 20, got 0; the nearest: 1, 2"),
        ({"sample_steps": 8}, "sample_steps: expected a divisor of T = 20, got 8; the nearest: 5, 10"),
        ({"sample_steps": 40}, "sample_steps: expected a divisor of T = 20, got 40; the nearest: 10, 20"),
        ({"solver": "dpm"}, "solver: got 'dpm'; "),
        ({"val_timesteps": 21}, r"val_timesteps: expected in 1..20, the schedule's, got 21"),
        ({"val_stride": 3}, "val_stride: expected a divisor of val_timesteps = 10, got 3"),
        ({"model": Diffusers(num_class_embeds=None)}, r"model: expected 4 label embeddings, .* got 0"),
        ({"model": Diffusers(num_class_embeds=3)}, r"model: expected 4 label embeddings, .* got 3"),
        ({"model": Diffusers(num_class_embeds=4), "classes": None}, "num_classes: expected 3, the model takes labels"),
        ({"model": Diffusers(num_embeds_ada_norm=2)}, r"model: expected 4 label embeddings, .* got 3"),
        ({"model": plain_dit()}, "drop labels, each by its own mask; build it with hasten.nn.dit"),
        ({"model": LinearSkip(plain_dit(), schedule(), 0.5)}, "drop labels, each by its own mask"),
    ],
)
def test_set_ups_that_cannot_work_are_refused_in_one_line(changes, words):
    with pytest.raises(HastenError, match=words) as caught:
        diffusion(**changes)
    assert str(caught.value).startswith("diffusion: ")
    assert "\n" not in str(caught.value)


def test_velocity_prediction_wants_a_scheduler_that_has_it():
    with pytest.raises(HastenError, match="v_prediction wants one with get_velocity, got PNDMScheduler"):
        diffusion(noise_scheduler=PNDMScheduler(T, prediction_type="v_prediction"))


@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        (EulerDiscreteScheduler, {}),
        (HeunDiscreteScheduler, {}),
        (HeunDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),  # knows no t = 0
        (LMSDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (UniPCMultistepScheduler, {}),
        (DEISMultistepScheduler, {}),
        (RePaintScheduler, {}),
    ],
)
def test_a_scheduler_that_adds_noise_otherwise_than_ddpm_is_refused(scheduler, changes):
    with pytest.raises(HastenError, match=f"expected add_noise.*, got another from {scheduler.__name__}; use DDPM"):
        diffusion(noise_scheduler=scheduler(T, **changes))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_scheduler_that_adds_noise_as_ddpm_is_taken(scheduler, betas):
    assert diffusion(noise_scheduler=scheduler(T, beta_schedule=betas)).num_timesteps == T


def test_a_prediction_of_another_shape_is_refused_before_the_loss_broadcasts_it():
    class Two(nn.Module):
        def forward(self, x, t):
            return x.repeat(1, 2, 1, 1)

    module = diffusion(classes=None, model=Two())
    with pytest.raises(HastenError, match=r"prediction of shape \(4, 1, 2, 2\), got \(4, 2, 2, 2\); a learned sigma"):
        module.training_step(images(4), 0)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_batch_that_is_no_tuple_of_tensors_is_refused(classes):
    with pytest.raises(HastenError, match=r"batch: expected \(images, labels\), got dict"):
        diffusion(classes=classes).training_step({"image": torch.zeros(2, 1, 2, 2)}, 0)


def test_a_batch_without_labels_is_refused_where_labels_are_needed():
    with pytest.raises(HastenError, match=r"expected \(images, labels\) for num_classes, got images alone"):
        diffusion().training_step(torch.zeros(2, 1, 2, 2), 0)


def test_other_classes_than_the_datamodules_are_refused():
    class Data(LightningDataModule):
        num_classes = 5

        def train_dataloader(self):
            return loader(4)

    with pytest.raises(HastenError, match="num_classes: expected 5, as in Data, got 3"):
        trainer(max_steps=1).fit(diffusion(), Data())


def test_generate_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="n: expected >= 1, got 0"):
        diffusion().generate(0)
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(2,\)"):
        diffusion().generate(3, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels: the model is unconditional; leave them out"):
        diffusion(classes=None).generate(1, torch.tensor([0]))
    with pytest.raises(HastenError, match="sample_steps: expected a divisor of T = 20, got 6"):
        diffusion().generate(1, steps=6)
