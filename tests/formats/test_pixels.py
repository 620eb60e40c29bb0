"""Both ranges go there and back, and through a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.formats import ZCA, PixelRange, pixels_from_tensors

IMAGES = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(0))
RANGES = [
    PixelRange(torch.tensor(0.5), torch.tensor(0.25)),
    PixelRange(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)),
    ZCA.fit([IMAGES]),
]


@pytest.mark.parametrize("pixels", RANGES, ids=["number", "channels", "zca"])
def test_denormalizing_undoes_normalizing(pixels):
    normalized = pixels.normalize(IMAGES)
    assert not torch.allclose(normalized, IMAGES, atol=0.1)
    torch.testing.assert_close(pixels.denormalize(normalized), IMAGES, atol=1e-5, rtol=0)
    assert pixels.normalize(IMAGES.double()).dtype == torch.float64


@pytest.mark.parametrize("pixels", RANGES, ids=["number", "channels", "zca"])
def test_a_range_is_the_same_out_of_a_file_that_holds_other_things_too(pixels, tmp_path):
    save_file({"images": torch.zeros(1), **pixels.to_tensors()}, tmp_path / "set.safetensors")
    again = pixels_from_tensors(load_file(tmp_path / "set.safetensors"))
    assert type(again) is type(pixels)
    assert torch.equal(again.normalize(IMAGES), pixels.normalize(IMAGES))
    assert torch.equal(again.denormalize(IMAGES), pixels.denormalize(IMAGES))


def test_half_a_range_is_refused():
    with pytest.raises(ValueError, match=r"expected mean and std, or .* got images, zca_matrix, zca_mean"):
        pixels_from_tensors({name: torch.zeros(1) for name in ("images", "zca_mean", "zca_matrix")})
