import pytest
import torch
from torch import nn

from hasten.nn import ConvNet
from hasten.nn.dataset_distillation.peers import alexnet, named_nets, resnet18, vgg11, vit_tiny

SMALLEST = {"resnet18": 9, "resnet18_batch": 1, "vgg11": 32, "vgg11_batch": 32, "alexnet": 8, "vit_tiny": 4}
MAKERS = {
    "resnet18": resnet18,
    "resnet18_batch": lambda *shape: resnet18(*shape, norm="batch"),
    "vgg11": vgg11,
    "vgg11_batch": lambda *shape: vgg11(*shape, norm="batch"),
    "alexnet": alexnet,
    "vit_tiny": vit_tiny,
}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.slow] if size >= 64 else [])
        for name in MAKERS
        for size in (8, 32, 64, 128)
        if size >= SMALLEST[name]
    ],
)
def test_a_net_gives_logits_that_tell_images_apart_and_every_weight_a_gradient(name, size):
    net = MAKERS[name](3, size, 7)
    if name.startswith("resnet"):
        for block in net.modules():  # zero at first, so that a block begins as the identity
            if hasattr(block, "zero_init_last"):
                nn.init.ones_(block.bn2.weight)
    logits = net(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert not torch.allclose(logits[0], logits[1])
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert any(parameter.grad.any() for parameter in list(net.parameters())[:2])


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "alexnet", "vit_tiny"])
def test_an_image_that_is_too_small_is_refused_in_one_line(name):
    smallest = SMALLEST[name]
    MAKERS[name](1, smallest, 2)
    with pytest.raises(
        ValueError, match=rf"^{name}: image_size: expected >= {smallest}, .*got {smallest - 1}; use .*$"
    ):
        MAKERS[name](1, smallest - 1, 2)


def test_small_images_keep_their_size_in_the_stem_of_a_resnet():
    assert resnet18(3, 32, 2).forward_features(torch.zeros(1, 3, 32, 32)).shape[-1] == 4
    assert resnet18(3, 128, 2).forward_features(torch.zeros(1, 3, 128, 128)).shape[-1] == 4


@pytest.mark.parametrize(("norm", "kind"), [("instance", nn.GroupNorm), ("batch", nn.BatchNorm2d)])
def test_every_norm_is_the_one_that_was_asked_for(norm, kind):
    for maker in (resnet18, vgg11):
        net = maker(3, 32, 2, norm=norm)
        norms = [module for module in net.modules() if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d))]
        assert norms
        assert all(isinstance(module, kind) for module in norms)
        if norm == "instance":
            assert all(module.num_groups == module.num_channels for module in norms)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="vgg11: norm: got 'batchnorm'; did you mean 'batch'"):
        vgg11(3, 32, 2, norm="batchnorm")


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (16, 2), (28, 2), (32, 4), (64, 8), (128, 16)])
def test_a_vit_sees_about_64_patches_of_at_least_2_pixels(size, patch):
    assert vit_tiny(1, size, 2).patch_embed.patch_size == (patch, patch)


def test_nets_are_made_by_name_and_are_fresh():
    nets = named_nets(["convnet", "convnet_batch", "alexnet"], 1, 8, 10, convnet={"width": 4, "depth": 2})
    assert list(nets) == ["convnet", "convnet_batch", "alexnet"]
    first, second = nets["convnet"](), nets["convnet"]()
    assert isinstance(first, ConvNet)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert any(isinstance(module, nn.BatchNorm2d) for module in nets["convnet_batch"]().modules())


@pytest.mark.parametrize(("size", "depth"), [(8, 1), (28, 2), (32, 3), (64, 4), (128, 5)])
def test_the_usual_convnet_halves_down_to_4_pixels(size, depth):
    assert len(named_nets(["convnet"], 1, size, 10)["convnet"]().blocks) == depth


def test_a_name_there_is_not_or_a_net_that_does_not_fit_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^nets: got 'resnet'; did you mean 'resnet18'\?$"):
        named_nets(["resnet"], 1, 8, 10)
    with pytest.raises(ValueError, match=r"^resnet18: image_size: expected >= 9, with norm=instance, got 8;"):
        named_nets(["resnet18"], 1, 8, 10)
