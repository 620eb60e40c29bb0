"""SpeeDSampler: the authors' stream, its law, its modes, and what it refuses."""

import logging
import warnings

import pytest
import torch
from diffusers import DDPMScheduler

from hasten.functional import speed_probabilities, speed_weights
from hasten.nn import SpeeDSampler

LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def p_value(counts, law):
    """Of a chi-square test of counts against a law; bins of law 0 must be empty."""
    possible = law > 0
    assert counts[~possible].sum() == 0
    expected = law[possible].double() * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((possible.sum() - 1) / 2.0, statistic / 2).item()


def dual_law(law, m=642):
    found = torch.zeros_like(law)
    for t, p in enumerate(law):
        found[m - t if t < m else t - m] += p
    return found


# the stream


def test_the_stream_is_that_of_the_authors_code():
    t = SpeeDSampler(LINEAR).sample(8, seeded(0))
    assert t.tolist() == [886, 537, 349, 699, 490, 244, 105, 293]
    assert SpeeDSampler(DDPMScheduler(1000)).sample(8, seeded(0)).equal(t)


@pytest.mark.parametrize(("n", "primaries"), [(1, 1), (2, 2), (3, 2), (8, 5), (9, 5), (32, 17)])
def test_a_batch_is_primaries_then_the_duals_of_the_first_of_them(n, primaries):
    law = torch.tensor([5.0] * 700 + [1.0] * 300, dtype=torch.float64) / 3800
    drawn = torch.multinomial(law.float(), n // 2 + 1, replacement=True, generator=seeded(7)).tolist()
    duals = [642 - t if t < 642 else t - 642 for t in drawn]
    t = SpeeDSampler(LINEAR).sample(n, seeded(7)).tolist()
    assert len(t) == n
    assert t == (drawn + duals)[:n]
    assert t[:primaries] == drawn[:primaries]


def test_primaries_and_duals_follow_their_laws():
    sampler = SpeeDSampler(LINEAR)
    t = sampler.sample(200_000)
    primaries, duals = t[:100_001], t[100_001:]
    law = speed_probabilities(1000, k=5.0, tau=700)
    assert p_value(torch.bincount(primaries, minlength=1000), law) > 1e-4
    assert p_value(torch.bincount(duals, minlength=1000), dual_law(law)) > 1e-4


@pytest.mark.parametrize("n", [1, 2, 8, 9, 32])
def test_log_prob_is_the_law_of_a_position_in_the_batch(n):
    law = speed_probabilities(1000, k=5.0, tau=700)
    primaries = min(n // 2 + 1, n)
    wanted = (primaries * law + (n - primaries) * dual_law(law)) / n
    found = SpeeDSampler(LINEAR).log_prob(torch.arange(1000), n).exp()
    torch.testing.assert_close(found, wanted.float())


def test_log_prob_of_large_batches_is_half_primaries_half_duals():
    law = speed_probabilities(1000, k=5.0, tau=700)
    found = SpeeDSampler(LINEAR).log_prob(torch.arange(1000)).exp()
    torch.testing.assert_close(found, ((law + dual_law(law)) / 2).float())


# modes, ablations


def test_official_mode_weighs_the_tail_one_and_paper_mode_does_not():
    official, paper = SpeeDSampler(LINEAR), SpeeDSampler(LINEAR, mode="paper")
    torch.testing.assert_close(official.weights, speed_weights(LINEAR, tail_weight=1.0).float())
    torch.testing.assert_close(paper.weights, speed_weights(LINEAR).float())
    assert official.weights[700:].unique().tolist() == [1]
    assert [paper.weights.min().item(), paper.weights.max().item()] == pytest.approx([0.4, 0.6])


def test_paper_mode_draws_independently():
    sampler = SpeeDSampler(LINEAR, mode="paper")
    assert sampler.sample(9, seeded(1)).equal(torch.multinomial(sampler.probs, 9, True, generator=seeded(1)))
    assert sampler.log_prob(torch.tensor(0), 9).exp().item() == pytest.approx(5 / 3800)


def test_dual_and_tail_weight_can_be_set_apart_from_the_mode():
    independent = SpeeDSampler(LINEAR, dual=False)
    assert independent.weights[-1] == 1
    assert independent.sample(9, seeded(1)).equal(torch.multinomial(independent.probs, 9, True, generator=seeded(1)))
    mirrored = SpeeDSampler(LINEAR, mode="paper", dual=True, tail_weight=0.25)
    assert mirrored.weights[-1] == 0.25
    assert mirrored.sample(8, seeded(0)).equal(SpeeDSampler(LINEAR).sample(8, seeded(0)))


def test_the_emphasis_of_official_mode():
    sampler = SpeeDSampler(LINEAR)
    emphasis = sampler.folded().probs * 1000
    t = [0, 100, 219, 400, 641, 650, 700, 999]
    assert emphasis[t].tolist() == pytest.approx([1.02, 1.48, 1.64, 1.28, 1.03, 0.51, 0.25, 0.25], abs=0.01)
    law = sampler.log_prob(torch.arange(1000)).exp()
    assert (law * sampler.weights).sum().item() == pytest.approx(0.528, abs=1e-3)


def test_sampling_false_leaves_the_weights_alone():
    sampler = SpeeDSampler(LINEAR, sampling=False)
    torch.testing.assert_close(sampler.log_prob(torch.arange(1000), 8).exp(), torch.full((1000,), 1e-3))
    assert sampler.weights.equal(SpeeDSampler(LINEAR).weights)


def test_weighting_false_leaves_the_law_alone():
    sampler = SpeeDSampler(LINEAR, weighting=False)
    assert sampler.weights.unique().tolist() == [1]
    assert sampler.sample(8, seeded(0)).equal(SpeeDSampler(LINEAR).sample(8, seeded(0)))


def test_normalized_weights_have_mean_one_under_the_law_with_duals():
    sampler = SpeeDSampler(LINEAR, normalize=True)
    law = sampler.log_prob(torch.arange(1000)).exp()
    assert (law * sampler.weights).sum().item() == pytest.approx(1, abs=1e-5)


def test_tau_and_areas_are_kept():
    sampler = SpeeDSampler(LINEAR, tau="auto")
    assert sampler.tau == 703
    assert sampler.areas == {"acceleration": (0, 219), "deceleration": (219, 703), "convergence": (703, 1000)}
    assert SpeeDSampler(LINEAR, tau="auto", r=100.0).tau == 673
    assert sampler.probs[702] / sampler.probs[703] == pytest.approx(5)


# warm-up


def test_the_warm_up_is_uniform_and_ends_by_itself():
    sampler, plain = SpeeDSampler(LINEAR, warmup_steps=10), SpeeDSampler(LINEAR)
    for step in [None, 0, 9]:
        if step is not None:
            sampler.step(step)
        assert sampler.probs.allclose(torch.tensor(1e-3))
        assert sampler.weights.unique().tolist() == [1]
        torch.testing.assert_close(sampler.log_prob(torch.arange(1000)).exp(), torch.full((1000,), 1e-3))
        assert sampler.sample(8, seeded(0)).equal(torch.multinomial(sampler.probs, 8, True, generator=seeded(0)))
    sampler.step(10)
    assert sampler.probs.equal(plain.probs)
    assert sampler.weights.equal(plain.weights)
    assert sampler.sample(8, seeded(0)).equal(plain.sample(8, seeded(0)))


def test_a_resumed_warm_up_stands_where_it_stood():
    sampler, resumed = SpeeDSampler(LINEAR, warmup_steps=10), SpeeDSampler(LINEAR, warmup_steps=10)
    sampler.step(12)
    assert sampler.state() == {"step": 12}
    resumed.load_state(sampler.state())
    assert resumed.probs.equal(sampler.probs)
    resumed.load_state({})
    assert resumed.probs.equal(sampler.probs)


# other predictions, other schedules


def test_for_v_prediction_the_weights_are_native_or_converted(caplog):
    velocity = DDPMScheduler(1000, prediction_type="v_prediction")
    plain = SpeeDSampler(DDPMScheduler(1000)).weights
    with caplog.at_level(logging.INFO, logger="hasten"):
        assert SpeeDSampler(velocity).weights.equal(plain)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "they multiply the MSE of v_prediction as they are" in caplog.text
    caplog.clear()
    converted = SpeeDSampler(velocity, weight_gauge="epsilon").weights
    torch.testing.assert_close(converted, (plain * LINEAR).float(), rtol=1e-4, atol=0)
    assert caplog.text == ""


def test_zero_terminal_snr_is_served_where_noise_is_not_predicted():
    velocity = DDPMScheduler(1000, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert SpeeDSampler(velocity, mode="paper", weight_gauge="epsilon").weights[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "0.211"),
        ({"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}, "0.125"),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "0.149"),
    ],
)
def test_a_dual_draw_that_feeds_the_tail_warns(schedule, share):
    scheduler = DDPMScheduler(1000, **schedule)
    with pytest.warns(UserWarning, match=f"raises the share of the steps t >= 700 from 0.079 to {share} .*'paper'"):
        SpeeDSampler(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpeeDSampler(scheduler, mode="paper")
        SpeeDSampler(LINEAR)


# bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0.5}, "speed: k: expected a number >= 1, got 0.5;"),
        ({"lam": 5.0}, "speed: lam: expected 0.5 <= lam <= 1, got 5.0;"),
        ({"tau": 1001}, r"speed: tau: expected 1\.\.1000 steps .* got 1001;"),
        ({"tau": True}, "speed: tau: .* got True;"),
        ({"tau": "late"}, "speed: tau: .* got 'late';"),
        ({"tau": "auto", "r": 1e9}, "speed: tau: expected a schedule whose .* 1/1e[+]09 .*; pass tau as a number"),
        ({"mode": "authors"}, "speed: mode: expected one of official, paper, got 'authors'"),
        ({"weight_gauge": "v"}, "weight_gauge: expected one of native, epsilon, got 'v'"),
        ({"tail_weight": -1.0}, "speed: tail_weight: .* got -1.0;"),
        ({"sampling": False, "dual": True}, "speed: dual: expected dual=False .*; for a uniform law use k=1"),
    ],
)
def test_bad_input_gets_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        SpeeDSampler(LINEAR, **kwargs)
    assert "\n" not in str(caught.value)


def test_the_dual_draw_refuses_a_schedule_that_never_gets_flat():
    rising = torch.linspace(0.99, 0.01, 100, dtype=torch.float64)
    rising[50] += 1e-3  # some change of speed
    with pytest.raises(ValueError, match=r"speed: meaningful step: expected 1 < m < 100 .*; pass dual=False"):
        SpeeDSampler(rising)
    assert SpeeDSampler(rising, dual=False).meaningful_step == 100
