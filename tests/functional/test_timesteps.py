"""The tables over t against the papers' numbers and slow restatements."""

import math

import numpy as np
import pytest
import torch

from hasten.functional import (
    clts_probabilities,
    dual_timesteps,
    edm_probabilities,
    edm_weights,
    logit_normal_probabilities,
    meaningful_step,
    min_snr_weights,
    mode_probabilities,
    noise_zones,
    p2_weights,
    second_moment_probabilities,
    snr_weights,
    soft_min_snr_weights,
    speed_probabilities,
    speed_tau,
    speed_weights,
    to_prediction_type,
)

SCHEMES = ["min_snr", "soft_min_snr", "p2", "debias", "truncated_snr", "edm"]


def abar(total=1000, start=1e-4, end=0.02, power=1.0):
    """Linear betas; power 2 is linear in sqrt(beta)."""
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), total, dtype=torch.float64) ** power
    return torch.cumprod(1 - betas, 0)


def cosine(total=1000):
    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((t + 1) / total) / level(t / total), 0.999) for t in range(total)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


LINEAR = abar()
SNR = LINEAR / (1 - LINEAR)
CONSTANT = torch.cumprod(torch.full((1000,), 0.98, dtype=torch.float64), 0)


# speed: areas


@pytest.mark.parametrize(("schedule", "m"), [(LINEAR, 642), (cosine(), 959), (abar(power=2.0), 829), (CONSTANT, 229)])
def test_the_meaningful_step_is_that_of_the_authors_schedules(schedule, m):
    assert meaningful_step(schedule) == m


@pytest.mark.parametrize("total", [250, 500, 2000, 4000])
def test_the_meaningful_step_scales_with_the_schedule(total):
    scaled = abar(total, 1e-4 * 1000 / total, 0.02 * 1000 / total)
    assert meaningful_step(scaled) / total == pytest.approx(0.642, abs=0.01)


def test_a_schedule_that_never_gets_flat_has_its_meaningful_step_at_the_end():
    assert meaningful_step(torch.linspace(0.99, 0.01, 100, dtype=torch.float64)) == 100


@pytest.mark.parametrize(("r", "steps"), [(50.0, 620), (100.0, 673), (150.0, 703), (200.0, 723)])
def test_auto_tau_is_where_the_signal_has_faded_to_one_in_r(r, steps):
    assert speed_tau(LINEAR, "auto", r=r) == steps
    assert LINEAR[steps] <= 1 / r < LINEAR[steps - 1]


def test_tau_is_a_fraction_as_a_float_and_steps_as_an_int():
    assert speed_tau(LINEAR, 0.7) == speed_tau(LINEAR, 700) == 700
    assert speed_tau(LINEAR, 1) == 1
    assert speed_tau(LINEAR, 1.0) == 1000


def test_the_zones_of_the_linear_schedule():
    assert noise_zones(LINEAR) == {"acceleration": (0, 219), "deceleration": (219, 703), "convergence": (703, 1000)}
    assert noise_zones(LINEAR, tau=100)["deceleration"] == (100, 100)


def test_the_zones_of_stable_diffusion():
    zones = noise_zones(abar(1000, 0.00085, 0.012, power=2.0))
    assert zones == {"acceleration": (0, 313), "deceleration": (313, 969), "convergence": (969, 1000)}


def test_a_schedule_that_keeps_its_signal_has_no_convergence_zone():
    assert noise_zones(abar(100))["convergence"] == (100, 100)


# speed: tables


