"""Class activation maps against loops over single images and cells, and that the network is left as it was."""

import pytest
import torch
from torch import nn

from hasten.functional import cam_complexity, discriminative_weight, grad_cam, smooth_grad_cam_pp
from hasten.nn import ConvNet, timm_model

METHODS = [grad_cam, smooth_grad_cam_pp]


def net(**options):
    torch.manual_seed(0)
    return ConvNet(1, 8, 5, width=6, depth=2, **options).double()


def batch(n=3):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=draws, dtype=torch.float64), torch.randint(5, (n,), generator=draws)


def slow_parts(model, image, label):
    """Activation and gradient (K, h, w) of the last ReLU, by the layers one after the other."""
    activation = model.blocks[:-1](image[None])
    activation = model.blocks[-1][2](model.blocks[-1][1](model.blocks[-1][0](activation))).detach().requires_grad_()
    score = model.classifier(model.blocks[-1][3](activation).flatten(1))[0, label]
    score.backward()
    return activation.detach()[0], activation.grad[0]


def slowly_normalized(cells):
    lowest = min(cells.values())
    highest = max(cells.values()) - lowest
    side = max(i for i, _ in cells) + 1
    return torch.tensor([[(cells[i, j] - lowest) / (highest + 1e-8) for j in range(side)] for i in range(side)])


def slow_grad_cam(model, image, label):
    activation, gradient = slow_parts(model, image, label)
    channels, side, _ = activation.shape
    weights = [float(gradient[k].sum()) / side**2 for k in range(channels)]
    cells = {
        (i, j): max(0.0, sum(weights[k] * float(activation[k, i, j]) for k in range(channels)))
        for i in range(side)
        for j in range(side)
    }
    return slowly_normalized(cells)


def slow_smooth_grad_cam_pp(model, image, label, noise, kind):
    clean, _ = slow_parts(model, image, label)
    channels, side, _ = clean.shape
    noisy = [slow_parts(model, image + one, label) for one in noise]
    places = [(i, j) for i in range(side) for j in range(side)]
    weights = []
    for k in range(channels):
        squares = {p: sum(float(g[k][p]) ** 2 for _, g in noisy) / len(noisy) for p in places}
        cubes = {p: sum(float(g[k][p]) ** 3 for _, g in noisy) / len(noisy) for p in places}
        whole = sum(cubes[p] * float(clean[k][p]) for p in places)
        importance = {p: squares[p] / (2 * squares[p] + whole + 1e-8) for p in places}
        weights.append(sum(importance[p] * max(0.0, float(noisy[-1][1][k][p])) for p in places))
    shown = noisy[-1][0] if kind == "last_noisy" else clean
    return slowly_normalized(
        {p: max(0.0, sum(weights[k] * float(shown[k][p]) for k in range(channels))) for p in places}
    )


def test_grad_cam_is_what_loops_over_the_cells_say():
    model, (images, labels) = net(), batch()
    expected = [slow_grad_cam(model, image, label) for image, label in zip(images, labels, strict=True)]
    found = grad_cam(model, model.saliency_layer, images, labels)
    assert found.shape == (3, 4, 4)
    torch.testing.assert_close(found.float(), torch.stack(expected))


