"""Timestep samplers: what a diffusion model draws its training timesteps from, and how much each counts.

A sampler is two tables over t = 0..T-1 (larger t is noisier): ``t, w = sampler(n)`` draws n timesteps and their loss
weights. Each takes the noise scheduler first: a diffusers scheduler or a 1-D tensor of abar = cumprod(1 - beta); those
that need only T take an int as well. The weights multiply the MSE of what the denoiser predicts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hasten.functional import PREDICTION_TYPES, to_prediction_type

NoiseSchedule = Any
"""A diffusers scheduler with ``betas``, or abar, a 1-D tensor; an int, T, where a sampler needs no more."""


class TimestepSampler(nn.Module):
    """Draws timesteps by a table of probabilities and weighs their losses by a table of weights, (T,) each.

    The tables are float32 buffers that follow the module to its device, stay float32 under reduced precision and never
    enter a state_dict. On a GPU neither drawing nor weighing waits for the device, except for n = 1, where torch checks
    the table.

    Attributes:
        probs: the law of one draw, (T,); sums to 1.
        weights: what multiplies the loss of a sample at t, (T,).
        generator: where the draws come from, on the tables' device; None is torch's global generator.

    Args:
        probs: at least 0, not all 0; normalised here.
        weights: at least 0; 1 everywhere by default.

    Example:
        >>> sampler = TimestepSampler(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 1.0]))
        >>> t, w = sampler(2)
        >>> t.tolist(), w.tolist()
        ([1, 1], [0.5, 0.5])
    """

    probs: Tensor
    weights: Tensor

    def __init__(self, probs: Tensor, weights: Tensor | None = None):
        super().__init__()
        probs = _table("probs", probs)
        if not probs.sum() > 0:
            raise ValueError("timestep sampler: probs: expected a positive sum, got 0; every timestep is excluded")
        weights = torch.ones_like(probs) if weights is None else _table("weights", weights)
        if len(weights) != len(probs):
            raise ValueError(f"timestep sampler: weights: expected {len(probs)} values as in probs, got {len(weights)}")
        self.register_buffer("probs", (probs / probs.sum()).float(), persistent=False)
        self.register_buffer("weights", weights.float(), persistent=False)
        self.generator: Generator | None = None

    @staticmethod
    def from_scheduler(
        noise_scheduler: NoiseSchedule,
        probs: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        weight_gauge: str = "native",
        prediction_type: str | None = None,
        normalize: bool = False,
    ) -> "TimestepSampler":
        """A sampler over the timesteps of a schedule; uniform, with weights 1, where nothing else is given.

        Args:
            noise_scheduler: a diffusers scheduler or abar.
            probs: (T,).
            weights: (T,).
            weight_gauge: what the given weights multiply: "native", the MSE of what the model predicts, or "epsilon",
                the noise MSE, from which they are converted.
            prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
            normalize: scale the weights to mean 1 under the law: same direction, comparable step and clipping.

        Example:
            >>> abar = torch.tensor([0.75, 0.5])
            >>> sampler = TimestepSampler.from_scheduler(abar, weight_gauge="epsilon", prediction_type="v_prediction")
            >>> sampler.weights.tolist()
            [0.75, 0.5]
        """
        abar = alphas_cumprod(noise_scheduler)
        probs = uniform(len(abar)) if probs is None else _table("probs", probs)
        weights = torch.ones_like(abar) if weights is None else _table("weights", weights)
        for name, table in {"probs": probs, "weights": weights}.items():
            if len(table) != len(abar):
                raise ValueError(
                    f"timestep sampler: {name}: expected {len(abar)} values as in the schedule, got {len(table)}"
                )
        weights = native_weights(weights, noise_scheduler, weight_gauge, prediction_type)
        return TimestepSampler(probs, mean_one(weights, probs / probs.sum()) if normalize else weights)

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        """Draw n timesteps, (n,) int64, and their weights, (n,) float32."""
        t = self.sample(n)
        return t, self.weights[t]

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Draw n timesteps, (n,) int64 on the tables' device.

        Args:
            n: at least 1.
            generator: on the tables' device; by default the sampler's own, else torch's global one.
        """
        if n < 1:
            raise ValueError(f"timestep sampler: n: expected at least 1 draw, got {n}")
        return torch.multinomial(self.probs, n, replacement=True, generator=generator or self.generator)

    def weight(self, t: Tensor) -> Tensor:
        """The loss weight of each timestep, any shape -> same shape."""
        self._check(t)
        return self.weights[t]

    def log_prob(self, t: Tensor, n: int | None = None) -> Tensor:
        """The log-probability of t at a random position of a batch of n, any shape -> same shape.

        Args:
            t: timesteps.
            n: the batch size, where the law depends on it; None is the limit of large batches.
        """
        self._check(t)
        return self._marginal(n).log()[t]

    def folded(self) -> "TimestepSampler":
        """A sampler with the weights moved into the law: same expected gradient up to a constant, every weight 1.

        The table is that of now: fold again where a curriculum or the losses have moved on.
        """
        return TimestepSampler(self._marginal(None) * self.weights)

    def step(self, global_step: int) -> None:
        """Tell a curriculum how many optimizer steps were taken; nothing to do for a fixed law."""

    def update(self, t: Tensor, per_sample_loss: Tensor) -> None:
        """Tell a loss-aware sampler what t cost before weighing, (n,) and (n,); nothing to do for other laws."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and ints: a generator's state, a curriculum's step, past losses."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave; a generator's state only where this sampler has a generator of its own."""
        if self.generator is not None and "generator" in state:
            try:
                self.generator.set_state(state["generator"].cpu())
            except RuntimeError as error:  # a CPU generator's state is no CUDA generator's state
                raise ValueError(
                    f"timestep sampler: generator: expected the state of a {self.generator.device.type} generator, got "
                    f"{len(state['generator'])} bytes of another kind; leave 'generator' out of the state and reseed"
                ) from error

    def _marginal(self, n: int | None) -> Tensor:
        """The law of a random position in a batch of n, (T,)."""
        return self.probs

    def _check(self, t: Tensor) -> None:
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(
                f"timestep sampler: t: expected integers, got {t.dtype}; pass the timesteps, not a fraction"
            )
        # on an accelerator the answer would have to be waited for
        if t.device.type == "cpu" and bool(((t < 0) | (t >= len(self.probs))).any()):
            raise ValueError(
                f"timestep sampler: t: expected 0..{len(self.probs) - 1}, got {int(t.min())}..{int(t.max())}; "
                "was the sampler built for another schedule?"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TimestepSampler":
        # .half() and .bfloat16() reach every buffer, and 8 bits do not hold a law over 1000 steps: take the device only
        tables = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in tables.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self


class UniformSampler(TimestepSampler):
    """Every timestep alike, weight 1.

    Args:
        noise_scheduler: only T is read, so an int will do.

    Source: DDPM, arXiv:2006.11239.

    Example:
        >>> UniformSampler(4).probs.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, noise_scheduler: NoiseSchedule):
        super().__init__(uniform(num_timesteps(noise_scheduler)))


def alphas_cumprod(noise_scheduler: NoiseSchedule) -> Tensor:
    """The abar table of a schedule, (T,) float64, from the scheduler's betas where it has them.

    In float32, as schedulers keep it, the tables made from it are off in the sixth digit.

    Args:
        noise_scheduler: a diffusers scheduler, or abar itself.

    Raises:
        TypeError: for a scheduler without ``betas`` and ``alphas_cumprod``, such as the flow-matching ones.
        ValueError: for a tensor that is not 1-D.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> alphas_cumprod(DDPMScheduler(1000)).dtype
        torch.float64
    """
    if isinstance(noise_scheduler, Tensor):
        if noise_scheduler.ndim != 1 or not noise_scheduler.is_floating_point():
            raise ValueError(
                f"noise_scheduler: expected abar as floats of shape (T,), got {noise_scheduler.dtype} of shape "
                f"{tuple(noise_scheduler.shape)}"
            )
        return noise_scheduler.detach().double().cpu()
    if isinstance(betas := getattr(noise_scheduler, "betas", None), Tensor):
        return torch.cumprod(1 - betas.double().cpu(), 0)
    if isinstance(abar := getattr(noise_scheduler, "alphas_cumprod", None), Tensor):
        return abar.double().cpu()
    raise TypeError(
        f"noise_scheduler: expected a scheduler with betas or alphas_cumprod, or abar as a 1-D tensor, got "
        f"{type(noise_scheduler).__name__}; pass the tensor, or use a sampler that needs T alone (LogitNormalSampler)"
    )


def num_timesteps(noise_scheduler: NoiseSchedule) -> int:
    """The number of training timesteps of a schedule, of any scheduler, or the int itself.

    Raises:
        ValueError: below 1.
        TypeError: for anything that has no number of timesteps.

    Example:
        >>> num_timesteps(1000), num_timesteps(torch.linspace(0.99, 0.01, 50))
        (1000, 50)
    """
    if isinstance(noise_scheduler, int) and not isinstance(noise_scheduler, bool):
        if noise_scheduler < 1:
            raise ValueError(f"noise_scheduler: expected at least 1 timestep, got {noise_scheduler}")
        return noise_scheduler
    total = getattr(getattr(noise_scheduler, "config", None), "num_train_timesteps", None)
    return total if isinstance(total, int) else len(alphas_cumprod(noise_scheduler))


def prediction_type_of(noise_scheduler: NoiseSchedule, prediction_type: str | None = None) -> str:
    """What the denoiser predicts: as given, else as the scheduler's config says, else "epsilon".

    Raises:
        ValueError: for a type other than "epsilon", "v_prediction" and "sample".

    Example:
        >>> prediction_type_of(torch.linspace(0.99, 0.01, 50))
        'epsilon'
    """
    configured = getattr(getattr(noise_scheduler, "config", None), "prediction_type", "epsilon")
    prediction_type = configured if prediction_type is None else prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"diffusion: prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )
    return prediction_type


def native_weights(
    weights: Tensor, noise_scheduler: NoiseSchedule, weight_gauge: str, prediction_type: str | None = None
) -> Tensor:
    """Weights, (T,), as they multiply the MSE of what the denoiser predicts, (T,).

    Args:
        weights: what is to be converted.
        noise_scheduler: a diffusers scheduler or abar.
        weight_gauge: what the weights multiply now: "native" or "epsilon", the noise MSE.
        prediction_type: None asks the scheduler.

    Example:
        >>> native_weights(torch.ones(2), torch.tensor([0.75, 0.5]), "epsilon", "v_prediction").tolist()
        [0.75, 0.5]
    """
    if weight_gauge not in ("native", "epsilon"):
        raise ValueError(f"timestep sampler: weight_gauge: expected one of native, epsilon, got {weight_gauge!r}")
    target = prediction_type_of(noise_scheduler, prediction_type)
    return weights if weight_gauge == "native" else to_prediction_type(weights, snr(noise_scheduler), target)


def snr(noise_scheduler: NoiseSchedule) -> Tensor:
    """The signal-to-noise ratios of a schedule, (T,) float64.

    Example:
        >>> snr(torch.tensor([0.75, 0.5])).tolist()
        [3.0, 1.0]
    """
    abar = alphas_cumprod(noise_scheduler)
    return abar / (1 - abar)


def mean_one(weights: Tensor, law: Tensor) -> Tensor:
    """Weights, (T,), scaled to mean 1 under a law, (T,).

    Example:
        >>> mean_one(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).tolist()
        [0.5, 1.5]
    """
    return weights / (weights * law).sum()


def uniform(total: int) -> Tensor:
    """The uniform law over ``total`` timesteps, (T,) float64.

    Example:
        >>> uniform(2).tolist()
        [0.5, 0.5]
    """
    return torch.full((total,), 1 / total, dtype=torch.float64)


def _table(name: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"timestep sampler: {name}: expected shape (T,), got {tuple(values.shape)}")
    if wrong := int((~values.isfinite() | (values < 0)).sum()):
        raise ValueError(
            f"timestep sampler: {name}: expected finite values >= 0, "
            f"got {wrong} of {len(values)} negative or not finite"
        )
    return values
