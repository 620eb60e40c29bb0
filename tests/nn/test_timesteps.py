"""The sampler object: drawing, weighing, folding, and what it refuses."""

import copy
import math
from pathlib import Path

import hydra.utils
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from hasten import configs, nn
from hasten.nn import TimestepSampler, UniformSampler, alphas_cumprod, num_timesteps
from hasten.nn.timesteps import prediction_type_of

LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shipped(group):
    return sorted((Path(configs.__path__[0]) / group).glob("*.yaml"))


# drawing and weighing


def test_a_sampler_draws_the_multinomial_of_its_table():
    probs = torch.tensor([1.0, 0.0, 3.0])
    sampler = TimestepSampler(probs)
    t = sampler.sample(50, torch.Generator().manual_seed(3))
    expected = torch.multinomial(torch.tensor([0.25, 0, 0.75]), 50, True, generator=torch.Generator().manual_seed(3))
    assert t.equal(expected)
    assert t.dtype == torch.int64


def test_the_generator_is_the_argument_then_the_samplers_then_the_global_one():
    sampler = UniformSampler(1000)
    torch.manual_seed(5)
    of_global = sampler.sample(4)
    sampler.generator = torch.Generator().manual_seed(5)
    assert sampler.sample(4).equal(of_global)
    assert sampler.sample(4, torch.Generator().manual_seed(5)).equal(of_global)
    assert sampler(4)[0].equal(torch.multinomial(sampler.probs, 8, True, generator=seeded(5))[4:])


def test_calling_a_sampler_gives_timesteps_and_their_weights():
    sampler = TimestepSampler(torch.ones(5), torch.arange(5.0))
    t, w = sampler(64)
    assert w.equal(t.float())
    assert w.dtype == torch.float32
    assert sampler.weight(t.view(8, 8)).equal(w.view(8, 8))


def test_log_prob_is_the_law_with_minus_infinity_where_nothing_is_drawn():
    sampler = TimestepSampler(torch.tensor([1.0, 0.0, 3.0]))
    found = sampler.log_prob(torch.tensor([[0, 1, 2]]), n=7).tolist()
    assert found == [[pytest.approx(math.log(0.25)), -math.inf, pytest.approx(math.log(0.75))]]


def test_folding_keeps_the_direction_of_the_expected_gradient():
    gradients = torch.randn(6, 3)  # at each t
    sampler = TimestepSampler(torch.rand(6), torch.rand(6))
    weighted = (sampler.probs * sampler.weights) @ gradients
    folded = sampler.folded()
    assert folded.weights.unique().tolist() == [1]
    total = (sampler.probs * sampler.weights).sum()
    torch.testing.assert_close(total * (folded.probs @ gradients), weighted)


# a module among modules


def test_a_sampler_adds_nothing_to_a_state_dict():
    for sampler in [UniformSampler(10), nn.SpeeDSampler(LINEAR), nn.CLTSSampler(10, std=1.0)]:
        assert sampler.state_dict() == {}
        assert list(sampler.parameters()) == []


def test_the_tables_stay_float32_when_the_model_is_cast():
    sampler = nn.SpeeDSampler(LINEAR)
    before = sampler.probs.clone()
    for cast in [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double]:
        cast(torch.nn.Sequential(sampler))
        assert {buffer.dtype for buffer in sampler.buffers()} == {torch.float32}
        assert sampler.probs.equal(before)


def test_a_copy_of_a_sampler_draws_on_its_own():
    sampler = UniformSampler(1000)
    sampler.generator = seeded(1)
    twin = copy.deepcopy(sampler)
    assert sampler.sample(4).equal(twin.sample(4))


def test_a_fixed_law_ignores_steps_and_losses():
    sampler = UniformSampler(4)
    sampler.step(10)
    sampler.update(torch.tensor([1]), torch.tensor([9.0]))
    assert sampler.probs.tolist() == [0.25] * 4
    assert sampler.state() == {}


def test_the_generators_state_is_resumed_weights_only(tmp_path):
    sampler = UniformSampler(1000)
    sampler.generator = seeded(1)
    sampler.sample(3)
    torch.save(sampler.state(), tmp_path / "state.pt")
    expected = sampler.sample(5)
    resumed = UniformSampler(1000)
    resumed.generator = seeded(2)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.sample(5).equal(expected)


