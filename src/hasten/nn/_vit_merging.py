"""ToMe inside timm's ViTs: what ``forward`` does on the modules of one model while it merges.

While merging is on, ``forward`` of the model, of its block list, of each block and of each attention is an attribute of
the instance; off, it is gone again. Weights, classes, module tree and state_dict are never touched. What is put
there is bound to this adapter, and ``copy.deepcopy`` and pickle map it as they map any attribute: a copy of the model
merges by itself and calls its own blocks. A closure would go on calling the blocks of the original.

Everything below a ``forward`` is called as a module, so that hooks fire, those of FSDP2 among them; on a block or an
attention they then see a tuple, tokens first. Sizes and sources travel from block to block as values: nothing is left
behind between two calls but ``token_source``.

Source: ToMe, arXiv:2210.09461.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from hasten.functional import bipartite_soft_matching, merge_source, merge_weighted, token_counts

if TYPE_CHECKING:
    from hasten.nn.token_merging import Merging

METRICS = ("k", "x")
"""What the similarity of tokens can be measured on: the keys averaged over the heads, or the tokens themselves."""

_GRID_LOST = "the tokens no longer form a grid; suspend merging for dense features, or see unmerge_tokens"


class ViTMerging:
    """A timm VisionTransformer that merges tokens, as ``SupportsTokenMerging``.

    Attributes:
        depth, num_tokens, num_prefix_tokens: as in ``SupportsTokenMerging``, at the image size of the model.
        token_source: as there, of the last batch in eval mode.

    Args:
        vit: a model that ``refusal`` has nothing against.
    """

    _merging: "Merging"  # there while merging is on

    def __init__(self, vit: VisionTransformer) -> None:
        self.vit = vit
        self.depth = len(vit.blocks)
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self.prefix_indices = tuple(range(self.num_prefix_tokens))
        self.num_tokens: int = vit.patch_embed.num_patches + self.num_prefix_tokens
        self.token_source: Tensor | None = None
        # made once: with new ones each time merging comes on, torch.compile would trace each time
        self._replacements = tuple(self._make_replacements())

    @staticmethod
    def carried_by(module: nn.Module) -> "ViTMerging | None":
        """The adapter of a model that merges; a copy of such a model carries one that no handle knows."""
        adapter = _bound_to(vars(module).get("forward"))
        return adapter if isinstance(adapter, ViTMerging) and adapter.vit is module else None

    @classmethod
    def of(cls, vit: VisionTransformer) -> "ViTMerging":
        """The adapter that a model carries, else a new one."""
        return cls.carried_by(vit) or cls(vit)

    @staticmethod
    def refusal(vit: VisionTransformer) -> str | None:
        """Why this model cannot merge, None where it can: what replaces code must know that code."""
        cls = _own_class(vit)
        for name in ("forward", "forward_features", "forward_intermediates", "pool"):
            if getattr(cls, name) is not getattr(VisionTransformer, name):
                return f"its own {name} is unknown here"
        weighted = vit.attn_pool is not None or vit.global_pool in ("avg", "avgmax")
        if weighted and cls.forward_head is not VisionTransformer.forward_head:
            return "its own forward_head pools without sizes"
        if vit.attn_pool is not None and _own_class(vit.attn_pool) is not AttentionPoolLatent:
            return f"its {_own_class(vit.attn_pool).__name__} pools without sizes"
        for block in map(_unwrapped, vit.blocks):
            if _own_class(block) is not Block:
                return f"only Block is supported, its blocks are {_own_class(block).__name__}"
            attention = _own_class(_unwrapped(block.attn))
            if attention is not Attention:
                return f"only Attention is supported, its blocks have {attention.__name__}"
        adapter = ViTMerging.of(vit)
        for module, name, _ in adapter._replacements:
            if name in vars(module) and _bound_to(vars(module)[name]) is not adapter:
                return f"something has replaced {name} of a {_own_class(module).__name__}; undo that, or attach before"
        return None

    def set_token_merging(self, merging: "Merging | None") -> None:
        """Merge from the next forward on, or None: be timm's model again.

        Raises:
            ValueError: for a metric that a ViT does not have, and an r that leaves too few tokens; names the block.
        """
        if merging is not None:
            self._check(merging)
        self.token_source = None
        for module, name, replacement in self._replacements:
            if merging is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = replacement
        if merging is not None:
            self._merging = merging

    def _make_replacements(self) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        yield self.vit, "forward", self._forward
        yield self.vit, "forward_features", self._forward_features
        yield self.vit, "forward_intermediates", self._forward_intermediates
        yield self.vit, "pool", self._pool
        yield self.vit.blocks, "forward", self._blocks
        for index, block in enumerate(map(_unwrapped, self.vit.blocks)):
            attention = _unwrapped(block.attn)
            yield block, "forward", partial(self._block, block, index)
            yield attention, "forward", partial(self._attention, attention)

    def _check(self, merging: "Merging") -> None:
        if merging.metric not in METRICS:
            raise ValueError(
                f"token_merging: metric: expected one of {', '.join(METRICS)} for a ViT, got {merging.metric!r}"
            )
        if len(merging.r) != self.depth:
            raise ValueError(
                f"token_merging: r: expected one int per block, {self.depth}, got {len(merging.r)}; pad with 0"
            )
        token_counts(self.num_tokens, merging.r, protected=self.num_prefix_tokens)

    # ------------------------------------------------------------------ the model

    def _forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        _refuse_masks(attn_mask, is_causal)
        x, size = self._tokens(x)
        vit = self.vit
        if size is None or not self._pools_by_size(vit.global_pool):
            return vit.forward_head(x)
        return vit.head(vit.head_drop(vit.fc_norm(self._weighted_pool(x, size))))

    def _forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, N', D), normalized."""
        _refuse_masks(attn_mask, is_causal)
        return self._tokens(x)[0]

    def _forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"token_merging: forward_intermediates: unavailable while merging is on, {_GRID_LOST}")

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> tokens (B, N', D) and their sizes (B, N', 1), None where all are 1."""
        vit = self.vit
        x = vit.patch_embed(x)
        x = vit._pos_embed(x)
        x = vit.patch_drop(x)
        x = vit.norm_pre(x)
        x, size, source = vit.blocks(x)
        if self._merging.trace_source and not vit.training:
            self.token_source = source
        return vit.norm(x), size

    def _blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size = source = None
        for block in self.vit.blocks:
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                x, size, source = checkpoint(block, x, size, source, use_reentrant=False)
            else:
                x, size, source = block(x, size, source)
        return x, size, source

    # ------------------------------------------------------------------ a block

    def _block(
        self, block: Block, index: int, x: Tensor, size: Tensor | None = None, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A Block of timm with a merge between attention and MLP, (B, N, D) -> (B, N - r, D)."""
        merging = self._merging
        y, keys = block.attn(block.norm1(x), size if merging.prop_attn else None)
        x = x + block.drop_path1(block.ls1(y))
        if merging.r[index]:
            plan = bipartite_soft_matching(
                keys.mean(1) if merging.metric == "k" else x,
                merging.r[index],
                num_prefix_tokens=self.num_prefix_tokens,
                distance=merging.distance,
                preserve_order=merging.preserve_order,
            )
            x, size = merge_weighted(x, size, plan, drop=merging.prune)
            if merging.trace_source and not block.training:
                source = merge_source(source, plan, drop=merging.prune)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, size, source

    def _attention(self, attn: Attention, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """An Attention of timm with log size on the logits, (B, N, D) -> (B, N, D), and the keys (B, H, N, D / H)."""
        B, N, _ = x.shape
        gate = getattr(attn, "gate", None)  # older than timm 1.0.31 may have none
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        mask = None if size is None else _log_size_mask(size, q.dtype)
        if attn.fused_attn:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=attn.attn_drop.p if attn.training else 0.0
            )
        else:
            logits = (q * attn.scale) @ k.transpose(-2, -1)
            y = attn.attn_drop((logits if mask is None else logits + mask).softmax(-1)) @ v
        y = attn.norm(y.transpose(1, 2).flatten(2))
        if gate is not None:
            y = y * gate(x).sigmoid()
        return attn.proj_drop(attn.proj(y)), k.detach()

    # ------------------------------------------------------------------ pooling

    def _pools_by_size(self, pool_type: str) -> bool:
        sized = any(self._merging.r) and not self._merging.prune
        return sized and (self.vit.attn_pool is not None or pool_type in ("avg", "avgmax"))

    def _pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """The pool of timm, where it needs no sizes; ``forward_head`` comes by here."""
        if self._pools_by_size(self.vit.global_pool if pool_type is None else pool_type):
            raise ValueError(
                "token_merging: forward_head: expected the sizes of the merged tokens, got tokens alone; call the model"
            )
        return type(self.vit).pool(self.vit, x, pool_type)

    def _weighted_pool(self, x: Tensor, size: Tensor) -> Tensor:
        """(B, N, D) -> (B, D): a token that stands for many patches counts as many."""
        vit = self.vit
        if not vit.pool_include_prefix:
            x, size = x[:, vit.num_prefix_tokens :], size[:, vit.num_prefix_tokens :]
        if vit.attn_pool is not None:
            return vit.attn_pool(x, attn_mask=_log_size_mask(size, x.dtype))
        mean = ((x * size).sum(1) / size.sum(1)).to(x.dtype)
        return mean if vit.global_pool == "avg" else 0.5 * (x.amax(1) + mean)


def _log_size_mask(size: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, 1) -> (B, 1, 1, N): a key of size s draws as much attention as s equal keys."""
    return size.float().log().transpose(1, 2)[:, None].to(dtype)


def _bound_to(replacement: Any) -> Any:
    """The adapter behind what stands for a ``forward``: a method of it, or a partial of one."""
    return getattr(getattr(replacement, "func", replacement), "__self__", None)


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        name = "is_causal" if attn_mask is None else "attn_mask"
        raise ValueError(f"token_merging: {name}: expected none while merging is on, got one; {_GRID_LOST}")


def _own_class(module: nn.Module) -> type:
    """The class a module was written as: ``fully_shard`` puts one of its own in front."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _unwrapped(module: Any) -> Any:
    """What ``torch.compile`` and PyTorch's activation checkpointing wrapped."""
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module"):
        if wrapper in module._modules:
            return _unwrapped(module.get_submodule(wrapper))
    return module
