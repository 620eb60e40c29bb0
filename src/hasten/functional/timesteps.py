"""Which timesteps a diffusion model trains on, and how much each counts: tables over t, (T,), and their formulas.

T is the number of training timesteps, t = 0..T-1 and larger t is noisier; abar_t = cumprod(1 - beta)_t;
SNR = abar / (1 - abar). Tables keep the dtype of what they are made from; those made from T alone are float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a denoiser predicts, in the words of diffusers: the noise, the velocity or the clean sample."""


def speed_probabilities(num_timesteps: int, *, k: float = 5.0, tau: float = 0.7) -> Tensor:
    """The sampling law of SpeeD, (T,): every t < tau is drawn k times as often as one in [tau, T).

    Args:
        num_timesteps: T.
        k: how much rarer the nearly solved, noisiest steps become, >= 1; 1 is the uniform law.
        tau: where they begin: steps (int, 1..T) or a fraction of T (float in (0, 1]).

    Raises:
        ValueError: for k or tau outside these ranges.

    Source: SpeeD, arXiv:2405.17403; the paper counts t from 1, which is the same law.

    Example:
        >>> speed_probabilities(10, k=5.0, tau=0.7).mul(38).tolist()
        [5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0]
    """
    if not 1 <= k < math.inf:
        raise ValueError(f"speed: k: expected a number >= 1, got {k}; 1 is uniform sampling, the paper uses 5")
    steps = _steps(tau, num_timesteps)
    law = torch.ones(num_timesteps, dtype=torch.float64)
    law[:steps] = k
    return law / (num_timesteps + steps * (k - 1))


def speed_weights(
    alphas_cumprod: Tensor, *, lam: float = 0.6, tau: float | str = 0.7, tail_weight: float | None = None
) -> Tensor:
    """The loss weights of SpeeD, (T,) -> (T,): from 1 - lam where the process changes slowest to lam where fastest.

    Args:
        alphas_cumprod: abar, (T,).
        lam: the ceiling of the weights, in [0.5, 1]; 0.5 weighs every step alike.
        tau: read by ``tail_weight`` only; as in :func:`speed_tau`.
        tail_weight: the weight of every t >= tau instead; 1.0 is what the authors' code trains with, None leaves the
            paper's formula.

    Raises:
        ValueError: for values outside these ranges, or a schedule that changes at one speed throughout.

    Source: SpeeD, arXiv:2405.17403.

    Example:
        >>> abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        >>> [round(w, 4) for w in speed_weights(abar)[[0, 219, 700]].tolist()]
        [0.4088, 0.6, 0.4071]
    """
    if not 0.5 <= lam <= 1:
        raise ValueError(
            f"speed: lam: expected 0.5 <= lam <= 1, got {lam}; lam is the ceiling of the weights, the paper uses 0.6"
        )
    if tail_weight is not None and not 0 <= tail_weight < math.inf:
        raise ValueError(f"speed: tail_weight: expected a number >= 0 or None, got {tail_weight}; official mode uses 1")
    _check_alphas_cumprod(alphas_cumprod)
    speed = _gradient(1 - alphas_cumprod)
    slowest, fastest = speed.min(), speed.max()
    if slowest == fastest:
        raise ValueError(
            "speed: schedule: expected 1 - alphas_cumprod to change at different speeds, got the same at every t; "
            "use uniform weights"
        )
    weights = (1 - lam) + (2 * lam - 1) * (speed - slowest) / (fastest - slowest)
    if tail_weight is not None:
        weights[speed_tau(alphas_cumprod, tau) :] = tail_weight
    return weights