@pytest.mark.parametrize("total", [2, 7, 1000])
@pytest.mark.parametrize("k", [1, 2, 5.0, 25.5])
@pytest.mark.parametrize("tau", [1, 0.5, 0.7, 1.0])
def test_the_law_is_the_papers(total, k, tau):
    steps = tau if isinstance(tau, int) else round(tau * total)
    expected = [(k if t < steps else 1) / (total + steps * (k - 1)) for t in range(total)]
    law = speed_probabilities(total, k=k, tau=tau)
    assert law.dtype == torch.float64
    torch.testing.assert_close(law, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_law_with_k_1_is_uniform():
    assert speed_probabilities(10, k=1).unique().tolist() == [0.1]


def test_the_weights_are_those_of_the_linear_schedule():
    weights = speed_weights(LINEAR, lam=0.6, tau=700, tail_weight=1.0)
    expected = torch.tensor([0.4088, 0.5389, 0.6000, 0.5158, 0.4228, 0.4072, 1.0], dtype=torch.float64)
    torch.testing.assert_close(weights[[0, 100, 219, 400, 600, 699, 700]], expected, rtol=0, atol=1e-4)
    assert weights.mean().item() == pytest.approx(0.653, abs=5e-4)
    assert bool((weights[700:] == 1).all())
    assert 0.4 <= weights[:700].min() <= weights[:700].max() <= 0.6


@pytest.mark.parametrize("schedule", [LINEAR, cosine(), abar(power=2.0), CONSTANT, abar(51)])
@pytest.mark.parametrize("lam", [0.5, 0.6, 1.0])
def test_the_weights_follow_the_gradient_of_the_noise(schedule, lam):
    speed = np.gradient(1 - schedule.numpy())
    expected = (1 - lam) + (2 * lam - 1) * (speed - speed.min()) / (speed.max() - speed.min())
    weights = speed_weights(schedule, lam=lam)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)
    assert weights.min().item() == pytest.approx(1 - lam)
    assert weights.max().item() == pytest.approx(lam)


def test_the_weights_of_a_float32_schedule_stay_float32():
    assert speed_weights(LINEAR.float()).dtype == torch.float32


def test_a_dual_is_the_distance_from_the_meaningful_step():
    t = torch.arange(1000)
    expected = [642 - s if s < 642 else s - 642 for s in range(1000)]
    assert dual_timesteps(t, 642).tolist() == expected


@pytest.mark.parametrize(
    ("k", "duals", "shares"),
    [
        (1, False, [0.358, 0.284, 0.058, 0.300]),
        (5, False, [0.471, 0.374, 0.076, 0.079]),
        (5, True, [0.548, 0.374, 0.039, 0.039]),
        (2, True, [0.543, 0.334, 0.035, 0.088]),
        (1, True, [0.536, 0.284, 0.030, 0.150]),
    ],
)
def test_the_shares_of_the_draws_by_zone(k, duals, shares):
    law = speed_probabilities(1000, k=k, tau=700)
    if duals:
        law = (law + torch.zeros_like(law).index_add(0, dual_timesteps(torch.arange(1000), 642), law)) / 2
    for share, (start, stop) in zip(shares, [(0, 358), (358, 642), (642, 700), (700, 1000)], strict=True):
        assert law[start:stop].sum().item() == pytest.approx(share, abs=1e-3)


# the SNR family


def test_the_weights_of_the_linear_schedule_are_the_published_ones():
    t = [0, 100, 219, 500, 999]
    checks = {
        "snr": (SNR[t], [9999, 8.5367, 1.5313, 0.08436, 4.036e-5]),
        "min_snr": (snr_weights(SNR)[t], [5.0005e-4, 0.5857, 1, 1, 1]),
        "min_snr v": (
            snr_weights(SNR, prediction_type="v_prediction")[t],
            [5.0e-4, 0.5243, 0.6049, 0.0778, 4.04e-5],
        ),
        "p2": (snr_weights(SNR, "p2")[t], [1.0e-4, 0.1049, 0.3951, 0.9222, 0.99996]),
    }
    for name, (found, expected) in checks.items():
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, err_msg=name)
    assert int((SNR < 5).nonzero()[0]) == 130
    assert int((SNR < 1).nonzero()[0]) == 259
    assert snr_weights(SNR, "debias").max().item() == pytest.approx(157, abs=0.5)
    assert snr_weights(SNR, "truncated_snr").max().item() == pytest.approx(2.5e4, rel=0.01)
    assert snr_weights(SNR, "edm").max().item() == pytest.approx(1e5, rel=0.01)


