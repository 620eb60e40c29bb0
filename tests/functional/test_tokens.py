"""Merging tokens against per-sample, per-token loops over lists."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hasten.functional import (
    MERGE_REDUCTIONS,
    MergePlan,
    bipartite_soft_matching,
    merge_schedule,
    merge_source,
    merge_tokens,
    merge_weighted,
    merged_image,
    ordered_bipartite_matching,
    token_counts,
    unmerge_tokens,
)

WIDTH = 5
LENGTHS = (1, 2, 3, 4, 8, 9, 14, 15)
RS = (0, 1, 3, 4, 7, 99)  # 4 and 7 are the most for 8, 9 and for 14, 15


def tokens(batch, n, seed=0, dtype=torch.float32):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# the loops: one sample is a list of vectors; an outcome is a list of groups, each a list of input positions, home first


def slow_score(a, b, distance):
    def unit(v):
        length = max(math.sqrt(sum(c * c for c in v)), 1e-12)
        return [c / length for c in v]

    a, b = unit(a), unit(b)
    if distance == "cosine":
        return sum(p * q for p, q in zip(a, b, strict=True))
    if distance == "l1":
        return -sum(abs(p - q) for p, q in zip(a, b, strict=True))
    return -math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def slow_pairs(sample, sources, destinations, r, distance, rank=0):
    """Of the sources that merge, in falling similarity: {source: destination}; and the other sources, likewise."""
    found = []
    for a in sources:
        ranked = sorted(((-slow_score(sample[a], sample[b], distance), i) for i, b in enumerate(destinations)))
        score, i = ranked[rank]
        found.append((score, a, destinations[i]))
    found.sort(key=lambda f: f[0])
    return {a: b for _, a, b in found[:r]}, [a for _, a, _ in found[r:]]


def groups(homes, pairs):
    return [[home, *(a for a, b in pairs.items() if b == home)] for home in homes]


def slow_tome(sample, r, prefix=0, distance="cosine", preserve_order=False):
    n = len(sample)
    r = min(r, (n - prefix) // 2)
    if r == 0:
        return [[i] for i in range(n)]
    sources = [i for i in range(prefix, n) if i % 2 == 0]
    destinations = [i for i in range(prefix, n) if i % 2 == 1]
    pairs, kept = slow_pairs(sample, sources, destinations, r, distance)
    homes = list(range(prefix)) + (sorted(kept) if prefix else kept) + destinations
    return groups(sorted(homes) if preserve_order else homes, pairs)


def slow_rmeeto(sample, r, cls=None, distance="cosine", rank=0, preserve_order=True, cls_rule="proportional"):
    n = len(sample)
    rest = [i for i in range(n) if i != cls]
    r = min(r, len(rest) // 2)
    if r == 0:
        return [[i] for i in range(n)]
    pairs, kept = slow_pairs(sample, rest[::2], rest[1::2], r, distance, rank)
    homes = kept + rest[1::2]
    if preserve_order:
        homes = sorted(homes)
    if cls is not None and cls_rule == "exact":
        homes = sorted([*homes, cls])
    elif cls is not None:
        t = n if preserve_order else len(rest[::2])
        homes.insert(int(cls * (t - r) // t), cls)
    return groups(homes, pairs)


def slow_merge(sample, outcome, reduce):
    rows = []
    for group in outcome:
        members = [sample[i] for i in (group[:1] if reduce == "drop" else group)]
        columns = list(zip(*members, strict=True))
        reducer = {"sum": sum, "drop": sum, "amax": max, "amin": min, "mean": lambda c: sum(c) / len(c)}[reduce]
        rows.append([reducer(c) for c in columns])
    return rows


def outcome_of(plan):
    """The groups of every sample, read off a plan."""
    return [
        [[home, *(s for s, d in zip(src, dst, strict=True) if d == j)] for j, home in enumerate(keep)]
        for keep, src, dst in zip(plan.keep.tolist(), plan.src.tolist(), plan.dst.tolist(), strict=True)
    ]


def cls_places(n):
    return sorted({0, n // 2, n - 1})


# plans


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("preserve_order", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
def test_a_tome_plan_is_that_of_a_loop(distance, preserve_order, prefix):
    for n, r in itertools.product(LENGTHS, RS):
        if prefix > n:
            continue
        x = tokens(2, n, seed=n)
        plan = bipartite_soft_matching(x, r, num_prefix_tokens=prefix, distance=distance, preserve_order=preserve_order)
        assert outcome_of(plan) == [slow_tome(s, r, prefix, distance, preserve_order) for s in x.tolist()]


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
@pytest.mark.parametrize(
    ("preserve_order", "cls_rule"), [(True, "proportional"), (True, "exact"), (False, "proportional")]
)
def test_an_ordered_plan_is_that_of_a_loop(distance, preserve_order, cls_rule):
    for n, r in itertools.product(LENGTHS, RS):
        x = tokens(2, n, seed=n)
        for cls in (None, *cls_places(n)):
            plan = ordered_bipartite_matching(
                x, r, cls_index=cls, distance=distance, preserve_order=preserve_order, cls_rule=cls_rule
            )
            expected = [
                slow_rmeeto(s, r, cls, distance, preserve_order=preserve_order, cls_rule=cls_rule) for s in x.tolist()
            ]
            assert outcome_of(plan) == expected
            if cls is None:
                assert plan.new_cls_index is None
            else:
                index = torch.as_tensor(plan.new_cls_index).expand(2)
                assert [keep[i] for keep, i in zip(plan.keep.tolist(), index.tolist(), strict=True)] == [cls, cls]


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_plan_of_another_rank_is_that_of_a_loop(rank):
    for n, cls in itertools.product((14, 15), (None, 0, 7, 13)):
        if (n - (cls is not None)) // 2 <= rank:
            continue
        x = tokens(2, n, seed=n)
        plan = ordered_bipartite_matching(x, 4, cls_index=cls, rank=rank)
        assert outcome_of(plan) == [slow_rmeeto(s, 4, cls, rank=rank) for s in x.tolist()]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ties_go_to_the_first(rank):
    # axes only, so that equal scores are equal to the bit in the loop too
    axes = torch.eye(WIDTH)[torch.randint(0, 2, (4, 13), generator=torch.Generator().manual_seed(0))]
    for x in (axes, torch.ones(4, 13, WIDTH), torch.zeros(4, 13, WIDTH)):
        plan = ordered_bipartite_matching(x, 4, cls_index=6, rank=rank)
        assert outcome_of(plan) == [slow_rmeeto(s, 4, 6, rank=rank) for s in x.tolist()]
        assert outcome_of(bipartite_soft_matching(x, 4)) == [slow_tome(s, 4) for s in x.tolist()]


def test_a_batch_of_one_is_a_row_of_a_larger_batch():
    x = tokens(3, 11)
    for i in range(3):
        alone, among = (
            ordered_bipartite_matching(x[i : i + 1], 3, cls_index=5),
            ordered_bipartite_matching(x, 3, cls_index=5),
        )
        assert torch.equal(alone.keep, among.keep[i : i + 1])
        assert torch.equal(alone.src, among.src[i : i + 1])
        assert torch.equal(alone.dst, among.dst[i : i + 1])


def test_more_than_the_most_is_clamped_and_nothing_is_the_identity():
    x = tokens(2, 15)
    assert bipartite_soft_matching(x, 99).r == 7
    assert bipartite_soft_matching(x, 99, num_prefix_tokens=4).r == 5
    assert ordered_bipartite_matching(x, 99, cls_index=3).r == 7
    assert ordered_bipartite_matching(tokens(2, 16), 99, cls_index=3).r == 7
    plan = ordered_bipartite_matching(x, 0, cls_index=3)
    assert (plan.r, plan.tokens, plan.new_cls_index) == (0, 15, 3)
    assert merge_tokens(x, plan) is x
    assert unmerge_tokens(x, plan) is x
    merged, size = merge_weighted(x, None, plan)
    assert merged is x
    assert torch.equal(size, torch.ones(2, 15, 1))


def test_the_class_token_of_vim_goes_where_the_authors_put_it():
    x = tokens(1, 197)
    places, n, cls = [], 197, 98
    for _ in range(11):
        plan = ordered_bipartite_matching(x, 11, cls_index=cls)
        x, cls = merge_tokens(x, plan), plan.new_cls_index
        n -= 11
        places.append((n, cls))
    assert places[-1] == (76, 34)


def test_the_exact_rule_puts_the_class_token_at_its_rank_in_every_sample_and_goes_on_from_there():
    x = tokens(6, 15)
    labels = torch.arange(15.0).expand(6, 15)[..., None]
    cls = 12
    for _ in range(3):
        plan = ordered_bipartite_matching(x, 3, cls_index=cls, cls_rule="exact")
        x, labels = merge_tokens(x, plan), merge_tokens(labels, plan, reduce="drop")
        cls = plan.new_cls_index
        assert labels[torch.arange(6), cls].flatten().tolist() == [12.0] * 6
        assert [row.index(12.0) for row in labels[..., 0].tolist()] == cls.tolist()
    assert len(set(cls.tolist())) > 1


def test_order_keys_ascend():
    x = tokens(4, 31)
    for plan in (
        ordered_bipartite_matching(x, 9),
        ordered_bipartite_matching(x, 9, cls_index=15, cls_rule="exact"),
        bipartite_soft_matching(x, 9, num_prefix_tokens=2, preserve_order=True),
    ):
        assert (plan.keep.diff(dim=1) > 0).all()
    plan = ordered_bipartite_matching(x, 9, cls_index=15)
    others = plan.keep[plan.keep != 15].view(4, -1)
    assert (others.diff(dim=1) > 0).all()
    assert not (bipartite_soft_matching(x, 9).keep.diff(dim=1) > 0).all()


def test_a_zero_token_is_similar_to_none_but_scores_zero():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    plan = bipartite_soft_matching(x, 1)  # 0 beats the -1 of the other source
    assert plan.src.tolist() == [[0]]


def test_plans_do_not_depend_on_autocast_nor_on_the_length_of_the_vectors():
    x = tokens(4, 33)
    scale = torch.rand(4, 33, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    plain = ordered_bipartite_matching(x, 11, cls_index=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ordered_bipartite_matching(x, 11, cls_index=16)
    scaled = ordered_bipartite_matching(x * scale, 11, cls_index=16)
    for other in (cast, scaled):
        assert outcome_of(other) == outcome_of(plain)
        assert torch.equal(other.src, plain.src)


def test_a_plan_saves_nothing_for_the_backward():
    x = tokens(2, 9).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        ordered_bipartite_matching(x, 3, cls_index=4, cls_rule="exact")
        bipartite_soft_matching(x, 3, distance="l2")
    assert saved == []


# merging


@pytest.mark.parametrize("reduce", MERGE_REDUCTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_merging_is_that_of_a_loop(reduce, batch):
    for n, r in itertools.product((2, 9, 14), (1, 4, 99)):
        x = tokens(batch, n, seed=n, dtype=torch.float64)
        metric = tokens(batch, n, seed=1)
        for plan in (bipartite_soft_matching(metric, r), ordered_bipartite_matching(metric, r, cls_index=n // 2)):
            expected = [slow_merge(s, o, reduce) for s, o in zip(x.tolist(), outcome_of(plan), strict=True)]
            torch.testing.assert_close(
                merge_tokens(x, plan, reduce=reduce), torch.tensor(expected, dtype=torch.float64).view(batch, -1, WIDTH)
            )


def test_weighted_merging_is_the_mean_over_all_first_tokens_in_a_loop():
    x = first = tokens(2, 17, dtype=torch.float64)
    made_of = [[[i] for i in range(17)] for _ in range(2)]
    size, cls = None, 8
    for _ in range(3):
        plan = ordered_bipartite_matching(x, 4, cls_index=cls)
        made_of = [
            [[first for i in group for first in m[i]] for group in o]
            for m, o in zip(made_of, outcome_of(plan), strict=True)
        ]
        x, size = merge_weighted(x, size, plan)
        cls = plan.new_cls_index
    for b in range(2):
        for j, members in enumerate(made_of[b]):
            torch.testing.assert_close(x[b, j], first[b, members].mean(0))
            assert size[b, j].item() == len(members)
    assert size[:, cls].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("cls", [None, 0, 11, 22])
def test_sizes_sum_to_n_and_the_weighted_sum_is_conserved(cls):
    x = first = tokens(3, 23)
    size = None
    for _ in range(4):
        plan = ordered_bipartite_matching(x, 3, cls_index=cls)
        x, size = merge_weighted(x, size, plan)
        cls = plan.new_cls_index
    assert size.sum(1).flatten().tolist() == [23.0] * 3
    torch.testing.assert_close((x * size).sum(1), first.sum(1))


def test_pruning_drops_the_sources_and_leaves_the_rest_as_it_is():
    x = tokens(2, 13)
    plan = ordered_bipartite_matching(x, 4, cls_index=6)
    pruned, size = merge_weighted(x, None, plan, drop=True)
    for b in range(2):
        assert torch.equal(pruned[b], x[b, plan.keep[b]])
    assert torch.equal(size, torch.ones(2, 9, 1))
    earlier = torch.arange(26.0).view(2, 13, 1)
    _, kept = merge_weighted(x, earlier, plan, drop=True)
    assert kept[1].flatten().tolist() == earlier[1, plan.keep[1], 0].tolist()


def test_merging_once_after_the_add_is_merging_two_streams_under_drop_path():
    hidden, residual = tokens(4, 19, seed=1, dtype=torch.float64), tokens(4, 19, seed=2, dtype=torch.float64)
    keep_path = torch.tensor([0.0, 1.25, 1.25, 0.0], dtype=torch.float64)[:, None, None]
    size = torch.randint(1, 5, (4, 19, 1), generator=torch.Generator().manual_seed(3)).float()
    plan = ordered_bipartite_matching(hidden, 6, cls_index=9)
    one, size_one = merge_weighted(residual + keep_path * hidden, size, plan)
    merged, size_two = merge_weighted(hidden, size, plan)
    torch.testing.assert_close(one, merge_weighted(residual, size, plan)[0] + keep_path * merged, atol=1e-12, rtol=0)
    assert torch.equal(size_one, size_two)


def test_unmerging_gives_every_token_the_value_of_its_group():
    x = tokens(2, 15)
    for plan in (
        ordered_bipartite_matching(x, 5, cls_index=7, cls_rule="exact"),
        bipartite_soft_matching(x, 5, num_prefix_tokens=2),
    ):
        merged = merge_tokens(x, plan)
        back = unmerge_tokens(merged, plan)
        for b, outcome in enumerate(outcome_of(plan)):
            for j, group in enumerate(outcome):
                for i in group:
                    assert torch.equal(back[b, i], merged[b, j])


def test_unmerging_undoes_a_merge_of_equal_tokens():
    x = tokens(2, 15)
    plan = ordered_bipartite_matching(x, 5, cls_index=7)
    x = unmerge_tokens(merge_tokens(x, plan, reduce="drop"), plan)  # constant on every group
    for reduce in ("mean", "amax", "amin", "drop"):
        torch.testing.assert_close(unmerge_tokens(merge_tokens(x, plan, reduce=reduce), plan), x)
    size = torch.randint(1, 9, (2, 15, 1), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(unmerge_tokens(merge_weighted(x, size, plan)[0], plan), x)


@pytest.mark.parametrize("drop", [False, True])
def test_the_source_is_that_of_a_loop(drop):
    x = tokens(2, 15)
    made_of = [[[i] for i in range(15)] for _ in range(2)]
    source, cls = None, 7
    for _ in range(3):
        plan = ordered_bipartite_matching(x, 3, cls_index=cls)
        x, cls = merge_tokens(x, plan, reduce="drop" if drop else "mean"), plan.new_cls_index
        source = merge_source(source, plan, drop=drop)
        made_of = [
            [[first for i in (group[:1] if drop else group) for first in m[i]] for group in o]
            for m, o in zip(made_of, outcome_of(plan), strict=True)
        ]
    expected = [[[float(i in members) for i in range(15)] for members in m] for m in made_of]
    assert source.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_are_float32_and_exact_in_half_precision(dtype):
    x, n = tokens(2, 11).to(dtype), 11
    size = torch.full((2, 11, 1), 257.0)
    plan = ordered_bipartite_matching(x, 4, cls_index=5)
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            merged, total = merge_weighted(x, size, plan)
        assert merged.dtype == dtype
        assert total.dtype == torch.float32
        assert total.sum(1).flatten().tolist() == [257.0 * n] * 2
        torch.testing.assert_close(merged, merge_weighted(x.double(), size, plan)[0].to(dtype))
    assert all(merge_tokens(x, plan, reduce=reduce).dtype == dtype for reduce in MERGE_REDUCTIONS)


def test_autocast_does_not_round_what_is_merged():
    x = tokens(2, 11)
    plan = ordered_bipartite_matching(x, 4)
    for reduce in MERGE_REDUCTIONS:
        plain = merge_tokens(x, plan, reduce=reduce)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(merge_tokens(x, plan, reduce=reduce), plain)


@pytest.mark.parametrize("reduce", MERGE_REDUCTIONS)
def test_merging_is_differentiable(reduce):
    metric = tokens(2, 9)
    plan = ordered_bipartite_matching(metric, 3, cls_index=4)
    x = tokens(2, 9, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: merge_tokens(t, plan, reduce=reduce), x)


@pytest.mark.parametrize("drop", [False, True])
def test_weighted_merging_and_unmerging_are_differentiable(drop):
    metric = tokens(2, 9)
    plan = bipartite_soft_matching(metric, 3, num_prefix_tokens=1)
    size = torch.arange(1.0, 19.0).view(2, 9, 1)
    x = tokens(2, 9, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: unmerge_tokens(merge_weighted(t, size, plan, drop=drop)[0], plan), x)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_empty_batch_and_no_tokens_give_empty_results(n):
    for batch in (0, 2):
        x = torch.zeros(batch, n, WIDTH)
        left = n - min(2, n // 2)
        plans = [bipartite_soft_matching(x, 2), ordered_bipartite_matching(x, 2)]
        if n:
            left_cls = n - min(2, (n - 1) // 2)
            assert merge_tokens(x, ordered_bipartite_matching(x, 2, cls_index=0)).shape == (batch, left_cls, WIDTH)
        for plan in plans:
            for reduce in MERGE_REDUCTIONS:
                assert merge_tokens(x, plan, reduce=reduce).shape == (batch, left, WIDTH)
            merged, size = merge_weighted(x, None, plan)
            assert (merged.shape, size.shape) == ((batch, left, WIDTH), (batch, left, 1))
            assert unmerge_tokens(merged, plan).shape == x.shape
            assert merge_source(None, plan).shape == (batch, left, n)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_nan_and_inf_propagate_and_stay_in_their_sample(bad, reduce):
    x = tokens(2, 9)
    plan = ordered_bipartite_matching(x, 3)
    x[0, plan.src[0, 0]] = bad
    merged = merge_tokens(x, plan, reduce=reduce)
    assert not merged[0, plan.dst[0, 0]].isfinite().any()
    assert merged[1].isfinite().all()
    for matching in (bipartite_soft_matching, ordered_bipartite_matching):
        plan = matching(x, 3)  # of a metric that is not finite: still a plan
        assert sorted(plan.keep[0].tolist() + plan.src[0].tolist()) == list(range(9))
        assert not merge_tokens(x, plan, reduce=reduce)[0].isfinite().all()


# in a graph


class Merger(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x):
        if self.method == "tome":
            plan = bipartite_soft_matching(x, 3, num_prefix_tokens=1)
        else:
            plan = ordered_bipartite_matching(x, 3, cls_index=4, cls_rule=self.method)
        merged, size = merge_weighted(x, None, plan)
        spread = merge_tokens(x, plan, reduce="amax") - merge_tokens(x, plan, reduce="mean")
        return merged, size, spread, merge_source(None, plan), unmerge_tokens(merged, plan), plan


def leaves(outputs):
    *tensors, plan = outputs
    return [
        *tensors,
        plan.keep,
        plan.src,
        plan.dst,
        torch.as_tensor(-1 if plan.new_cls_index is None else plan.new_cls_index),
    ]


METHODS = ["tome", "proportional", "exact"]


@pytest.mark.parametrize("method", METHODS)
def test_merging_compiles_to_one_graph(method):
    torch.compiler.reset()
    merger, x = Merger(method), tokens(2, 9)
    compiled = torch.compile(merger, fullgraph=True, backend="eager")
    for fast, plain in zip(leaves(compiled(x)), leaves(merger(x)), strict=True):
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("method", METHODS)
def test_merging_exports_for_any_batch_with_its_plan(method):
    merger = Merger(method)
    batch = torch.export.Dim("batch")
    program = torch.export.export(merger, (tokens(2, 9),), dynamic_shapes=({0: batch},))
    x = tokens(5, 9, seed=1)
    outputs = program.module()(x)
    assert isinstance(outputs[-1], MergePlan)
    for exported, plain in zip(leaves(outputs), leaves(merger(x)), strict=True):
        assert torch.equal(exported, plain)


def test_a_plan_is_a_pytree():
    plan = ordered_bipartite_matching(tokens(2, 9), 3, cls_index=4, cls_rule="exact")
    flat, spec = torch.utils._pytree.tree_flatten(plan)
    assert len(flat) == 4
    again = torch.utils._pytree.tree_unflatten(flat, spec)
    assert torch.equal(merge_tokens(tokens(2, 9), again), merge_tokens(tokens(2, 9), plan))


def test_recomputation_in_a_checkpoint_gives_the_same_gradients():
    def block(t):
        merged, size = merge_weighted(t, None, ordered_bipartite_matching(t, 5, cls_index=6))
        return merged * size.log1p()

    def gradient(forward):
        x = tokens(3, 13).requires_grad_()
        forward(x).square().sum().backward()
        return x.grad

    assert torch.equal(gradient(lambda t: checkpoint(block, t, use_reentrant=False)), gradient(block))


# schedules


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"r": 0}, (0, 0, 0, 0, 0, 0)),
        ({"r": 4}, (4, 4, 4, 4, 4, 4)),
        ({"r": 4, "interval": 2, "offset": 2}, (0, 0, 4, 0, 4, 0)),
        ({"r": 4, "interval": 2, "offset": 1}, (0, 4, 0, 4, 0, 4)),
        ({"r": 4, "offset": 9}, (0, 0, 0, 0, 0, 0)),
        ({"r": 4, "layers": [5, 1, 1]}, (0, 4, 0, 0, 0, 4)),
        ({"r": 4, "layers": []}, (0, 0, 0, 0, 0, 0)),
        ({"r": [1, 2, 3]}, (1, 2, 3, 0, 0, 0)),
        ({"r": []}, (0, 0, 0, 0, 0, 0)),
        ({"r": [8, 1]}, (8, 1, 0, 0, 0, 0)),
        ({"r": (8, 0)}, (8, 8, 8, 8, 8, 8)),
        ({"r": (8, -1)}, (16, 12, 9, 6, 3, 0)),
        ({"r": [8, 1.0]}, (0, 3, 6, 9, 12, 16)),
        ({"r": (7, 0.5)}, (3, 4, 6, 7, 9, 11)),
        ({"r": (8, 1.0), "layers": [1, 3, 5]}, (0, 0, 0, 8, 0, 16)),
        ({"r": 0.25, "tokens": 33, "protected": 1}, (8, 6, 4, 3, 2, 2)),
        ({"r": 0.25, "tokens": 33, "protected": 1, "layers": [2, 4]}, (0, 0, 8, 0, 6, 0)),
        ({"r": 0.49, "tokens": 2, "protected": 3}, (0, 0, 0, 0, 0, 0)),
    ],
)
def test_a_schedule_has_one_int_for_every_block(arguments, expected):
    schedule = merge_schedule(6, **arguments)
    assert schedule == expected
    assert all(type(r) is int for r in schedule)


@pytest.mark.parametrize("inflect", [-1.0, -0.3, 0.0, 0.7, 1.0])
def test_an_inflected_schedule_merges_about_as_many_as_a_constant_one(inflect):
    for r, depth in itertools.product((3, 8, 16), (6, 12, 24)):
        assert sum(merge_schedule(depth, (r, inflect))) == pytest.approx(r * depth, abs=depth)


def test_the_published_vims_end_on_142_and_76_tokens():
    for r, last in ((5, 142), (11, 76)):
        schedule = merge_schedule(24, r, interval=2, offset=2)
        counts = token_counts(197, schedule, protected=1)
        assert schedule.count(r) == 11
        assert (counts[0], counts[1], counts[2], counts[-1]) == (197, 197, 197 - r, last)


def test_token_counts_are_those_of_the_plans():
    schedule, x = merge_schedule(5, 0.45, tokens=40, protected=2), tokens(1, 40)
    counts = []
    for r in schedule:
        plan = bipartite_soft_matching(x, r, num_prefix_tokens=2)
        assert plan.r == r
        x = merge_tokens(x, plan)
        counts.append(x.shape[1])
    assert token_counts(40, schedule, protected=2) == tuple(counts)


# pictures


@pytest.mark.parametrize("prefix", [(), (0,), (4,), (0, 1, 8)])
def test_a_merged_image_has_the_mean_colour_of_each_token_on_its_patches(prefix):
    rows, columns, patch, total = 2, 3, 4, 6 + len(prefix)
    images = torch.rand(2, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(0))
    patches = [i for i in range(total) if i not in prefix]
    together = [[0, 4], [1], [2, 3, 5]]
    source = torch.zeros(2, 3 + len(prefix), total)
    for token, members in enumerate(together):
        for m in members:
            source[:, token, patches[m]] = 1
    for token, i in enumerate(prefix, start=3):
        source[:, token, i] = 1
    painted = merged_image(images, source, prefix_indices=prefix, border=None)

    def pixels(m):
        y, x = divmod(m, columns)
        return slice(y * patch, (y + 1) * patch), slice(x * patch, (x + 1) * patch)

    for members in together:
        mean = torch.stack([images[:, :, *pixels(m)].mean((2, 3)) for m in members]).mean(0)
        for m in members:
            torch.testing.assert_close(painted[:, :, *pixels(m)], mean[..., None, None].expand(-1, -1, patch, patch))


def test_a_merged_image_has_borders_between_different_tokens_only():
    images = torch.ones(1, 3, 8, 8)
    source = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    painted = merged_image(images, source, prefix_indices=(), border=7.0)
    line = painted[0, 0] == 7
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4] = True
    expected[4:, 4] = True
    assert torch.equal(line, expected)
    assert (painted[0, 0][~line] == 1).all()


def test_pruned_patches_are_zero():
    images = torch.ones(1, 1, 4, 4)
    source = torch.eye(4)[None, [0, 1, 3]]
    painted = merged_image(images, source, prefix_indices=(), border=None)
    assert painted[0, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_nothing_merged_paints_every_patch_in_its_own_colour():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    source = torch.eye(17).expand(2, -1, -1)
    torch.testing.assert_close(merged_image(images, source, border=None), images)


# errors

X = torch.zeros(2, 9, WIDTH)
PLAN = bipartite_soft_matching(X, 2)


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda: bipartite_soft_matching(X, -1), ValueError, "bipartite_soft_matching: r: expected 0 or more, got -1"),
        (lambda: bipartite_soft_matching(X, 0.3), TypeError, "r: expected an int, got 0.3; merge_schedule"),
        (lambda: bipartite_soft_matching(X, True), TypeError, "r: expected an int, got True"),
        (lambda: bipartite_soft_matching(X[0], 1), ValueError, r"metric: expected \(B, N, D\), got \(9, 5\)"),
        (lambda: bipartite_soft_matching(X, 1, distance="l3"), ValueError, "distance: expected one of cosine, l1, l2"),
        (lambda: bipartite_soft_matching(X, 1, num_prefix_tokens=10), ValueError, "num_prefix_tokens: expected 0 to 9"),
        (lambda: bipartite_soft_matching(X, 1, num_prefix_tokens=-1), ValueError, "num_prefix_tokens: expected 0 to 9"),
        (lambda: ordered_bipartite_matching(X, -1), ValueError, "ordered_bipartite_matching: r: expected 0 or more"),
        (
            lambda: ordered_bipartite_matching(X, 1, cls_index=9),
            ValueError,
            "cls_index: expected one of 9 tokens, got 9",
        ),
        (lambda: ordered_bipartite_matching(X, 1, cls_index=-1), ValueError, "cls_index: expected one of 9 tokens"),
        (
            lambda: ordered_bipartite_matching(X, 1, rank=4),
            ValueError,
            "rank: expected 0 to 3, one of 4 destinations, got 4",
        ),
        (lambda: ordered_bipartite_matching(X, 1, rank=-1), ValueError, "rank: expected 0 to 3"),
        (
            lambda: ordered_bipartite_matching(X, 1, cls_rule="last"),
            ValueError,
            "cls_rule: expected proportional or exact",
        ),
        (
            lambda: ordered_bipartite_matching(X, 1, cls_rule="exact", preserve_order=False),
            ValueError,
            "cls_rule: expected proportional without preserve_order",
        ),
        (
            lambda: ordered_bipartite_matching(X, 1, cls_index=torch.tensor([1, 2])),
            ValueError,
            "cls_index: expected an int for cls_rule='proportional'",
        ),
        (
            lambda: ordered_bipartite_matching(X, 1, cls_index=torch.tensor([1]), cls_rule="exact"),
            ValueError,
            r"cls_index: expected \(2,\), one a sample, got \(1,\)",
        ),
        (
            lambda: merge_tokens(X, PLAN, reduce="median"),
            ValueError,
            "reduce: expected one of sum, mean, amax, amin, drop",
        ),
        (lambda: merge_tokens(X[:, :8], PLAN), ValueError, r"merge_tokens: x: expected \(B, 9, D\) as planned"),
        (lambda: merge_weighted(X[:, :8], None, PLAN), ValueError, r"merge_weighted: x: expected \(B, 9, D\)"),
        (lambda: merge_weighted(X, X, PLAN), ValueError, r"size: expected \(2, 9, 1\) as x has it, got \(2, 9, 5\)"),
        (lambda: unmerge_tokens(X, PLAN), ValueError, r"unmerge_tokens: x: expected \(B, 7, D\) as planned"),
        (lambda: merge_source(X[:, :4], PLAN), ValueError, r"merge_source: source: expected \(B, 9, D\) as planned"),
        (lambda: merge_schedule(4, -1), ValueError, "merge_schedule: r: expected 0 or more, got -1"),
        (lambda: merge_schedule(4, [2, -1]), ValueError, r"r: expected 0 or more, got \[2, -1\]"),
        (lambda: merge_schedule(4, (-2, 0.5)), ValueError, "r: expected 0 or more"),
        (lambda: merge_schedule(4, 0.5, tokens=9), ValueError, r"r: expected a fraction in \[0, 0.5\), got 0.5"),
        (lambda: merge_schedule(4, math.nan, tokens=9), ValueError, r"r: expected a fraction in \[0, 0.5\), got nan"),
        (lambda: merge_schedule(4, 0.2), ValueError, "tokens: expected the number of tokens for a fraction, got None"),
        (lambda: merge_schedule(4, (0.25, 0.0)), TypeError, "r: expected an int, a float below 0.5, a pair"),
        (lambda: merge_schedule(4, [1] * 5), ValueError, "r: expected at most 4 entries, one a block, got 5"),
        (lambda: merge_schedule(4, [1, 2], interval=2), ValueError, "got a list; a list has one entry a block"),
        (lambda: merge_schedule(4, [1, 2], layers=[0]), ValueError, "got a list; a list has one entry a block"),
        (lambda: merge_schedule(4, (8, 2)), ValueError, r"expected an inflect in \[-1, 1\], got \(8, 2\)"),
        (lambda: merge_schedule(4, "8"), TypeError, "r: expected an int, a float below 0.5, a pair"),
        (lambda: merge_schedule(4, True), TypeError, "r: expected an int, a float below 0.5, a pair"),
        (lambda: merge_schedule(4, [1, 2, 0.5]), TypeError, r"got \[1, 2, 0.5\]"),
        (lambda: merge_schedule(4, 1, layers=[4]), ValueError, r"layers: expected blocks from 0 to 3, got \[4\]"),
        (
            lambda: merge_schedule(4, 1, layers=[-1, 2]),
            ValueError,
            r"layers: expected blocks from 0 to 3, got \[-1, 2\]",
        ),
        (
            lambda: merge_schedule(4, 1, layers=[1], interval=2),
            ValueError,
            "expected either layers or interval and offset",
        ),
        (
            lambda: merge_schedule(4, 1, interval=0),
            ValueError,
            "interval and offset: expected at least 1 and 0, got 0 and 0",
        ),
        (
            lambda: token_counts(9, [2, 4], protected=1),
            ValueError,
            "token_merging: block 1: expected r from 0 to 3, half of the 6 tokens there that may merge, got 4",
        ),
        (lambda: token_counts(9, [-1], protected=1), ValueError, "block 0: expected r from 0 to 4"),
        (
            lambda: merged_image(torch.zeros(1, 3, 8, 8), torch.eye(12)[None]),
            ValueError,
            "merged_image: source: expected the patches of a 8 x 8 image on a grid of its aspect ratio, got 11; name",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, error, line):
    with pytest.raises(error, match=line) as caught:
        call()
    assert "\n" not in str(caught.value)
