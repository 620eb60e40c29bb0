"""Diffusion: trains a denoiser with the timesteps and weights of a sampler, and draws images with it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Generator, Tensor, nn

from hasten.errors import HastenError, did_you_mean
from hasten.functional import noise_zones
from hasten.functional.draws import seed_of
from hasten.nn import LinearSkip, TimestepSampler, UniformSampler, alphas_cumprod
from hasten.nn.modes import evaluating
from hasten.nn.sharding import shard
from hasten.optim import configure_optimizers, parameter_groups
from hasten.optim.build import OptimizerFactory, SchedulerFactory

SamplerFactory = Callable[[Any], TimestepSampler]

# word -> diffusers' class, how it clips the predicted image to [-1, 1], and what its `step` takes beside. DDIM must
# take the noise of the clipped image: guidance overshoots at high noise, and what is clipped would come back as noise.
_SOLVERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.0}, {"use_clipped_model_output": True}),
    "dpm_solver": ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.0}, {}),
}


class Diffusion(LightningModule):
    """Denoising diffusion over any diffusers noise scheduler, conditional on classes or not.

    Training: ``t, w = timestep_sampler(n)``; the loss is the mean of w times each sample's MSE. Logs ``train/loss``
    (weighted), ``train/mse`` (unweighted, over the timesteps the sampler drew), ``sampler/mean_t`` and
    ``sampler/mean_weight``.

    Validation and test: ``val/mse`` is the unweighted MSE on a fixed grid of timesteps, ``val/mse_acceleration``,
    ``val/mse_deceleration`` and ``val/mse_convergence`` its means over SpeeD's areas of the noise schedule. Neither
    depends on the timestep sampler, so these, unlike the training loss, compare across samplers. Every image is
    evaluated at each ``val_stride``-th timestep of the grid, image i beginning at i modulo ``val_stride``, with noise
    that is a function of i: each image counts in each area, each timestep sees its share of all images, and the work
    is ``val_timesteps / val_stride`` forward passes over the split.

    Sampling is deterministic from the first noise on: DDIM or DPM-Solver++ from diffusers, with trailing timesteps. On
    pixels every step clips the predicted image to [-1, 1], whatever the noise scheduler says.

    Args:
        model: a denoiser, see ``hasten.nn.diffusion``. A conditional one embeds ``num_classes`` + 1 labels.
        noise_scheduler: a diffusers scheduler with ``add_noise``; it also says what the model predicts.
        timestep_sampler: a sampler, or a function that makes one from the noise scheduler; uniform by default.
        optimizer: called with parameter groups; by default AdamW, lr 1e-4, without weight decay.
        scheduler: called with the optimizer, and with ``total_steps`` where it takes that; stepped every step.
        num_classes: K, at least 1; None for an unconditional model.
        image_shape: (C, H, W); None takes that of the first batch, before which nothing can be generated.
        autoencoder: a frozen ``AutoencoderKL``; the model then works on its latents. It is no part of the state_dict,
            of the parameters or of any copy of this module.
        latent_scale: what makes the latents' standard deviation about 1.
        class_dropout: share of the training labels replaced by "no label", in [0, 1); guidance needs some.
        guidance: scale of classifier-free guidance while sampling, at least 0; 1 or None is none.
        solver: "ddim" or "dpm_solver".
        sample_steps: model evaluations for an image, a divisor of T.
        val_timesteps: size of the validation grid: the midpoints of that many equal bins of 0..T.
        val_stride: a divisor of ``val_timesteps``; 1 evaluates every image at every timestep of the grid.
        picture_grid: rows and columns of :meth:`pictures`; of a conditional model each row is a class.

    Raises:
        HastenError: where these do not fit together.

    Source: DDPM, arXiv:2006.11239; guidance, arXiv:2207.12598; the areas, SpeeD, arXiv:2405.17403.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from hasten.nn import unet
        >>> model = unet(1, 8, num_classes=10, widths=(16, 32))
        >>> module = Diffusion(model, DDPMScheduler(), num_classes=10, image_shape=(1, 8, 8), sample_steps=2)
        >>> module.generate(3, labels=torch.tensor([7, 7, 7])).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        noise_scheduler: Any,
        timestep_sampler: TimestepSampler | SamplerFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        num_classes: int | None = None,
        image_shape: Sequence[int] | None = None,
        autoencoder: nn.Module | None = None,
        latent_scale: float = 0.18215,
        class_dropout: float = 0.1,
        guidance: float | None = None,
        solver: str = "ddim",
        sample_steps: int = 50,
        val_timesteps: int = 20,
        val_stride: int = 4,
        picture_grid: tuple[int, int] = (10, 10),
    ) -> None:
        super().__init__()
        _check_noise_scheduler(noise_scheduler)
        _check_guidance(num_classes, class_dropout, guidance)
        _check_model(model, num_classes)
        self.num_timesteps = len(noise_scheduler.alphas_cumprod)
        self._check_steps(sample_steps)
        if solver not in _SOLVERS:
            raise HastenError(f"diffusion: solver: got {solver!r}{did_you_mean(solver, _SOLVERS)}")
        if not 1 <= val_timesteps <= self.num_timesteps:
            raise HastenError(
                f"diffusion: val_timesteps: expected in 1..{self.num_timesteps}, the schedule's, got {val_timesteps}"
            )
        if val_stride < 1 or val_timesteps % val_stride:
            raise HastenError(
                f"diffusion: val_stride: expected a divisor of val_timesteps = {val_timesteps}, got {val_stride}"
            )
        self.model = model
        self.noise_scheduler = noise_scheduler
        self.timestep_sampler = _sampler(timestep_sampler, noise_scheduler, self.num_timesteps)
        self.optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0)
        self.scheduler = scheduler
        self.num_classes = num_classes
        if image_shape is not None and len(image_shape) != 3:
            raise ValueError(f"diffusion: image_shape: expected (C, H, W), got {tuple(image_shape)}")
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.latent_scale = latent_scale
        self.class_dropout = class_dropout
        self.guidance = guidance
        self.solver = solver
        self.sample_steps = sample_steps
        self.val_stride = val_stride
        self.picture_grid = tuple(picture_grid)
        self._autoencoder = None if autoencoder is None else _Frozen(autoencoder)
        bins = torch.arange(val_timesteps)
        self._val_grid = (2 * bins + 1) * self.num_timesteps // (2 * val_timesteps)
        self._zones = noise_zones(alphas_cumprod(noise_scheduler))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The model's prediction for noisy images or latents, in float32: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        x = x.to(self.dtype)
        out = self.model(x, t) if labels is None else self.model(x, t, class_labels=labels)
        return getattr(out, "sample", out).float()

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        classes = getattr(datamodule, "num_classes", self.num_classes)
        if self.num_classes is not None and classes != self.num_classes:
            raise HastenError(
                f"diffusion: num_classes: expected {classes}, as in {type(datamodule).__name__}, got {self.num_classes}"
            )

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def on_train_start(self) -> None:
        # Lightning seeds all ranks alike, and a resumed run as at its start: the ranks would add the same noise at the
        # same timesteps, and a resumed run that of its own first steps again. With ExactResume it then draws what it
        # would have drawn without the interruption; without, something new.
        if self.global_rank == self.global_step == 0:
            return
        torch.manual_seed(self._seed_from(torch.initial_seed()))
        if (generator := self.timestep_sampler.generator) is not None:
            generator.manual_seed(self._seed_from(generator.initial_seed()))

    def _seed_from(self, seed: int) -> int:
        """A seed for this rank at this step; a plain sum would give rank 1 that of rank 0 a step later."""
        return seed_of(seed, self.global_rank, self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self._images_and_labels(batch)
        x = self._encode(images, draw=True)
        if self._autoencoder is not None and self.global_step == batch_idx == 0:
            self._check_latents(x)
        if labels is not None and self.class_dropout > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.class_dropout
            labels = labels.masked_fill(dropped, cast(int, self.num_classes))
        self.timestep_sampler.step(self.global_step)
        t, weight = self.timestep_sampler(len(x))
        mse = self._mse(x, torch.randn_like(x), t, labels)
        self.timestep_sampler.update(t, mse.detach())
        loss = (weight * mse).mean()
        self.log("train/loss", loss)
        self.log("train/mse", mse.mean())
        self.log("sampler/mean_t", t.float().mean())
        self.log("sampler/mean_weight", weight.mean())
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is built over: weights with decay, vectors without."""
        return parameter_groups(self.model)

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        return configure_optimizers(
            self.parameter_groups(),
            self.optimizer,
            self.scheduler,
            total_steps=lambda: cast(int, self.trainer.estimated_stepping_batches),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # the file is written by rank zero: with its generator in it, all ranks of a resumed run would draw alike
        state = self.timestep_sampler.state()
        checkpoint["timestep_sampler"] = {key: value for key, value in state.items() if key != "generator"}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.timestep_sampler.load_state(checkpoint.get("timestep_sampler", {}))

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._start_grid()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._add_to_grid(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_grid("val")

    def on_test_epoch_start(self) -> None:
        self._start_grid()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._add_to_grid(batch)

    def on_test_epoch_end(self) -> None:
        self._log_grid("test")

    def _start_grid(self) -> None:
        self._seen = 0  # images, by this rank
        self._sums = torch.zeros(2, len(self._val_grid), device=self.device)  # of MSEs, and their number

    def _add_to_grid(self, batch: Any) -> None:
        images, labels = self._images_and_labels(batch)
        x = self._encode(images, draw=False)
        n, grid = len(x), self._val_grid.to(self.device)
        index = self.global_rank + self.trainer.world_size * torch.arange(self._seen, self._seen + n)
        self._seen += n
        first = index % self.val_stride
        noise = _noise_by_index(index, len(grid) // self.val_stride, x)
        for offset, eps in zip(range(0, len(grid), self.val_stride), noise, strict=True):
            place = (first + offset).to(self.device)
            mse = self._mse(x, eps, grid[place], labels)
            self._sums.index_add_(1, place, torch.stack([mse, torch.ones_like(mse)]))

    def _log_grid(self, split: str) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        mse = sums[0] / sums[1]  # NaN where a short split leaves a timestep without images
        self.log(f"{split}/mse", mse.nanmean(), sync_dist=True)
        for name, (start, stop) in self._zones.items():
            inside = (start <= self._val_grid) & (self._val_grid < stop)
            if inside.any():
                self.log(f"{split}/mse_{name}", mse[inside.to(mse.device)].nanmean(), sync_dist=True)

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate(
        self, n: int, labels: Tensor | None = None, steps: int | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Draw n images, (n, C, H, W) in [-1, 1].

        Args:
            n: at least 1.
            labels: (n,) int64; a conditional model without them takes its classes in turn.
            steps: instead of ``sample_steps``.
            generator: of the first noise; one on the CPU gives the same images on every device.
        """
        if n < 1:
            raise ValueError(f"diffusion: generate: n: expected >= 1, got {n}")
        steps = self.sample_steps if steps is None else steps
        self._check_steps(steps)
        labels = self._labels_to_generate(n, labels)
        solver, extra = self._solver(steps)
        where = self.device if generator is None else generator.device
        x = torch.randn(n, *self._latent_shape(), generator=generator, device=where).to(self.device)
        with evaluating(self.model):
            for t in solver.timesteps:
                prediction = self._guided(x, torch.full((n,), int(t), device=self.device), labels)
                x = solver.step(prediction, t, x, **extra).prev_sample
        if self._autoencoder is not None:
            x = self._autoencoder.decode(x / self.latent_scale)
        return x.clamp(-1, 1)

    def pictures(self) -> dict[str, Tensor]:
        """A grid of samples, (rows, columns, C, H, W) in [0, 1], from the same noise and labels at every call."""
        rows, columns = self.picture_grid
        labels = None
        if self.num_classes is not None:
            rows = min(rows, self.num_classes)
            labels = torch.arange(rows).repeat_interleave(columns)
        images = self.generate(rows * columns, labels, generator=Generator().manual_seed(0))
        return {"samples": ((images + 1) / 2).unflatten(0, (rows, columns))}

    def _guided(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or self.guidance is None:
            return self(x, t, labels)
        no_label = torch.full_like(labels, cast(int, self.num_classes))
        both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, no_label]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _solver(self, steps: int) -> tuple[Any, dict[str, Any]]:
        import diffusers  # noqa: PLC0415 - seconds of import, and training needs none of it

        name, clipping, extra = _SOLVERS[self.solver]
        if self._autoencoder is not None:
            clipping = {"clip_sample": False, "thresholding": False}  # latents have no range
        # diffusers keeps a list of the settings left at their defaults, takes the solver's own defaults for those, and
        # counts settings that were given by position among them: DDIM would be built for 1000 timesteps
        config = {key: value for key, value in self.noise_scheduler.config.items() if key != "_use_default_values"}
        solver = getattr(diffusers, name).from_config(config, timestep_spacing="trailing", **clipping)
        solver.set_timesteps(steps)
        return solver, extra

    def _labels_to_generate(self, n: int, labels: Tensor | None) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("diffusion: generate: labels: the model is unconditional; leave them out")
            return None
        labels = torch.arange(n) % self.num_classes if labels is None else labels
        if labels.shape != (n,):
            raise ValueError(f"diffusion: generate: labels: expected shape ({n},), got {tuple(labels.shape)}")
        return labels.to(self.device)

    def _latent_shape(self) -> Sequence[int]:
        if self.image_shape is None:
            raise HastenError(
                "diffusion: image_shape: unknown before the first batch; pass image_shape=(C, H, W) to generate now"
            )
        if self._autoencoder is None:
            return self.image_shape
        return self._encode(torch.zeros(1, *self.image_shape, device=self.device), draw=False).shape[1:]

    # ------------------------------------------------------------------ shared

    def _mse(self, x: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The error of the prediction at x_t, (B,), mean over all other axes."""
        noisy = self.noise_scheduler.add_noise(x, noise, t)
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "sample":
            target = x
        else:
            target = self.noise_scheduler.get_velocity(x, noise, t)
        prediction = self(noisy, t, labels)
        if prediction.shape != target.shape:  # which the loss would broadcast
            raise HastenError(
                f"diffusion: model: expected a prediction of shape {tuple(target.shape)}, got "
                f"{tuple(prediction.shape)}; a learned sigma is not served"
            )
        return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)

    def _images_and_labels(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        images, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
        if not isinstance(images, Tensor):
            raise HastenError(f"diffusion: batch: expected (images, labels), got {type(images).__name__}")
        if self.image_shape is None:
            self.image_shape = tuple(images.shape[1:])
        if self.num_classes is None:
            return images, None
        if not rest:
            raise HastenError(
                "diffusion: batch: expected (images, labels) for num_classes, got images alone; leave num_classes out "
                "to train without labels"
            )
        return images, rest[0]

    @torch.no_grad()
    def _encode(self, images: Tensor, *, draw: bool) -> Tensor:
        """Images as the model's data in float32: themselves, or latents drawn from their posterior or at its mode."""
        if self._autoencoder is None:
            return images.float()
        posterior = self._autoencoder.encode(images)
        return (posterior.sample() if draw else posterior.mode()).float() * self.latent_scale

    def _check_latents(self, x: Tensor) -> None:
        if not 0.5 < (std := float(x.std())) < 2:
            rank_zero_warn(
                f"diffusion: latent_scale: expected latents of standard deviation about 1, got {std:.2f}; "
                f"try latent_scale={self.latent_scale / std:.5f}"
            )

    def _check_steps(self, steps: int) -> None:
        # diffusers' solvers space other numbers unevenly, and for some evaluate at t = -1
        divisors = [d for d in range(1, self.num_timesteps + 1) if self.num_timesteps % d == 0]
        if steps not in divisors:
            near = sorted(sorted(divisors, key=lambda d: abs(d - steps))[:2])
            raise HastenError(
                f"diffusion: sample_steps: expected a divisor of T = {self.num_timesteps}, got {steps}; "
                f"the nearest: {', '.join(map(str, near))}"
            )


class _Frozen:
    """Holds a module where neither nn.Module nor a deep copy of what holds it finds it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Frozen":
        return self

    def encode(self, images: Tensor) -> Any:
        """The posterior of the latents, in the autoencoder's dtype."""
        return self._call("encode", images).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents, in float32."""
        return self._call("decode", latents).sample.float()

    def _call(self, method: str, x: Tensor) -> Any:
        # in its own dtype whatever the trainer's precision: some autoencoders overflow in a smaller one
        parameter = next(self.module.parameters())
        if parameter.device != x.device:
            self.module.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            return getattr(self.module, method)(x.to(parameter.dtype))


def _noise_by_index(index: Tensor, draws: int, like: Tensor) -> Tensor:
    """Noise for images like (B, C, H, W), (draws, B, C, H, W), image i's a function of i alone, on every machine."""
    generator, shape = Generator(), (draws, *like.shape[1:])
    noise = [torch.randn(shape, generator=generator.manual_seed(i), dtype=like.dtype) for i in index.tolist()]
    return torch.stack(noise, dim=1).to(like.device)


def _sampler(sampler: TimestepSampler | SamplerFactory | None, noise_scheduler: Any, total: int) -> TimestepSampler:
    if sampler is None:
        sampler = UniformSampler
    made = sampler if isinstance(sampler, TimestepSampler) else sampler(noise_scheduler)
    if not isinstance(made, TimestepSampler):
        raise HastenError(
            "diffusion: timestep_sampler: expected a TimestepSampler or a function that makes one from the noise "
            f"scheduler, got {type(made).__name__}"
        )
    if len(made.probs) != total:
        raise HastenError(
            f"diffusion: timestep_sampler: expected one for the noise scheduler's T = {total}, got T = "
            f"{len(made.probs)}; pass the class (or a partial of it) and it is built for this schedule"
        )
    return made


def _check_noise_scheduler(noise_scheduler: Any) -> None:
    name = type(noise_scheduler).__name__
    if not (hasattr(noise_scheduler, "add_noise") and hasattr(noise_scheduler, "alphas_cumprod")):
        raise HastenError(
            f"diffusion: noise_scheduler: expected one with add_noise and alphas_cumprod, got {name}; use DDPMScheduler"
        )
    if not _adds_noise_as_ddpm(noise_scheduler):
        raise HastenError(
            "diffusion: noise_scheduler: expected add_noise(x, noise, t) = sqrt(abar_t) x + sqrt(1 - abar_t) noise, "
            f"got another from {name}; use DDPMScheduler"
        )
    kind = noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise HastenError(
            f"diffusion: noise_scheduler: prediction_type: expected epsilon, sample or v_prediction, got {kind!r}"
        )
    if kind == "v_prediction" and not hasattr(noise_scheduler, "get_velocity"):
        raise HastenError(
            f"diffusion: noise_scheduler: v_prediction wants one with get_velocity, got {name}; use DDPMScheduler"
        )
    if kind == "epsilon" and noise_scheduler.alphas_cumprod[-1] == 0:
        raise HastenError(
            "diffusion: noise_scheduler: zero terminal SNR leaves no image to recover from predicted noise; set "
            "prediction_type to v_prediction or sample"
        )


def _adds_noise_as_ddpm(noise_scheduler: Any) -> bool:
    """Whether t is a row of alphas_cumprod to ``add_noise``; to many solvers it is a time to look up, or a sigma."""
    abar = noise_scheduler.alphas_cumprod
    t = torch.tensor([0, len(abar) // 2, len(abar) - 1])
    one, zero = torch.ones(3), torch.zeros(3)
    try:
        signal, noise = noise_scheduler.add_noise(one, zero, t), noise_scheduler.add_noise(zero, one, t)
    except (IndexError, NotImplementedError):
        return False
    found = torch.stack([signal, noise]).double()
    wanted = torch.stack([abar[t], 1 - abar[t]]).double().sqrt()
    return torch.allclose(found, wanted, rtol=0, atol=1e-4)


def _check_guidance(num_classes: int | None, class_dropout: float, guidance: float | None) -> None:
    if num_classes is not None and num_classes < 1:
        raise HastenError(f"diffusion: num_classes: expected >= 1 or null, got {num_classes}")
    if not 0 <= class_dropout < 1:
        raise HastenError(f"diffusion: class_dropout: expected in [0, 1), got {class_dropout}")
    if guidance is None:
        return
    if guidance < 0:
        raise HastenError(f"diffusion: guidance: expected >= 0, got {guidance}; 1 is plain sampling")
    if num_classes is None:
        raise HastenError(f"diffusion: guidance: expected null without num_classes, got {guidance}")
    if class_dropout == 0:
        raise HastenError(
            f"diffusion: guidance: expected null with class_dropout = 0, got {guidance}; train with class_dropout=0.1, "
            "else the model never learns to predict without a label"
        )


def _check_model(model: nn.Module, num_classes: int | None) -> None:
    """Refuse a diffusers network that cannot serve these labels; on a GPU its embedding fails without a word."""
    network = model.model if isinstance(model, LinearSkip) else model
    config = getattr(network, "config", {})
    if "num_class_embeds" in config:  # UNet2DModel
        rows = config["num_class_embeds"] or 0
        if rows and num_classes is None:
            raise HastenError(f"diffusion: num_classes: expected {rows - 1}, the model takes labels, got null")
    elif "num_embeds_ada_norm" in config:  # DiTTransformer2DModel, whose table has one row more
        rows = config["num_embeds_ada_norm"] + 1
    else:
        return
    if num_classes is not None and rows <= num_classes:
        raise HastenError(
            f"diffusion: model: expected {num_classes + 1} label embeddings, one of them for no label, got {rows}; "
            f"build it with hasten.nn.unet or hasten.nn.dit and num_classes={num_classes}"
        )
    if any(type(part).__name__ == "LabelEmbedding" and cast(Any, part).dropout_prob > 0 for part in network.modules()):
        raise HastenError(
            "diffusion: model: the blocks of a DiTTransformer2DModel drop labels, each by its own mask; build it with "
            "hasten.nn.dit, or set every class_embedder.dropout_prob to 0"
        )
