"""What a Vision Mamba loses by merging tokens, and what re-training gives back: merging beside pruning and controls.

    python benchmarks/rmeeto_recovery.py                  # digits at 16x16, no download; seeds 0, 1, 2
    python benchmarks/rmeeto_recovery.py --data FOLDER    # images with train/ and test/, e.g. CIFAR-10, at 16x16
    python benchmarks/rmeeto_recovery.py --device cuda --data FOLDER    # at 64x64 with 257 tokens, one seed

Of every seed a base is trained until its accuracy stands still, and four arms start from its weights:

    merge      R-MeeTo: the r most similar pairs merge in front of every second block, the order of the image is kept
    unordered  the same, but what was left alone comes first
    prune      the same, but one of each pair is dropped
    none       the control: nothing merges, and the re-training is the same

Each is measured as it is, re-trained, and re-trained with distillation (KD) from the base. Re-trained arms of a seed
share images, their order, epochs, schedule and learning rate; KD is all that its two levels differ in. The learning
rate is chosen once, for the first seed, on images that are neither trained on nor tested on: the one with the highest
mean over the four arms without KD.

Two arms are trained at a time, a thread each (--workers). Bases are kept in runs/, an arm is written as soon as it is
finished, and the same command goes on from there (--fresh measures again, from the same bases). On the GPU it has not
been run yet; its sizes are meant for ten minutes.

--check exits with 1 where a base was still moving, and where merging cost two points or more and re-training gives less
than half of them back. It asserts nothing about merging beside pruning.
"""

import argparse
import copy
import hashlib
import json
import math
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    ROOT,
    Images,
    Results,
    argument_parser,
    command,
    load_images,
    markdown_table,
    mirrored,
    progress_bar,
    reduced_precision,
    result_path,
    to_float,
)
from torch import Tensor

from hasten.formats import whole_file
from hasten.functional import distillation_loss
from hasten.nn import MergeHandle, VisionMamba, attach_token_merging
from hasten.nn.weights import weight_hash
from hasten.optim import cosine, parameter_groups

KINDS: dict[str, dict[str, Any]] = {
    "merge": {},
    "unordered": {"preserve_order": False},
    "prune": {"reduce": "prune"},
    "none": {"method": "none"},
}
AS_IS, RETRAINED, DISTILLED = STAGES = ("as it is", "re-trained", "re-trained with KD")
LR = "accuracy on the images for choosing lr"
THROUGHPUT = "images/s of a forward, ratio to none"
PLATEAU = 0.003  # what the accuracy of a base moves by at its end, at most
LAST_EPOCHS = 3
COSTLY = 0.02  # from this loss of accuracy on, --check wants half of it back


@dataclass(frozen=True)
class Base:
    """The model that is merged, and its training."""

    image_size: int = 16
    patch_size: int = 2
    depth: int = 6
    embed_dim: int = 64
    d_state: int = 8
    images: int = 1000
    flip: bool = False
    batch: int = 64
    epochs: int = 20
    lr: float = 5e-3
    warmup_steps: int = 20


