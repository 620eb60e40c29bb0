"""Images per second of Vims and ViTs as more tokens merge, beside what the FLOPs predict.

    python benchmarks/merge_throughput.py                          # the GPU if there is one, else one CPU core
    python benchmarks/merge_throughput.py --device cpu             # Vim-Ti and DeiT-Ti, eight minutes
    python benchmarks/merge_throughput.py --models vim_small_patch16_224,vit_small_patch16_224

r tokens merge in front of every second block of a Vim, from block 2, and in every block of a ViT, or as many as can.
A forward is in eval mode, with log sizes on the attention logits of a ViT; a training step is forward, backward and
AdamW, without them, as re-trained weights need none. The arms of a model take turns. r = 0 is the model as it is; a
second r = 0 among the arms shows by how much equal work differs. The models of several runs share one file.

    predicted ratio     FLOPs of a forward without / with merging, by torch's counter; for the training step the same
    share of the gain   (measured ratio - 1) / (predicted ratio - 1)

--check exits with 1 where a model reaches less than 80 % of its predicted gain, in a forward or a training step, at the
r that leaves nearest to 70 % of the tokens, mean over the blocks.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import Results, argument_parser, command, markdown_table, reduced_precision, result_path
from timing import Times, Work, in_turns
from torch import Tensor

from hasten.formats import whole_file
from hasten.functional import token_counts
from hasten.nn import MergeHandle, MergeOptions, Merging, VisionMamba

FORWARD, STEP = "forward", "training step"
PLAIN, AGAIN = "r = 0", "r = 0, again"
TARGET_SHARE, TARGET_LEFT = 0.8, 0.7


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    models: tuple[str, ...] = ("vim_tiny_patch16_224", "deit_tiny_patch16_224")
    r: tuple[int, ...] = (3, 5, 8, 11, 16)
    img_size: int = 224
    depth: int | None = None  # None: the model's own
    batch: int = 32
    forward_repeats: int = 3
    step_repeats: int = 3


GPU = Sizes(
    models=("vim_tiny_patch16_224", "vim_small_patch16_224", "deit_tiny_patch16_224", "vit_small_patch16_224"),
    batch=128,
    forward_repeats=20,
    step_repeats=20,
)
DRY_RUN = Sizes(r=(1,), img_size=64, depth=3, batch=1, forward_repeats=1, step_repeats=1)


# ---------------------------------------------------------------------- measuring


def merge_options(model: Any, r: int) -> MergeOptions:
    """Merge r in every block that merges, or as many as can."""
    if isinstance(model, VisionMamba):
        return MergeOptions(r)
    schedule, left = [], model.patch_embed.num_patches
    for _ in model.blocks:
        schedule.append(min(r, left // 2))
        left -= schedule[-1]
    return MergeOptions(schedule)


def prediction(model: Any, r: int, image: Tensor) -> dict[str, float]:
    """By which ratio an r reduces the FLOPs of a forward, and which share of the tokens it leaves, block by block."""
    with MergeHandle(model, merge_options(model, r)) as handle:
        before, after = handle.flops(image)
        tokens = handle.backbone.num_tokens
        left = token_counts(tokens, handle.merging.r, protected=handle.backbone.num_prefix_tokens)
    return {"predicted_ratio": before / after, "tokens_left": fmean(left) / tokens}


def measure(name: str, sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Forward and training step of a model at every r."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=sizes.img_size, depth=sizes.depth).to(device)
    images = torch.randn(sizes.batch, 3, sizes.img_size, sizes.img_size, device=device)
    labels = torch.randint(1000, (sizes.batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    predicted = {f"r = {r}": prediction(model, r, images[:1]) for r in (0, *sizes.r)}
    predicted[AGAIN] = predicted[PLAIN]

    def forward() -> None:
        with torch.inference_mode(), reduced_precision(device):
            model(images)

    def step() -> None:
        with reduced_precision(device):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rows = []
    for what, work, repeats in ((FORWARD, forward, sizes.forward_repeats), (STEP, step, sizes.step_repeats)):
        model.train(what == STEP)
        times = at_every_r(model, work, sizes.r, repeats, device, retrained=what == STEP)
        for arm, time in times.items():
            rate = {"value": sizes.batch / time.minimum, "unit": "images/s, of the fastest", "repeats": repeats}
            ratio = times[PLAIN].minimum / time.minimum
            row = {"claim": f"{what}, {name}", "arm": arm, **rate, "ratio": ratio, **predicted[arm]}
            gain = predicted[arm]["predicted_ratio"] - 1
            rows.append({**row, "share_of_gain": (ratio - 1) / gain if gain else None})
    return rows


def at_every_r(
    model: Any, work: Work, rs: Sequence[int], repeats: int, device: torch.device, *, retrained: bool
) -> dict[str, Times]:
    """The times of a work on a model that merges r tokens, and twice that of the model as it is."""
    with MergeHandle(model, merge_options(model, 0)) as handle:
        mergings: dict[str, Merging | None] = {PLAIN: None, AGAIN: None}
        for r in rs:
            mergings[f"r = {r}"] = merge_options(model, r).resolve(handle.backbone, retrained=retrained)
        works = dict.fromkeys(mergings, work)
        return in_turns(works, device, repeats=repeats, before=lambda arm: handle.set(mergings[arm]))


# ---------------------------------------------------------------------- the report


def report(results: Results) -> str:
    """What was measured, as Markdown."""
    header = ["tokens left", "FLOPs predict", "measured", "share of the gain", "images/s"]
    return "\n\n".join(
        markdown_table(
            [claim, *header],
            [
                [
                    row["arm"],
                    f"{row['tokens_left']:.0%}",
                    f"{row['predicted_ratio']:.3f}",
                    f"{row['ratio']:.3f}",
                    "" if row["share_of_gain"] is None else f"{row['share_of_gain']:.0%}",
                    f"{row['value']:.4g}",
                ]
                for row in results.select(claim=claim)
            ],
        )
        for claim in claims(results)
    )


def claims(results: Results) -> list[str]:
    """Everything that was measured, once each."""
    return list(dict.fromkeys(row["claim"] for row in results.rows))


def failures(results: Results) -> list[str]:
    """Where too little of the predicted gain is reached, a line each."""
    found = []
    for claim in claims(results):
        merging = [row for row in results.select(claim=claim) if row["share_of_gain"] is not None]
        row = min(merging, key=lambda row: abs(row["tokens_left"] - TARGET_LEFT))
        if row["share_of_gain"] < TARGET_SHARE:
            found.append(
                f"{claim}, {row['arm']}: expected {TARGET_SHARE:.0%} of the predicted gain, "
                f"got {row['share_of_gain']:.0%}"
            )
    return found


def plot(results: Results, path: Path) -> None:
    """Show the measured ratios over the predicted ones, with how much equal work differed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    largest = max(max(row["predicted_ratio"], row["ratio"]) for row in results.rows)
    for axes, what in zip(panels, (FORWARD, STEP), strict=True):
        axes.plot([1, largest], [1, largest], color="grey", linewidth=0.8, label="as predicted")
        axes.plot([1, largest], [1, 1 + TARGET_SHARE * (largest - 1)], ":", color="grey", label=f"{TARGET_SHARE:.0%}")
        for claim in claims(results):
            if claim.startswith(f"{what}, "):
                rows = sorted(results.select(claim=claim), key=lambda row: row["predicted_ratio"])
                points = [(row["predicted_ratio"], row["ratio"]) for row in rows]
                axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=claim.removeprefix(f"{what}, "))
        axes.set_title(what, fontsize=10)
        axes.set_xlabel("ratio of FLOPs, without / with merging")
        axes.legend(frameon=False)
    panels[0].set_ylabel("ratio of images/s, with / without merging")
    figure.suptitle("What merging gains; the points at 1 are equal work")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model, each written when it is finished, then report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--models", type=lambda text: text.split(","), help="names of timm, joined by commas")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu"))
    torch.set_num_threads(1)
    sizes = DRY_RUN if options.dry_run else GPU if device.type == "cuda" else Sizes()
    precision = "bfloat16 autocast" if device.type == "cuda" else "float32"
    protocol = {"device": device.type, "precision": precision, "optimizer": "AdamW", **asdict(sizes)}
    del protocol["models"]
    path = result_path(options, f"merge_throughput_{device.type}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    for name in options.models or sizes.models:
        results.add(*measure(name, sizes, device))
    plot(results, path.with_suffix(".png"))
    print(report(results))
    if options.check and (failed := failures(results)):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
