"""Class activation maps: where in an image a network sees a class; and what is made of them.

The maps have the size of the layer that they are read from. The network is left as it was: its mode, its gradients, its
hooks. All of it also works under the caller's ``torch.no_grad``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from hasten.errors import did_you_mean

_EPS = 1e-8


def grad_cam(
    model: nn.Module, layer: nn.Module | str, images: Tensor, classes: Tensor, *, generator: Generator | None = None
) -> Tensor:
    """Grad-CAM in [0, 1], images (B, C, H, W) and classes (B,) -> (B, h, w).

    Channels of the layer count by the mean of their gradient; what speaks against the class counts as 0.

    Args:
        model: gives logits (B, K); is asked in eval mode.
        layer: a module of the model, or its name, whose output is (B, channels, h, w).
        images: in the range of the model.
        classes: int64, each the index of a logit.
        generator: not used, there is no noise here.

    Raises:
        ValueError: for a layer that the model lacks or whose output is no map, and for a class out of range.

    Source: Grad-CAM, arXiv:1610.02391.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> grad_cam(net, "1", torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0])).shape
        torch.Size([5, 6, 6])
    """
    with _probe(model, layer) as activation_and_gradient:
        activation, gradient = activation_and_gradient(images, classes)
    return _normalized((gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1))


def smooth_grad_cam_pp(
    model: nn.Module,
    layer: nn.Module | str,
    images: Tensor,
    classes: Tensor,
    *,
    samples: int = 4,
    std: float = 0.3,
    noise: Tensor | None = None,
    generator: Generator | None = None,
    activation: str = "last_noisy",
) -> Tensor:
    """SmoothGrad-CAM++ in [0, 1], images (B, C, H, W) and classes (B,) -> (B, h, w).

    Grad-CAM++ with powers of the gradient that are means over noisy copies of the image.

    Args:
        model: as of ``grad_cam``, as are layer, images and classes.
        samples: noisy copies, >= 1.
        std: of the noise, in the range of the model.
        noise: (samples, B, C, H, W), in place of normal noise times std.
        generator: draws the noise, on the CPU; by default torch's global one.
        activation: "last_noisy" weighs the channels of the last noisy copy, as the code does that EDF was run with;
            "clean" those of the image, as the method is written.

    Raises:
        ValueError: as of ``grad_cam``, and for other samples, noise or activation.

    Source: Smooth Grad-CAM++, arXiv:1908.01224; EDF, arXiv:2410.17193.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> smooth_grad_cam_pp(net, "1", torch.rand(1, 1, 8, 8), torch.tensor([0]), generator=generator).shape
        torch.Size([1, 6, 6])
    """
    if samples < 1:
        raise ValueError(f"saliency: samples: expected >= 1, got {samples}")
    if activation not in ("last_noisy", "clean"):
        raise ValueError(f"saliency: activation: expected 'last_noisy' or 'clean', got {activation!r}")
    if noise is None:
        noise = std * torch.randn(samples, *images.shape, generator=generator)
    if noise.shape != (samples, *images.shape):
        raise ValueError(f"saliency: noise: expected {(samples, *images.shape)}, got {tuple(noise.shape)}")
    with _probe(model, layer) as activation_and_gradient:
        clean, _ = activation_and_gradient(images, classes)
        weighed = gradient = squares = cubes = torch.zeros_like(clean)
        for sample in noise.to(images):
            weighed, gradient = activation_and_gradient(images + sample, classes)
            squares, cubes = squares + gradient**2 / samples, cubes + gradient**3 / samples
    importance = squares / (2 * squares + (cubes * clean).sum(dim=(2, 3), keepdim=True) + _EPS)
    weights = (importance * gradient.relu()).sum(dim=(2, 3), keepdim=True)
    terms = weights * (weighed if activation == "last_noisy" else clean)
    # importance may divide by 0; such a channel says nothing
    return _normalized(terms.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum(dim=1))


def discriminative_weight(cam: Tensor, *, beta: float = 1.0, threshold: float | None = None) -> Tensor:
    """Weights of pixel gradients, (N, H, W) in [0, 1] -> (N, H, W): cam + beta where cam is high, elsewhere 1.

    Args:
        cam: class activation maps.
        beta: >= 0; from 1 on no gradient is lowered.
        threshold: what is high: cam >= threshold; default: the mean of each image.

    Raises:
        ValueError: for beta < 0.

    Source: EDF, arXiv:2410.17193, discriminative area enhancement.

    Example:
        >>> discriminative_weight(torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))
        tensor([[[1.0000, 1.0000, 1.7500, 2.0000]]])
    """
    if not beta >= 0:
        raise ValueError(f"discriminative_weight: beta: expected >= 0, got {beta}; EDF uses 1 or 2")
    high = cam >= (cam.mean(dim=(1, 2), keepdim=True) if threshold is None else threshold)
    return torch.where(high, cam + beta, 1.0)


def cam_complexity(cam: Tensor) -> Tensor:
    """The share of an image that does not show its class, (B, h, w) in [0, 1] -> (B,): cells that are not over 0.5.

    Source: Comp-DD, in EDF, arXiv:2410.17193.

    Example:
        >>> cam_complexity(torch.tensor([[[1.0, 0.5], [0.2, 0.0]]]))
        tensor([0.7500])
    """
    return 1 - (cam > 0.5).to(cam.dtype).mean(dim=(1, 2))


@contextmanager
def _probe(model: nn.Module, layer: nn.Module | str) -> Iterator["_Probe"]:
    """The network in eval mode with a hook on ``layer``; both as before when the block ends."""
    module, name = _found(model, layer)
    probe = _Probe(model, name)
    modes = [(part, part.training) for part in model.modules()]
    handle = module.register_forward_hook(probe.hook)
    try:
        model.eval()
        # inference tensors cannot be differentiated; Lightning validates under inference_mode
        with torch.inference_mode(False), torch.enable_grad():
            yield probe
    finally:
        handle.remove()
        for part, training in modes:
            part.training = training


class _Probe:
    """(images, classes) -> what the layer gives (B, channels, h, w), and the gradient of the logits by that."""

    def __init__(self, model: nn.Module, name: str):
        self.model = model
        self.name = name
        # detached: the graph begins at the layer, and no parameter gets a gradient
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.seen: Tensor | None = None

    def __call__(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = None
        logits = functional_call(self.model, self.weights, (images.detach().clone(),))
        if self.seen is None:
            raise ValueError(
                f"saliency: layer {self.name!r}: expected a layer that the network calls, got one it skips"
            )
        lowest, highest = int(classes.min()), int(classes.max())
        if lowest < 0 or highest >= logits.shape[1]:
            raise ValueError(
                f"saliency: classes: expected 0 to {logits.shape[1] - 1}, the logits of the network, "
                f"got {lowest} to {highest}"
            )
        scores = logits.gather(1, classes.to(logits.device).clone()[:, None])
        (gradient,) = torch.autograd.grad(scores.sum(), self.seen)
        return self.seen.detach(), gradient

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shape = tuple(output.shape)
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] < 2:
            raise ValueError(
                f"saliency: layer {self.name!r}: expected square maps (B, channels, h, w) of at least 2 x 2, "
                f"got {shape}; choose a layer before the pooling"
            )
        self.seen = output.detach().requires_grad_()
        return self.seen.clone()  # what follows may work in place


def _found(model: nn.Module, layer: nn.Module | str) -> tuple[nn.Module, str]:
    named = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in named:
            raise ValueError(f"saliency: layer: the network has no {layer!r}{did_you_mean(layer, named)}")
        return named[layer], layer
    for name, module in named.items():
        if module is layer:
            return layer, name
    raise ValueError(
        f"saliency: layer: expected a module of the network, got another {type(layer).__name__}; say its name"
    )


def _normalized(maps: Tensor) -> Tensor:
    """To [0, 1] each, (B, h, w) -> (B, h, w); what is below 0 is 0 before that."""
    maps = maps.relu()
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + _EPS)