@dataclass(frozen=True)
class Retraining:
    """What is merged, and the training after it."""

    r: int = 16
    epochs: int = 4
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    kd_weight: float = 0.5


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    base: Base = field(default_factory=Base)
    retraining: Retraining = field(default_factory=Retraining)
    choosing: int = 200  # images to choose lr on
    held_out: int = 597
    repeats: int = 11  # forwards whose median is the throughput

    @property
    def base_steps(self) -> int:
        return self.base.epochs * (self.base.images // self.base.batch)

    @property
    def arm_steps(self) -> int:
        return self.retraining.epochs * (self.base.images // self.base.batch)


DIGITS = Sizes()
FOLDER = Sizes(
    Base(images=5000, flip=True, epochs=14), Retraining(r=20, epochs=2, lrs=(5e-4, 2e-3)), choosing=1000, held_out=4000
)
GPU = Sizes(
    Base(
        image_size=64,
        patch_size=4,
        depth=12,
        embed_dim=192,
        d_state=16,
        images=50_000,
        flip=True,
        batch=256,
        epochs=16,
        lr=1e-3,
        warmup_steps=200,
    ),
    Retraining(r=32, epochs=2, lrs=(2e-4,)),
    choosing=0,
    held_out=10_000,
)
DRY_RUN = Sizes(
    Base(patch_size=4, depth=3, embed_dim=8, d_state=2, images=32, batch=16, epochs=4, warmup_steps=2),
    Retraining(r=6, epochs=1, lrs=(1e-3, 2e-3)),
    choosing=20,
    held_out=40,
    repeats=1,
)


# ---------------------------------------------------------------------- images


def load(data: str, sizes: Sizes) -> tuple[Images, Images]:
    """Images with those that are tested on as held-out ones, and the same with those that lr is chosen on.

    Digits are tested on wherever they are not used otherwise; they are enlarged.
    """
    size, trained = sizes.base.image_size, sizes.base.images
    found = load_images(data, size)
    chosen_on = slice(trained, trained + sizes.choosing)
    if len(found.train) < chosen_on.stop:
        raise SystemExit(
            f"{found.name}: expected {trained} images to train on and {sizes.choosing} to choose lr on, "
            f"got {len(found.train)}; pass a smaller --limit"
        )
    held_out, labels = found.held_out, found.held_out_labels
    if data == "digits":
        held_out = torch.cat((held_out, found.train[chosen_on.stop :]))
        labels = torch.cat((labels, found.train_labels[chosen_on.stop :]))
    images = Images(
        found.name,
        _enlarged(found.train[:trained], size),
        found.train_labels[:trained],
        _enlarged(held_out[: sizes.held_out], size),
        labels[: sizes.held_out],
    )
    for_lr = replace(
        images, held_out=_enlarged(found.train[chosen_on], size), held_out_labels=found.train_labels[chosen_on]
    )
    return images, for_lr


def _enlarged(images: Tensor, size: int) -> Tensor:
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="bilinear")


# ---------------------------------------------------------------------- training and measuring


def training(
    model: VisionMamba,
    data: Images,
    *,
    seed: int,
    epochs: range,
    batch: int,
    lr: float,
    warmup_steps: int = 0,
    flip: bool = False,
    teacher: VisionMamba | None = None,
    kd_weight: float = 0.0,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Train by AdamW and a cosine, and yield every epoch when it is done; its order is a function of (seed, epoch)."""
    device = data.train.device
    optimizer = torch.optim.AdamW(parameter_groups(model), lr, weight_decay=0.05)
    schedule = cosine(optimizer, len(epochs) * (len(data.train) // batch), warmup_steps=warmup_steps)
    generator = torch.Generator(device)
    for epoch in epochs:
        generator.manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(data.train), generator=generator, device=device)
        model.train()
        for index in order.split(batch):
            if len(index) < batch:
                break
            on_step()
            x = to_float(data.train[index])
            if flip:
                x = mirrored(x, generator)
            with reduced_precision(device):
                logits = model(x)
                loss = F.cross_entropy(logits, data.train_labels[index])
                if teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(x)
                    loss = loss + kd_weight * distillation_loss(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch


@torch.no_grad()
def held_out_logits(model: VisionMamba, data: Images) -> Tensor:
    """(N, K) float32."""
    model.eval()
    with reduced_precision(data.held_out.device):
        return torch.cat([model(to_float(x)).float() for x in data.held_out.split(500)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images that are given their class."""
    return (logits.argmax(1) == labels).float().mean().item()


@dataclass(frozen=True)
class TrainedBase:
    """The unmerged model that the arms of a seed start from.

    Attributes:
        model: in eval mode; nobody trains it any more.
        hash: of its weights.
        logits: on the held-out images, (N, K).
        last_epochs: its accuracy after each of the last epochs.
    """

    seed: int
    model: VisionMamba
    hash: str
    logits: Tensor
    last_epochs: list[float]


def trained_base(
    model: VisionMamba, seed: int, data: Images, base: Base, path: Path, on_step: Callable[[], None]
) -> TrainedBase:
    """Train a base, or read it where that was done."""
    if path.exists():
        kept = torch.load(path, map_location=data.train.device, weights_only=True)
        model.load_state_dict(kept["model"])
    else:
        kept = {"last_epochs": []}
        for epoch in training(
            model,
            data,
            seed=seed,
            epochs=range(base.epochs),
            batch=base.batch,
            lr=base.lr,
            warmup_steps=base.warmup_steps,
            flip=base.flip,
            on_step=on_step,
        ):
            if epoch >= base.epochs - LAST_EPOCHS:
                kept["last_epochs"].append(accuracy(held_out_logits(model, data), data.held_out_labels))
        with whole_file(path) as unfinished:
            torch.save({"model": model.state_dict(), **kept}, unfinished)
    logits = held_out_logits(model, data)  # leaves it in eval mode
    return TrainedBase(seed, model.requires_grad_(False), weight_hash(model), logits, kept["last_epochs"])


def attach(model: VisionMamba, kind: str, r: int) -> MergeHandle:
    """Make an arm of a model."""
    return attach_token_merging(model, r, retrained=True, **KINDS[kind])


def arm_logits(
    base: TrainedBase,
    stage: str,
    kind: str,
    data: Images,
    sizes: Sizes,
    *,
    lr: float,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """What an arm says to the held-out images, once it is re-trained if the stage says so, (N, K)."""
    model = copy.deepcopy(base.model)
    with attach(model, kind, sizes.retraining.r):
        if stage != AS_IS:
            first = sizes.base.epochs  # the order of the images goes on where the base's ended
            epochs = training(
                model.requires_grad_(True),
                data,
                seed=base.seed,
                epochs=range(first, first + sizes.retraining.epochs),
                batch=sizes.base.batch,
                lr=lr,
                flip=sizes.base.flip,
                teacher=base.model if stage == DISTILLED else None,
                kd_weight=sizes.retraining.kd_weight,
                on_step=on_step,
            )
            for _ in epochs:
                pass
        return held_out_logits(model, data)


def arm_row(base: TrainedBase, stage: str, kind: str, data: Images, logits: Tensor) -> dict[str, Any]:
    """The accuracy of an arm, its loss, and how often it says what its base says."""
    row = {"claim": stage, "arm": kind, "seed": base.seed, "unit": "accuracy", "base": base.hash}
    row["value"] = accuracy(logits, data.held_out_labels)
    row["agreement"] = accuracy(logits, base.logits.argmax(1))
    row["loss"] = F.cross_entropy(logits, data.held_out_labels).item()
    if (stage, kind) == (AS_IS, "none"):
        row["last_epochs"] = base.last_epochs
    return row


def throughput_rows(model: VisionMamba, images: Tensor, sizes: Sizes) -> list[dict[str, Any]]:
    """How much faster a forward is by each way of merging, beside what its FLOPs say."""
    rows = []
    for kind in KINDS:
        if kind == "none":
            continue
        with attach(model, kind, sizes.retraining.r) as handle, reduced_precision(images.device):
            plain, merged = handle.throughput(to_float(images), repeats=sizes.repeats)
            flops, merged_flops = handle.flops(to_float(images[:1]))
            tokens = [row.after for row in handle.table()]
        row = {"claim": THROUGHPUT, "arm": kind, "seed": None, "value": merged / plain, "unit": "ratio of medians"}
        rows.append({**row, "flops_ratio": flops / merged_flops, "images_per_s": merged, "tokens": tokens})
    return rows


# ---------------------------------------------------------------------- the report


def seeds_of(results: Results) -> list[int]:
    """The seeds of which every arm was measured."""
    found = {(row["claim"], row["arm"], row["seed"]) for row in results.rows}
    seeds = sorted({seed for claim, _, seed in found if claim in STAGES})
    return [seed for seed in seeds if all((stage, kind, seed) in found for stage in STAGES for kind in KINDS)]


def column(results: Results, stage: str, kind: str, key: str = "value") -> list[float]:
    """A number of an arm, for every complete seed."""
    return [results.select(claim=stage, arm=kind, seed=seed)[0][key] for seed in seeds_of(results)]


def mean_sd(values: Sequence[float], form: str = ".1f", *, scale: float = 100) -> str:
    """The mean, and the standard deviation where there are several; of shares, in per cent."""
    scaled = [scale * value for value in values]
    sd = f" ± {statistics.stdev(scaled):{form.lstrip('+')}}" if len(scaled) > 1 else ""
    return f"{statistics.fmean(scaled):{form}}{sd}"


def binomial_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n images."""
    z = 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return centre - half, centre + half


def paired(results: Results, arm: tuple[str, str], other: tuple[str, str]) -> str:
    """By how many points an arm (stage, kind) is above another, paired by seed."""
    ours, theirs = column(results, *arm), column(results, *other)
    return mean_sd([a - b for a, b in zip(ours, theirs, strict=True)], "+.1f")


def tried_lrs(results: Results) -> dict[float, float]:
    """Learning rate -> mean accuracy over the arms; empty where there was no choice."""
    lrs = sorted({row["step"] for row in results.select(claim=LR)})
    return {lr: statistics.fmean(row["value"] for row in results.select(claim=LR, step=lr)) for lr in lrs}


def chosen_lr(results: Results) -> float:
    """The best learning rate that was tried, the lower one of two that are equal, or the only one there is."""
    means = tried_lrs(results)
    return max(means, key=means.__getitem__) if means else results.protocol["retraining"]["lrs"][0]


def report(results: Results) -> str:
    """All that was measured, as Markdown."""
    n = results.protocol["images"]["held_out"]
    arms, differences = [], []
    for stage in STAGES:
        for kind in KINDS:
            low, high = binomial_interval(statistics.fmean(column(results, stage, kind)), n)
            arms.append(
                [
                    stage if (stage, kind) != (AS_IS, "none") else "the base",
                    kind,
                    mean_sd(column(results, stage, kind)),
                    f"{100 * low:.1f} to {100 * high:.1f}",
                    mean_sd(column(results, stage, kind, "agreement")),
                    mean_sd(column(results, stage, kind, "loss"), ".3f", scale=1),
                ]
            )
    for other in ("prune", "unordered", "none"):
        cells = [paired(results, (stage, "merge"), (stage, other)) for stage in STAGES]
        differences.append([f"merge - {other}", *cells])
    distillation = [[kind, paired(results, (DISTILLED, kind), (RETRAINED, kind))] for kind in KINDS]
    speeds = [
        [row["arm"], f"{row['value']:.2f}", f"{row['flops_ratio']:.2f}", ", ".join(map(str, row["tokens"]))]
        for row in results.select(claim=THROUGHPUT)
    ]
    tables = [
        markdown_table(["", "arm", "accuracy, %", f"95 % of {n} images", "agreement with the base, %", "loss"], arms),
        markdown_table(["points", *STAGES], differences),
        markdown_table(["arm", "with KD - without, points"], distillation),
        markdown_table(["arm", "images/s, ratio to none", "FLOPs predict", "tokens, block by block"], speeds),
    ]
    return "\n\n".join([*tables, _note(results)])


def _note(results: Results) -> str:
    seeds = seeds_of(results)
    moved = ", ".join(f"{100 * spread(results, seed):.2f}" for seed in seeds)
    tried = ", ".join(f"{lr:g}: {mean:.1%}" for lr, mean in tried_lrs(results).items())
    return (
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; differences are paired by seed. The "
        f"interval is of the held-out images, which all seeds share. In its last {LAST_EPOCHS} epochs the accuracy of "
        f"the base moved by {moved} points. Re-trained for {results.protocol['retraining']['epochs']} epochs from lr "
        f"{chosen_lr(results):g}{f', chosen by {tried}' if tried else ''}."
    )


def spread(results: Results, seed: int) -> float:
    """By how much the accuracy of a base moved in its last epochs."""
    last = results.select(claim=AS_IS, arm="none", seed=seed)[0]["last_epochs"]
    return max(last) - min(last)


def failures(results: Results) -> list[str]:
    """What the measurement fails to show, a line each."""
    found = [
        f"base of seed {seed}: expected an accuracy that moves by less than {100 * PLATEAU:g} points, "
        f"got {100 * moved:.2f}; give it more epochs"
        for seed in seeds_of(results)
        if (moved := spread(results, seed)) >= PLATEAU
    ]
    base, merged = (statistics.fmean(column(results, AS_IS, kind)) for kind in ("none", "merge"))
    if base - merged >= COSTLY:
        for stage in (RETRAINED, DISTILLED):
            back = (statistics.fmean(column(results, stage, "merge")) - merged) / (base - merged)
            if back < 0.5:
                found.append(f"merge, {stage}: expected half of the lost accuracy back, got {back:.0%}")
    return found


def plot(results: Results, path: Path) -> None:
    """Show the accuracy of every arm and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(1, 1), layout="constrained")
    looks = dict(zip(STAGES, (("0.5", 0.25), ("C0", 0.0), ("C1", -0.25)), strict=True))  # colour, height
    for axes, stages in zip(panels, (STAGES, STAGES[1:]), strict=True):
        for y, kind in enumerate(reversed(KINDS)):
            for stage in stages:
                values = [100 * value for value in column(results, stage, kind)]
                colour, up = looks[stage]
                axes.plot(values, [y + up] * len(values), "o", color=colour, alpha=0.5)
                label = stage if y == 0 else None
                axes.plot(statistics.fmean(values), y + up, "|", color=colour, ms=16, mew=2, label=label)
        base = 100 * statistics.fmean(column(results, AS_IS, "none"))
        axes.axvline(base, color="0.5", linestyle="--", linewidth=0.8)
        axes.set_yticks(range(len(KINDS)), reversed(KINDS))
        axes.set_xlabel("accuracy on held-out images, % (dashed: the base)")
    panels[0].legend(frameon=False, loc="lower left")
    panels[1].set_title("re-trained alone", fontsize=10)
    panels[0].set_title("all (dots: seeds, bars: means)", fontsize=10)
    tokens = results.select(claim=THROUGHPUT)[0]["tokens"]
    figure.suptitle(f"{results.protocol['data']}: a Vim that goes from {tokens[0]} to {tokens[-1]} tokens")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------- the benchmark


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # networks this small lose by more, and by far where cores are busy
    digits = options.data == "digits"
    gpu = torch.cuda.is_available() and not digits and not options.dry_run
    device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    if device.type == "cuda" and digits:
        raise SystemExit("data: expected a folder for a GPU, got digits; pass --data FOLDER, or --device cpu")
    sizes = DRY_RUN if options.dry_run else GPU if device.type == "cuda" else DIGITS if digits else FOLDER
    if options.limit is not None:
        sizes = replace(sizes, base=replace(sizes.base, images=options.limit))
    seeds = options.seeds or ([0] if device.type == "cuda" else [0, 1, 2])
    data, for_lr = load(options.data, sizes)
    base_protocol = {
        "data": data.name,
        "images": {"shape": data.shape, "train": len(data.train), "held_out": len(data.held_out)},
        "device": device.type,
        "optimizer": "AdamW, weight decay 0.05 on matrices; cosine to 0; bfloat16 on a GPU",
        "base": asdict(sizes.base),
    }
    protocol = base_protocol | {"retraining": asdict(sizes.retraining), "choosing": len(for_lr.held_out)}
    path = result_path(options, f"rmeeto_recovery_{device.type}_{data.name}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    wanted = [(stage, kind, seed) for seed in seeds for stage in STAGES for kind in KINDS]
    missing = [arm for arm in wanted if not results.select(claim=arm[0], arm=arm[1], seed=arm[2])]
    if missing:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} arms are in {path.name}; this run adds the others")
        key = hashlib.sha256(json.dumps(base_protocol).encode()).hexdigest()[:8]
        bases = (options.out or ROOT / "runs") / "rmeeto_recovery" / f"{data.name}_{key}"
        workers = options.workers if device.type == "cpu" else 1
        incomplete = sorted({seed for *_, seed in missing})
        run(incomplete, data.to(device), for_lr.to(device), sizes, results, bases=bases, workers=workers)
    model = build(seeds[0], data, sizes.base).to(device).eval()
    results.add(*throughput_rows(model, data.held_out[: 4 * sizes.base.batch].to(device), sizes))
    plot(results, path.with_suffix(".png"))
    print(report(results))
    if options.check and (failed := failures(results)):
        raise SystemExit("\n".join(failed))


def run(
    seeds: Sequence[int], data: Images, for_lr: Images, sizes: Sizes, results: Results, *, bases: Path, workers: int
) -> None:
    """Train bases, choose lr, train and measure arms, ``workers`` at a time, each written when it is finished."""
    # initial weights come from torch's global generator: drawn before there are threads
    models = {seed: build(seed, data, sizes.base).to(data.train.device) for seed in seeds}
    lrs = () if len(sizes.retraining.lrs) == 1 or results.select(claim=LR) else sizes.retraining.lrs
    stop = threading.Event()
    with (
        progress_bar() as progress,
        ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool,
    ):
        trained_arms = len(seeds) * 2 * len(KINDS) + len(lrs) * len(KINDS)
        task = progress.add_task("training steps", total=len(seeds) * sizes.base_steps + trained_arms * sizes.arm_steps)

        def on_step() -> None:
            if stop.is_set():
                raise CancelledError
            progress.advance(task)

        def lr_row(base: Future[TrainedBase], lr: float, kind: str) -> dict[str, Any]:
            logits = arm_logits(base.result(), RETRAINED, kind, for_lr, sizes, lr=lr, on_step=on_step)
            row = {"claim": LR, "arm": kind, "seed": seeds[0], "step": lr, "unit": "accuracy; step is lr"}
            return {**row, "value": accuracy(logits, for_lr.held_out_labels)}

        def measured(base: TrainedBase, stage: str, kind: str, lr: float) -> dict[str, Any]:
            logits = arm_logits(base, stage, kind, data, sizes, lr=lr, on_step=on_step)
            return arm_row(base, stage, kind, data, logits)

        try:
            futures = {
                seed: pool.submit(
                    trained_base, model, seed, data, sizes.base, bases / f"seed_{seed}.pt", on_step=on_step
                )
                for seed, model in models.items()
            }
            # begun after all bases are, so that none waits for one that waits for it
            tried = [pool.submit(lr_row, futures[seeds[0]], lr, kind) for lr in lrs for kind in KINDS]
            trained = [future.result() for future in futures.values()]
            rows = [future.result() for future in tried]
            if rows:
                results.add(*rows)  # all or none: a part of them would choose another lr
            lr = chosen_lr(results)
            progress.print(f"lr {lr:g}")
            missing = [
                (base, stage, kind)
                for base in trained
                for stage in STAGES
                for kind in KINDS
                if not results.select(claim=stage, arm=kind, seed=base.seed, base=base.hash)
            ]
            left = sizes.arm_steps * sum(stage != AS_IS for _, stage, _ in missing)
            progress.update(task, total=progress.tasks[0].completed + left)
            running = [pool.submit(measured, *arm, lr) for arm in missing]
            for finished in as_completed(running):
                row = finished.result()
                results.add(row)
                progress.print(f"{row['arm']} {row['claim']}, seed {row['seed']}: {row['value']:.1%}")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def build(seed: int, data: Images, base: Base) -> VisionMamba:
    """The model of a seed before its first step."""
    torch.manual_seed(seed)
    return VisionMamba(
        base.image_size,
        base.patch_size,
        depth=base.depth,
        embed_dim=base.embed_dim,
        d_state=base.d_state,
        in_chans=data.shape[0],
        num_classes=data.num_classes,
        init_dt_b=True,
    )


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ or val/")
    parser.add_argument("--limit", type=int, help="images to train on; default: 1000 digits, 5000 of a folder")
    parser.add_argument("--seeds", type=_seeds, help="default: 0,1,2; on a GPU 0")
    parser.add_argument("--workers", type=int, default=2, help="arms trained at the same time, a core each; default: 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one, for a folder")
    return parser


if __name__ == "__main__":
    main()
