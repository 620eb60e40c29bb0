"""ZCA against the singular values of the centred data."""

import warnings

import pytest
import torch

from hasten.functional import zca_colour, zca_fit, zca_whiten


def photographs(n=60, channels=2, size=3):
    """Neighbouring pixels hang together."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.rand(n, channels, size + 1, size + 1, generator=draws, dtype=torch.float64)
    return (noise[..., 1:, 1:] + noise[..., :-1, 1:] + noise[..., 1:, :-1] + noise[..., :-1, :-1]) / 4


def by_svd(images, lam):
    flat = images.flatten(1)
    mean = flat.mean(0)
    _, singular, directions = torch.linalg.svd(flat - mean, full_matrices=True)
    variances = torch.zeros(flat.shape[1], dtype=flat.dtype)
    variances[: len(singular)] = singular**2 / (len(flat) - 1)
    return mean, directions.T @ torch.diag((variances + lam) ** -0.5) @ directions


@pytest.mark.parametrize("lam", [0.1, 1e-3])
@pytest.mark.parametrize("n", [60, 5])  # 5: fewer images than the 18 pixels of each
def test_the_matrix_is_that_of_the_singular_value_decomposition(n, lam):
    images = photographs(n)
    mean, matrix, inverse = zca_fit([images], lam=lam)
    expected_mean, expected = by_svd(images, lam)
    torch.testing.assert_close(mean, expected_mean.float())
    torch.testing.assert_close(matrix, expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inverse, torch.linalg.inv(expected).float(), atol=1e-5, rtol=1e-4)
    assert {mean.dtype, matrix.dtype, inverse.dtype} == {torch.float32}


def test_with_little_regularisation_whitened_pixels_are_uncorrelated():
    images = photographs(400).float()
    mean, matrix, _ = zca_fit([images], lam=1e-6)
    covariance = zca_whiten(images, mean, matrix).flatten(1).T.cov()
    torch.testing.assert_close(covariance, torch.eye(18), atol=2e-3, rtol=0)


def test_batches_of_any_size_give_the_same_fit():
    images = photographs()
    for one, other in zip(zca_fit([images]), zca_fit(images.split(7)), strict=True):
        torch.testing.assert_close(one, other)


def test_colouring_undoes_whitening_for_any_leading_dimensions():
    images = photographs().float()
    mean, matrix, inverse = zca_fit([images])
    whitened = zca_whiten(images.view(6, 10, 2, 3, 3), mean, matrix)
    assert torch.equal(whitened.flatten(0, 1), zca_whiten(images, mean, matrix))
    torch.testing.assert_close(zca_colour(whitened, mean, inverse).flatten(0, 1), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([photographs(1)], {}, "expected at least 2 images, got 1"),
        ([], {}, "expected at least 2 images, got 0"),
        ([photographs() * float("nan")], {}, "expected finite pixels"),
        ([photographs()], {"lam": 0.0}, "lam: expected > 0, got 0.0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(batches, options, message):
    with pytest.raises(ValueError, match=message):
        zca_fit(batches, **options)


def test_large_images_warn_before_the_work_begins():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"12288 pixels an image: each matrix of the fit has 1\.1 GiB"):
            zca_fit([torch.zeros(2, 3, 64, 64)])
