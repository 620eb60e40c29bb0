"""Merging tokens inside a backbone: what is merged and where, on which part of a model, and how it is undone.

A VisionMamba merges by itself (R-MeeTo), timm's ViTs are taught to (ToMe, ``_vit_merging.py``); both answer to
``SupportsTokenMerging``. From words to a run: ``MergeOptions`` -> ``find_backbone`` -> ``Merging`` -> ``MergeHandle``.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hasten.functional import MERGE_DISTANCES, merge_schedule, token_counts
from hasten.functional.tokens import is_inflected
from hasten.nn.modes import evaluating
from hasten.nn.protocols import SupportsTokenMerging

METHODS = {"rmeeto": "a Vision Mamba", "tome": "a ViT"}
"""Method -> the backbone it is for."""

_VIT = "timm.models.vision_transformer.VisionTransformer"
_HUGGING_FACE = "transformers.modeling_utils.PreTrainedModel"
_REFUSED = {
    _HUGGING_FACE: "later, so far only ViTs of timm",
    "timm.models.eva.": "later, its rotary positions would have to follow the tokens of each sample",
    "timm.models.beit.": "its relative position bias belongs to a fixed grid",
    "timm.models.swin_transformer": "its windows need the whole grid",
    "timm.models.maxxvit.": "its windows need the whole grid",
    "timm.models.pvt_v2.": "its stages need the whole grid",
    "timm.models.naflexvit.": "it pads and masks its tokens",
    "timm.models.": "no one sequence of tokens runs through all its blocks",
}
_attached: WeakSet[nn.Module] = WeakSet()  # the backbones that have a handle


@dataclass(frozen=True)
class Merging:
    """How a backbone merges tokens, fixed before it runs: every shape is a Python int.

    Args:
        r: tokens that each block removes, one int per block, 0 for none.
        metric: what similarity is measured on: "k" or "x" in a ViT; "x", "b", "c" or "delta" in a Vim.
        distance: "cosine", "l1" or "l2" of the normalised vectors.
        preserve_order: keep the tokens in the order of the image, as a scan needs it.
        prune: drop the sources instead of merging them.
        cls_rule: where the class token of a Vim goes: "proportional" or "exact".
        prop_attn: add log size to the attention logits of a ViT.
        trace_source: keep which tokens went where, for pictures.

    Example:
        >>> Merging(r=(0, 8, 0, 8), metric="x").removed
        16
    """

    r: tuple[int, ...]
    metric: str
    distance: str = "cosine"
    preserve_order: bool = True
    prune: bool = False
    cls_rule: str = "proportional"
    prop_attn: bool = False
    trace_source: bool = False

    @property
    def removed(self) -> int:
        """Tokens that are gone after the last block."""
        return sum(self.r)


@dataclass(frozen=True)
class MergeOptions:
    """How to merge tokens, in words that fit any backbone.

    Args:
        r: tokens to remove at each merge; a float in [0, 0.5) removes that fraction of the tokens there that may merge;
            a pair (r, inflect) goes linearly from r (1 - inflect) to r (1 + inflect); a list has one int per block.
        method: "rmeeto" for a Vim, "tome" for a ViT, "auto" for what fits, "none" for a control that merges nothing.
        layers: the blocks that merge, from 0.
        interval: merge at every so many blocks; by default every second of a Vim, from block 2 on, every one of a ViT.
        metric: what similarity is measured on: "x", the tokens; "k", the keys of a ViT; "b", "c" or "delta" of a Vim;
            "auto" is x for a Vim and k for a ViT.
        distance: "cosine", "l1" or "l2" of the normalised vectors.
        preserve_order: keep the tokens in the order of the image; "auto" does for a Vim.
        prop_attn: add log size to the attention logits of a ViT; "auto" does where its weights are not re-trained.
        reduce: "merge", or "prune" to drop what would have been merged.
        cls_rule: where the class token of a Vim goes: to its share of the new length ("proportional") or between its
            neighbours ("exact").
        trace_source: keep which tokens went where in the last batch in eval mode, for pictures.

    Raises:
        ValueError: for values outside these.
        TypeError: for an r of another type.

    Example:
        >>> from hasten.nn import VisionMamba
        >>> vim = VisionMamba(16, patch_size=4, depth=6, embed_dim=32, num_classes=10)
        >>> MergeOptions(0.25).resolve(vim).r
        (0, 0, 4, 0, 3, 0)
    """

    r: float | Sequence[float] = 8
    method: str = "auto"
    layers: Sequence[int] | None = None
    interval: int | None = None
    metric: str = "auto"
    distance: str = "cosine"
    preserve_order: bool | str = "auto"
    prop_attn: bool | str = "auto"
    reduce: str = "merge"
    cls_rule: str = "proportional"
    trace_source: bool = False

    def __post_init__(self) -> None:
        _check_word("method", self.method, ("auto", *METHODS, "none"))
        _check_word("metric", self.metric, ("auto", "x", "k", "b", "c", "delta"))
        _check_word("distance", self.distance, MERGE_DISTANCES)
        _check_word("preserve_order", self.preserve_order, ("auto", True, False))
        _check_word("prop_attn", self.prop_attn, ("auto", True, False))
        _check_word("reduce", self.reduce, ("merge", "prune"))
        _check_word("cls_rule", self.cls_rule, ("proportional", "exact"))
        if self.layers is not None and self.interval is not None:
            raise ValueError("token_merging: layers: expected either layers or interval, got both; drop one")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"token_merging: interval: expected 1 or more, got {self.interval}")
        # what can be wrong without a backbone is wrong with any
        merge_schedule(len(self.r) if isinstance(self.r, Sequence) else 1, self.r, tokens=2)

    def resolve(self, backbone: SupportsTokenMerging, *, retrained: bool = False) -> Merging:
        """What these words mean in a backbone.

        Args:
            backbone: a VisionMamba, or a handle's ``backbone``.
            retrained: the weights are trained while merging is on.

        Raises:
            ValueError: where they do not fit; what only the backbone knows, it says in ``set_token_merging``.
        """
        method = _method_of(backbone)
        if self.method not in ("auto", "none", method):
            raise ValueError(
                f"token_merging: method: expected auto, none or {method} for {METHODS[method]}, got {self.method!r}"
            )
        tome = method == "tome"
        if tome and self.cls_rule != "proportional":
            raise ValueError(
                f"token_merging: cls_rule: expected none for a ViT, whose class token stays in front, "
                f"got {self.cls_rule!r}; leave it out"
            )
        if self.metric in (("b", "c", "delta") if tome else ("k",)):
            raise ValueError(
                f"token_merging: metric: expected {'k or x' if tome else 'x, b, c or delta'} for {METHODS[method]}, "
                f"got {self.metric!r}"
            )
        if self.prop_attn is True and not tome:
            raise ValueError(
                "token_merging: prop_attn: expected auto or False for a Vim, which has no attention, got True"
            )
        prune = self.reduce == "prune"
        auto_prop_attn = tome and not prune and not retrained
        return Merging(
            r=self._schedule(backbone, method),
            metric=("k" if tome else "x") if self.metric == "auto" else self.metric,
            distance=self.distance,
            preserve_order=not tome if self.preserve_order == "auto" else bool(self.preserve_order),
            prune=prune,
            cls_rule=self.cls_rule,
            prop_attn=auto_prop_attn if self.prop_attn == "auto" else bool(self.prop_attn),
            trace_source=self.trace_source,
        )

    def _schedule(self, backbone: SupportsTokenMerging, method: str) -> tuple[int, ...]:
        if self.method == "none":
            return (0,) * backbone.depth
        where: dict[str, Any] = {}
        if self.layers is not None:
            where["layers"] = self.layers
        elif method == "rmeeto" and (self.interval or not self._says_where()):
            where["interval"] = where["offset"] = self.interval or 2  # block 0 has no residual to merge yet
        elif self.interval is not None:
            where["interval"] = self.interval
        return merge_schedule(
            backbone.depth, self.r, tokens=backbone.num_tokens, protected=backbone.num_prefix_tokens, **where
        )

    def _says_where(self) -> bool:
        """A list with one int per block says itself which of them merge; a pair (r, inflect) does not."""
        return isinstance(self.r, Sequence) and not is_inflected(self.r)


class BlockTokens(NamedTuple):
    """One row of :meth:`MergeHandle.table`."""

    block: int
    before: int
    after: int


class MergeHandle:
    """Token merging that is attached to a model, until ``remove`` or the end of a ``with``.

    The example batches its methods take are what the backbone takes, not the model around it.

    Attributes:
        path: where in the model the backbone is.
        module: the backbone.
        backbone: what answers to ``SupportsTokenMerging`` for it.
        merging: what was attached.
        active: what merges now, None for nothing.

    Args:
        model: the backbone, or what holds it.
        options: how to merge.
        target: where in the model to look for the backbone; None: everywhere.
        retrained: the weights are trained while merging is on.

    Raises:
        ValueError: where no backbone is found or it is attached to already, and where the options do not fit it.

    Example:
        >>> from hasten.nn import VisionMamba
        >>> vim = VisionMamba(16, patch_size=4, depth=4, embed_dim=32, num_classes=10)
        >>> with MergeHandle(vim, MergeOptions(r=5)) as handle:
        ...     handle.table()[2], vim.forward_features(torch.zeros(1, 3, 16, 16)).shape
        (BlockTokens(block=2, before=17, after=12), torch.Size([1, 12, 32]))
    """

    def __init__(
        self, model: nn.Module, options: MergeOptions, *, target: str | None = None, retrained: bool = False
    ) -> None:
        self.path, self.module = find_backbone(model, target)
        if self.module in _attached:
            raise ValueError(
                f"token_merging: {type(self.module).__name__}: expected a backbone without a handle, got one that has "
                "one; call remove() on that first"
            )
        self.backbone = _adapted(self.module)
        self.merging = options.resolve(self.backbone, retrained=retrained)
        self.backbone.set_token_merging(self.merging)
        self.active: Merging | None = self.merging
        self._attached = True
        _attached.add(self.module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the backbone as it was; once is enough."""
        if self._attached:
            self.set(None)
            self._attached = False
            _attached.discard(self.module)

    def set(self, merging: Merging | None) -> None:
        """Merge like this from now on, None: not at all.

        Raises:
            ValueError: where it does not fit the backbone, and after ``remove``.
        """
        if not self._attached:
            raise ValueError(
                "token_merging: handle: expected one that is attached, got one that was removed; attach again"
            )
        self.backbone.set_token_merging(merging)
        self.active = merging

    @contextmanager
    def using(self, merging: Merging | None) -> Iterator[None]:
        """Merge like this inside a ``with``, None: not at all."""
        before = self.active
        self.set(merging)
        try:
            yield
        finally:
            self.set(before)

    def suspended(self) -> AbstractContextManager[None]:
        """Merge nothing inside a ``with``."""
        return self.using(None)

    def table(self) -> tuple[BlockTokens, ...]:
        """Tokens before and after the merge of each block, at the image size of the backbone."""
        tokens = self.backbone.num_tokens
        after = token_counts(tokens, self.merging.r, protected=self.backbone.num_prefix_tokens)
        return tuple(BlockTokens(i, *pair) for i, pair in enumerate(zip((tokens, *after[:-1]), after, strict=True)))

    def flops(self, example: Tensor) -> tuple[int, int]:
        """Floating point operations of a forward, two for a multiplication with addition, without and with merging."""
        return self._flops(example, None), self._flops(example, self._untraced)

    def _flops(self, example: Tensor, merging: Merging | None) -> int:
        # as plain matmuls attention counts the same on every device
        with (
            self._evaluating(merging),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            self.module(example)
        return counter.get_total_flops()

    def throughput(self, example: Tensor, *, repeats: int = 5) -> tuple[float, float]:
        """Images per second of a forward, without and with merging; measured in turns, the median of ``repeats``."""
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for merging, runs in zip((None, self._untraced), seconds, strict=True):
                with self._evaluating(merging):
                    _synchronize(example)
                    start = time.perf_counter()
                    self.module(example)
                    _synchronize(example)
                    runs.append(time.perf_counter() - start)
        plain, merged = (len(example) / statistics.median(runs[1:]) for runs in seconds)  # the first warms up
        return plain, merged

    def export(self, example: Tensor) -> torch.export.ExportedProgram:
        """The merging backbone in eval mode as one graph, with r and the shape of the example baked in."""
        with self._evaluating(self._untraced):
            return torch.export.export(self.module, (example,))

    @property
    def _untraced(self) -> Merging:
        """What was attached, without what is for pictures only."""
        return replace(self.merging, trace_source=False)

    @contextmanager
    def _evaluating(self, merging: Merging | None) -> Iterator[None]:
        with self.using(merging), torch.no_grad(), evaluating(self.module):
            yield


def attach_token_merging(
    model: nn.Module,
    r: float | Sequence[float] = 8,
    *,
    target: str | None = None,
    retrained: bool = False,
    **options: Any,
) -> MergeHandle:
    """Merge tokens in a model that holds a ViT of timm or a VisionMamba, no Lightning needed.

    Args:
        model: the backbone, or what holds it.
        r: as in :class:`MergeOptions`.
        target: where in the model to look for the backbone; None: everywhere.
        retrained: the weights are trained while merging is on.
        **options: the other fields of :class:`MergeOptions`.

    Raises:
        ValueError: as :class:`MergeOptions` and :class:`MergeHandle`.
        TypeError: for an r of another type.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10)
        >>> with attach_token_merging(vit, r=4) as handle:
        ...     [row.after for row in handle.table()], vit(torch.zeros(1, 3, 64, 64)).shape
        ([13, 9, 5], torch.Size([1, 10]))
    """
    return MergeHandle(model, MergeOptions(r, **options), target=target, retrained=retrained)


def unmerged_copy(model: nn.Module) -> Any:
    """A deep copy that merges nothing, whatever the model does: its own teacher.

    ``copy.deepcopy`` gives one that merges as the model does at that moment.

    Example:
        >>> from hasten.nn import VisionMamba
        >>> vim = VisionMamba(16, patch_size=4, depth=4, embed_dim=32, num_classes=10)
        >>> with attach_token_merging(vim, r=5):
        ...     unmerged_copy(vim).forward_features(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 17, 32])
    """
    from hasten.nn._vit_merging import ViTMerging  # noqa: PLC0415 - timm's side, needed by a ViT alone

    copied = copy.deepcopy(model)
    for module in copied.modules():
        backbone = module if _merges_natively(module) else ViTMerging.carried_by(module)
        if backbone is not None:
            cast(SupportsTokenMerging, backbone).set_token_merging(None)
    return copied


# ------------------------------------------------------------------ the part of a model that merges


def find_backbone(model: nn.Module, target: str | None = None) -> tuple[str, nn.Module]:
    """The one part of a model that can merge tokens, and its path; what ``torch.compile`` wraps is looked into.

    Args:
        model: the backbone, or what holds it.
        target: where in the model to look, a dotted path; needed where it holds several backbones.

    Raises:
        ValueError: where there is none, with the reason against what comes near, and where there are several.

    Example:
        >>> from hasten.nn import VisionMamba
        >>> vim = VisionMamba(16, patch_size=4, depth=2, embed_dim=32, num_classes=10)
        >>> find_backbone(nn.Sequential(nn.Identity(), vim))[0]
        '1'
    """
    try:
        root = model.get_submodule(target or "")
    except AttributeError as error:
        raise ValueError(
            f"token_merging: target: expected the path of a module in {type(model).__name__}, got {target!r}: {error}"
        ) from error
    found = list(_backbones(root))
    supported = {path: module for path, module, refusal in found if not refusal}
    if not supported:
        got = "; ".join(f"{type(module).__name__}: {refusal}" for _, module, refusal in found) or "none"
        raise ValueError(
            f"token_merging: target: expected a timm VisionTransformer or a hasten VisionMamba in "
            f"{type(root).__name__}, got {got}"
        )
    if len(supported) > 1:
        raise ValueError(
            f"token_merging: target: expected one backbone in {type(root).__name__}, got {', '.join(supported)}; "
            "give target=<one of them>"
        )
    [(path, module)] = supported.items()
    return ".".join(filter(None, (target, path))), module


def _backbones(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and refusal, "" for none, of every outermost backbone."""
    inside = None
    for path, module in root.named_modules():
        if inside is not None and f"{path}.".startswith(inside):
            continue
        refusal = _verdict(module)
        if refusal is not None:
            inside = path and f"{path}."
            yield ".".join(name for name in path.split(".") if name != "_orig_mod"), module, refusal


def _verdict(module: nn.Module) -> str | None:
    """What speaks against merging in a module, "" for nothing, None where it is no backbone."""
    if "_orig_mod" in module._modules:  # torch.compile's wrapper answers for what it wraps, which comes next
        return None
    if _merges_natively(module):
        return ""
    classes = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
    if _VIT in classes:
        from hasten.nn._vit_merging import ViTMerging  # noqa: PLC0415 - timm's side, needed by a ViT alone

        return ViTMerging.refusal(cast(Any, module)) or ""
    if type(module).__name__ == "VisionMamba":
        return "later, as VideoMamba; load a checkpoint of Vim into hasten.nn.VisionMamba"
    if not hasattr(module, "forward_features") and _HUGGING_FACE not in classes:
        return None  # a part of somebody's own model
    return next((why for start, why in _REFUSED.items() for name in classes if name.startswith(start)), None)


def _adapted(module: nn.Module) -> SupportsTokenMerging:
    """What merges tokens in a backbone that nothing speaks against."""
    if _merges_natively(module):
        return cast(SupportsTokenMerging, module)
    from hasten.nn._vit_merging import ViTMerging  # noqa: PLC0415 - timm's side, needed by a ViT alone

    return ViTMerging.of(cast(Any, module))


def _merges_natively(module: nn.Module) -> bool:
    return callable(getattr(module, "set_token_merging", None))


def _method_of(backbone: SupportsTokenMerging) -> str:
    # what merges by itself is a Vim, the adapter of a ViT is no module
    return "rmeeto" if isinstance(backbone, nn.Module) else "tome"


def _check_word(name: str, value: object, accepted: Sequence[object]) -> None:
    if value not in accepted:
        raise ValueError(f"token_merging: {name}: expected one of {', '.join(map(str, accepted))}, got {value!r}")


def _synchronize(example: Tensor) -> None:
    if example.device.type != "cpu":
        torch.accelerator.synchronize(example.device)
