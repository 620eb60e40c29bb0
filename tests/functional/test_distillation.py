import math

import pytest
import torch

from hasten.functional import distillation_loss


def slow_loss(student, teacher, temperature):
    """The formula, one number at a time."""
    total = 0.0
    for logits_s, logits_t in zip(student.tolist(), teacher.tolist(), strict=True):
        weights_s = [math.exp(x / temperature) for x in logits_s]
        weights_t = [math.exp(x / temperature) for x in logits_t]
        for s, t in zip(weights_s, weights_t, strict=True):
            p_s, p_t = s / sum(weights_s), t / sum(weights_t)
            total += p_t * (math.log(p_t) - math.log(p_s))
    return temperature**2 * total / len(student)


def logits(batch=5, classes=4, **kwargs):
    return 3 * torch.randn(2, batch, classes, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_divergence_of_a_slow_loop(batch, temperature):
    student, teacher = logits(batch)
    loss = distillation_loss(student, teacher, temperature=temperature)
    assert float(loss) == pytest.approx(slow_loss(student, teacher, temperature), rel=1e-12)


def test_the_gradient_is_t_times_the_difference_of_the_probabilities():
    student, teacher = logits()
    student.requires_grad_()
    distillation_loss(student, teacher, temperature=3.0).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / len(student)
    torch.testing.assert_close(student.grad, expected.detach())


def test_equal_logits_up_to_a_constant_cost_nothing_and_pull_nowhere():
    student = logits()[0].requires_grad_()
    loss = distillation_loss(student, student.detach() + 7, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and float(student.grad.abs().max()) < 1e-12


def test_half_precision_is_summed_in_float32_and_double_stays_double():
    student, teacher = logits()
    half = distillation_loss(student.bfloat16(), teacher.bfloat16(), temperature=4.0)
    exact = distillation_loss(student.bfloat16().double(), teacher.bfloat16().double(), temperature=4.0)
    assert half.dtype == torch.float32 and exact.dtype == torch.float64
    assert float(half) == pytest.approx(float(exact), rel=1e-5)


def test_confident_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert float(distillation_loss(student, teacher)) == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("shapes", "temperature", "line"),
    [
        (((2, 3), (2, 4)), 1.0, r"logits: expected two of one shape \(B, K\), got \(2, 3\) and \(2, 4\)"),
        (((2, 3, 4), (2, 3, 4)), 1.0, r"logits: expected two of one shape \(B, K\), got \(2, 3, 4\)"),
        (((2, 3), (2, 3)), 0.0, "temperature: expected > 0, got 0.0"),
        (((2, 3), (2, 3)), math.inf, "temperature: expected > 0, got inf"),
    ],
)
def test_bad_input_is_one_line(shapes, temperature, line):
    with pytest.raises(ValueError, match=f"^distillation_loss: {line}"):
        distillation_loss(*map(torch.zeros, shapes), temperature=temperature)
