"""Which tokens of a sequence merge, (B, N, D) -> (B, N - r, D), and what becomes of them.

Even positions are sources, odd ones destinations; the r sources most similar to their best destination go into it, and
several may share one. r is a Python int and every shape follows from it, so one compiled or exported graph does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.functional.precision import no_autocast

MERGE_DISTANCES = ("cosine", "l1", "l2")
"""How far two tokens are apart: by their angle, or by the distance of the normalised vectors."""
MERGE_REDUCTIONS = ("sum", "mean", "amax", "amin", "drop")
"""What becomes of a destination and its sources; drop leaves the destination alone."""


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which of N tokens become which of N - r; indices only, without gradient, a pytree.

    Args:
        keep: the input position that each output token stands on, (B, N - r) int64.
        src: the input positions of the tokens that merge, most similar first, (B, r) int64.
        dst: the output position that each of them goes to, (B, r) int64.
        new_cls_index: where the class token of an ordered plan is now; (B,) int64 if ``cls_rule="exact"`` and r > 0.

    Example:
        >>> plan = bipartite_soft_matching(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]]), 1)
        >>> plan.keep.tolist(), plan.src.tolist(), plan.dst.tolist()
        ([[0, 1, 3]], [[2]], [[1]])
    """

    keep: Tensor
    src: Tensor
    dst: Tensor
    new_cls_index: int | Tensor | None = None

    @property
    def r(self) -> int:
        """Tokens that merge."""
        return self.src.shape[1]

    @property
    def tokens(self) -> int:
        """N, tokens before the merge."""
        return self.keep.shape[1] + self.src.shape[1]


torch.export.register_dataclass(MergePlan, serialized_type_name="hasten.MergePlan")


