"""What an input of a hypernetwork acts on, against restatements a sample at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import BinaryF1Score

from hasten.modules.hypernet_tasks import (
    AmortisedPrior,
    Disagreement,
    MeanOf,
    Noisy,
    Scattered,
    dice_and_cross_entropy,
    fidelity_and_smoothness,
    mixture,
    mixture_nll,
    total_variation,
)
from hasten.nn import Range, hypernetize


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(6)


# ---------------------------------------------------------------------- what draws


@pytest.mark.parametrize("transform", [Noisy(0.5), Scattered(16)])
def test_a_transform_draws_anew_in_training_and_always_alike_in_evaluation(transform, batch):
    transform.train()
    assert not transform(batch)[0].equal(transform(batch)[0])
    transform.eval()
    state = torch.get_rng_state()
    (x, target), (again, same) = transform(batch), transform(batch)
    assert x.equal(again) and target.equal(same)
    assert torch.get_rng_state().equal(state)


def test_noise_has_its_std_and_the_target_is_clean():
    images = torch.rand(64, 1, 16, 16)
    noisy, clean = Noisy(0.25)((images, torch.zeros(64)))
    assert clean is images
    assert (noisy - images).std() == pytest.approx(0.25, rel=0.03)


# ---------------------------------------------------------------------- a trade-off of losses


def test_total_variation_is_the_mean_over_all_pairs_of_neighbours():
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    for b in range(2):
        pairs = []
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    pairs += [(images[b, c, i, j] - images[b, c, i + 1, j]).abs()] if i < 3 else []
                    pairs += [(images[b, c, i, j] - images[b, c, i, j + 1]).abs()] if j < 4 else []
        assert total_variation(images)[b] == pytest.approx(float(sum(pairs)) / len(pairs))


@pytest.mark.parametrize("smoothness", [torch.tensor(0.25), torch.tensor([0.0, 0.25, 1.0])])
def test_the_loss_goes_from_fidelity_to_smoothness_for_each_sample(smoothness):
    output, target = torch.rand(2, 3, 1, 4, 4)
    found = fidelity_and_smoothness(output, target, smoothness, total_variation_weight=0.2)
    for b, s in enumerate(smoothness.expand(3).tolist()):
        mse, tv = F.mse_loss(output[b], target[b]), total_variation(output[b : b + 1])
        assert found[b] == pytest.approx(float((1 - s) * mse + s * 0.2 * tv))


# ---------------------------------------------------------------------- a distribution of networks


def _hyper(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return hypernetize(net, {"noise": Range(0, 1, dim=16)}, hidden=(8,), **options)


def test_the_prior_asks_for_its_spread_and_gets_it():
    hyper, prior = _hyper(), AmortisedPrior(1.0, 0.05)
    optimizer = torch.optim.Adam(hyper.hyper.parameters(), 0.01)
    torch.manual_seed(1)
    before = prior(hyper).item()
    for _ in range(150):
        optimizer.zero_grad()
        prior(hyper).backward()
        optimizer.step()
    deltas = torch.cat([delta.flatten(1) for delta in hyper.delta(**hyper.sample_inputs(200)).values()], 1)
    assert prior(hyper) < 0.2 * before
    assert 0.6 * 0.05 < deltas.std(0).mean() < 1.4 * 0.05


def test_the_weight_multiplies_the_prior():
    values = []
    for weight in (1.0, 0.5):
        torch.manual_seed(0)
        values.append(AmortisedPrior(weight, 0.1)(_hyper()).item())
    assert values[1] == pytest.approx(values[0] / 2)


def test_the_prior_is_the_mean_divergence_of_what_is_generated_at_its_draws():
    hyper = _hyper()
    torch.manual_seed(1)
    found = AmortisedPrior(2.0, 0.1, draws=5)(hyper)
    torch.manual_seed(1)
    deltas = torch.cat([delta.flatten(1) for delta in hyper.delta(**hyper.sample_inputs(5)).values()], 1).double()
    slow = []
    for column in deltas.T.tolist():
        mean = sum(column) / 5
        ratio = sum((value - mean) ** 2 for value in column) / 4 / 0.1**2
        slow.append((ratio + (mean / 0.1) ** 2 - 1 - math.log(ratio)) / 2)
    assert found.item() == pytest.approx(2 * sum(slow) / len(slow), rel=1e-3)


def test_a_mixture_is_the_mean_of_the_probabilities_and_its_nll_that_of_the_label():
    logits, labels = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    for b in range(5):
        slow = sum(logits[k, b].exp() / logits[k, b].exp().sum() for k in range(4)) / 4
        torch.testing.assert_close(mixture(logits)[b], slow)
        torch.testing.assert_close(mixture_nll(logits, labels)[b], -slow[labels[b]].log())


def test_the_nll_of_a_mixture_stays_finite_where_all_are_sure_and_wrong():
    logits = torch.tensor([[[1000.0, 0.0]], [[1000.0, 0.0]]])
    assert mixture_nll(logits, torch.tensor([1])) == 1000


def test_a_mean_is_over_samples_whatever_the_batches():
    metric, images = MeanOf(total_variation), torch.rand(5, 1, 3, 3)
    for part in images.split([2, 3]):
        metric.update(part, part)
    assert metric.compute() == pytest.approx(float(total_variation(images).mean()))
    assert metric.higher_is_better is False


def test_two_metrics_are_merged_to_the_mean_over_all_samples():
    images = torch.rand(5, 1, 3, 3)
    one, other = MeanOf(total_variation), MeanOf(total_variation)
    one.update(images[:2], images[:2])
    other.update(images[2:], images[2:])
    one.merge_state(other)  # as torchmetrics does for two processes
    assert one.compute() == pytest.approx(float(total_variation(images).mean()))


def test_disagreement_is_the_mean_divergence_from_the_mixture():
    logits, metric = torch.randn(4, 5, 3), Disagreement()
    metric.update(logits, torch.zeros(5))
    mean = mixture(logits)
    slow = [F.kl_div(mean[b].log(), logits[k, b].softmax(-1), reduction="sum") for k in range(4) for b in range(5)]
    assert metric.compute() == pytest.approx(float(sum(slow)) / 20, rel=1e-4)


def test_networks_that_do_not_differ_are_a_warning():
    metric = Disagreement()
    metric.update(torch.randn(1, 5, 3).expand(4, 5, 3), torch.zeros(5))
    with pytest.warns(UserWarning, match="disagreement: expected networks that differ .* ignores its input"):
        assert metric.compute() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- segmentation


def test_the_mask_is_the_digits_ink_in_one_half_and_the_other_half_holds_the_distractor(batch):
    ink = (batch[0] > 0.2).float() * 2 - 1
    image, mask = Scattered(16, noise=0.0).eval()((ink, batch[1]))
    assert image.shape == mask.shape == (6, 1, 16, 16) and mask.dtype == torch.int64
    for b in range(6):
        left, right = (mask[b, 0, :, half].sum() for half in (slice(0, 8), slice(8, 16)))
        assert min(left, right) == 0 < max(left, right)
        assert (image[b, 0, :, 8:] if left else image[b, 0, :, :8]).max() > 0  # something lies there, and is no target
        assert image[b][mask[b] == 1].min() > 0


def test_a_digit_without_noise_keeps_its_pixels():
    """At twice the size of a digit pixels fall on pixels: its strokes are there, row by row, at some height."""
    digit = torch.zeros(2, 1, 8, 8)
    digit[0, 0, 3, 2:6] = 1
    _, mask = Scattered(16, noise=0.0).eval()((digit * 2 - 1, torch.zeros(2)))
    assert mask[0].sum(-1).max() == 4 and not mask[1].any()


def _at(ink, row, column):
    """Between two rows of an image (H, W), and nothing around it."""
    above = math.floor(row)
    inside = [float(ink[i, column]) if 0 <= i < len(ink) else 0.0 for i in (above, above + 1)]
    return inside[0] + (row - above) * (inside[1] - inside[0])


def test_a_canvas_is_a_digit_and_its_neighbour_with_exchanged_quarters(batch):
    image, mask = Scattered(16, noise=0.0).eval()(batch)
    generator = torch.Generator().manual_seed(0)
    side, heights = torch.randint(2, (6,), generator=generator), torch.rand(2, 6, generator=generator).tolist()
    ink = (batch[0][:, 0] + 1) / 2
    for b in range(6):
        neighbour = ink[b - 1]
        other = torch.cat([torch.cat([neighbour[4:, 4:], neighbour[4:, :4]], 1),
                           torch.cat([neighbour[:4, 4:], neighbour[:4, :4]], 1)])  # fmt: skip
        halves = (
            [[_at(ink[b], r - 8 * heights[0][b], c) for c in range(8)] for r in range(16)],
            [[_at(other, r - 8 * heights[1][b], c) for c in range(8)] for r in range(16)],
        )
        digit, beside = map(torch.tensor, halves)
        left, right = (beside, digit) if side[b] else (digit, beside)
        torch.testing.assert_close(image[b, 0], 2 * torch.cat([left, right], 1) - 1, rtol=0, atol=1e-5)
        assert mask[b, 0, :, 8:].equal((right > 0.5).long() if side[b] else torch.zeros(16, 8).long())
        assert mask[b].sum() == (digit > 0.5).sum()


def test_the_segmentation_loss_is_cross_entropy_and_dice_of_each_image():
    logits, target = torch.randn(3, 1, 4, 4), torch.randint(2, (3, 1, 4, 4))
    found = dice_and_cross_entropy(logits, target)
    for b in range(3):
        p, t = logits[b].sigmoid().flatten().tolist(), target[b].flatten().tolist()
        entropy = -sum(math.log(q if wanted else 1 - q) for q, wanted in zip(p, t, strict=True)) / 16
        dice = (2 * sum(q * wanted for q, wanted in zip(p, t, strict=True)) + 1) / (sum(p) + sum(t) + 1)
        assert found[b] == pytest.approx(entropy + 1 - dice, rel=1e-4)


def test_dice_is_the_f1_of_the_pixels():
    logits, target = torch.randn(3, 1, 4, 4), torch.randint(2, (3, 1, 4, 4))
    found, wanted = logits > 0, target.bool()
    dice = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
    assert BinaryF1Score()(logits, target) == pytest.approx(float(dice))
