"""ConvNet: its sizes and names, its norms, its frame of zeros."""

import pytest
import torch
import torch.nn.functional as F

from hasten.nn import ConvNet


@pytest.mark.parametrize(
    ("options", "numel"),
    [
        ({"in_channels": 3, "image_size": 32, "depth": 3}, 320_010),
        ({"in_channels": 3, "image_size": 128, "depth": 5}, 615_690),
    ],
)
def test_the_published_networks_have_their_number_of_parameters(options, numel):
    assert sum(parameter.numel() for parameter in ConvNet(num_classes=10, **options).parameters()) == numel


def test_the_names_in_a_checkpoint_stay():
    names = [
        *(f"blocks.{block}.{layer}.{kind}" for block in (0, 1) for layer in (0, 1) for kind in ("weight", "bias")),
        "classifier.weight",
        "classifier.bias",
    ]
    assert list(ConvNet(1, 8, 10, depth=2).state_dict()) == names
    assert list(ConvNet(1, 28, 10, depth=2, pad_to=32).state_dict()) == names


def test_instance_norm_is_that_of_each_channel_by_itself():
    model, images = ConvNet(2, 8, 3, width=4, depth=1), torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        model.blocks[0][1].weight.uniform_(0.5, 2)
        model.blocks[0][1].bias.uniform_(-1, 1)
    raw, norm = model.blocks[0][0](images), model.blocks[0][1]
    expected = F.instance_norm(raw, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(model.features(images), F.avg_pool2d(expected.relu(), 2).flatten(1))


def test_batch_norm_can_be_had_instead():
    model = ConvNet(1, 8, 3, width=4, depth=2, norm="batch")
    assert [name for name, _ in model.named_buffers() if name.endswith("running_mean")] == [
        "blocks.0.1.running_mean",
        "blocks.1.1.running_mean",
    ]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(("size", "pad_to", "before"), [(28, 32, 2), (8, 8, 0), (7, 8, 0)])
def test_images_are_framed_with_zeros(size, pad_to, before):
    torch.manual_seed(0)
    framed = ConvNet(1, size, 3, width=4, depth=3, pad_to=pad_to)
    plain = ConvNet(1, pad_to, 3, width=4, depth=3)
    plain.load_state_dict(framed.state_dict())
    images = torch.randn(2, 1, size, size)
    padded = torch.zeros(2, 1, pad_to, pad_to)
    padded[:, :, before : before + size, before : before + size] = images
    torch.testing.assert_close(framed(images), plain(padded))


def test_the_layer_for_maps_is_the_last_relu_and_keeps_what_comes_before_it():
    model, seen = ConvNet(1, 16, 3, width=4, depth=3), {}
    for name in ("blocks.2.1", model.saliency_layer):
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    model(torch.randn(2, 1, 16, 16))
    assert seen[model.saliency_layer].shape == (2, 4, 4, 4)
    assert torch.equal(seen["blocks.2.1"].relu(), seen[model.saliency_layer])
    assert (seen["blocks.2.1"] < 0).any()  # an in-place ReLU would have overwritten them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, r"depth: expected 2 \*\* depth <= image_size = 8, got depth 4; use at most 3"),
        ({"image_size": 10, "depth": 5, "pad_to": 16}, "image_size = 16, got depth 5; use at most 4"),
        ({"depth": 0}, "depth and width: expected >= 1, got 0 and 128"),
        ({"norm": "batchnorm"}, "norm: got 'batchnorm'; did you mean 'batch'"),
        ({"pad_to": 4}, "pad_to: expected >= image_size = 8, got 4"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(**{"in_channels": 1, "image_size": 8, "num_classes": 3} | options)
