"""The peers: each its law and weights, the curriculum, the loss-aware law."""

from collections import deque

import pytest
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler

from hasten.functional import clts_probabilities, edm_probabilities, snr_weights
from hasten.nn import (
    CLTSSampler,
    DebiasSampler,
    EDMSampler,
    LogitNormalSampler,
    LossSecondMomentSampler,
    MinSNRSampler,
    ModeSampler,
    P2Sampler,
    SoftMinSNRSampler,
    TruncatedSNRSampler,
)

LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SNR = LINEAR / (1 - LINEAR)
WEIGHTED = {
    "min_snr": (MinSNRSampler, {"gamma": 3.0}),
    "soft_min_snr": (SoftMinSNRSampler, {"gamma": 3.0}),
    "p2": (P2Sampler, {"k": 2.0, "gamma": 0.5}),
    "debias": (DebiasSampler, {}),
    "truncated_snr": (TruncatedSNRSampler, {}),
    "edm": (EDMSampler, {"data_std": 0.7}),
}


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheme", WEIGHTED)
def test_the_snr_family_weighs_what_the_denoiser_predicts(scheme, target):
    sampler, constants = WEIGHTED[scheme]
    expected = snr_weights(SNR, scheme, prediction_type=target, **constants).float()
    torch.testing.assert_close(sampler(LINEAR, **constants, prediction_type=target).weights, expected)
    scheduler = DDPMScheduler(1000, prediction_type=target)
    torch.testing.assert_close(sampler(scheduler, **constants).weights, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", WEIGHTED)
def test_the_snr_family_draws_uniformly_but_for_edm(scheme):
    sampler, _ = WEIGHTED[scheme]
    law = edm_probabilities(SNR).float() if scheme == "edm" else torch.full((1000,), 1e-3)
    torch.testing.assert_close(sampler(LINEAR).probs, law)


@pytest.mark.parametrize("scheme", WEIGHTED)
def test_normalized_weights_have_mean_one_under_the_law(scheme):
    sampler = WEIGHTED[scheme][0](LINEAR, normalize=True)
    assert (sampler.probs * sampler.weights).sum().item() == pytest.approx(1, abs=1e-5)
    plain = WEIGHTED[scheme][0](LINEAR)
    torch.testing.assert_close(sampler.weights / sampler.weights[300], plain.weights / plain.weights[300])


@pytest.mark.parametrize("scheme", WEIGHTED)
def test_zero_terminal_snr_is_refused_for_noise_prediction(scheme):
    scheduler = DDPMScheduler(1000, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"zero terminal SNR.*; use .*rescale_betas_zero_snr=False"):
        WEIGHTED[scheme][0](scheduler)


def test_zero_terminal_snr_is_served_for_v_prediction_except_by_edm():
    scheduler = DDPMScheduler(1000, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert MinSNRSampler(scheduler).weights[-1].item() == pytest.approx(0, abs=1e-9)
    assert TruncatedSNRSampler(scheduler).weights[-1] == 1
    with pytest.raises(ValueError, match=r"edm: snr: .*zero terminal SNR"):
        EDMSampler(scheduler)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"prediction_type: expected one of .* got 'flow'"):
        MinSNRSampler(LINEAR, prediction_type="flow")


def test_a_gamma_of_zero_is_refused():
    with pytest.raises(ValueError, match="min_snr: gamma: expected a number > 0, got 0"):
        MinSNRSampler(LINEAR, gamma=0)


def test_sd3_laws_weigh_every_step_one():
    for sampler in [LogitNormalSampler(50, mean=0.5), ModeSampler(50, scale=1.29)]:
        assert sampler.weights.unique().tolist() == [1]
        assert sampler.probs.argmax() not in (0, 49)


# the curriculum


@pytest.mark.parametrize("step", [0, 1, 20, 40, 10**6])
def test_clts_follows_its_curriculum(step):
    sampler = CLTSSampler(1000, std=80.0, ramp_steps=40)
    sampler.step(step)
    expected = clts_probabilities(1000, step=step, std=80.0, ramp_steps=40).float()
    torch.testing.assert_close(sampler.probs, expected, rtol=1e-4, atol=1e-9)
    assert sampler.sample(100).max() < 1000


def test_clts_starts_uniform_and_resumes_where_it_was():
    sampler = CLTSSampler(1000, std=80.0, ramp_steps=40)
    assert sampler.probs.allclose(torch.tensor(1e-3))
    sampler.step(30)
    resumed = CLTSSampler(1000, std=80.0, ramp_steps=40)
    resumed.load_state(sampler.state())
    assert resumed.probs.equal(sampler.probs)
    resumed.load_state({})
    assert resumed.probs.equal(sampler.probs)


def test_clts_refuses_a_step_before_the_first():
    with pytest.raises(ValueError, match="clts: step: expected an optimizer step >= 0, got -1"):
        CLTSSampler(1000, std=80.0).step(-1)


# the loss-aware law


class Slow:
    """The same by lists."""

    def __init__(self, total, history, uniform):
        self.past = [deque(maxlen=history) for _ in range(total)]
        self.history, self.uniform = history, uniform

    def update(self, t, loss):
        for s, value in zip(t.tolist(), loss.tolist(), strict=True):
            self.past[s].append(value)

    def law(self):
        total = len(self.past)
        if any(len(past) < self.history for past in self.past):
            return torch.full((total,), 1 / total)
        root = torch.tensor([(sum(value**2 for value in past) / self.history) ** 0.5 for past in self.past])
        return (1 - self.uniform) * root / root.sum() + self.uniform / total


@pytest.mark.parametrize(("total", "history", "n"), [(5, 3, 4), (4, 1, 7), (3, 2, 20), (6, 4, 1)])
def test_the_loss_aware_law_is_that_of_the_last_losses(total, history, n):
    sampler, slow = LossSecondMomentSampler(total, history, uniform=0.05), Slow(total, history, 0.05)
    for _ in range(80):
        t, loss = torch.randint(total, (n,)), torch.rand(n)
        sampler.update(t, loss)
        slow.update(t, loss)
        torch.testing.assert_close(sampler.probs, slow.law(), rtol=1e-4, atol=1e-6)
    assert sampler.probs.max() > sampler.probs.min()


def test_the_loss_aware_weights_are_unbiased():
    sampler = LossSecondMomentSampler(8, history=2)
    losses = torch.rand(8, 2)
    for column in losses.T:
        sampler.update(torch.arange(8), column)
    anything = torch.randn(8)
    assert (sampler.probs * sampler.weights * anything).sum().item() == pytest.approx(anything.mean().item(), abs=1e-6)
    assert sampler.probs.max() > sampler.probs.min()


def test_the_loss_aware_law_is_uniform_until_every_t_has_its_history():
    sampler = LossSecondMomentSampler(3, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([9.0, 9.0, 1.0, 1.0, 1.0]))
    assert sampler.probs.unique().numel() == 1
    assert sampler.weights.tolist() == [pytest.approx(1)] * 3
    sampler.update(torch.tensor([2]), torch.tensor([1.0], requires_grad=True))
    assert sampler.probs[0] > 5 * sampler.probs[1]


def test_a_loss_that_is_not_finite_is_left_out():
    sampler = LossSecondMomentSampler(2, history=1)
    sampler.update(torch.tensor([0, 1, 0, 1]), torch.tensor([3.0, 1.0, float("nan"), float("inf")]))
    assert sampler.probs[0].item() == pytest.approx(0.75, abs=1e-3)


def test_the_loss_aware_state_is_resumed_weights_only(tmp_path):
    sampler = LossSecondMomentSampler(4, history=2)
    sampler.update(torch.arange(4).repeat(3), torch.rand(12))
    torch.save(sampler.state(), tmp_path / "state.pt")
    resumed = LossSecondMomentSampler(4, history=2)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.probs.equal(sampler.probs)
    for one in [sampler, resumed]:
        one.update(torch.tensor([1, 1, 3]), torch.tensor([0.5, 0.1, 4.0]))
    assert resumed.probs.equal(sampler.probs)
    assert sampler.state_dict() == {}


def test_a_saved_state_does_not_move_on_with_the_sampler():
    sampler = LossSecondMomentSampler(2, history=1)
    state = sampler.state()
    sampler.update(torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
    assert state["losses"].sum() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LossSecondMomentSampler(4, history=0), ValueError, "history: expected at least 1 loss .* got 0"),
        (lambda: LossSecondMomentSampler(4, uniform=0), ValueError, "uniform: expected 0 < uniform <= 1, got 0;"),
        (
            lambda: LossSecondMomentSampler(4).update(torch.tensor([1]), torch.tensor(1.0)),
            ValueError,
            r"per_sample_loss: expected one loss for each t, .* got \(\) and \(1,\)",
        ),
        (
            lambda: LossSecondMomentSampler(4).update(torch.tensor([4]), torch.tensor([1.0])),
            ValueError,
            r"t: expected 0\.\.3, got 4\.\.4;",
        ),
        (
            lambda: LossSecondMomentSampler(4).update(torch.tensor([0.5]), torch.tensor([1.0])),
            TypeError,
            "t: expected integers",
        ),
        (
            lambda: LossSecondMomentSampler(4, history=2).load_state(LossSecondMomentSampler(5, history=3).state()),
            ValueError,
            "state: expected 2 losses at each of 4 timesteps, got 3 at 5;",
        ),
    ],
)
def test_bad_input_gets_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def _rank():
    sampler = LossSecondMomentSampler(3, history=1, uniform=0.1)
    # batches of different length: rank 0 sees t = 0 and 1, rank 1 sees t = 2
    t, loss = [([0, 1], [1.0, 2.0]), ([2], [5.0])][dist.get_rank()]
    sampler.update(torch.tensor(t), torch.tensor(loss))
    return sampler.probs


@pytest.mark.slow
def test_two_ranks_share_their_losses(two_processes):
    expected = 0.9 * torch.tensor([1.0, 2.0, 5.0]) / 8 + 0.1 / 3
    for table in two_processes(_rank):
        torch.testing.assert_close(table, expected)
