"""The formulas of hypernetworks against restatements, number by number."""

import math

import pytest
import torch

from hasten.functional import (
    basis_delta,
    complement_encoding,
    fan_out_std,
    lora_delta,
    magnitude_invariant_encoding,
    moment_matched_kl,
)


@pytest.mark.parametrize("dims", [1, 2, 16])
@pytest.mark.parametrize(("norm", "length"), [("unit", lambda d: 1.0), ("per_dim", math.sqrt)])
def test_the_encoding_has_one_norm_whatever_the_input(dims, norm, length):
    encoded = magnitude_invariant_encoding(torch.rand(100, dims, dtype=torch.float64), norm=norm)
    assert encoded.shape == (100, 2 * dims)
    assert encoded.norm(dim=-1).sub(length(dims)).abs().max() <= 1e-12


def test_the_encoding_is_all_cosines_then_all_sines_of_a_quarter_turn():
    z = [0.0, 0.3, 1.0]
    expected = [math.cos(math.pi * v / 2) for v in z] + [math.sin(math.pi * v / 2) for v in z]
    found = magnitude_invariant_encoding(torch.tensor(z, dtype=torch.float64), norm="per_dim")
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_unit_is_per_dim_over_the_root_of_the_dimensions():
    z = torch.rand(2, 7, 5, dtype=torch.float64)
    per_dim = magnitude_invariant_encoding(z, norm="per_dim")
    torch.testing.assert_close(magnitude_invariant_encoding(z), per_dim / math.sqrt(5), rtol=1e-15, atol=1e-15)


def test_the_encodings_have_the_gradients_of_their_values():
    z = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(magnitude_invariant_encoding, z)
    assert torch.autograd.gradcheck(complement_encoding, z)


def test_an_unknown_norm_is_named():
    with pytest.raises(ValueError, match="norm: expected one of unit, per_dim, got 'two'"):
        magnitude_invariant_encoding(torch.rand(1), norm="two")


def test_the_complement_has_one_l1_norm_and_no_l2_norm():
    encoded = complement_encoding(torch.tensor([[0.0, 0.5], [0.25, 1.0]]))
    assert encoded.tolist() == [[0.0, 0.5, 1.0, 0.5], [0.25, 1.0, 0.75, 0.0]]
    assert encoded.abs().sum(-1).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_the_fan_out_std_gives_a_layers_output_gain_times_the_norm_of_its_input(gain):
    weight = torch.randn(50_000, 16) * fan_out_std(50_000, gain=gain)
    x = torch.randn(16)
    assert (weight @ x).norm() / x.norm() == pytest.approx(gain, rel=0.02)


def test_a_basis_delta_is_the_sum_of_the_weighted_rows():
    c, bank = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for b in range(2):
        slow = sum(c[b, k] * bank[k] for k in range(3))
        torch.testing.assert_close(basis_delta(c, bank)[b], slow)
        torch.testing.assert_close(basis_delta(c[b], bank), slow)


def test_a_lora_delta_is_u_diag_s_v():
    u, s, v = (torch.randn(*shape, dtype=torch.float64) for shape in [(4, 2), (3, 2), (2, 5)])
    for b in range(3):
        torch.testing.assert_close(lora_delta(u, s, v)[b], u @ torch.diag(s[b]) @ v)
        torch.testing.assert_close(lora_delta(u, s[b], v), u @ torch.diag(s[b]) @ v)


def test_the_kl_is_that_of_two_normals_with_the_samples_moments():
    samples = torch.randn(6, 4, dtype=torch.float64) * 0.3 + 0.1
    found = moment_matched_kl(samples, std=0.2)
    for i in range(4):
        column = samples[:, i]
        matched = torch.distributions.Normal(column.mean(), column.std())
        prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 0.2)
        torch.testing.assert_close(found[i], torch.distributions.kl_divergence(matched, prior))


def test_equal_samples_have_a_large_kl_and_no_nan():
    samples = torch.zeros(3, 2, requires_grad=True)
    kl = moment_matched_kl(samples, std=1.0)
    kl.sum().backward()
    assert (kl > 40).all() and kl.isfinite().all() and samples.grad.isfinite().all()


def test_a_kl_needs_two_samples_and_a_prior_with_a_spread():
    with pytest.raises(ValueError, match="samples: expected at least 2, got 1"):
        moment_matched_kl(torch.zeros(1, 2), std=1.0)
    with pytest.raises(ValueError, match="std: expected > 0, got 0"):
        moment_matched_kl(torch.zeros(2, 2), std=0.0)