@pytest.mark.parametrize("snr", [9999.0, 5.0, 1.0, 0.3, 4e-5])
def test_each_scheme_is_its_papers_formula_in_each_gauge(snr):
    sigma = snr**-0.5
    rows = {
        "min_snr": (min(snr, 5) / snr, min(snr, 5) / (snr + 1), min(snr, 5)),
        "soft_min_snr": (5 / (snr + 5), 5 / (snr + 5) * snr / (snr + 1), 5 * snr / (snr + 5)),
        "p2": (1 / (1 + snr), snr / (snr + 1) ** 2, snr / (1 + snr)),
        "debias": (sigma, snr**0.5 / (snr + 1), snr**0.5),
        "truncated_snr": (max(snr, 1) / snr, max(snr, 1) / (snr + 1), max(snr, 1)),
        "edm": (
            (sigma**2 + 0.25) / 0.25,
            (sigma**2 + 0.25) / 0.25 * snr / (snr + 1),
            (sigma**2 + 0.25) / (sigma * 0.5) ** 2,
        ),
    }
    assert list(rows) == SCHEMES
    for scheme, row in rows.items():
        for target, expected in zip(["epsilon", "v_prediction", "sample"], row, strict=True):
            found = snr_weights(torch.tensor([snr], dtype=torch.float64), scheme, prediction_type=target)
            assert found.item() == pytest.approx(expected, rel=1e-9), (scheme, target)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_one_loss_whatever_the_denoiser_predicts(scheme):
    t = torch.tensor([0, 3, 130, 500, 999])
    alpha, sigma = LINEAR[t].sqrt()[:, None], (1 - LINEAR[t]).sqrt()[:, None]
    x0, noise, error = torch.randn(3, 5, 12, dtype=torch.float64)
    noisy = alpha * x0 + sigma * noise
    # a denoiser that is wrong about the noise by `error` is wrong about the rest by what follows from it
    guess = noise + error
    x0_guess = (noisy - sigma * guess) / alpha
    errors = {
        "epsilon": guess - noise,
        "sample": x0_guess - x0,
        "v_prediction": (alpha * guess - sigma * x0_guess) - (alpha * noise - sigma * x0),
    }
    losses = [snr_weights(SNR[t], scheme, prediction_type=target) * e.square().mean(1) for target, e in errors.items()]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-6, atol=0)


def test_the_snr_is_that_of_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(1000)
    found = compute_snr(scheduler, torch.arange(1000))
    torch.testing.assert_close(found.double(), SNR, rtol=1e-2, atol=0)  # float32 1 - abar is off by 6e-3 at t = 0
    torch.testing.assert_close(found[100:].double(), SNR[100:], rtol=1e-4, atol=0)


def test_min_snr_is_not_a_multiple_of_p2():
    ratio = min_snr_weights(SNR) / p2_weights(SNR)
    assert ratio.max() / ratio.min() > 2


