"""Dataset distillation of CIFAR-10 on a GPU: DM, MTT, DATM and EDF at ten images a class, beside random images.

    python benchmarks/unrolls.py --device cuda          # first: time and memory of an iteration
    python benchmarks/edf_gpu.py --data FOLDER          # FOLDER/train/<class>/ and FOLDER/test/<class>/
    python benchmarks/edf_gpu.py --data cifar10         # torchvision's, in ./data
    python benchmarks/edf_gpu.py --data FOLDER --iterations 500 --seeds 0 --workers 8

Not measured yet. It is made for one GPU and little time: 8 experts of 15 epochs by GSAM and as many by SGD, trained
once; 1,500 iterations of 20 inner steps on all of the 100 images, for DM as many without inner steps; 3 networks of 300
epochs a row. A seed draws the synthetic images and the networks, the experts are the same for all. Images are whitened
and stay in memory for every arm. The arms are shipped experiments with these sizes; edf_dropout is edf_cifar10 as it
is. The first seed runs each at two step sizes for the images, of which the holdout chooses, as in edf.py; random and
random_soft come from the runs of datm.

A run takes --iterations times what unrolls.py says of an iteration, and the evaluation of some fifteen networks. It
launches many small kernels, which is why several of them share the GPU (--workers), each with the images in its own
memory. A run is written as soon as it is finished, and the same command goes on from there, also with the experts that
are complete; other --iterations are another protocol.

--check exits with 1 where an arm that distils is not above random images with hard labels by more than three standard
deviations, over seeds, of their difference. It asserts nothing about the arms among each other.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, Results, argument_parser, command, result_path
from edf import Arm, Run, complete, failures, in_parallel, numbers, plot, report, row_of, some_of

EXPERTS = ("experts_cifar10", "experts_sgd_cifar10")
GSAM, SGD = EXPERTS
MATCHING = (
    "datamodule.expert_epochs=2",
    "module.batch_syn=null",
    "module.lr_lr=1e-4",  # the step size has few iterations to find its place
)
SOFT = (
    *MATCHING,
    "module.max_loss=2.0",
)  # a student that has not moved is at 1, the recipe's; so few steps start there
ARMS = {
    "dm": Arm("dm_cifar10", ("callbacks.evaluate_distilled.lr=holdout",), rates=(1.0, 10.0)),
    "mtt": Arm("mtt_cifar10", MATCHING, rates=(100.0, 1000.0)),
    "datm": Arm("datm_cifar10", SOFT, rates=(100.0, 1000.0)),
    "edf_dropout": Arm("edf_cifar10", SOFT, rates=(100.0, 1000.0)),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    iterations: int = 1500
    ipc: int = 10
    image_size: int = 32
    width: int = 128
    depth: int = 3
    experts: int = 8
    epochs: int = 15
    syn_steps: int = 20
    per_class: int = 256
    nets: int = 3
    net_epochs: int = 300


DRY_RUN = Sizes(
    2, ipc=1, image_size=8, width=4, depth=2, experts=1, epochs=3, syn_steps=2, per_class=2, nets=1, net_epochs=1
)


class Setup(NamedTuple):
    """Where and how runs are made."""

    data: str
    sizes: Sizes
    accelerator: str
    folder: Path
    threads: int


def resident(kind: str, **options: Any) -> Any:
    """A datamodule that the runs of a process share: its images are read and whitened once."""
    return _resident(kind, tuple(sorted(options.items())))


@cache
def _resident(kind: str, options: tuple[tuple[str, Any], ...]) -> Any:
    from hasten import datamodules

    return getattr(datamodules, kind)(**dict(options))


# ---------------------------------------------------------------------- measuring


def shared_words(setup: Setup) -> list[str]:
    """What experts and arms have in common: the images, the network, the machine."""
    sizes = setup.sizes
    if setup.data == "cifar10":
        data, kind = ["data=cifar10"], "CIFAR10"
    else:
        classes = sum(entry.is_dir() for entry in Path(setup.data, "train").iterdir())
        data, kind = ["data=image_folder", f"data.root={setup.data}", f"image.num_classes={classes}"], "ImageFolder"
    return [
        *data,
        "data._target_=edf_gpu.resident",
        f"+data.kind={kind}",
        "data.zca=true",
        "++data.mean=0.5",  # whitening takes the place of an experiment's own
        "++data.std=0.5",
        "data.seed=0",  # of the order in which experts see them; one datamodule serves all seeds
        f"image.size={sizes.image_size}",
        f"model.width={sizes.width}",
        f"model.depth={sizes.depth}",
        f"trainer={setup.accelerator}",
        "logger=none",
        f"threads={setup.threads}",
    ]


def expert_words(experiment: str, setup: Setup) -> list[str]:
    """The command line of the experts."""
    return [
        f"experiment={experiment}",
        *shared_words(setup),
        f"module.experts={setup.sizes.experts}",
        f"module.epochs={setup.sizes.epochs}",
        f"run_dir={setup.folder / experiment}",
    ]


def words(run: Run, setup: Setup) -> list[str]:
    """The command line of a run."""
    sizes, arm = setup.sizes, ARMS[run.arm]
    third = max(1, sizes.iterations // 3)
    max_start = sizes.epochs - 1  # two epochs from the last start are the last epoch
    experts = setup.folder / (SGD if run.arm == "mtt" else GSAM) / "experts"
    if run.arm == "dm":
        own = [f"datamodule.experts={experts}", f"datamodule.per_class={sizes.per_class}"]
    else:
        own = [
            f"datamodule.path={experts}",
            f"datamodule.max_start={max_start}",
            f"module.syn_steps={sizes.syn_steps}",
        ]
    if run.arm in ("datm", "edf_dropout"):
        own += [f"datamodule.initial_max_start={max_start // 2}", f"datamodule.expansion={third}"]
        if run.dry:  # experts so young are not right about every class
            own += ["module.init._target_=hasten.nn.dataset_distillation.initial.real"]
    return [
        f"experiment={arm.experiment}",
        f"seed={run.seed}",
        *shared_words(setup),
        "first=[]",
        f"module.synthetic.ipc={run.ipc}",
        f"module.lr_img={run.rate}",
        *own,
        f"trainer.max_steps={sizes.iterations}",
        f"callbacks.evaluate_distilled.every={third}",
        f"callbacks.evaluate_distilled.seeds={sizes.nets}",
        f"callbacks.evaluate_distilled.epochs={sizes.net_epochs}",
        f"callbacks.evaluate_distilled.baselines=[{'random,random_soft' if run.arm == 'datm' else ''}]",
        "+callbacks.evaluate_distilled.scores=false",
        *arm.words,
        f"run_dir={setup.folder / f'{run.arm}_{run.rate:g}_seed{run.seed}'}",
    ]


def train_experts(job: tuple[str, Setup]) -> dict[str, Any]:
    """The experts of that experiment in the folder of the benchmark, unless they are complete."""
    from hasten.run import compose
    from hasten.run import run as run_experiment
    from hasten.run_folders import result_of

    composed = compose(expert_words(*job))
    if result_of(Path(composed.run_dir)).get("status") != "complete":
        run_experiment(composed)
    return {}


def measure(job: tuple[Run, Setup]) -> dict[str, Any]:
    """One run's row, with its seconds, evaluation included, and on a GPU the peak of its memory."""
    from hasten.run import compose
    from hasten.run import run as run_experiment

    composed = compose(words(*job))
    shutil.rmtree(composed.run_dir, ignore_errors=True)  # of a benchmark that was interrupted
    run, setup = job
    on_gpu = setup.accelerator == "gpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    metrics = run_experiment(composed).metrics
    measured = {"seconds": round(time.perf_counter() - began, 1)}
    if on_gpu:
        measured["peak_MiB"] = torch.cuda.max_memory_allocated() // 2**20
    shutil.rmtree(composed.run_dir)
    return row_of(run, metrics) | measured


