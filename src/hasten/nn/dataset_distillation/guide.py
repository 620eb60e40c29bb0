"""DiscriminativeArea: the guide of EDF, which weighs pixel gradients by where a network sees the class."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hasten.functional.saliency import discriminative_weight, smooth_grad_cam_pp

_IMAGES_AT_ONCE = 64
"""For which maps are made; of thousands the activations would not fit into memory."""


class DiscriminativeArea:
    """Weights for the gradients of synthetic images, from class activation maps that are renewed now and then.

    A plain object outside of the module tree: its network is in no state_dict and no optimizer.

    Args:
        net: is asked for the maps; None: to be set before the first weight.
        layer: a module of the net or its name; None: what the net has for ``saliency_layer``.
        saliency: of the form of ``hasten.functional.smooth_grad_cam_pp``.
        every: iterations from one renewal to the next, >= 1.
        beta: see ``hasten.functional.discriminative_weight``.
        threshold: likewise.
        classes: label -> index of the net's logit, one for each label; None: the labels as they are, which for a net
            of ImageNet and labels 0 to 9 are ten fishes and birds.

    Raises:
        ValueError: for every < 1 or beta < 0.

    Source: EDF, arXiv:2410.17193, discriminative area enhancement.

    Example:
        >>> from hasten.nn import ConvNet
        >>> guide = DiscriminativeArea(ConvNet(1, 8, 10, width=8, depth=2), every=50)
        >>> draws = torch.Generator().manual_seed(0)
        >>> guide.weight(torch.rand(10, 1, 8, 8), torch.arange(10), iteration=0, generator=draws).shape
        torch.Size([10, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        layer: nn.Module | str | None = None,
        *,
        saliency: Callable[..., Tensor] = smooth_grad_cam_pp,
        every: int = 100,
        beta: float = 1.0,
        threshold: float | None = None,
        classes: Sequence[int] | None = None,
    ):
        if every < 1:
            raise ValueError(f"guide: every: expected >= 1 iteration, got {every}")
        if not beta >= 0:
            raise ValueError(f"guide: beta: expected >= 0, got {beta}; EDF uses 1 or 2")
        self.net = net
        self.layer = layer
        self.saliency = saliency
        self.every = every
        self.beta = beta
        self.threshold = threshold
        self.classes = None if classes is None else torch.tensor(list(classes), dtype=torch.int64)
        self.cam: Tensor | None = None
        """The maps of the last renewal in the images' size, (N, H, W) in [0, 1]."""
        self._renewed_at = 0

    def weight(self, images: Tensor, labels: Tensor, *, iteration: int, generator: Generator) -> Tensor:
        """The weights, (N, C, H, W) and (N,) -> (N, 1, H, W), of maps not older than the last multiple of ``every``.

        Args:
            images: in the range of the model.
            labels: int64.
            iteration: counts from 0; one where nobody asks for weights puts no renewal off.
            generator: of the noise of the maps, on the CPU.

        Raises:
            ValueError: where there is no net or no layer, and where ``classes`` has no entry for each label.
        """
        if self.cam is None or iteration // self.every != self._renewed_at // self.every:
            self.cam = self._maps(images, self._logits(labels), generator)
            self._renewed_at = iteration
        self.cam = self.cam.to(images.device)  # after load_state_dict it may be elsewhere
        return discriminative_weight(self.cam, beta=self.beta, threshold=self.threshold)[:, None]

    def state_dict(self) -> dict[str, Any]:
        """The maps and when they were made; the net is not part of it."""
        return {"cam": self.cam, "renewed_at": self._renewed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cam, self._renewed_at = state_dict["cam"], state_dict["renewed_at"]

    def _maps(self, images: Tensor, classes: Tensor, generator: Generator) -> Tensor:
        if self.net is None:
            raise ValueError("guide: net: expected a network that is asked for maps, got None; set guide.net")
        layer = getattr(self.net, "saliency_layer", None) if self.layer is None else self.layer
        if layer is None:
            raise ValueError(
                f"guide: layer: expected the name of a layer, as {type(self.net).__name__} has no saliency_layer; "
                f"'layer4' for a ResNet"
            )
        self.net.to(images.device)  # outside of the module tree nobody else moves it
        parts = zip(images.split(_IMAGES_AT_ONCE), classes.split(_IMAGES_AT_ONCE), strict=True)
        maps = torch.cat([self.saliency(self.net, layer, *part, generator=generator) for part in parts])
        return F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    def _logits(self, labels: Tensor) -> Tensor:
        if self.classes is None:
            return labels
        if int(labels.max()) + 1 != len(self.classes):
            raise ValueError(
                f"guide: classes: expected an index for each of {int(labels.max()) + 1} labels, "
                f"got {len(self.classes)}; the datamodule's imagenet_indices fit an ImageNet net"
            )
        return self.classes.to(labels.device)[labels]