def test_a_sampler_without_a_generator_leaves_the_global_stream_alone():
    sampler = UniformSampler(10)
    before = torch.get_rng_state()
    sampler.load_state({"generator": seeded(1).get_state()})
    assert sampler.generator is None
    assert torch.get_rng_state().equal(before)


# from a schedule


def test_the_abar_table_comes_from_the_betas_in_float64():
    scheduler = DDPMScheduler(1000)
    torch.testing.assert_close(alphas_cumprod(scheduler), LINEAR, rtol=1e-5, atol=0)
    assert alphas_cumprod(scheduler).equal(torch.cumprod(1 - scheduler.betas.double(), 0))
    assert alphas_cumprod(LINEAR).equal(LINEAR)


def test_a_scheduler_that_keeps_only_alphas_cumprod_will_do():
    class Scheduler:
        alphas_cumprod = LINEAR.float()

    assert alphas_cumprod(Scheduler()).equal(LINEAR.float().double())


def test_law_only_samplers_take_an_int_a_table_or_any_scheduler():
    for schedule in [50, torch.linspace(0.9, 0.1, 50), DDPMScheduler(50), FlowMatchEulerDiscreteScheduler(50)]:
        assert num_timesteps(schedule) == 50
        for law in [
            UniformSampler(schedule),
            nn.LogitNormalSampler(schedule),
            nn.ModeSampler(schedule, scale=1.29),
            nn.CLTSSampler(schedule, std=10.0, mean=15.0),
            nn.LossSecondMomentSampler(schedule),
        ]:
            assert law.probs.shape == law.weights.shape == (50,)


def test_from_scheduler_is_uniform_by_default():
    sampler = TimestepSampler.from_scheduler(DDPMScheduler(50))
    assert sampler.probs.equal(UniformSampler(50).probs)
    assert sampler.weights.equal(torch.ones(50))


def test_from_scheduler_converts_weights_of_the_noise_mse():
    weights = torch.rand(1000)
    noise, velocity = DDPMScheduler(1000), DDPMScheduler(1000, prediction_type="v_prediction")

    def made(*args, **kwargs):
        return TimestepSampler.from_scheduler(*args, None, weights, **kwargs).weights

    assert made(velocity).equal(weights)
    assert made(noise, weight_gauge="epsilon").equal(weights)
    converted = (weights * alphas_cumprod(velocity)).float()  # SNR / (SNR + 1) is abar
    torch.testing.assert_close(made(velocity, weight_gauge="epsilon"), converted)
    torch.testing.assert_close(made(LINEAR, weight_gauge="epsilon", prediction_type="v_prediction"), converted)


def test_normalized_weights_have_mean_one_under_the_law():
    probs, weights = torch.rand(1000), torch.rand(1000)
    sampler = TimestepSampler.from_scheduler(LINEAR, probs, weights, normalize=True)
    assert (sampler.probs * sampler.weights).sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(sampler.weights / sampler.weights[0], weights / weights[0])


def test_the_prediction_type_is_the_schedulers_unless_given():
    velocity = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    assert prediction_type_of(velocity) == "v_prediction"
    assert prediction_type_of(velocity, "sample") == "sample"
    assert prediction_type_of(LINEAR) == "epsilon"


# configs


@pytest.mark.parametrize("path", shipped("timestep_sampler"), ids=lambda path: path.stem)
def test_every_sampler_config_makes_a_sampler_of_a_schedule(path):
    make = hydra.utils.instantiate(yaml.safe_load(path.read_text()))
    t, w = make(DDPMScheduler(1000, clip_sample=False))(8)
    assert t.shape == w.shape == (8,)
    assert bool((w >= 0).all())


@pytest.mark.parametrize("path", shipped("noise_scheduler"), ids=lambda path: path.stem)
def test_every_noise_config_makes_a_schedule(path):
    scheduler = hydra.utils.instantiate(yaml.safe_load(path.read_text()))
    abar = alphas_cumprod(scheduler)
    assert len(abar) == 1000
    assert (abar[-1] == 0) == (path.stem == "v_prediction")
    assert nn.MinSNRSampler(scheduler).weights.isfinite().all()