@pytest.mark.parametrize("kind", ["last_noisy", "clean"])
def test_smooth_grad_cam_pp_is_what_loops_over_the_cells_say(kind):
    model, (images, labels) = net(), batch()
    noise = 0.3 * torch.randn(4, *images.shape, dtype=torch.float64)
    expected = [
        slow_smooth_grad_cam_pp(model, image, label, noise[:, i], kind)
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    found = smooth_grad_cam_pp(model, model.saliency_layer, images, labels, noise=noise, activation=kind)
    torch.testing.assert_close(found.float(), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_the_activation_is_the_last_noisy_one_by_default_and_that_matters():
    model, (images, labels) = net(), batch()
    noise = 0.3 * torch.randn(4, *images.shape, dtype=torch.float64)
    default, noisy, clean = (
        smooth_grad_cam_pp(model, model.saliency_layer, images, labels, noise=noise, **options)
        for options in ({}, {"activation": "last_noisy"}, {"activation": "clean"})
    )
    assert torch.equal(default, noisy) and (noisy - clean).abs().max() > 0.05


def test_the_noise_comes_out_of_the_generator_and_has_its_deviation():
    model, (images, labels) = net(), batch()

    def maps(**options):
        return smooth_grad_cam_pp(model, model.saliency_layer, images, labels, **options)

    def draws(seed=0):
        return torch.Generator().manual_seed(seed)

    state = torch.get_rng_state()
    noise = 0.5 * torch.randn(2, *images.shape, generator=draws())
    torch.testing.assert_close(maps(generator=draws(), samples=2, std=0.5), maps(noise=noise, samples=2))
    assert not torch.equal(maps(generator=draws()), maps(generator=draws(1)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_know_of_each_other_and_maps_fill_zero_to_one(method):
    model, (images, labels) = net(), batch()
    fixed = {} if method is grad_cam else {"noise": torch.zeros(4, 3, 1, 8, 8)}
    maps = method(model, model.saliency_layer, images, labels, **fixed)
    torch.testing.assert_close(maps.amin(dim=(1, 2)), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(maps.amax(dim=(1, 2)), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    fixed = {} if method is grad_cam else {"noise": torch.zeros(4, 1, 1, 8, 8)}
    alone = method(model, model.saliency_layer, images[1:2], labels[1:2], **fixed)
    torch.testing.assert_close(maps[1:2], alone)


# ------------------------------------------------------------------ the network


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_left_as_it_was(method):
    model, (images, labels) = net(norm="batch"), batch()
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    maps = method(model, model.saliency_layer, images.requires_grad_(), labels)
    assert not maps.requires_grad and images.grad is None
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert hooks(model) == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_left_as_it_was_when_something_breaks(method):
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("broken")

    model, (images, labels) = net().train(), batch()
    model.classifier = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        method(model, model.saliency_layer, images, labels)
    assert hooks(model) == 0 and all(module.training for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_have_gradients_off(method, context):
    model, (images, labels) = net(), batch()
    fixed = {} if method is grad_cam else {"noise": torch.full((4, 3, 1, 8, 8), 0.1)}
    expected = method(model, model.saliency_layer, images, labels, **fixed)
    with context():
        images, labels = images.clone(), labels.clone()  # inference tensors, where there are such
        torch.testing.assert_close(method(model, model.saliency_layer, images, labels, **fixed), expected)
        assert not torch.is_grad_enabled()


def test_a_module_or_its_name_mean_the_same():
    model, (images, labels) = net(), batch()
    by_name = grad_cam(model, "blocks.1.2", images, labels)
    assert torch.equal(grad_cam(model, model.blocks[1][2], images, labels), by_name)


def test_what_the_next_layer_does_in_place_is_not_seen():
    model, (images, labels) = net(), batch()
    expected = grad_cam(model, "blocks.1.1", images, labels)
    model.blocks[1][2].inplace = True
    torch.testing.assert_close(grad_cam(model, "blocks.1.1", images, labels), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_resnet_of_timm_gives_maps_of_its_last_stage(method):
    torch.manual_seed(0)
    model = timm_model("resnet18", pretrained=False)
    images, classes = torch.randn(8, 3, 128, 128), torch.tensor([0, 1, 2, 3, 4, 5, 6, 701])
    maps = method(model, "layer4", images, classes)
    assert maps.shape == (8, 4, 4) and maps.isfinite().all() and maps.max() > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------ refusals


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)

    def forward(self, images):
        return self.used(images).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("model", "layer", "label", "message"),
    [
        (net(), "blocks.1.3.x", 0, "layer: the network has no 'blocks.1.3.x'; did you mean 'blocks.1.3'?"),
        (net(), nn.ReLU(), 0, "layer: expected a module of the network, got another ReLU"),
        (net(), "classifier", 0, r"layer 'classifier': expected square maps .* got \(1, 5\)"),
        (ConvNet(1, 8, 5, width=6, depth=3).double(), "blocks.2", 0, r"at least 2 x 2, got \(1, 6, 1, 1\); choose"),
        (Skipping().double(), "unused", 0, "layer 'unused': expected a layer that the network calls"),
        (net(), "blocks.1.2", 5, "classes: expected 0 to 4, the logits of the network, got 5 to 5"),
        (net(), "blocks.1.2", -1, "classes: expected 0 to 4, the logits of the network, got -1 to -1"),
    ],
)
def test_what_gives_no_map_is_refused_in_one_line(model, layer, label, message):
    with pytest.raises(ValueError, match=message) as caught:
        grad_cam(model, layer, batch(1)[0], torch.tensor([label]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: expected >= 1, got 0"),
        ({"activation": "noisy"}, "activation: expected 'last_noisy' or 'clean', got 'noisy'"),
        ({"noise": torch.zeros(3, 3, 1, 8, 8)}, r"noise: expected \(4, 3, 1, 8, 8\), got \(3, 3, 1, 8, 8\)"),
    ],
)
def test_impossible_noise_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        smooth_grad_cam_pp(net(), "blocks.1.2", *batch(), **options)


# ------------------------------------------------------------------ what is made of maps


@pytest.mark.parametrize(("beta", "threshold"), [(1.0, None), (2.0, None), (0.0, 0.4), (1.0, 0.4)])
def test_the_weight_is_what_loops_over_the_pixels_say(beta, threshold):
    cam = torch.rand(3, 4, 5, dtype=torch.float64)
    cam[0, 0, 0] = 0.4  # at the threshold is high
    expected = torch.ones_like(cam)
    for n in range(3):
        level = sum(cam[n].flatten().tolist()) / 20 if threshold is None else threshold
        for i in range(4):
            for j in range(5):
                if cam[n, i, j] >= level:
                    expected[n, i, j] = cam[n, i, j] + beta
    torch.testing.assert_close(discriminative_weight(cam, beta=beta, threshold=threshold), expected)


def test_a_weight_that_would_turn_gradients_round_is_refused():
    with pytest.raises(ValueError, match="beta: expected >= 0, got -1"):
        discriminative_weight(torch.rand(1, 2, 2), beta=-1)


def test_complexity_is_the_share_of_cells_that_are_not_over_a_half():
    cam = torch.tensor([[[0.5, 0.51], [0.9, 0.1]], [[0.0, 0.0], [0.0, 0.0]]])
    assert cam_complexity(cam).tolist() == [0.5, 1.0]