def speed_tau(alphas_cumprod: Tensor, tau: float | str = "auto", *, r: float = 150.0) -> int:
    """Where SpeeD's convergence area begins, (T,) -> steps in 1..T.

    Args:
        alphas_cumprod: abar, (T,).
        tau: steps (int, 1..T), a fraction of T (float in (0, 1]), or "auto": the first t with abar_t <= 1 / r.
        r: how far the signal must have faded for "auto", > 1.

    Raises:
        ValueError: for any other tau, or where abar never falls to 1 / r.

    Source: SpeeD, arXiv:2405.17403, for the area; "auto" is ours, the paper's rule of magnitudes read off the table.

    Example:
        >>> abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        >>> speed_tau(abar), speed_tau(abar, 0.7), speed_tau(abar, 650)
        (703, 700, 650)
    """
    _check_alphas_cumprod(alphas_cumprod)
    if tau != "auto":
        return _steps(tau, len(alphas_cumprod))
    steps = _first_faded(alphas_cumprod, r)
    if steps == len(alphas_cumprod):
        raise ValueError(
            f"speed: tau: expected a schedule whose alphas_cumprod falls to 1/{r:g} for 'auto', "
            f"got {alphas_cumprod[-1].item():.3g} at its end; pass tau as a number or a smaller r"
        )
    return steps


def meaningful_step(alphas_cumprod: Tensor) -> int:
    """The step m that SpeeD's dual draw mirrors at, (T,) -> 1 + the first t where sqrt(1 - abar) has become flat.

    Flat is a gradient below 0.1 / T: the authors' 1e-4 at T = 1000, and the same share of T at every other T. Where
    the schedule never gets flat m is T, which no dual draw can use.

    Source: the authors' SpeeD code; the paper does not have it.

    Example:
        >>> meaningful_step(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
        642
    """
    _check_alphas_cumprod(alphas_cumprod)
    flat = _gradient((1 - alphas_cumprod).sqrt()) < 0.1 / len(alphas_cumprod)
    return 1 + int(flat.int().argmax()) if flat.any() else len(flat)


def dual_timesteps(t: Tensor, m: int) -> Tensor:
    """The partner of each t in SpeeD's dual draw, any shape -> same shape: its distance from the meaningful step m.

    Not an antithetic draw, and it does not keep a law: steps beyond m land on the lowest noise.

    Source: the authors' SpeeD code; the paper does not have it.

    Example:
        >>> dual_timesteps(torch.tensor([0, 100, 642, 999]), 642).tolist()
        [642, 542, 0, 357]
    """
    return (t - m).abs()


def noise_zones(alphas_cumprod: Tensor, *, tau: float | str = "auto") -> dict[str, tuple[int, int]]:
    """SpeeD's three areas of a schedule, (T,) -> name: (start, stop): acceleration, deceleration, convergence.

    The noise grows ever faster up to t*, the steepest point of 1 - abar, ever slower from there, and from tau on the
    sample is nearly pure noise. A schedule that never gets there has no convergence area under "auto".

    Args:
        alphas_cumprod: abar, (T,).
        tau: as in :func:`speed_tau`.

    Source: SpeeD, arXiv:2405.17403.

    Example:
        >>> noise_zones(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
        {'acceleration': (0, 219), 'deceleration': (219, 703), 'convergence': (703, 1000)}
    """
    _check_alphas_cumprod(alphas_cumprod)
    speed = _gradient(1 - alphas_cumprod)
    stop = _first_faded(alphas_cumprod, 150.0) if tau == "auto" else speed_tau(alphas_cumprod, tau)
    steepest = min(int(speed.argmax()), stop)
    return {"acceleration": (0, steepest), "deceleration": (steepest, stop), "convergence": (stop, len(speed))}


