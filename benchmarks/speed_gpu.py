"""SpeeD and four peers on one GPU, ten minutes a seed: a DiT on CIFAR-10, the same number of steps for every arm.

    python benchmarks/speed_gpu.py --seed 0      # then --seed 1 and --seed 2: they merge into one file, plot and table
    python benchmarks/speed_gpu.py --dry-run     # tiny sizes on a CPU, without a download

Not yet run on a GPU: only its dry run has been seen to work, and the times below are a budget, not a measurement.

    feature net         40 s   a ResNet-18 by a fixed recipe, kept in runs/ for the other seeds
    compile, calibrate  40 s   the steps of an arm = 72 s / the median of 50 steps
    five arms     5 x   94 s   72 s of training, 22 s of evaluation

The network is compiled once and set back to the same weights for every arm; the samplers' tables live outside of it. As
in ``speed.py``, data order, flips and noise are functions of (seed, step). An arm is written as soon as it is finished,
and the same command goes on from there.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import (
    ROOT,
    Images,
    Results,
    argument_parser,
    command,
    held_out_accuracy,
    load_images,
    markdown_table,
    progress_bar,
    result_path,
    to_float,
    train_classifier,
)
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from speed import (
    GRID,
    SAMPLERS,
    Denoiser,
    Judge,
    arms_of,
    cost_rows,
    error_rows,
    failures,
    plot,
    report,
    run_arm,
    seconds,
    summary,
)
from torch import nn

from hasten.formats import whole_file
from hasten.nn import LinearSkip, dit

NETS = ROOT / "runs" / "benchmarks"
REACH = "steps to reach uniform's last val/mse"


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    patch_size: int = 4
    width: int = 384
    depth: int = 12
    heads: int = 6
    batch: int = 512
    train_s: float = 72.0
    calibration_steps: int = 50
    evaluations: int = 16
    held_out: int = 1024
    samples: int = 5000
    sample_steps: int = 50
    net_steps: int = 800
    net_batch: int = 512


DRY_RUN = Sizes(
    patch_size=2,
    width=16,
    depth=1,
    heads=2,
    batch=16,
    train_s=0.1,
    calibration_steps=3,
    evaluations=4,
    held_out=16,
    samples=16,
    sample_steps=2,
    net_steps=1,
    net_batch=8,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the arms of a seed that are missing, then report all seeds."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    sizes = DRY_RUN if options.dry_run else Sizes()
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("speed_gpu: expected a GPU, found none; pass --dry-run, or use benchmarks/speed.py")
    data = load(options.data or ("digits" if options.dry_run else "cifar10"))
    protocol = {
        "data": data.name,
        "images": {"shape": data.shape, "train": len(data.train), "held_out": len(data.held_out)},
        "model": "DiTTransformer2DModel in LinearSkip, noise prediction, bfloat16",
        "noise_scheduler": "DDPMScheduler(1000), linear",
        "optimizer": "AdamW, lr 2e-4, no weight decay; flips; measured with EMA(0.9999) of the weights",
        "solver": "DDIM, trailing",
        "feature_net": "ResNet-18 with a 3x3 stem, without its classifier, trained on the training images",
        "reference": "as many real images as samples: held-out ones if they make two such sets, else any",
        "grid": GRID,
        **asdict(sizes),
    }
    path = result_path(options, f"speed_gpu_{data.name}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    missing = [arm for arm in SAMPLERS if not results.select(claim="val/mse", arm=arm, seed=options.seed)]
    if missing:
        start = time.perf_counter()
        run(missing, options.seed, data.to(device), sizes, results)
        print(f"seed {options.seed}: {(time.perf_counter() - start) / 60:.1f} minutes")
    results.add(*reach_rows(results, options.seed))
    plot(results, path.with_suffix(".png"))
    print(report(results), reach_table(results), sep="\n\n")
    if options.check and (failed := failures(results)):
        raise SystemExit("\n".join(failed))


def run(arms: list[str], seed: int, data: Images, sizes: Sizes, results: Results) -> None:
    """Train and measure arms, each written when it is finished."""
    device = data.train.device
    torch.set_float32_matmul_precision("high")
    net, accuracy = feature_net(data, sizes)
    judge = Judge(data, net, name="resnet18", accuracy=accuracy, held_out=sizes.held_out, n=sizes.samples)
    judge.check(results.select(seed=seed))
    results.add(*judge.bound_rows(seed))

    noise_scheduler = DDPMScheduler(1000)
    torch.manual_seed(seed)
    channels, size, _ = data.shape
    network = dit(channels, size, patch_size=sizes.patch_size, width=sizes.width, depth=sizes.depth, heads=sizes.heads)
    model = LinearSkip(network, noise_scheduler, to_float(data.train).square().mean().item()).to(device)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    compiled: Any = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")

    def begin(arm: str) -> Denoiser:
        model.load_state_dict(initial)
        sampler = SAMPLERS[arm](noise_scheduler)
        return Denoiser(
            compiled, sampler, noise_scheduler, data.train, lr=2e-4, batch=sizes.batch, seed=seed, flip=True
        )

    step_s = calibrate(begin("uniform"), judge, sizes)
    samplers = {arm: sampler(noise_scheduler) for arm, sampler in SAMPLERS.items()}
    results.add(*cost_rows(begin("uniform"), samplers, sizes.calibration_steps, seed=seed))
    # arms that were finished earlier set the number of steps for the others
    before = [row["step"] for row in results.select(claim="val/mse", seed=seed)]
    steps = max(before, default=max(int(sizes.train_s / step_s), sizes.evaluations))
    evaluations = [steps * (i + 1) // sizes.evaluations for i in range(sizes.evaluations)]
    with progress_bar() as progress:
        progress.print(f"seed {seed}: {1e3 * step_s:.1f} ms a step, {steps} steps an arm")
        task = progress.add_task("", total=len(arms) * steps)
        for arm in arms:
            progress.update(task, description=f"{arm}, seed {seed}")
            rows = run_arm(
                begin(arm),
                judge,
                arm,
                steps=steps,
                evaluations=evaluations,
                sample_steps=sizes.sample_steps,
                on_step=partial(progress.advance, task),
            )
            results.add(*rows)
            progress.print(summary(rows))


def calibrate(denoiser: Denoiser, judge: Judge, sizes: Sizes) -> float:
    """Compile what training, errors and samples need, and return the seconds of a training step."""
    denoiser.step()
    denoiser.mse_by_timestep(judge.x, judge.noise)
    denoiser.draw(1, sizes.sample_steps)
    denoiser.step()
    return statistics.median(seconds(denoiser.step, denoiser.device) for _ in range(sizes.calibration_steps))


def feature_net(data: Images, sizes: Sizes) -> tuple[nn.Module, float]:
    """A classifier without its last layer, and its accuracy; kept for other seeds, as on a GPU no two are equal."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net: Any = resnet18(num_classes=data.num_classes)
    net.conv1 = nn.Conv2d(data.shape[0], 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.to(data.train.device)
    path = NETS / f"{data.name}_resnet18_{sizes.net_steps}.safetensors"
    if path.exists():
        net.load_state_dict(load_file(path))
    else:
        train_classifier(net, data, steps=sizes.net_steps, batch=sizes.net_batch, flip=True)
        with whole_file(path) as unfinished:
            save_file(net.state_dict(), unfinished)
    accuracy = held_out_accuracy(net, data)
    net.fc = nn.Identity()
    return net, accuracy


def reach_rows(results: Results, seed: int) -> list[dict[str, Any]]:
    """After which share of uniform's steps an arm reaches the error that uniform ends with; None: it does not."""
    uniform = error_rows(results, "uniform")[seed]
    rows = []
    for arm in SAMPLERS:
        curve = sorted((row["step"], row["value"]) for row in results.select(claim="val/mse", arm=arm, seed=seed))
        reached = first_reach(curve, uniform["value"])
        share = None if reached is None else reached / uniform["step"]
        row = {"claim": REACH, "arm": arm, "seed": seed, "value": share, "unit": "share of uniform's steps"}
        # the paper's factor of three is by FID, and for a far larger network
        rows.append({**row, "paper_value": 1 / 3 if arm.startswith("speed") else None})
    return rows


def first_reach(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step at which a curve of (step, error) first comes down to a target, on straight lines between its points."""
    if curve[0][1] <= target:
        return curve[0][0]
    for (step, error), (next_step, next_error) in pairwise(curve):
        if next_error <= target:
            return step + (next_step - step) * (error - target) / (error - next_error)
    return None


def reach_table(results: Results) -> str:
    """The speed-ups by validation error, as a Markdown table."""
    lines = []
    for arm in arms_of(results):
        values = [row["value"] for row in results.select(claim=REACH, arm=arm)]
        lines.append([arm, ", ".join("not reached" if value is None else f"{value:.2f}" for value in values)])
    return markdown_table(["arm", f"{REACH}, as a share of uniform's, every seed"], lines)


def load(data: str) -> Images:
    """CIFAR-10 by torchvision, or what ``load_images`` takes."""
    if data != "cifar10":
        return load_images(data, 32)
    from torchvision.datasets import CIFAR10

    parts = []
    for train in (True, False):
        split = CIFAR10(ROOT / "data", train=train, download=True)
        parts += [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)]
    return Images("cifar10", *parts)


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="cifar10 (default), or a folder with train/ and test/ or val/, in 32x32")
    return parser


if __name__ == "__main__":
    main()
