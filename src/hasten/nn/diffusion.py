"""Denoisers: diffusers' networks as the papers train them from scratch, and the linear skip.

A denoiser is called as ``model(x, t)`` or ``model(x, t, class_labels=labels)``, (B, C, H, W), (B,) int64, (B,) int64,
and returns the prediction, (B, C, H, W), or an object that holds it as ``.sample``. Label ``num_classes``, one past the
last class, stands for "no label": classifier-free guidance learns it by replacing labels outside of the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.nn.timesteps import alphas_cumprod


def unet(
    in_channels: int,
    image_size: int,
    *,
    num_classes: int | None = None,
    widths: Sequence[int] = (64, 128),
    attention: Sequence[int] = (),
    blocks: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """DDPM's U-Net as a diffusers ``UNet2DModel``: its output and every residual branch start at zero.

    Args:
        in_channels: C, of the images and of the prediction.
        image_size: H = W, divisible by 2 ** (len(widths) - 1).
        num_classes: K, for a conditional model; it embeds K + 1 labels. None: the model takes no labels.
        widths: channels at each resolution; each halves the one before.
        attention: sides of the feature maps that attend, e.g. (16,). The lowest resolution attends in any case.
        blocks: residual blocks at each resolution.
        dropout: in [0, 1).

    Raises:
        ValueError: where the sizes do not fit.

    Source: DDPM, arXiv:2006.11239, appendix B.

    Example:
        >>> model = unet(1, 8, num_classes=10, widths=(32, 64))
        >>> x, t, no_label = torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([10, 10])
        >>> model(x, t, class_labels=no_label).sample.shape
        torch.Size([2, 1, 8, 8])
    """
    from diffusers import UNet2DModel  # noqa: PLC0415 - seconds of import for those who build one only

    if not widths or min(widths) < 1:
        raise ValueError(f"unet: widths: expected at least one, each >= 1, got {list(widths)}")
    if blocks < 1:
        raise ValueError(f"unet: blocks: expected >= 1, got {blocks}")
    factor = 2 ** (len(widths) - 1)
    if image_size % factor:
        raise ValueError(
            f"unet: image_size: expected a multiple of {factor} for {len(widths)} widths, got {image_size}; use fewer"
        )
    groups = min(32, max(1, widths[0] // 4))
    if any(width % groups for width in widths):
        raise ValueError(f"unet: widths: expected multiples of {groups} (norm groups), got {list(widths)}")
    sides = [image_size // 2**level for level in range(len(widths))]
    if unknown := set(attention) - set(sides):
        raise ValueError(f"unet: attention: expected sides among {sides}, got {sorted(unknown)}")
    attends = ["Attn" * (side in attention) for side in sides]
    model = UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=tuple(widths),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in attends),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attends)),
        layers_per_block=blocks,
        dropout=dropout,
        norm_num_groups=groups,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    for name, layer in model.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")):  # the last of a block, of an attention, of the network
            _zero(layer)
    return model


def dit(
    in_channels: int,
    image_size: int,
    *,
    num_classes: int | None = None,
    patch_size: int = 4,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
) -> nn.Module:
    """The paper's DiT as a diffusers ``DiTTransformer2DModel``: every block starts as the identity, the output at zero.

    Built directly, diffusers' class has other initial weights, drops labels in every block by a mask of its own, and
    cannot be called without labels. Here no block drops labels, and without them the call uses label 0. One difference
    to the paper remains: every block embeds t and the label by itself.

    Args:
        in_channels: C, of the images and of the prediction.
        image_size: H = W, a multiple of ``patch_size``.
        num_classes: K, for a conditional model; it embeds K + 1 labels. None: an unconditional model.
        patch_size: side of a patch, in pixels.
        width: features of a token, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.

    Raises:
        ValueError: where the sizes do not fit.

    Source: DiT, arXiv:2212.09748; initial weights as in the authors' code.

    Example:
        >>> model = dit(1, 8, patch_size=2, width=32, depth=1, heads=2)
        >>> x = torch.randn(2, 1, 8, 8)
        >>> model(x, torch.tensor([0, 999])).sample.abs().max().item()
        0.0
    """
    from diffusers import DiTTransformer2DModel  # noqa: PLC0415 - seconds of import for those who build one only

    if image_size % patch_size:
        raise ValueError(f"dit: image_size: expected a multiple of patch_size = {patch_size}, got {image_size}")
    if width % heads:
        raise ValueError(f"dit: width: expected a multiple of heads = {heads}, got {width}")
    model: Any = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        num_layers=depth,
        sample_size=image_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes or 1,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.pos_embed.proj  # a convolution that is a linear layer over flat patches
    nn.init.xavier_uniform_(patches.weight.view(width, -1))
    nn.init.zeros_(patches.bias)
    for block in model.transformer_blocks:
        embedding = block.norm1.emb
        nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
        embedding.class_embedder.dropout_prob = 0.0
        _zero(block.norm1.linear)
    _zero(model.proj_out_1)
    _zero(model.proj_out_2)
    model.register_forward_pre_hook(_label_zero_without_labels, with_kwargs=True)
    return model


class LinearSkip(nn.Module):
    """Add the best linear guess of the target to a denoiser's output: (B, C, H, W), (B,) -> (B, C, H, W).

    For images of mean square s^2 the best guess that is linear in x_t is c_t x_t; where noise is predicted,
    c_t = sqrt(1 - abar_t) / (abar_t s^2 + 1 - abar_t). A fresh network then need not learn that at high noise almost
    all of x_t is noise. SpeeD draws those steps rarely, which a small network affords only if they are solved early.

    Args:
        model: a denoiser.
        noise_scheduler: a diffusers scheduler; its ``prediction_type`` says what is predicted.
        data_var: mean square of the images in the range the model sees, > 0.

    Raises:
        ValueError: for a data_var or a prediction type that is not served.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> model = LinearSkip(unet(1, 8, widths=(32, 64)), DDPMScheduler(), data_var=0.7)
        >>> x = torch.randn(2, 1, 8, 8)
        >>> torch.allclose(model(x, torch.tensor([999, 999])), x, rtol=1e-3)
        True
    """

    coefficients: Tensor

    def __init__(self, model: nn.Module, noise_scheduler: Any, data_var: float) -> None:
        super().__init__()
        if not data_var > 0:
            raise ValueError(f"linear skip: data_var: expected > 0, got {data_var}; pass the images' mean square")
        abar = alphas_cumprod(noise_scheduler)
        covariances = {  # of x_t and the target; images and noise are independent
            "epsilon": (1 - abar).sqrt(),
            "v_prediction": (abar * (1 - abar)).sqrt() * (1 - data_var),
            "sample": abar.sqrt() * data_var,
        }
        if (kind := noise_scheduler.config.prediction_type) not in covariances:
            raise ValueError(f"linear skip: prediction_type: expected one of {', '.join(covariances)}, got {kind!r}")
        coefficients = covariances[kind] / (abar * data_var + 1 - abar)
        self.model = model
        self.register_buffer("coefficients", coefficients.float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's prediction plus the guess; what else the model takes is passed on."""
        prediction = self.model(x, t, *args, **kwargs)
        return getattr(prediction, "sample", prediction) + self.coefficients[t].view(-1, 1, 1, 1) * x


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _label_zero_without_labels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook, so that the model stays a plain DiTTransformer2DModel for pipelines and checkpoints."""
    if len(args) < 3 and kwargs.get("class_labels") is None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        kwargs["class_labels"] = torch.zeros_like(t)
    return args, kwargs