def snr_weights(
    snr: Tensor, scheme: str = "min_snr", *, prediction_type: str = "epsilon", **constants: float
) -> Tensor:
    """The loss weights of a published scheme for what the denoiser predicts, any shape -> same shape.

    Args:
        snr: signal-to-noise ratios, finite and >= 0; 0 (zero terminal SNR) only where it is not noise that is
            predicted.
        scheme: "min_snr", "soft_min_snr", "p2", "debias", "truncated_snr" or "edm".
        prediction_type: "epsilon", "v_prediction" or "sample": what the MSE that the weights multiply is about.
        constants: of the scheme, such as ``gamma``.

    Raises:
        ValueError: for an unknown scheme or prediction type, constants out of range, or epsilon with zero SNR.

    Example:
        >>> snr_weights(torch.tensor([10.0, 1.0]), "min_snr", gamma=5.0).tolist()
        [0.5, 1.0]
        >>> snr_weights(torch.tensor([10.0, 1.0]), "min_snr", prediction_type="sample").tolist()
        [5.0, 1.0]
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"snr weights: scheme: expected one of {', '.join(_SCHEMES)}, got {scheme!r}")
    if not bool((snr.isfinite() & (snr >= 0)).all()):
        raise ValueError(
            f"snr weights: snr: expected finite values >= 0, got {snr.min().item():g} to {snr.max().item():g}; "
            "alphas_cumprod must be below 1 everywhere"
        )
    if prediction_type == "epsilon" and bool((snr == 0).any()):
        raise ValueError(
            f"snr weights: {scheme}: expected SNR > 0 for epsilon prediction, got 0 (zero terminal SNR); "
            "use v_prediction, or rescale_betas_zero_snr=False"
        )
    # the weight of the noise error may grow like 1 / SNR: near 0 its conversion has a limit, at 0 it is inf * 0
    near = snr.clamp(min=math.sqrt(torch.finfo(snr.dtype).tiny))
    return to_prediction_type(_SCHEMES[scheme](near, **constants), near, prediction_type)


def to_prediction_type(weights: Tensor, snr: Tensor, prediction_type: str) -> Tensor:
    """Weights of the noise MSE as weights of another target's MSE, any shape -> same shape: the same loss.

    One error seen three ways: ``|e_v|^2 = |e_eps|^2 (SNR + 1) / SNR`` and ``|e_x0|^2 = |e_eps|^2 / SNR``.

    Args:
        weights: of the noise MSE, per entry of ``snr``.
        snr: signal-to-noise ratios.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Raises:
        ValueError: for any other prediction type.

    Example:
        >>> to_prediction_type(torch.ones(2), torch.tensor([3.0, 1.0]), "v_prediction").tolist()
        [0.75, 0.5]
    """
    if prediction_type == "epsilon":
        return weights
    if prediction_type == "v_prediction":
        return weights * (snr / (snr + 1))
    if prediction_type == "sample":
        return weights * snr
    raise ValueError(
        f"diffusion: prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
    )


def min_snr_weights(snr: Tensor, *, gamma: float = 5.0) -> Tensor:
    """Min-SNR weights of the noise MSE, any shape -> same shape: min(SNR, gamma) / SNR.

    Source: Min-SNR, arXiv:2303.09556.

    Example:
        >>> min_snr_weights(torch.tensor([10.0, 5.0, 1.0])).tolist()
        [0.5, 1.0, 1.0]
    """
    _check_positive("min_snr: gamma", gamma)
    return snr.clamp(max=gamma) / snr


def soft_min_snr_weights(snr: Tensor, *, gamma: float = 5.0) -> Tensor:
    """Soft min-SNR weights of the noise MSE, any shape -> same shape: gamma / (SNR + gamma).

    Source: HDiT, arXiv:2401.11605, and k-diffusion.

    Example:
        >>> soft_min_snr_weights(torch.tensor([15.0, 5.0])).tolist()
        [0.25, 0.5]
    """
    _check_positive("soft_min_snr: gamma", gamma)
    return gamma / (snr + gamma)


def p2_weights(snr: Tensor, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """P2 weights of the noise MSE, any shape -> same shape: 1 / (k + SNR)^gamma.

    Source: P2, arXiv:2204.00227.

    Example:
        >>> p2_weights(torch.tensor([3.0, 1.0])).tolist()
        [0.25, 0.5]
    """
    _check_positive("p2: k", k)
    _check_positive("p2: gamma", gamma)
    return (k + snr) ** -gamma


def debias_weights(snr: Tensor) -> Tensor:
    """Debiased-estimation weights of the noise MSE, any shape -> same shape: 1 / sqrt(SNR).

    Source: arXiv:2310.08442.

    Example:
        >>> debias_weights(torch.tensor([4.0, 1.0])).tolist()
        [0.5, 1.0]
    """
    return snr.rsqrt()


def truncated_snr_weights(snr: Tensor) -> Tensor:
    """Truncated-SNR weights of the noise MSE, any shape -> same shape: max(SNR, 1) / SNR.

    Source: Progressive Distillation, arXiv:2202.00512.

    Example:
        >>> truncated_snr_weights(torch.tensor([4.0, 0.5])).tolist()
        [1.0, 2.0]
    """
    return snr.clamp(min=1) / snr


def edm_weights(snr: Tensor, *, data_std: float = 0.5) -> Tensor:
    """EDM weights of the noise MSE, any shape -> same shape: (sigma^2 + s^2) / s^2 with sigma^2 = 1 / SNR.

    Args:
        snr: signal-to-noise ratios, > 0.
        data_std: s, the standard deviation of the data, > 0.

    Source: EDM, arXiv:2206.00364.

    Example:
        >>> edm_weights(torch.tensor([4.0, 1.0])).tolist()
        [2.0, 5.0]
    """
    _check_positive("edm: data_std", data_std)
    return 1 + 1 / (snr * data_std**2)


_SCHEMES: dict[str, Callable[..., Tensor]] = {
    "min_snr": min_snr_weights,
    "soft_min_snr": soft_min_snr_weights,
    "p2": p2_weights,
    "debias": debias_weights,
    "truncated_snr": truncated_snr_weights,
    "edm": edm_weights,
}


def edm_probabilities(snr: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """EDM's law of noise levels on a schedule, (T,) -> (T,): ln sigma is normal and goes to the nearest step's.

    The ends take the tails.

    Args:
        snr: signal-to-noise ratios of the schedule, > 0 and falling; sigma^2 = 1 / SNR.
        mean: of ln sigma.
        std: of ln sigma, > 0.

    Raises:
        ValueError: for std <= 0, or zero terminal SNR, whose sigma is infinite.

    Source: EDM, arXiv:2206.00364.

    Example:
        >>> edm_probabilities(torch.tensor([100.0, 10.0, 1.0, 0.1])).sum().item()
        1.0
    """
    _check_positive("edm: std", std)
    if not bool(((snr > 0) & snr.isfinite()).all()):
        raise ValueError(
            "edm: snr: expected finite values > 0, got 0 or infinity, as from zero terminal SNR; "
            "use a noise schedule without it (rescale_betas_zero_snr=False)"
        )
    levels = snr.log() / -2
    edges = (levels[1:] + levels[:-1]) / 2
    return _binned_normal((edges - mean) / std)


def logit_normal_probabilities(num_timesteps: int, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The logit-normal law, (T,): t = floor(u T) with logit(u) normal, so a mean above 0 means more noise.

    Source: Stable Diffusion 3, arXiv:2403.03206.

    Example:
        >>> [round(p, 3) for p in logit_normal_probabilities(4).tolist()]
        [0.136, 0.364, 0.364, 0.136]
    """
    _check_positive("logit_normal: std", std)
    edges = torch.arange(1, num_timesteps, dtype=torch.float64) / num_timesteps
    return _binned_normal((edges.logit() - mean) / std)