@pytest.mark.parametrize("target", ["v_prediction", "sample"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_terminal_snr_has_a_limit_where_noise_is_not_predicted(scheme, target, dtype):
    limit = snr_weights(torch.tensor([0.0], dtype=dtype), scheme, prediction_type=target).item()
    near = snr_weights(torch.tensor([1e-12], dtype=torch.float64), scheme, prediction_type=target).item()
    assert limit == pytest.approx(near, abs=1e-5)


def test_the_constants_of_a_scheme_reach_it():
    assert snr_weights(SNR, "min_snr", gamma=1.0).equal(min_snr_weights(SNR, gamma=1.0))
    assert snr_weights(SNR, "soft_min_snr", gamma=1.0).equal(soft_min_snr_weights(SNR, gamma=1.0))
    assert snr_weights(SNR, "p2", k=2.0, gamma=0.5).equal(p2_weights(SNR, k=2.0, gamma=0.5))
    assert snr_weights(SNR, "edm", data_std=1.0).equal(edm_weights(SNR, data_std=1.0))


# laws of the peers


def test_edm_draws_the_step_whose_noise_level_is_nearest():
    law = edm_probabilities(SNR, mean=-1.2, std=1.2)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    levels = -SNR.log() / 2
    draws = -1.2 + 1.2 * torch.randn(100_000, dtype=torch.float64)
    nearest = torch.cat([(chunk[:, None] - levels).abs().argmin(1) for chunk in draws.split(5_000)])
    found = torch.bincount(nearest, minlength=1000).double() / len(draws)
    assert (found.view(20, 50).sum(1) - law.view(20, 50).sum(1)).abs().max() < 0.01
    assert found[0].item() == pytest.approx(law[0].item(), abs=0.002)  # the end with the tail of the low noise


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal_is_the_histogram_of_diffusers(mean, std):
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    law = logit_normal_probabilities(20, mean=mean, std=std)
    u = density("logit_normal", 400_000, logit_mean=mean, logit_std=std)
    found = torch.bincount((u * 20).long(), minlength=20).double() / len(u)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    assert (found - law).abs().max() < 0.004


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29, 1.75])
def test_mode_is_the_histogram_of_diffusers(scale):
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    law = mode_probabilities(20, scale=scale)
    u = density("mode", 400_000, mode_scale=scale)
    found = torch.bincount((u * 20).long().clamp(max=19), minlength=20).double() / len(u)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    assert (found - law).abs().max() < 0.004


def test_logit_normal_with_a_positive_mean_means_more_noise():
    t = torch.arange(100, dtype=torch.float64)
    assert (logit_normal_probabilities(100, mean=0.5) * t).sum() > (logit_normal_probabilities(100) * t).sum()


@pytest.mark.parametrize("step", [0, 1, 25_000, 50_000, 10**9])
@pytest.mark.parametrize(("mean", "std"), [(300.0, 100.0), (300.0, 1e-3), (-1e6, 1.0)])
def test_clts_is_a_law_at_every_step(step, mean, std):
    law = clts_probabilities(1000, step=step, mean=mean, std=std)
    assert bool((law >= 0).all())
    assert law.sum().item() == pytest.approx(1)


def test_clts_goes_from_uniform_to_normal():
    normal = [math.exp(-(((t - 300) / 80) ** 2) / 2) for t in range(1000)]
    normal = torch.tensor(normal, dtype=torch.float64) / sum(normal)
    torch.testing.assert_close(clts_probabilities(1000, step=50_000, std=80.0), normal)
    torch.testing.assert_close(clts_probabilities(1000, step=10, std=80.0, ramp_steps=40), 0.75 / 1000 + 0.25 * normal)