# ---------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the experts, measure what is not in the result file yet, and print all of it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--data", required=True, help="a folder with train/ and test/, a folder a class; or cifar10")
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--arms", type=some_of(ARMS), default=list(ARMS), help="some of " + ", ".join(ARMS))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="e.g. 0,1,2")
    parser.add_argument("--iterations", type=int, help=f"default: {Sizes.iterations}")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time, a process each")
    options = parser.parse_args(arguments)
    if options.data != "cifar10" and not all(Path(options.data, part).is_dir() for part in ("train", "test")):
        raise SystemExit(f"{Path(options.data).name}: expected a folder with train/ and test/ in it, got none")
    sizes = DRY_RUN if options.dry_run else Sizes()
    sizes = replace(sizes, iterations=options.iterations or sizes.iterations)
    protocol = {
        "data": Path(options.data).name,
        "accelerator": options.accelerator,
        "sizes": asdict(sizes),
        "arms": {name: [arm.experiment, *arm.words] for name, arm in ARMS.items()},
        "rates": {name: list(arm.rates) for name, arm in ARMS.items()},
        "dry_run": options.dry_run,
    }
    name = protocol["data"].replace("-", "_")
    path = result_path(options, f"edf_{options.accelerator}_{name}_ipc{sizes.ipc}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    setup = Setup(
        options.data if options.data == "cifar10" else str(Path(options.data).resolve()),
        sizes,
        options.accelerator,
        ((options.out or ROOT / "runs") / f"benchmark_edf_{name}{'_dry' if options.dry_run else ''}").resolve(),
        max(1, (os.cpu_count() or 1) // options.workers),
    )

    def measured(runs: list[Run]) -> Iterator[dict[str, Any]]:
        if runs:
            list(in_parallel(train_experts, [(experiment, setup) for experiment in EXPERTS], min(2, options.workers)))
        return in_parallel(measure, [(run, setup) for run in runs], options.workers)

    arms = {name: ARMS[name] for name in options.arms}
    complete(results, arms, options.seeds, measured, ipc=sizes.ipc, dry=options.dry_run)
    print(report(results, sizes.ipc))
    plot(results, sizes.ipc, path.with_suffix(".png"), images=name)
    if options.check and (failed := failures(results, sizes.ipc, ARMS)):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
