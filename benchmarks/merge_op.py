"""What a merge of tokens costs beside one block's forward: planning and merging, in the forms it could have.

    python benchmarks/merge_op.py                # on the GPU if there is one, else one CPU core; half a minute
    python benchmarks/merge_op.py --device cpu

The merge is the first of a model, where there are the most tokens: 197 before it. All forms share the plan's code.

    one stream      the sum of what the blocks before have computed is merged, as hasten does
    two streams     the last block's output and the sum before it apart, as R-MeeTo's authors do
    matmul          sources are added to their destinations by a matmul with 0 and 1, as hasten does
    scatter         by index_add

--check exits with 1 where, on a CPU, ours takes more than 10 % of the block it stands in front of.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
from common import Results, argument_parser, command, markdown_table, reduced_precision, result_path
from timing import Work, in_turns
from torch import Tensor, nn

from hasten.functional import MergePlan, bipartite_soft_matching, merge_weighted, ordered_bipartite_matching
from hasten.nn import VisionMamba

PLAN, BLOCK = "plan", "block"
OURS = "one stream, matmul"
TARGET = 0.1

Merge = Callable[[Tensor, Tensor, MergePlan], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    r: tuple[tuple[str, int], ...] = (  # the published ones of Vim, a usual one of ToMe
        ("vim_tiny_patch16_224", 5),
        ("vim_small_patch16_224", 11),
        ("vit_small_patch16_224", 8),
    )
    img_size: int = 224
    batch: int = 8
    repeats: int = 20


GPU = Sizes(batch=128, repeats=50)
DRY_RUN = Sizes(img_size=64, batch=1, repeats=1)


def merge_by_scatter(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """``merge_weighted`` with index_add, (B, N, C) and (B, N, 1) -> (B, N - r, C) and (B, N - r, 1)."""
    sample = torch.arange(len(x), device=x.device)[:, None]
    sources, places = ((index + sample * x.shape[1]).flatten() for index in (plan.src, plan.keep))
    destinations = (plan.dst + sample * plan.keep.shape[1]).flatten()

    def added(tokens: Tensor) -> Tensor:
        tokens = tokens.flatten(0, 1)
        total = tokens.index_select(0, places).index_add_(0, destinations, tokens.index_select(0, sources))
        return total.unflatten(0, plan.keep.shape)

    total = added(size)
    return added(x * size) / total, total


def works(name: str, r: int, sizes: Sizes, device: torch.device) -> dict[str, Work]:
    """The block, the plan, and every form of plan and merge."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=sizes.img_size, num_classes=10, depth=2).eval().to(device)
    vim = isinstance(model, VisionMamba)
    tokens = model.num_tokens if vim else model.pos_embed.shape[1]
    computed = torch.bfloat16 if device.type == "cuda" else torch.float32  # what a layer returns under autocast
    hidden, residual = (torch.randn(sizes.batch, tokens, model.embed_dim, device=device) for _ in range(2))
    hidden = hidden.to(computed)
    size = torch.ones(sizes.batch, tokens, 1, device=device)
    if vim:
        plan = partial(ordered_bipartite_matching, hidden, r, cls_index=(tokens - 1) // 2)
        block = partial(_vim_block, model.layers[1], hidden, residual)
    else:
        attention = model.blocks[1].attn
        keys = torch.randn(sizes.batch, attention.num_heads, tokens, attention.head_dim, device=device).to(computed)
        plan = partial(_vit_plan, keys, r)
        block = partial(model.blocks[1], residual)

    def one_stream(merge: Merge) -> None:
        merge(residual, size, plan())

    def two_streams(merge: Merge) -> None:
        found = plan()
        merge(hidden, size, found)
        merge(residual, size, found)

    forms: dict[str, Work] = {BLOCK: block, PLAN: plan}
    for summation, merge in (("matmul", merge_weighted), ("scatter", merge_by_scatter)):
        forms[f"one stream, {summation}"] = partial(one_stream, cast(Merge, merge))
        if vim:  # a ViT has no second stream
            forms[f"two streams, {summation}"] = partial(two_streams, cast(Merge, merge))
    return forms


def _vim_block(block: nn.Module, hidden: Tensor, residual: Tensor) -> None:
    block(residual + hidden)


def _vit_plan(keys: Tensor, r: int) -> MergePlan:
    # the mean over the heads is part of planning
    return bipartite_soft_matching(keys.mean(1), r, num_prefix_tokens=1)


def measure(name: str, r: int, sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """A row a form, with its share of the block's time."""
    with torch.inference_mode(), reduced_precision(device):
        forms = works(name, r, sizes, device)
        # each after a block, which leaves the caches as a model does
        times = in_turns(forms, device, repeats=sizes.repeats, before=lambda form: forms[BLOCK]())
    block = times[BLOCK].minimum
    return [
        {"claim": f"{name}, r = {r}", "arm": arm, **time.row(), "share_of_block": time.minimum / block}
        for arm, time in times.items()
    ]


def report(results: Results, sizes: Sizes) -> str:
    """What was measured, as Markdown."""
    tables = []
    for name, r in sizes.r:
        rows = results.select(claim=f"{name}, r = {r}")
        lines = [[row["arm"], f"{row['value']:.3g}", f"{row['share_of_block']:.1%}"] for row in rows]
        tables.append(markdown_table([f"{name}, batch {sizes.batch}, r = {r}", "ms", "of a block"], lines))
    return "\n\n".join(tables)


def failures(results: Results) -> list[str]:
    """The models in which ours costs too much, a line each."""
    return [
        f"{row['claim']}: expected plan and merge within {TARGET:.0%} of a block, got {row['share_of_block']:.1%}"
        for row in results.select(arm=OURS)
        if row["share_of_block"] > TARGET
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, then report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu"))
    torch.set_num_threads(1)
    sizes = DRY_RUN if options.dry_run else GPU if device.type == "cuda" else Sizes()
    precision = "bfloat16 autocast, merges in float32" if device.type == "cuda" else "float32"
    path = result_path(options, f"merge_op_{device.type}")
    protocol = {"device": device.type, "precision": precision, **asdict(sizes)}
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    for name, r in sizes.r:
        results.add(*measure(name, r, sizes, device))
    print(report(results, sizes))
    if options.check and device.type == "cpu" and (failed := failures(results)):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