def mode_probabilities(num_timesteps: int, *, scale: float) -> Tensor:
    """The law with heavy tails and an adjustable mode, (T,): t = floor(f(u) T) with u uniform.

    f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u).

    Args:
        num_timesteps: T.
        scale: in [-1, 2 / (pi - 2)], where f is monotone; 0 is uniform, above 0 prefers the middle, below 0 the ends.

    Raises:
        ValueError: for a scale outside that range.

    Source: Stable Diffusion 3, arXiv:2403.03206.

    Example:
        >>> [round(p, 3) for p in mode_probabilities(4, scale=1.29).tolist()]
        [0.134, 0.366, 0.366, 0.134]
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode: scale: expected -1 <= scale <= {2 / (math.pi - 2):.4f}, got {scale}; SD3 uses 1.29")
    # f falls from 1 to 0 and has no closed inverse: halve the interval that holds it until float64 is exhausted
    edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    low, high = torch.zeros_like(edges), torch.ones_like(edges)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) > edges
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    cdf = 1 - (low + high) / 2
    cdf[0], cdf[-1] = 0, 1
    return cdf.diff().clamp(min=0)


def clts_probabilities(
    num_timesteps: int, *, step: int, std: float, mean: float = 300.0, ramp_steps: int = 50_000
) -> Tensor:
    """The curriculum law at an optimizer step, (T,): (1 - c) uniform + c normal over t, with c = min(step / ramp, 1).

    Args:
        num_timesteps: T.
        step: optimizer steps so far, >= 0.
        std: of the normal, in timesteps, > 0.
        mean: of the normal, in timesteps.
        ramp_steps: optimizer steps from the uniform law to the normal one, >= 1.

    Raises:
        ValueError: for values outside these ranges.

    Source: CLTS, arXiv:2404.07946.

    Example:
        >>> clts_probabilities(4, step=0, std=1.0, mean=2.0).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    _check_positive("clts: std", std)
    _check_positive("clts: ramp_steps", ramp_steps)
    if step < 0:
        raise ValueError(f"clts: step: expected an optimizer step >= 0, got {step}")
    t = torch.arange(num_timesteps, dtype=torch.float64)
    normal = torch.softmax(-(((t - mean) / std) ** 2) / 2, 0)  # never 0/0, however far from the table the mean lies
    share = min(step / ramp_steps, 1.0)
    return (1 - share) / num_timesteps + share * normal


