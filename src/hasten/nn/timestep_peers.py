"""The published timestep samplers that SpeeD is compared with, each by its original paper."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hasten.functional import (
    clts_probabilities,
    edm_probabilities,
    logit_normal_probabilities,
    mode_probabilities,
    second_moment_probabilities,
    snr_weights,
)
from hasten.nn.timesteps import (
    NoiseSchedule,
    TimestepSampler,
    mean_one,
    num_timesteps,
    prediction_type_of,
    snr,
    uniform,
)


class MinSNRSampler(TimestepSampler):
    """Uniform draws; low-noise steps count only as far as min(SNR, gamma).

    Args:
        noise_scheduler: a diffusers scheduler or abar.
        gamma: the SNR from which on steps lose weight, > 0.
        prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
        normalize: scale the weights to mean 1.

    Source: Min-SNR, arXiv:2303.09556.

    Example:
        >>> MinSNRSampler(torch.tensor([0.9375, 0.5]), gamma=5.0).weights
        tensor([0.3333, 1.0000])
    """

    def __init__(
        self,
        noise_scheduler: NoiseSchedule,
        gamma: float = 5.0,
        *,
        prediction_type: str | None = None,
        normalize: bool = False,
    ):
        super().__init__(*_snr_tables(noise_scheduler, "min_snr", prediction_type, normalize, gamma=gamma))


class SoftMinSNRSampler(TimestepSampler):
    """Uniform draws; the smooth form of min-SNR, gamma / (SNR + gamma) for noise prediction.

    Args:
        noise_scheduler: a diffusers scheduler or abar.
        gamma: the SNR of weight one half, > 0.
        prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
        normalize: scale the weights to mean 1.

    Source: HDiT, arXiv:2401.11605, and k-diffusion.

    Example:
        >>> SoftMinSNRSampler(torch.tensor([0.9375, 0.5]), gamma=5.0).weights
        tensor([0.2500, 0.8333])
    """

    def __init__(
        self,
        noise_scheduler: NoiseSchedule,
        gamma: float = 5.0,
        *,
        prediction_type: str | None = None,
        normalize: bool = False,
    ):
        super().__init__(*_snr_tables(noise_scheduler, "soft_min_snr", prediction_type, normalize, gamma=gamma))


class P2Sampler(TimestepSampler):
    """Uniform draws; weights 1 / (k + SNR)^gamma for noise prediction: less for the steps of fine detail.

    Args:
        noise_scheduler: a diffusers scheduler or abar.
        k: > 0; bounds the weights at high noise.
        gamma: how strongly low noise is suppressed, > 0.
        prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
        normalize: scale the weights to mean 1.

    Source: P2, arXiv:2204.00227.

    Example:
        >>> P2Sampler(torch.tensor([0.75, 0.5])).weights
        tensor([0.2500, 0.5000])
    """

    def __init__(
        self,
        noise_scheduler: NoiseSchedule,
        k: float = 1.0,
        gamma: float = 1.0,
        *,
        prediction_type: str | None = None,
        normalize: bool = False,
    ):
        super().__init__(*_snr_tables(noise_scheduler, "p2", prediction_type, normalize, k=k, gamma=gamma))


class DebiasSampler(TimestepSampler):
    """Uniform draws; weights 1 / sqrt(SNR) for noise prediction, over a hundred at the noisiest steps.

    Args:
        noise_scheduler: a diffusers scheduler or abar.
        prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
        normalize: scale the weights to mean 1; advisable with gradient clipping.

    Source: arXiv:2310.08442.

    Example:
        >>> DebiasSampler(torch.tensor([0.8, 0.5])).weights
        tensor([0.5000, 1.0000])
    """

    def __init__(self, noise_scheduler: NoiseSchedule, *, prediction_type: str | None = None, normalize: bool = False):
        super().__init__(*_snr_tables(noise_scheduler, "debias", prediction_type, normalize))


class TruncatedSNRSampler(TimestepSampler):
    """Uniform draws; weights max(SNR, 1) / SNR for noise prediction: the larger of its own and the sample's MSE.

    Args:
        noise_scheduler: a diffusers scheduler or abar.
        prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
        normalize: scale the weights to mean 1; advisable with gradient clipping.

    Source: Progressive Distillation, arXiv:2202.00512.

    Example:
        >>> TruncatedSNRSampler(torch.tensor([0.5, 0.2])).weights
        tensor([1., 4.])
    """

    def __init__(self, noise_scheduler: NoiseSchedule, *, prediction_type: str | None = None, normalize: bool = False):
        super().__init__(*_snr_tables(noise_scheduler, "truncated_snr", prediction_type, normalize))


class EDMSampler(TimestepSampler):
    """Draws ln sigma from a normal, snapped to the schedule, and weighs as EDM does.

    Args:
        noise_scheduler: a diffusers scheduler or abar, without zero terminal SNR.
        mean: of ln sigma.
        std: of ln sigma, > 0.
        data_std: the standard deviation of the data, > 0.
        prediction_type: "epsilon", "v_prediction" or "sample"; None asks the scheduler.
        normalize: scale the weights to mean 1; advisable with gradient clipping.

    Source: EDM, arXiv:2206.00364.

    Example:
        >>> EDMSampler(torch.tensor([0.8, 0.5])).weights
        tensor([2.0000, 5.0000])
    """

    def __init__(
        self,
        noise_scheduler: NoiseSchedule,
        mean: float = -1.2,
        std: float = 1.2,
        data_std: float = 0.5,
        *,
        prediction_type: str | None = None,
        normalize: bool = False,
    ):
        law = edm_probabilities(snr(noise_scheduler), mean=mean, std=std)
        super().__init__(*_snr_tables(noise_scheduler, "edm", prediction_type, normalize, law, data_std=data_std))


class LogitNormalSampler(TimestepSampler):
    """Draws u with logit(u) normal and takes t = floor(u T), weight 1: the middle of the schedule most often.

    Args:
        noise_scheduler: only T is read, so an int or a flow-matching scheduler will do.
        mean: of logit(u); above 0 means more noise.
        std: of logit(u), > 0.

    Source: Stable Diffusion 3, arXiv:2403.03206.

    Example:
        >>> LogitNormalSampler(4).probs
        tensor([0.1360, 0.3640, 0.3640, 0.1360])
    """

    def __init__(self, noise_scheduler: NoiseSchedule, mean: float = 0.0, std: float = 1.0):
        super().__init__(logit_normal_probabilities(num_timesteps(noise_scheduler), mean=mean, std=std))


class ModeSampler(TimestepSampler):
    """Draws by a law with an adjustable mode and heavier tails than the logit-normal one, weight 1.

    Args:
        noise_scheduler: only T is read, so an int or a flow-matching scheduler will do.
        scale: in [-1, 1.7519]; 0 is uniform, above 0 prefers the middle, below 0 the ends.

    Source: Stable Diffusion 3, arXiv:2403.03206.

    Example:
        >>> ModeSampler(4, scale=1.29).probs
        tensor([0.1336, 0.3664, 0.3664, 0.1336])
    """

    def __init__(self, noise_scheduler: NoiseSchedule, scale: float):
        super().__init__(mode_probabilities(num_timesteps(noise_scheduler), scale=scale))


class CLTSSampler(TimestepSampler):
    """A curriculum from uniform draws to a normal over t, weight 1; moves on with every :meth:`step`.

    Args:
        noise_scheduler: only T is read, so an int will do.
        std: of the normal, in timesteps, > 0.
        mean: of the normal, in timesteps; the default is meant for T = 1000.
        ramp_steps: optimizer steps from the one to the other.

    Source: CLTS, arXiv:2404.07946.

    Example:
        >>> sampler = CLTSSampler(4, std=1.0, mean=2.0, ramp_steps=100)
        >>> sampler.step(100)
        >>> sampler.probs
        tensor([0.0576, 0.2583, 0.4258, 0.2583])
    """

    _normal: Tensor

    def __init__(self, noise_scheduler: NoiseSchedule, *, std: float, mean: float = 300.0, ramp_steps: int = 50_000):
        total = num_timesteps(noise_scheduler)
        normal = clts_probabilities(total, step=ramp_steps, std=std, mean=mean, ramp_steps=ramp_steps)
        super().__init__(uniform(total))
        self.register_buffer("_normal", normal.float(), persistent=False)
        self.ramp_steps = ramp_steps
        self.global_step = 0

    def step(self, global_step: int) -> None:
        """Mix the two laws for this optimizer step, on the tables' device."""
        if global_step < 0:
            raise ValueError(f"clts: step: expected an optimizer step >= 0, got {global_step}")
        self.global_step = global_step
        share = min(global_step / self.ramp_steps, 1.0)
        self.probs.copy_(share * self._normal + (1 - share) / len(self.probs))

    def state(self) -> dict[str, Any]:
        """The optimizer step, and a generator's state."""
        return {**super().state(), "step": self.global_step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        super().load_state(state)
        self.step(state.get("step", self.global_step))


class LossSecondMomentSampler(TimestepSampler):
    """Draws t in proportion to the root mean square of its last losses and weighs by 1 / (T p_t): unbiased.

    Uniform until every t has ``history`` losses; :meth:`update` brings them, from all ranks where torch.distributed
    runs. A loss that is not finite is left out.

    Args:
        noise_scheduler: only T is read, so an int will do.
        history: losses kept for each t, >= 1.
        uniform: the share of the uniform law, in (0, 1].

    Source: Improved DDPM, arXiv:2102.09672.

    Example:
        >>> sampler = LossSecondMomentSampler(2, history=1, uniform=0.5)
        >>> sampler.update(torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
        >>> sampler.probs, sampler.weights
        (tensor([0.6250, 0.3750]), tensor([0.8000, 1.3333]))
    """

    def __init__(self, noise_scheduler: NoiseSchedule, history: int = 10, uniform: float = 0.001):
        total = num_timesteps(noise_scheduler)
        if history < 1:
            raise ValueError(f"second moment: history: expected at least 1 loss for each t, got {history}")
        super().__init__(torch.ones(total))
        self.uniform = uniform
        # Attributes, because averaging buffers (EMA) would mix the losses of different steps. One row more than T:
        # what does not count goes there, which keeps shapes fixed and the GPU unwatched.
        self._losses = torch.zeros(total + 1, history)
        self._seen = torch.zeros(total + 1, dtype=torch.int64)
        self._retabulate()

    def update(self, t: Tensor, per_sample_loss: Tensor) -> None:
        """Remember unweighted losses, (n,), at their timesteps, (n,), and redraw the tables."""
        self._check(t)
        loss = per_sample_loss.detach().float()
        if loss.shape != t.shape or t.ndim != 1:
            raise ValueError(
                f"second moment: per_sample_loss: expected one loss for each t, (n,) and (n,), got "
                f"{tuple(loss.shape)} and {tuple(t.shape)}"
            )
        nowhere = len(self.probs)
        if dist.is_available() and dist.is_initialized():
            t, loss = _from_all_ranks(t, loss, nowhere)
        self._losses, self._seen = self._losses.to(t.device), self._seen.to(t.device)

        t = torch.where(loss.isfinite(), t.long(), nowhere)
        t, order = t.sort(stable=True)
        rank = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)  # 0, 1, ... within each t
        left = torch.searchsorted(t, t, right=True) - torch.arange(len(t), device=t.device)  # of the same t, itself too
        history = self._losses.shape[1]
        row = torch.where(left <= history, t, nowhere)  # of more than history losses at one t the last ones count
        self._losses[row, (self._seen[t] + rank) % history] = loss[order]
        self._seen.index_add_(0, t, torch.ones_like(t))
        self._retabulate()

    def state(self) -> dict[str, Any]:
        """The losses and how many were seen at each t, and a generator's state."""
        return {**super().state(), "losses": self._losses.clone(), "seen": self._seen.clone()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        super().load_state(state)
        if "losses" in state:
            if state["losses"].shape != self._losses.shape:
                (total, history), (found, kept) = self._losses.shape, state["losses"].shape
                raise ValueError(
                    f"second moment: state: expected {history} losses at each of {total - 1} timesteps, got {kept} at "
                    f"{found - 1}; resume with the schedule and history it was saved with"
                )
            self._losses = state["losses"].to(self.probs.device, copy=True)
            self._seen = state["seen"].to(self.probs.device, copy=True)
            self._retabulate()

    def _retabulate(self) -> None:
        law = second_moment_probabilities(self._losses[:-1], uniform=self.uniform)
        complete = (self._seen[:-1] >= self._losses.shape[1]).all()
        self.probs.copy_(torch.where(complete, law, 1 / len(law)))
        self.weights.copy_(1 / (len(law) * self.probs))


def _snr_tables(
    noise_scheduler: NoiseSchedule,
    scheme: str,
    prediction_type: str | None,
    normalize: bool,
    law: Tensor | None = None,
    **constants: float,
) -> tuple[Tensor, Tensor]:
    """The law, uniform by default, and the weights of a scheme for what the denoiser predicts, (T,) each."""
    ratios = snr(noise_scheduler)
    law = uniform(len(ratios)) if law is None else law
    target = prediction_type_of(noise_scheduler, prediction_type)
    weights = snr_weights(ratios, scheme, prediction_type=target, **constants)
    return law, mean_one(weights, law) if normalize else weights


def _from_all_ranks(t: Tensor, loss: Tensor, nowhere: int) -> tuple[Tensor, Tensor]:
    """The timesteps and losses of every rank, one after another; shorter batches are filled up with ``nowhere``."""
    longest = torch.tensor(len(t), device=t.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - len(t)
    t, loss = pad(t, (0, missing), value=nowhere), pad(loss, (0, missing))
    ts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    losses = [torch.empty_like(loss) for _ in ts]
    dist.all_gather(ts, t)
    dist.all_gather(losses, loss)
    return torch.cat(ts), torch.cat(losses)
