"""Vision Mamba (Vim): a bidirectional selective scan over the patches of an image, with token merging built in.

Parameters are named as in the authors' models, so that their checkpoints load as they are. Letters: M patches,
N = M + 1 tokens with the class token in the middle, C width, E = 2C features of the scan, S states of a feature.

Source: Vision Mamba, arXiv:2401.09417; merging as in R-MeeTo, arXiv:2412.12496.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, lecun_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from hasten.functional import (
    MergePlan,
    merge_source,
    merge_weighted,
    ordered_bipartite_matching,
    selective_scan,
    token_counts,
)
from hasten.functional.precision import no_autocast
from hasten.nn._vim_checkpoint import HUB_FILES, load_checkpoint
from hasten.nn.token_merging import Merging

METRICS = ("x", "b", "c", "delta")
"""What the similarity of tokens can be measured on: the last block's output, or what steers its scan."""


class VisionMamba(nn.Module):
    """Vim with a class token in the middle of the sequence, (B, in_chans, H, W) -> (B, K).

    Args:
        img_size: H = W, or (H, W), in pixels.
        patch_size: side of a patch, in pixels.
        stride: pixels from one patch to the next; None: ``patch_size``, patches do not overlap.
        depth: number of blocks.
        embed_dim: C.
        d_state: S.
        in_chans: channels of the images.
        num_classes: K; 0 for no classifier, the output is the class token's (B, C).
        drop_rate: of the dropout behind the position embedding, in [0, 1).
        drop_path_rate: chance that the last block is skipped in training; it grows linearly from 0 at the first.
        init_dt_b: start the backward scan at the forward scan's time steps, 0.001 to 0.1. The authors' code starts
            it at 0.69, where a state is forgotten within two tokens.
        scan_backend: see ``selective_scan``.

    Attributes:
        depth: number of blocks.
        num_tokens: N, patches and class token.
        cls_index: where the class token stands after the last block; None where that differs between samples.
        token_source: as in ``SupportsTokenMerging``.

    Raises:
        ValueError: where no patch fits into the image, or there is no block.

    Example:
        >>> model = VisionMamba(16, patch_size=4, depth=4, embed_dim=32, num_classes=10)
        >>> model.set_token_merging(Merging(r=(0, 0, 5, 0), metric="x"))
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> model(images).shape, model.forward_features(images).shape
        (torch.Size([2, 10]), torch.Size([2, 12, 32]))
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        *,
        stride: int | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_dt_b: bool = False,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"depth": depth, "patch_size": patch_size, "embed_dim": embed_dim, "d_state": d_state}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"vim: {name}: expected >= 1, got {value}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"vim: drop_path_rate: expected in [0, 1), got {drop_path_rate}")
        self.patch_embed = _patch_embed(img_size, patch_size, stride or patch_size, in_chans, embed_dim)
        self.grid_size: tuple[int, int] = self.patch_embed.grid_size
        self.num_tokens = math.prod(self.grid_size) + 1
        if self.num_tokens == 1:
            raise ValueError(f"vim: patch_size: expected to fit into img_size = {img_size}, got {patch_size}")
        self.prefix_indices = ((self.num_tokens - 1) // 2,)
        self.depth = depth
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_classes = num_classes
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        blocks = [
            Block(embed_dim, d_state, drop_path=rate, init_dt_b=init_dt_b, scan_backend=scan_backend)
            for rate in (0.0, *rates[:-1])  # a block drops what the one before it computed
        ]
        self.layers = nn.ModuleList(blocks)
        self.drop_path = DropPath(rates[-1])
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        _init_head(self.head)
        with torch.no_grad():
            for block in blocks:
                block.mixer.out_proj.weight /= math.sqrt(depth)  # what enters the sum, as in GPT-2
        self.grad_checkpointing = False
        self.set_token_merging(None)

    # ------------------------------------------------------------------ forward

    def forward(self, images: Tensor) -> Tensor:
        features, cls_index = self._features(images)
        return self.forward_head(features, cls_index=cls_index)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens that are left after the last block, normalized, (B, in_chans, H, W) -> (B, N', C)."""
        return self._features(images)[0]

    def forward_head(
        self, features: Tensor, pre_logits: bool = False, *, cls_index: Tensor | int | None = None
    ) -> Tensor:
        """Classify by the class token, (B, N', C) -> (B, K).

        Args:
            features: what ``forward_features`` returns.
            pre_logits: return the class token itself, (B, C).
            cls_index: where the class token is, an int or (B,) int64; None: ``self.cls_index``.

        Raises:
            ValueError: where the class token's place is needed and unknown.
        """
        if cls_index is None:
            cls_index = self.cls_index
        if cls_index is None:
            raise ValueError(
                "vim: cls_index: needed with cls_rule='exact', which puts it elsewhere in each sample; call the model"
            )
        if isinstance(cls_index, Tensor):
            token = features.take_along_dim(cls_index[:, None, None], dim=1)[:, 0]
        else:
            token = features[:, cls_index]
        return token if pre_logits else self.head(token)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor | int | None]:
        """The normalized tokens (B, N', C), and where the class token is among them."""
        merging, traced = self._merging, self._merging.trace_source and not self.training
        hidden = self._embed(images)
        residual = sizes = metric = source = None
        cls_index: Tensor | int | None = self.prefix_indices[0]
        for i, layer in enumerate(cast(Iterable[Block], self.layers)):
            # float32 also under autocast: bfloat16 would round away what single blocks add
            residual = _wide(hidden) if residual is None else residual + layer.drop_path(hidden)
            if metric is not None:  # asked for where the next block merges
                plan = _plan(metric, merging, i, cls_index)
                # R-MeeTo merges both summands; merging is linear, so merging their sum once is the same
                residual, sizes = merge_weighted(residual, sizes, plan, drop=merging.prune)
                cls_index = plan.new_cls_index
                source = merge_source(source, plan, drop=merging.prune) if traced else None
            wanted = merging.metric if any(merging.r[i + 1 : i + 2]) else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                hidden, metric = recompute(layer, residual, wanted, use_reentrant=False)
            else:
                hidden, metric = layer(residual, wanted)
        if traced:
            self.token_source = source
        residual = residual + self.drop_path(hidden)
        return self.norm_f(residual.to(self.norm_f.weight.dtype)), cls_index

    def _embed(self, images: Tensor) -> Tensor:
        """Patches in rows, the class token in their middle, positions added, (B, in_chans, H, W) -> (B, N, C)."""
        patches = self.patch_embed(images)
        middle = patches.shape[1] // 2
        cls = self.cls_token.expand(len(patches), -1, -1)
        return self.pos_drop(torch.cat((patches[:, :middle], cls, patches[:, middle:]), dim=1) + self.pos_embed)

    # ------------------------------------------------------------------ token merging

    def set_token_merging(self, merging: Merging | None) -> None:
        """Merge from the next forward on, or None: not at all; see ``SupportsTokenMerging``.

        ``merging.r[i]`` tokens go at the start of block i, once what block i - 1 computed is added.
        """
        merging = merging or Merging(r=(0,) * self.depth, metric="x")
        self.cls_index = _walk(merging, self.depth, self.num_tokens)
        self._merging = merging
        self.token_source: Tensor | None = None

    # ------------------------------------------------------------------ timm's conventions

    def no_weight_decay(self) -> set[str]:
        """The embeddings and the dynamics of the scans, by name: parameters that weight decay spares."""
        dynamics = ("A_log", "A_b_log", "D", "D_b")
        return {"cls_token", "pos_embed"} | {f"layers.{i}.mixer.{name}" for i in range(self.depth) for name in dynamics}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for learning rates that fall layer by layer."""
        blocks = [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what enters a block and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier of ``num_classes`` outputs in, 0 for none.

        Raises:
            ValueError: for a pooling other than the class token.
        """
        if global_pool not in (None, "token"):
            raise ValueError(f"vim: global_pool: expected 'token', the class token, got {global_pool!r}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes).to(self.pos_embed) if num_classes else nn.Identity()
        _init_head(self.head)


def vim(
    *,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    stride: int | None = None,
    depth: int = 24,
    embed_dim: int = 192,
    d_state: int = 16,
    in_chans: int = 3,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    init_dt_b: bool = False,
    scan_backend: str = "auto",
) -> VisionMamba:
    """A ``VisionMamba`` of these sizes, with weights from a file or the hub where ``checkpoint`` is given.

    Args:
        checkpoint: a file (of Vim's trainer, of Lightning, a plain state_dict, or .safetensors), ``hf-hub:<id>`` of one
            of the authors' models, or ``hf-hub:<id>/<file>``. It must fit, but for a classifier of other classes, which
            stays fresh, and positions of another grid, which are resampled.

    Raises:
        ValueError: for sizes that make no Vim, or a checkpoint that cannot be read or does not fit.

    Example:
        >>> vim(img_size=16, patch_size=4, depth=2, embed_dim=32, num_classes=10).num_tokens
        17
    """
    model = VisionMamba(
        img_size,
        patch_size,
        stride=stride,
        depth=depth,
        embed_dim=embed_dim,
        d_state=d_state,
        in_chans=in_chans,
        num_classes=num_classes,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        init_dt_b=init_dt_b,
        scan_backend=scan_backend,
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


# ------------------------------------------------------------------ blocks


class Block(nn.Module):
    """Norm and mixer of what has been summed up so far, (B, N, C) -> (B, N, C).

    ``drop_path`` is for the model, which adds the result of the block before: ``residual + drop_path(hidden)``.
    """

    def __init__(self, dim: int, d_state: int, *, drop_path: float, init_dt_b: bool, scan_backend: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = BidirectionalMamba(dim, d_state, init_dt_b=init_dt_b, scan_backend=scan_backend)
        self.drop_path = DropPath(drop_path)

    def forward(self, residual: Tensor, metric: str | None = None) -> tuple[Tensor, Tensor | None]:
        """The mixer's output, and where one of METRICS is asked for, that of each token, (B, N, D)."""
        return self.mixer(self.norm(residual.to(self.norm.weight.dtype)), metric)


class BidirectionalMamba(nn.Module):
    """Vim's mixer: one projection, a scan in each direction, their mean projected back, (B, N, C) -> (B, N, C).

    The names of the backward direction end in ``_b``; it runs over the same tokens from last to first, nothing is
    flipped.
    """

    def __init__(self, dim: int, d_state: int = 16, *, init_dt_b: bool = False, scan_backend: str = "auto") -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.splits = (rank, d_state, d_state)
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner)
        self.conv1d_b = nn.Conv1d(inner, inner, 4, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.x_proj_b = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.dt_proj_b = nn.Linear(rank, inner)
        log_states = torch.arange(1.0, d_state + 1).log().expand(inner, -1)
        self.A_log = nn.Parameter(log_states.clone())
        self.A_b_log = nn.Parameter(log_states.clone())
        self.D = nn.Parameter(torch.ones(inner))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        _init_dt(self.dt_proj.bias)
        nn.init.zeros_(self.dt_proj_b.bias)
        if init_dt_b:
            _init_dt(self.dt_proj_b.bias)

    def forward(self, x: Tensor, metric: str | None = None) -> tuple[Tensor, Tensor | None]:
        """The mixed tokens, and where one of METRICS is asked for, that of each token, (B, N, D)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        z = z.contiguous()
        forward = (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        y, steered_by = self._scan(x, z, *forward, reverse=False)
        y_b, steered_by_b = self._scan(x, z, *backward, reverse=True)
        out = self.out_proj((y + y_b) / 2)
        if metric is None:
            return out, None
        if metric == "x":
            return out, out.detach()
        return out, (steered_by[metric] + steered_by_b[metric]).detach() / 2

    def _scan(
        self,
        x: Tensor,
        z: Tensor,
        conv1d: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: Tensor,
        D: Tensor,
        *,
        reverse: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One direction, gated by z, (B, N, E); and what steered it, (B, N, S) and (B, N, E)."""
        u = F.silu(_depthwise_conv(x, conv1d, reverse=reverse))
        dt, B, C = x_proj(u).split(self.splits, dim=-1)
        with no_autocast(u.device.type):  # bfloat16 steps would change the decay exp(dt A) by up to 0.3 %
            delta = F.linear(_wide(dt), _wide(dt_proj.weight))
            y = cast(
                Tensor,
                selective_scan(
                    u,
                    delta,
                    -_wide(A_log).exp(),
                    B,
                    C,
                    D,
                    z,
                    delta_bias=dt_proj.bias,
                    delta_softplus=True,
                    reverse=reverse,
                    backend=self.scan_backend,
                ),
            )
        return y, {"b": B, "c": C, "delta": delta}


def _depthwise_conv(x: Tensor, conv1d: nn.Conv1d, *, reverse: bool) -> Tensor:
    """Each feature's convolution over the tokens before it, ``reverse``: behind it, (B, N, E) -> (B, N, E).

    As a 2-d convolution over a channels-last view: on a CPU the forward is 3 to 4 times faster than conv1d's on a
    transposed sequence, and what comes out is contiguous.
    """
    weight = conv1d.weight.flip(-1) if reverse else conv1d.weight
    width = weight.shape[-1] - 1
    x = F.pad(x, (0, 0, 0, width) if reverse else (0, 0, width, 0))
    image = x.transpose(1, 2).unsqueeze(2)  # (B, E, 1, N + 3)
    return F.conv2d(image, weight.unsqueeze(2), conv1d.bias, groups=conv1d.groups).squeeze(2).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------ merging


def _plan(metric: Tensor, merging: Merging, block: int, cls_index: Tensor | int | None) -> MergePlan:
    return ordered_bipartite_matching(
        metric,
        merging.r[block],
        cls_index=cls_index,
        distance=merging.distance,
        preserve_order=merging.preserve_order,
        cls_rule=merging.cls_rule,
    )


def _walk(merging: Merging, depth: int, tokens: int) -> int | None:
    """Check ``merging`` block by block before anything runs, and say where the class token ends up."""
    if len(merging.r) != depth:
        raise ValueError(f"vim: r: expected one entry for each of {depth} blocks, got {len(merging.r)}")
    if merging.metric not in METRICS:
        raise ValueError(f"vim: metric: expected one of {', '.join(METRICS)}, got {merging.metric!r}")
    if merging.prop_attn:
        raise ValueError("vim: prop_attn: expected False, a Vim has no attention, got True")
    if merging.r[0]:
        raise ValueError(f"vim: r: expected 0 at block 0, where there is no residual yet, got {merging.r[0]}")
    cls_index: Tensor | int | None = (tokens - 1) // 2
    for block, left in enumerate(token_counts(tokens, merging.r, protected=1)):
        if merging.r[block]:
            cls_index = _plan(torch.zeros(1, tokens, 1), merging, block, cls_index).new_cls_index
        tokens = left
    return cls_index if isinstance(cls_index, int) else None


# ------------------------------------------------------------------ parts and their first weights


def _patch_embed(img_size: int | tuple[int, int], patch_size: int, stride: int, chans: int, dim: int) -> PatchEmbed:
    """Patch embedding of timm, which refuses images of another size, with patches that may overlap."""
    embed = PatchEmbed(img_size, patch_size, chans, dim, strict_img_size=True)
    embed.proj.stride = (stride, stride)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    embed.grid_size = tuple(max(0, (side - patch_size) // stride + 1) for side in (height, width))
    embed.num_patches = math.prod(embed.grid_size)
    lecun_normal_(embed.proj.weight)
    nn.init.zeros_(cast(Tensor, embed.proj.bias))
    return embed


def _init_head(head: nn.Module) -> None:
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def _init_dt(bias: Tensor) -> None:
    """Biases whose softplus is log-uniform in [0.001, 0.1]."""
    dt = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    with torch.no_grad():
        bias.copy_(dt + (-torch.expm1(-dt)).log())


# ------------------------------------------------------------------ timm's registry


def _cfg(hub_id: str) -> dict[str, Any]:
    return {
        "hf_hub_id": hub_id,
        "hf_hub_filename": HUB_FILES[hub_id],
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_ids": "arXiv:2401.09417",
    }


default_cfgs = generate_default_cfgs(  # register_model looks for this name
    {
        "vim_tiny_patch16_224": _cfg("hustvl/Vim-tiny-midclstok"),
        "vim_small_patch16_224": _cfg("hustvl/Vim-small-midclstok"),
        "vim_base_patch16_224": _cfg("hustvl/Vim-base-midclstok"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VisionMamba:
    if kwargs.get("features_only"):
        raise ValueError(f"{variant}: features_only: not supported, a Vim has no feature maps; call forward_features")
    model = build_model_with_cfg(VisionMamba, variant, pretrained=False, **kwargs)
    if pretrained:  # timm's own loader would take any averaged weights it finds, and skip keys for other classes
        cfg = cast(dict[str, Any], model.pretrained_cfg)
        load_checkpoint(model, cfg.get("file") or f"hf-hub:{cfg['hf_hub_id']}/{cfg['hf_hub_filename']}")
    return model


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti, 7.1 M parameters; the authors report 76.1 % top-1 on ImageNet-1k."""
    return _create("vim_tiny_patch16_224", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S, 25.8 M parameters; the authors report 80.5 % top-1 on ImageNet-1k."""
    return _create("vim_small_patch16_224", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B, 97.6 M parameters; the authors report 81.9 % top-1 on ImageNet-1k, by averaged weights."""
    return _create("vim_base_patch16_224", pretrained, **{"embed_dim": 768, **kwargs})