def bipartite_soft_matching(
    metric: Tensor, r: int, *, num_prefix_tokens: int = 0, distance: str = "cosine", preserve_order: bool = False
) -> MergePlan:
    """Match the r most similar pairs as ToMe does, (B, N, D) -> plan for N - r tokens.

    Prefix tokens take no part and come out first. Unless ``preserve_order``, the kept sources follow (in their order if
    there is a prefix, else by falling similarity), then the destinations.

    Args:
        metric: what similarity is measured on, in float32 whatever its dtype; a zero token has a cosine of 0 with all.
        r: tokens to merge, >= 0, at most half of those behind the prefix; more is clamped.
        num_prefix_tokens: class and register tokens at the start.
        distance: one of MERGE_DISTANCES.
        preserve_order: a merged token stays where its destination was, all others where they were.

    Raises:
        ValueError: for values outside these ranges.
        TypeError: for an r that is no int.

    Source: ToMe, arXiv:2210.09461; the order is R-MeeTo's.

    Example:
        >>> metric = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
        >>> bipartite_soft_matching(metric, 1, num_prefix_tokens=1).keep.tolist()
        [[0, 4, 1, 3]]
    """
    _check_matching("bipartite_soft_matching", metric, r, distance)
    batch, tokens, _ = metric.shape
    if not 0 <= num_prefix_tokens <= tokens:
        raise ValueError(
            f"bipartite_soft_matching: num_prefix_tokens: expected 0 to {tokens}, the tokens there are, "
            f"got {num_prefix_tokens}; count class and register tokens"
        )
    r = min(r, (tokens - num_prefix_tokens) // 2)
    positions = torch.arange(tokens, device=metric.device).expand(batch, -1)
    if r == 0:
        return _identity(positions)
    # odd and even are those of the whole sequence, so the prefix takes the first half (rounded up) of its own sources
    sources = positions[:, ::2][:, (num_prefix_tokens + 1) // 2 :]
    destinations = positions[:, 1::2][:, num_prefix_tokens // 2 :]
    src, homes, kept = _match(metric, sources, destinations, r, distance=distance)
    if num_prefix_tokens:
        kept = kept.sort().values
    keep = torch.cat([positions[:, :num_prefix_tokens], kept, destinations], dim=1)
    return _plan(keep.sort().values if preserve_order else keep, src, homes)


def ordered_bipartite_matching(
    metric: Tensor,
    r: int,
    *,
    cls_index: int | Tensor | None = None,
    distance: str = "cosine",
    rank: int = 0,
    preserve_order: bool = True,
    cls_rule: str = "proportional",
) -> MergePlan:
    """Match the r most similar pairs as R-MeeTo does, in the order of the scan, (B, N, D) -> plan for N - r tokens.

    The class token is set aside, the others are split into even and odd, and a merged token stays where its destination
    was. Without ``preserve_order`` the kept sources come first, by falling similarity, then the destinations.

    Args:
        metric: as in :func:`bipartite_soft_matching`.
        r: tokens to merge, >= 0, at most half of those beside the class token; more is clamped.
        cls_index: where the class token is, an int; (B,) int64 after an exact plan; None: there is none.
        distance: one of MERGE_DISTANCES.
        rank: merge into the best destination (0), the second best (1) and so on, for ablations.
        preserve_order: off is the unordered baseline.
        cls_rule: the class token goes to its share of the new length, the same int for all samples ("proportional"), or
            stays between its neighbours ("exact", ordered plans only).

    Raises:
        ValueError: for values outside these ranges.
        TypeError: for an r that is no int.

    Source: R-MeeTo, arXiv:2412.12496; the exact rule is ours.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> plan = ordered_bipartite_matching(metric, 1, cls_index=2)
        >>> plan.keep.tolist(), plan.src.tolist(), plan.dst.tolist(), plan.new_cls_index
        ([[0, 2, 1, 4]], [[3]], [[2]], 1)
    """
    _check_matching("ordered_bipartite_matching", metric, r, distance)
    batch, tokens, _ = metric.shape
    _check_cls(cls_index, cls_rule, preserve_order, batch, tokens)
    others = tokens - (cls_index is not None)
    if not 0 <= rank < max(others // 2, 1):
        raise ValueError(
            f"ordered_bipartite_matching: rank: expected 0 to {max(others // 2, 1) - 1}, "
            f"one of {others // 2} destinations, got {rank}; 0 is the most similar"
        )
    r = min(r, others // 2)
    positions = torch.arange(tokens, device=metric.device).expand(batch, -1)
    if r == 0:
        return _identity(positions, cls_index)
    # beyond the last position is where no class token is
    cls = _column(tokens if cls_index is None else cls_index, positions)
    rest = positions[:, :others] + (positions[:, :others] >= cls)
    sources, destinations = rest[:, ::2], rest[:, 1::2]
    src, homes, kept = _match(metric, sources, destinations, r, distance=distance, rank=rank)
    keep = torch.cat([kept, destinations], dim=1)
    if cls_index is None:
        return _plan(keep.sort().values if preserve_order else keep, src, homes)
    if cls_rule == "exact":
        keep = torch.cat([keep, cls], dim=1).sort().values
        return _plan(keep, src, homes, (keep < cls).sum(1))
    if preserve_order:
        keep = keep.sort().values
        new_cls_index = cls_index * (tokens - r) // tokens
    else:
        # inside the kept sources: behind them the scan would read destinations only
        new_cls_index = cls_index * (sources.shape[1] - r) // sources.shape[1]
    keep = torch.cat([keep[:, :new_cls_index], cls, keep[:, new_cls_index:]], dim=1)
    return _plan(keep, src, homes, new_cls_index)


def merge_tokens(x: Tensor, plan: MergePlan, *, reduce: str = "sum") -> Tensor:
    """Merge every source into its destination, (B, N, D) -> (B, N - r, D); r = 0 returns x itself.

    A NaN or inf in a source reaches every token of its sample by way of a sum or mean.

    Args:
        x: floating point; the result has its dtype.
        plan: of the same N.
        reduce: one of MERGE_REDUCTIONS, each over a destination and its sources; drop is the pruning baseline.

    Raises:
        ValueError: for another N, or another reduce.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [2.5], [8.0]]])
        >>> plan = MergePlan(keep=torch.tensor([[0, 1, 3]]), src=torch.tensor([[2]]), dst=torch.tensor([[1]]))
        >>> merge_tokens(x, plan).flatten().tolist(), merge_tokens(x, plan, reduce="drop").flatten().tolist()
        ([1.0, 4.5, 8.0], [1.0, 2.0, 8.0])
    """
    if reduce not in MERGE_REDUCTIONS:
        raise ValueError(f"merge_tokens: reduce: expected one of {', '.join(MERGE_REDUCTIONS)}, got {reduce!r}")
    _check_tokens("merge_tokens", "x", x, plan.tokens)
    if plan.r == 0:
        return x
    kept = _take(x, plan.keep)
    if reduce == "drop":
        return kept
    sources = _take(x, plan.src)
    if reduce in ("amax", "amin"):
        index = plan.dst[..., None].expand_as(sources)
        return kept.scatter_reduce(1, index, sources, reduce)
    arrivals = _arrivals(plan)
    total = _add(kept, arrivals, sources)
    return total if reduce == "sum" else total / (1 + arrivals.sum(-1, keepdim=True)).to(x.dtype)


def merge_weighted(x: Tensor, size: Tensor | None, plan: MergePlan, *, drop: bool = False) -> tuple[Tensor, Tensor]:
    """Merge every source into its destination as the mean over all they are made of, (B, N, D) -> (B, N - r, D).

    Args:
        x: floating point; the result has its dtype.
        size: how many of the first tokens each token is made of, (B, N, 1); None: one each.
        plan: of the same N.
        drop: prune instead: destinations and sizes stay as they are.

    Returns:
        The tokens and their sizes, (B, N - r, 1) float32 always: bfloat16 counts to 256 only.

    Raises:
        ValueError: for another N.

    Example:
        >>> x, size = torch.tensor([[[1.0], [2.0], [5.0]]]), torch.tensor([[[1.0], [1.0], [2.0]]])
        >>> plan = MergePlan(keep=torch.tensor([[0, 1]]), src=torch.tensor([[2]]), dst=torch.tensor([[1]]))
        >>> [t.flatten().tolist() for t in merge_weighted(x, size, plan)]
        [[1.0, 4.0], [1.0, 3.0]]
    """
    _check_tokens("merge_weighted", "x", x, plan.tokens)
    if size is None:
        size = torch.ones(*x.shape[:2], 1, device=x.device)
    if size.shape != (*x.shape[:2], 1):
        raise ValueError(
            f"merge_weighted: size: expected ({x.shape[0]}, {x.shape[1]}, 1) as x has it, got {tuple(size.shape)}"
        )
    size = size.float()
    if plan.r == 0:
        return x, size
    if drop:
        return _take(x, plan.keep), _take(size, plan.keep)
    arrivals = _arrivals(plan)
    # no matmul for the sizes: they are counts, and TF32 would round them
    total = _take(size, plan.keep) + (arrivals * _take(size, plan.src).mT).sum(-1, keepdim=True)
    weighted = x * size
    merged = _add(_take(weighted, plan.keep), arrivals, _take(weighted, plan.src)) / total
    return merged.to(x.dtype), total


def unmerge_tokens(x: Tensor, plan: MergePlan) -> Tensor:
    """Give every input token the value of the token it went into, (B, N - r, D) -> (B, N, D); r = 0 returns x itself.

    Example:
        >>> plan = MergePlan(keep=torch.tensor([[0, 1, 3]]), src=torch.tensor([[2]]), dst=torch.tensor([[1]]))
        >>> unmerge_tokens(torch.tensor([[[1.0], [4.5], [8.0]]]), plan).flatten().tolist()
        [1.0, 4.5, 4.5, 8.0]
    """
    _check_tokens("unmerge_tokens", "x", x, plan.tokens - plan.r)
    if plan.r == 0:
        return x
    return _take(x, _output_positions(plan.keep, plan.tokens).scatter(1, plan.src, plan.dst))


def merge_source(source: Tensor | None, plan: MergePlan, *, drop: bool = False) -> Tensor:
    """Follow which of the first N0 tokens each token is made of, (B, N, N0) 0/1 -> (B, N - r, N0) 0/1.

    Args:
        source: what earlier plans returned; None: nothing has merged yet, N0 = N.
        plan: of the same N.
        drop: the sources are pruned, and nothing is made of them.

    Example:
        >>> plan = MergePlan(keep=torch.tensor([[0, 1]]), src=torch.tensor([[2]]), dst=torch.tensor([[1]]))
        >>> merge_source(None, plan).tolist()
        [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]]
    """
    if source is None:
        source = torch.eye(plan.tokens, device=plan.keep.device).expand(plan.keep.shape[0], -1, -1)
    _check_tokens("merge_source", "source", source, plan.tokens)
    return merge_tokens(source, plan, reduce="drop" if drop else "sum")


def merge_schedule(
    depth: int,
    r: float | Sequence[float],
    *,
    interval: int = 1,
    offset: int = 0,
    layers: Iterable[int] | None = None,
    tokens: int | None = None,
    protected: int = 0,
) -> tuple[int, ...]:
    """How many tokens each block merges, known before anything runs: one int a block, 0 for none.

    Args:
        depth: blocks.
        r: an int for every block that merges; a float in [0, 0.5), the fraction of the tokens there that may merge; a
            pair (r, inflect), a tuple or a list whose second entry is a float: from r (1 - inflect) to r (1 + inflect)
            in equal steps, inflect in [-1, 1]; or a list with one int a block, padded with 0.
        interval: every how many blocks merge.
        offset: the first of them.
        layers: the blocks that merge, in place of interval and offset.
        tokens: N before the first block, for a fraction.
        protected: how many of them never merge, for a fraction.

    Raises:
        ValueError: for values outside these ranges.
        TypeError: for an r of another type.

    Source: ToMe, arXiv:2210.09461, for the pair and the list; R-MeeTo is ``interval=2, offset=2``.

    Example:
        >>> merge_schedule(6, 11, interval=2, offset=2), merge_schedule(4, (8, -1.0)), merge_schedule(4, [0, 8])
        ((0, 0, 11, 0, 11, 0), (16, 10, 5, 0), (0, 8, 0, 0))
        >>> merge_schedule(3, 0.25, tokens=65, protected=1)
        (16, 12, 9)
    """
    merging = _merging_blocks(depth, interval, offset, layers)
    if isinstance(r, float):
        return _fractions(depth, r, merging, tokens, protected)
    if _is_count(r):
        counts = dict.fromkeys(merging, r)
    elif is_inflected(r) and _is_count(r[0]):
        counts = dict(zip(merging, _inflected(*r, len(merging)), strict=True))
    elif _is_list(r):
        if len(r) > depth:
            raise ValueError(f"merge_schedule: r: expected at most {depth} entries, one a block, got {len(r)}")
        if (interval, offset, layers) != (1, 0, None):
            raise ValueError(
                "merge_schedule: r: expected an int, a fraction or a pair beside interval, offset and layers, got a "
                "list; a list has one entry a block, 0 where nothing merges"
            )
        counts = dict(enumerate(r))
    else:
        raise TypeError(
            f"merge_schedule: r: expected an int, a float below 0.5, a pair (r, inflect) or a list of ints, got {r!r}"
        )
    if any(n < 0 for n in counts.values()):
        raise ValueError(f"merge_schedule: r: expected 0 or more, got {r}; 0 merges nothing")
    return tuple(counts.get(block, 0) for block in range(depth))


def token_counts(tokens: int, schedule: Sequence[int], *, protected: int) -> tuple[int, ...]:
    """How many tokens are left after the merge of each block, one int a block.

    Args:
        tokens: N before the first block.
        schedule: tokens that each block merges.
        protected: how many never merge: class and register tokens.

    Raises:
        ValueError: for a block that has too few tokens for its r, with the block, its r and the most it could merge.

    Example:
        >>> token_counts(197, merge_schedule(24, 5, interval=2, offset=2), protected=1)[-1]
        142
    """
    left = tokens
    counts = []
    for block, r in enumerate(schedule):
        mergeable = max(left - protected, 0)
        if not 0 <= r <= mergeable // 2:
            raise ValueError(
                f"token_merging: block {block}: expected r from 0 to {mergeable // 2}, half of the {mergeable} tokens "
                f"there that may merge, got {r}; merge fewer or in fewer blocks"
            )
        left -= r
        counts.append(left)
    return tuple(counts)


def merged_image(
    images: Tensor, source: Tensor, *, prefix_indices: Sequence[int] = (0,), border: float | None = 0.0
) -> Tensor:
    """Paint every patch in the mean colour of the token it went into, (B, C, H, W) -> (B, C, H, W).

    Patches that were pruned are 0. Enlarge small images first: a border is one pixel wide.

    Args:
        images: their patches, row by row, are the first tokens; a grid of the images' aspect ratio.
        source: which of N first tokens each token is made of, (B, N', N) 0/1, from :func:`merge_source`.
        prefix_indices: which of the N are no patches: class and register tokens.
        border: the value of the lines between tokens; None draws none.

    Raises:
        ValueError: for a number of patches that makes no grid.

    Example:
        >>> source = torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0]]])
        >>> merged_image(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]), source).tolist()
        [[[[3.0, 3.0], [3.0, 3.0]]]]
    """
    height, width = images.shape[-2:]
    patches = [n for n in range(source.shape[-1]) if n not in prefix_indices]
    rows = round((len(patches) * height / width) ** 0.5)
    if rows == 0 or len(patches) % rows:
        raise ValueError(
            f"merged_image: source: expected the patches of a {height} x {width} image on a grid of its aspect ratio, "
            f"got {len(patches)}; name the tokens that are no patches in prefix_indices"
        )
    grid = (rows, len(patches) // rows)
    made_of = source[..., patches].float()
    colours = F.adaptive_avg_pool2d(images.float(), grid).flatten(2)
    shares = made_of / made_of.sum(-1, keepdim=True).clamp_min(1)
    painted = F.interpolate((colours @ shares.mT @ made_of).unflatten(2, grid), size=(height, width))
    if border is not None:
        # 0 is nobody's: the pruned patches; interpolate takes no integers
        tokens = made_of * torch.arange(1, made_of.shape[1] + 1, device=made_of.device)[:, None]
        owner = F.interpolate(tokens.sum(1, keepdim=True).unflatten(2, grid), size=(height, width))
        above, before = owner.diff(dim=-2) != 0, owner.diff(dim=-1) != 0
        painted = painted.masked_fill(F.pad(above, (0, 0, 1, 0)) | F.pad(before, (1, 0)), border)
    return painted.to(images.dtype)


def _match(
    metric: Tensor, sources: Tensor, destinations: Tensor, r: int, *, distance: str, rank: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Which r sources merge (B, r), where each goes (B, r), and the others by falling similarity (B, a - r).

    All are input positions, as are ``sources`` (B, a) and ``destinations`` (B, b).
    """
    unit = F.normalize(metric.detach().float(), dim=-1)
    a, b = _take(unit, sources), _take(unit, destinations)
    if distance == "cosine":
        with no_autocast(metric.device.type):
            scores = a @ b.mT
    elif distance == "l1":
        scores = -torch.cdist(a, b, p=1)
    else:
        # by matmul, the default for many tokens, near ones are equally far: rounding
        scores = -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    if rank:
        ranked = scores.sort(dim=-1, descending=True, stable=True)
        best, partner = ranked.values[..., rank], ranked.indices[..., rank]
    else:
        best, partner = scores.max(dim=-1)
    # stable, so that ties are the same in the recomputation of a checkpoint
    falling = best.argsort(dim=-1, descending=True, stable=True)
    by_similarity = sources.gather(1, falling)
    homes = destinations.gather(1, partner.gather(1, falling[:, :r]))
    return by_similarity[:, :r], homes, by_similarity[:, r:]


def _plan(keep: Tensor, src: Tensor, homes: Tensor, new_cls_index: int | Tensor | None = None) -> MergePlan:
    """The plan whose destinations are given as input positions, (B, r)."""
    tokens = keep.shape[1] + src.shape[1]
    return MergePlan(keep, src, _output_positions(keep, tokens).gather(1, homes), new_cls_index)


def _identity(positions: Tensor, cls_index: int | Tensor | None = None) -> MergePlan:
    none = positions[:, :0]
    return MergePlan(positions, none, none, cls_index)


def _column(cls_index: int | Tensor, positions: Tensor) -> Tensor:
    """The position of the class token of each sample, (B, 1)."""
    return cls_index[:, None] if isinstance(cls_index, Tensor) else torch.full_like(positions[:, :1], cls_index)


def _output_positions(keep: Tensor, tokens: int) -> Tensor:
    """Where each input token comes out, (B, N - r) -> (B, N); 0 for those that merge."""
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return keep.new_zeros(keep.shape[0], tokens).scatter(1, keep, places)


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """Tokens by position, (B, N, D) and (B, n) -> (B, n, D)."""
    # whole rows of the flat table: six times faster on a CPU than a gather with the index expanded over D
    first = x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (positions + first).flatten()).unflatten(0, positions.shape)


def _arrivals(plan: MergePlan) -> Tensor:
    """Which source arrives at which output token, (B, N - r, r) 0/1 float32."""
    places = torch.arange(plan.keep.shape[1], device=plan.keep.device)
    return (places[:, None] == plan.dst[:, None]).float()


def _add(kept: Tensor, arrivals: Tensor, sources: Tensor) -> Tensor:
    """Add every source to its destination, (B, N - r, D), (B, N - r, r) and (B, r, D) -> (B, N - r, D)."""
    # index_add would round in another order at every run on a GPU: a checkpoint's recomputation must find the same plan
    with no_autocast(kept.device.type):
        return torch.baddbmm(kept, arrivals.to(kept.dtype), sources)


def _merging_blocks(depth: int, interval: int, offset: int, layers: Iterable[int] | None) -> list[int]:
    if layers is None:
        if interval < 1 or offset < 0:
            raise ValueError(
                f"merge_schedule: interval and offset: expected at least 1 and 0, got {interval} and {offset}; "
                "interval 1 and offset 0 are every block"
            )
        return list(range(offset, depth, interval))
    if (interval, offset) != (1, 0):
        raise ValueError("merge_schedule: layers: expected either layers or interval and offset, got both; drop one")
    merging = sorted(set(layers))
    if merging and not 0 <= merging[0] <= merging[-1] < depth:
        raise ValueError(f"merge_schedule: layers: expected blocks from 0 to {depth - 1}, got {merging}")
    return merging


def _fractions(depth: int, fraction: float, merging: list[int], tokens: int | None, protected: int) -> tuple[int, ...]:
    if not 0 <= fraction < 0.5:
        raise ValueError(
            f"merge_schedule: r: expected a fraction in [0, 0.5), got {fraction}; at most half of the tokens have a "
            "partner, and an int is a number of tokens"
        )
    if tokens is None:
        raise ValueError("merge_schedule: tokens: expected the number of tokens for a fraction, got None; pass tokens=")
    counts = [0] * depth
    for block in merging:
        counts[block] = int(fraction * max(tokens - protected, 0))
        tokens -= counts[block]
    return tuple(counts)


def _inflected(r: float, inflect: float, blocks: int) -> list[int]:
    if not -1 <= inflect <= 1:
        raise ValueError(
            f"merge_schedule: r: expected an inflect in [-1, 1], got {(r, inflect)}; 0 is the same r everywhere, and "
            "one int a block is a list"
        )
    first = int(r * (1 - inflect))
    step = 2 * (r - first) / max(blocks - 1, 1)
    return [int(first + step * block) for block in range(blocks)]


def _is_count(n: object) -> TypeGuard[int]:
    return isinstance(n, int) and not isinstance(n, bool)


def is_inflected(r: object) -> TypeGuard[tuple[float, float]]:
    """Whether r is a pair (r, inflect): YAML has no tuples, so a float says it too."""
    return isinstance(r, Sequence) and len(r) == 2 and (isinstance(r, tuple) or isinstance(r[1], float))


def _is_list(r: object) -> TypeGuard[Sequence[int]]:
    return isinstance(r, Sequence) and all(_is_count(n) for n in r)


def _check_matching(name: str, metric: Tensor, r: int, distance: str) -> None:
    if not _is_count(r):
        raise TypeError(f"{name}: r: expected an int, got {r!r}; merge_schedule turns a fraction into ints")
    if r < 0:
        raise ValueError(f"{name}: r: expected 0 or more, got {r}; 0 merges nothing")
    if metric.ndim != 3:
        raise ValueError(f"{name}: metric: expected (B, N, D), got {tuple(metric.shape)}; average over heads first")
    if distance not in MERGE_DISTANCES:
        raise ValueError(f"{name}: distance: expected one of {', '.join(MERGE_DISTANCES)}, got {distance!r}")


def _check_cls(cls_index: int | Tensor | None, cls_rule: str, preserve_order: bool, batch: int, tokens: int) -> None:
    name = "ordered_bipartite_matching"
    if cls_rule not in ("proportional", "exact"):
        raise ValueError(f"{name}: cls_rule: expected proportional or exact, got {cls_rule!r}")
    if cls_rule == "exact" and not preserve_order:
        raise ValueError(
            f"{name}: cls_rule: expected proportional without preserve_order, got 'exact'; an unordered sequence has "
            "no neighbours"
        )
    if isinstance(cls_index, Tensor):
        if cls_rule != "exact":
            raise ValueError(
                f"{name}: cls_index: expected an int for cls_rule='proportional', got a tensor; use 'exact' throughout"
            )
        if cls_index.shape != (batch,):
            raise ValueError(f"{name}: cls_index: expected ({batch},), one a sample, got {tuple(cls_index.shape)}")
    elif cls_index is not None and not 0 <= cls_index < tokens:
        raise ValueError(
            f"{name}: cls_index: expected one of {tokens} tokens, got {cls_index}; pass None without a class token"
        )


def _check_tokens(name: str, argument: str, x: Tensor, tokens: int) -> None:
    if x.ndim != 3 or x.shape[1] != tokens:
        raise ValueError(f"{name}: {argument}: expected (B, {tokens}, D) as planned, got {tuple(x.shape)}")