# bad input


def load_foreign_generator():
    sampler = UniformSampler(4)
    sampler.generator = seeded(1)
    sampler.load_state({"generator": torch.zeros(16, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TimestepSampler(torch.tensor([0.5, -0.5])), ValueError, "probs: expected finite values >= 0"),
        (
            lambda: TimestepSampler(torch.tensor([0.5, math.nan])),
            ValueError,
            "probs: expected finite .* got 1 of 2 negative or not finite",
        ),
        (lambda: TimestepSampler(torch.ones(2, 2)), ValueError, r"probs: expected shape \(T,\), got \(2, 2\)"),
        (lambda: TimestepSampler(torch.zeros(3)), ValueError, "probs: expected a positive sum, got 0;"),
        (lambda: TimestepSampler(torch.ones(2), -torch.ones(2)), ValueError, "weights: expected finite values >= 0"),
        (lambda: TimestepSampler(torch.ones(2), torch.tensor([1, math.inf])), ValueError, "weights: expected finite"),
        (lambda: TimestepSampler(torch.ones(2), torch.ones(3)), ValueError, "weights: expected 2 values .* got 3"),
        (
            lambda: TimestepSampler.from_scheduler(LINEAR, torch.ones(9)),
            ValueError,
            "probs: expected 1000 values as in the schedule, got 9",
        ),
        (
            lambda: TimestepSampler.from_scheduler(LINEAR, None, torch.ones(9)),
            ValueError,
            "weights: expected 1000 values as in the schedule, got 9",
        ),
        (
            lambda: TimestepSampler.from_scheduler(LINEAR, None, -torch.ones(1000), normalize=True),
            ValueError,
            "weights: expected finite values >= 0, got 1000 of 1000 negative",
        ),
        (
            lambda: TimestepSampler.from_scheduler(LINEAR, weight_gauge="v"),
            ValueError,
            "weight_gauge: expected one of native, epsilon, got 'v'",
        ),
        (
            lambda: TimestepSampler.from_scheduler(LINEAR, prediction_type="flow"),
            ValueError,
            "prediction_type: expected one of epsilon, v_prediction, sample, got 'flow'",
        ),
        (lambda: UniformSampler(4).sample(0), ValueError, "n: expected at least 1 draw, got 0"),
        (lambda: UniformSampler(4)(-1), ValueError, "n: expected at least 1 draw, got -1"),
        (lambda: nn.SpeeDSampler(LINEAR).sample(0), ValueError, "n: expected at least 1 draw, got 0"),
        (lambda: UniformSampler(4).weight(torch.tensor([0.5])), TypeError, "t: expected integers, got torch.float32;"),
        (lambda: UniformSampler(4).log_prob(torch.tensor([True])), TypeError, "t: expected integers, got torch.bool;"),
        (lambda: UniformSampler(4).weight(torch.tensor([0, -1])), ValueError, r"t: expected 0\.\.3, got -1\.\.0;"),
        (lambda: UniformSampler(4).log_prob(torch.tensor([4])), ValueError, r"t: expected 0\.\.3, got 4\.\.4;"),
        (lambda: UniformSampler(0), ValueError, "noise_scheduler: expected at least 1 timestep, got 0"),
        (lambda: UniformSampler(True), TypeError, "noise_scheduler: expected a scheduler .* got bool;"),
        (lambda: nn.MinSNRSampler(1000), TypeError, "noise_scheduler: expected a scheduler .* got int;"),
        (
            lambda: nn.SpeeDSampler(FlowMatchEulerDiscreteScheduler()),
            TypeError,
            "noise_scheduler: .* got FlowMatchEulerDiscreteScheduler; pass the tensor, or .*LogitNormalSampler",
        ),
        (lambda: nn.MinSNRSampler(torch.ones(2, 2)), ValueError, r"noise_scheduler: .* of shape \(2, 2\)"),
        (lambda: nn.MinSNRSampler(torch.arange(5)), ValueError, "noise_scheduler: expected abar as floats"),
        (load_foreign_generator, ValueError, "generator: expected the state of a cpu generator, got 16 "),
    ],
)
def test_bad_input_gets_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
