"""SpeeD: draw the nearly solved timesteps rarely, weigh by how fast the process changes."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from hasten.functional import (
    dual_timesteps,
    meaningful_step,
    noise_zones,
    speed_probabilities,
    speed_tau,
    speed_weights,
)
from hasten.nn.timesteps import (
    NoiseSchedule,
    TimestepSampler,
    alphas_cumprod,
    mean_one,
    native_weights,
    prediction_type_of,
    uniform,
)

log = logging.getLogger(__name__)

# (dual, tail_weight): the authors' code does two things that the paper does not describe
_MODES: dict[str, tuple[bool, float | None]] = {"official": (True, 1.0), "paper": (False, None)}


class SpeeDSampler(TimestepSampler):
    """SpeeD's law and weights: steps t >= tau are drawn k times as rarely, fast-changing ones weigh up to lam.

    In "official" mode, what the authors' code runs, the steps t >= tau weigh 1, and the second half of a batch mirrors
    the first at the meaningful step: batches are not shuffled, a draw and its dual depend on each other, and the law of
    a batch depends on its size (:meth:`log_prob` takes n). "paper" mode draws every step independently by the paper's
    formulas. The dual draw fits linear schedules; on most others it carries draws into the tail it means to thin out,
    which warns: use "paper" mode there.

    Training only: neither the network nor sampling changes.

    Attributes:
        tau: where the convergence area begins, in steps.
        meaningful_step: the step at which the dual draw mirrors.
        areas: name: (start, stop) of acceleration, deceleration and convergence.

    Args:
        noise_scheduler: a diffusers scheduler or abar.
        k: how much rarer t >= tau is drawn, >= 1.
        tau: steps (int), a fraction of T (float in (0, 1]) or "auto", the first t with abar_t <= 1 / r.
        lam: the ceiling of the weights, in [0.5, 1].
        mode: "official" or "paper"; fills ``dual`` and ``tail_weight`` where they are None.
        dual: draw the second half of a batch as the mirror image of the first.
        tail_weight: the weight of t >= tau.
        r: read by tau="auto".
        sampling: False draws uniformly: the weights alone.
        weighting: False weighs every step 1: the law alone.
        warmup_steps: optimizer steps of uniform sampling with weight 1 at the start; ours, needs :meth:`step`.
        weight_gauge: for a denoiser that does not predict noise, what the weights multiply: "native", the MSE of
            its prediction, or "epsilon", the noise MSE as in the paper, from which they are converted.
        normalize: scale the weights to mean 1 under the law.

    Source: SpeeD, arXiv:2405.17403, and the authors' code.

    Example:
        >>> sampler = SpeeDSampler(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
        >>> sampler.tau, sampler.meaningful_step, sampler.areas["deceleration"]
        (700, 642, (219, 700))
        >>> sampler.sample(8, torch.Generator().manual_seed(0)).tolist()
        [886, 537, 349, 699, 490, 244, 105, 293]
    """

    _speed_probs: Tensor
    _speed_weights: Tensor

    def __init__(
        self,
        noise_scheduler: NoiseSchedule,
        k: float = 5.0,
        tau: float | str = 0.7,
        lam: float = 0.6,
        mode: str = "official",
        *,
        dual: bool | None = None,
        tail_weight: float | None = None,
        r: float = 150.0,
        sampling: bool = True,
        weighting: bool = True,
        warmup_steps: int = 0,
        weight_gauge: str = "native",
        normalize: bool = False,
    ):
        if mode not in _MODES:
            raise ValueError(f"speed: mode: expected one of {', '.join(_MODES)}, got {mode!r}")
        if dual and not sampling:
            raise ValueError(
                "speed: dual: expected dual=False with sampling=False, got True; for a uniform law use k=1"
            )
        abar = alphas_cumprod(noise_scheduler)
        steps = speed_tau(abar, tau, r=r)
        preset_dual, preset_tail = _MODES[mode]
        mirror = meaningful_step(abar)
        dual = sampling and (preset_dual if dual is None else dual)
        if dual and not 1 < mirror < len(abar):
            raise ValueError(
                f"speed: meaningful step: expected 1 < m < {len(abar)} for the dual draw, got {mirror}, as "
                "the schedule does not level off; pass dual=False or mode='paper'"
            )
        probs = speed_probabilities(len(abar), k=k, tau=steps)
        weights = speed_weights(
            abar, lam=lam, tau=steps, tail_weight=preset_tail if tail_weight is None else tail_weight
        )
        weights = native_weights(weights, noise_scheduler, weight_gauge)
        if not sampling:
            probs = uniform(len(abar))
        if not weighting:
            weights = torch.ones_like(abar)
        law = _with_duals(probs, mirror, 0.5) if dual else probs
        super().__init__(probs, mean_one(weights, law) if normalize else weights)

        self.tau = steps
        self.meaningful_step = mirror
        self.areas = noise_zones(abar, tau=steps)
        self.warmup_steps = warmup_steps
        self.global_step = 0
        self._dual = dual
        self._warming_up = False
        # what the tables hold once the warm-up is over
        self.register_buffer("_speed_probs", self.probs.clone(), persistent=False)
        self.register_buffer("_speed_weights", self.weights.clone(), persistent=False)
        self.step(0)

        if law[steps:].sum() > probs[steps:].sum():
            warnings.warn(
                f"speed: the dual draw raises the share of the steps t >= {steps} from {probs[steps:].sum():.3f} to "
                f"{law[steps:].sum():.3f} on this schedule, against the purpose; pass mode='paper' or dual=False",
                stacklevel=2,
            )
        predicted = prediction_type_of(noise_scheduler)
        if weighting and weight_gauge == "native" and predicted != "epsilon":
            log.info(
                "speed: the paper's weights are for noise prediction; here they multiply the MSE of %s as they are, "
                "weight_gauge='epsilon' converts them",
                predicted,
            )

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Draw n timesteps, (n,) int64; with the dual draw n // 2 + 1 primaries, then the duals of the first of them.

        Args:
            n: at least 1.
            generator: on the tables' device; by default the sampler's own, else torch's global one.
        """
        if not self._dual or self._warming_up or n < 1:
            return super().sample(n, generator)
        primaries = super().sample(n // 2 + 1, generator)
        return torch.cat([primaries, dual_timesteps(primaries, self.meaningful_step)])[:n]

    def step(self, global_step: int) -> None:
        """Leave the warm-up, or enter it again, at the given optimizer step."""
        self.global_step = global_step
        warming_up = global_step < self.warmup_steps
        if warming_up != self._warming_up:
            self._warming_up = warming_up
            self.probs.copy_(torch.full_like(self.probs, 1 / len(self.probs)) if warming_up else self._speed_probs)
            self.weights.copy_(torch.ones_like(self.weights) if warming_up else self._speed_weights)

    def state(self) -> dict[str, Any]:
        """The optimizer step, and a generator's state."""
        return {**super().state(), "step": self.global_step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        super().load_state(state)
        self.step(state.get("step", self.global_step))

    def _marginal(self, n: int | None) -> Tensor:
        if not self._dual or self._warming_up:
            return self.probs
        primaries = 0.5 if n is None else min(n // 2 + 1, n) / n
        return _with_duals(self.probs, self.meaningful_step, primaries)


def _with_duals(probs: Tensor, m: int, primaries: float) -> Tensor:
    """The law of a batch that holds a share of primaries drawn from ``probs``, (T,), and else their duals, (T,)."""
    t = torch.arange(len(probs), device=probs.device)
    duals = torch.zeros_like(probs).index_add_(0, dual_timesteps(t, m), probs)
    return primaries * probs + (1 - primaries) * duals