def test_losses_that_are_all_zero_draw_uniformly():
    assert second_moment_probabilities(torch.zeros(4, 3), uniform=0.1).tolist() == [0.25] * 4


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: speed_probabilities(10, k=0.5), "speed: k: expected a number >= 1, got 0.5"),
        (lambda: speed_probabilities(10, k=math.nan), "speed: k: expected a number >= 1, got nan"),
        (lambda: speed_probabilities(10, tau=11), r"speed: tau: expected 1\.\.10 steps .* got 11;"),
        (lambda: speed_probabilities(10, tau=0), "speed: tau: .* got 0;"),
        (lambda: speed_probabilities(10, tau=1.5), "speed: tau: .* got 1.5;"),
        (lambda: speed_probabilities(10, tau=0.01), "speed: tau: .* got 0.01;"),
        (lambda: speed_probabilities(10, tau=math.nan), "speed: tau: .* got nan;"),
        (lambda: speed_probabilities(10, tau=True), "speed: tau: expected steps .* got True;"),
        (lambda: speed_probabilities(10, tau="auto"), "speed: tau: expected steps .* got 'auto';"),
        (lambda: speed_tau(LINEAR, "late"), "speed: tau: .*'auto', got 'late';"),
        (lambda: speed_tau(abar(100)), "speed: tau: expected a schedule .* 1/150 .*; pass tau as a number"),
        (lambda: speed_tau(LINEAR, r=1.0), "speed: r: expected a number > 1, got 1.0;"),
        (
            lambda: speed_weights(LINEAR, lam=5.0),
            "speed: lam: expected 0.5 <= lam <= 1, got 5.0; lam is the ceiling of the weights, the paper uses 0.6",
        ),
        (lambda: speed_weights(LINEAR, lam=0.4), "speed: lam: .* got 0.4;"),
        (lambda: speed_weights(LINEAR, tail_weight=-1.0), "speed: tail_weight: expected a number >= 0 .* got -1.0;"),
        (
            lambda: speed_weights(torch.tensor([1.0, 0.75, 0.5, 0.25])),
            "speed: schedule: .* different speeds, got the same at every t;",
        ),
        (lambda: speed_weights(torch.ones(3, 3)), r"schedule: alphas_cumprod: expected \(T,\) .* got shape \(3, 3\)"),
        (lambda: speed_weights(torch.ones(1)), r"schedule: alphas_cumprod: .* got shape \(1,\)"),
        (lambda: meaningful_step(torch.tensor([2.0, 0.5])), r"schedule: .* in \[0, 1\], got 0.5 to 2;"),
        (lambda: noise_zones(torch.tensor([0.5, math.nan])), r"schedule: .* in \[0, 1\], got nan to nan;"),
        (lambda: snr_weights(SNR, "max_snr"), "snr weights: scheme: expected one of min_snr, .* got 'max_snr'"),
        (
            lambda: snr_weights(SNR, prediction_type="flow"),
            "prediction_type: expected one of epsilon, v_prediction, sample, got 'flow'",
        ),
        (lambda: snr_weights(torch.tensor([0.0, 1.0])), "min_snr: expected SNR > 0 for epsilon .*; use v_prediction"),
        (lambda: snr_weights(torch.tensor([math.inf])), "snr weights: snr: expected finite .* got inf to inf;"),
        (lambda: snr_weights(torch.tensor([-1.0])), "snr weights: snr: expected finite .* got -1 to -1;"),
        (lambda: to_prediction_type(SNR, SNR, "velocity"), "prediction_type: expected one of .* got 'velocity'"),
        (lambda: min_snr_weights(SNR, gamma=0), "min_snr: gamma: expected a number > 0, got 0"),
        (lambda: soft_min_snr_weights(SNR, gamma=-1), "soft_min_snr: gamma: expected a number > 0, got -1"),
        (lambda: p2_weights(SNR, gamma=0), "p2: gamma: expected a number > 0, got 0"),
        (lambda: p2_weights(SNR, k=0), "p2: k: expected a number > 0, got 0"),
        (lambda: edm_weights(SNR, data_std=0), "edm: data_std: expected a number > 0, got 0"),
        (lambda: edm_probabilities(SNR, std=0), "edm: std: expected a number > 0, got 0"),
        (
            lambda: edm_probabilities(torch.tensor([1.0, 0.0])),
            "edm: snr: .*zero terminal SNR; use a noise schedule without it",
        ),
        (lambda: logit_normal_probabilities(4, std=-1), "logit_normal: std: expected a number > 0, got -1"),
        (lambda: mode_probabilities(4, scale=2.0), "mode: scale: expected -1 <= scale <= 1.7519, got 2.0;"),
        (lambda: clts_probabilities(4, step=-1, std=1.0), "clts: step: expected an optimizer step >= 0, got -1"),
        (lambda: clts_probabilities(4, step=0, std=0.0), "clts: std: expected a number > 0, got 0"),
        (lambda: clts_probabilities(4, step=0, std=1.0, ramp_steps=0), "clts: ramp_steps: expected a number > 0"),
        (
            lambda: second_moment_probabilities(torch.ones(2, 2), uniform=0),
            "second moment: uniform: expected 0 < uniform <= 1, got 0;",
        ),
    ],
)
def test_bad_input_gets_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