def second_moment_probabilities(losses: Tensor, *, uniform: float = 0.001) -> Tensor:
    """The law that draws each t by its loss, (T, history) -> (T,): sqrt(mean L_t^2), with a share of the uniform law.

    Args:
        losses: the last losses seen at each t.
        uniform: the share of the uniform law, in (0, 1]: without it a t with no loss would never be drawn again.

    Raises:
        ValueError: for a share outside that range.

    Source: Improved DDPM, arXiv:2102.09672.

    Example:
        >>> second_moment_probabilities(torch.tensor([[3.0], [1.0]]), uniform=0.5).tolist()
        [0.625, 0.375]
    """
    if not 0 < uniform <= 1:
        raise ValueError(
            f"second moment: uniform: expected 0 < uniform <= 1, got {uniform}; the paper's code uses 0.001"
        )
    root = losses.square().mean(1).sqrt()
    total = root.sum()
    law = torch.where(total > 0, root / total, 1 / len(losses))  # all losses 0: nothing to prefer
    return (1 - uniform) * law + uniform / len(losses)


def _steps(tau: float | str, num_timesteps: int) -> int:
    """Tau in steps, from steps or a fraction."""
    if isinstance(tau, bool) or not isinstance(tau, int | float):
        raise ValueError(
            f"speed: tau: expected steps (int), a fraction (float) or, where the schedule is known, 'auto', "
            f"got {tau!r}; the paper uses 0.7"
        )
    steps = tau if isinstance(tau, int) else round(tau * num_timesteps) if 0 < tau <= 1 else 0
    if not 1 <= steps <= num_timesteps:
        raise ValueError(
            f"speed: tau: expected 1..{num_timesteps} steps (int) or a fraction of them in (0, 1] (float), got {tau}; "
            "the paper uses 0.7"
        )
    return steps


def _first_faded(alphas_cumprod: Tensor, r: float) -> int:
    """The first t with abar_t <= 1 / r; T where there is none."""
    if not r > 1:
        raise ValueError(f"speed: r: expected a number > 1, got {r}; the default is 150")
    faded = alphas_cumprod <= 1 / r
    return int(faded.int().argmax()) if faded.any() else len(faded)


def _gradient(table: Tensor) -> Tensor:
    """Central differences over t, one-sided at the ends."""
    return torch.gradient(table)[0]


def _binned_normal(edges: Tensor) -> Tensor:
    """The standard normal's mass between neighbouring edges, (T - 1,) -> (T,); the ends take the tails."""
    cdf = torch.special.ndtr(edges)
    return torch.cat([cdf.new_zeros(1), cdf, cdf.new_ones(1)]).diff().clamp(min=0)


def _check_alphas_cumprod(table: Tensor) -> None:
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"schedule: alphas_cumprod: expected (T,) with T >= 2, got shape {tuple(table.shape)}")
    if not bool(((table >= 0) & (table <= 1)).all()):
        raise ValueError(
            f"schedule: alphas_cumprod: expected values in [0, 1], "
            f"got {table.min().item():g} to {table.max().item():g}; pass cumprod(1 - betas)"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
