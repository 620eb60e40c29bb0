"""Dataset distillation on the digits: MTT, DATM, EDF, DM, and the two baselines without which no number says anything.

    python benchmarks/edf.py                 # 1 image a class, all arms, seeds 0, 1, 2; no download
    python benchmarks/edf.py --ipc 10        # 10 images a class, half of the iterations
    python benchmarks/edf.py --arms edf,datm --seeds 0

Every run is a shipped experiment, started as a person would: experts, distillation, five fresh networks on the
synthetic set. A seed draws its own experts, images and networks; the 400 test images are the same for all. An arm's
step size for the images is one of two; it is chosen with the first seed, by the accuracy on the holdout, 200 images
that no expert and no synthetic image has seen, and what is reported is the accuracy on the test images at that step
size. The arms:

    random         real images, hard labels; the step size of the networks chosen on the holdout
    random_soft    the same images with the experts' logits as labels
    dm             distribution matching
    mtt            experts by SGD, hard labels, the window of all epochs
    datm           experts by GSAM, soft labels, an expanding window
    edf            datm and discriminative area enhancement, nothing dropped
    edf_dropout    edf and common pattern dropout, a quarter of the parameters dropped
    whole          all training images, hard labels: the ceiling

About 40 minutes on two idle cores: two runs at a time, a process and a thread each (--workers). A run is written as
soon as it is finished, and the same command goes on from there (--fresh begins anew).

--check exits with 1 where at one image a class an arm that distils is not above random images with hard labels by more
than three standard deviations, over seeds, of their difference. It asserts nothing about the arms among each other, nor
about edf and datm: they differ by less than the seeds do.

edf_gpu.py measures the same of CIFAR-10 on a GPU.
"""

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from common import ROOT, Results, argument_parser, command, markdown_table, progress_bar, result_path

T = TypeVar("T")
CLAIM = "test accuracy of fresh networks trained on the synthetic set"


class Arm(NamedTuple):
    """A shipped experiment, what is changed in it, and the two step sizes that are tried."""

    experiment: str
    words: tuple[str, ...] = ()
    rates: tuple[float, ...] = (10.0, 100.0)


ARMS = {
    "dm": Arm("dm_digits", rates=(1.0, 10.0)),
    "mtt": Arm("mtt_digits"),
    "datm": Arm("datm_digits"),
    "edf": Arm("edf_digits", ("module.mask=null",)),
    "edf_dropout": Arm("edf_digits"),
}
BASELINES = ("random", "random_soft", "whole")
WHOLE_EPOCHS = 30  # over 1,197 images: more steps than 300 over ten
PROTOCOLS = {
    1: {"iterations": 800, "seeds": [0, 1, 2]},
    10: {"iterations": 400, "seeds": [0, 1, 2]},
}


class Run(NamedTuple):
    """What is measured by one process."""

    arm: str
    rate: float
    seed: int
    ipc: int
    dry: bool


# ---------------------------------------------------------------------- measuring


def words(run: Run) -> list[str]:
    """The command line of a run."""
    arm = ARMS[run.arm]
    iterations = PROTOCOLS[run.ipc]["iterations"]
    folder = ROOT / "runs" / "benchmark_edf" / f"{run.arm}_{run.rate:g}_ipc{run.ipc}_seed{run.seed}"
    tiny = [word for word in _tiny(arm.experiment) if not word.startswith("module.synthetic.ipc")] if run.dry else []
    return [
        f"experiment={arm.experiment}",
        f"seed={run.seed}",
        f"module.synthetic.ipc={run.ipc}",
        f"module.lr_img={run.rate}",
        f"trainer.max_steps={iterations}",
        # once a seed: they do not depend on what is distilled
        f"callbacks.evaluate_distilled.baselines=[{','.join(BASELINES) if run.arm == 'datm' else ''}]",
        "+callbacks.evaluate_distilled.scores=false",
        f"callbacks.evaluate_distilled.whole_epochs={1 if run.dry else WHOLE_EPOCHS}",
        "logger=none",
        *arm.words,
        *tiny,
        f"run_dir={folder}{'_dry' if run.dry else ''}",
    ]


def _tiny(experiment: str) -> list[str]:
    from hasten.run import compose

    return list(compose([f"experiment={experiment}"]).tiny)


def measure(run: Run) -> dict[str, Any]:
    """One run's row, with all that its evaluation found."""
    import shutil

    from hasten.run import compose
    from hasten.run import run as run_experiment

    torch.set_num_threads(1)
    composed = compose(words(run))
    shutil.rmtree(composed.run_dir, ignore_errors=True)  # of a benchmark that was interrupted
    metrics = run_experiment(composed).metrics
    shutil.rmtree(composed.run_dir)
    return row_of(run, metrics)


def row_of(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    """What is kept of a run's metrics."""
    return {
        "claim": CLAIM,
        "arm": f"{run.arm}, lr_img {run.rate:g}, ipc {run.ipc}",
        "seed": run.seed,
        "value": metrics["eval/convnet/acc_final"],
        "unit": "fraction",
        "name": run.arm,
        "rate": run.rate,
        "ipc": run.ipc,
        "holdout": metrics["eval/acc"],
        "metrics": {name: value for name, value in metrics.items() if name.startswith("eval/")},
    }


# ---------------------------------------------------------------------- the report


class Found(NamedTuple):
    """An arm at the step size that the holdout chose."""

    rate: float | None
    final: dict[int, float]
    best: dict[int, float]


def found(results: Results, arm: str, ipc: int) -> Found | None:
    """What an arm reaches on the test images, by seed; None where it was not measured."""
    rows = [row for row in results.rows if row["ipc"] == ipc]
    if arm in BASELINES:
        # the runs of datm have them
        metric = f"eval/{arm}/acc"
        of = {row["seed"]: row["metrics"] for row in rows if row["name"] == "datm" and metric in row["metrics"]}
        accuracies = {seed: metrics[metric] for seed, metrics in sorted(of.items())}
        return Found(None, accuracies, accuracies) if accuracies else None
    by_rate: dict[float, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["name"] == arm:
            by_rate.setdefault(row["rate"], {})[row["seed"]] = row
    if not by_rate:
        return None
    tuned_on = min(seed for of_seeds in by_rate.values() for seed in of_seeds)
    tried = {rate: of_seeds[tuned_on]["holdout"] for rate, of_seeds in by_rate.items() if tuned_on in of_seeds}
    rate = max(tried, key=lambda rate: tried[rate])
    chosen = dict(sorted(by_rate[rate].items()))
    return Found(
        rate,
        {seed: row["metrics"]["eval/convnet/acc_final"] for seed, row in chosen.items()},
        {seed: row["metrics"]["eval/convnet/acc_best"] for seed, row in chosen.items()},
    )


def report(results: Results, ipc: int) -> str:
    """All arms as Markdown: the final set, and the one that was best on the holdout."""
    lines = []
    for arm in ("random", "random_soft", *ARMS, "whole"):
        if (here := found(results, arm, ipc)) is not None:
            rate = "" if here.rate is None else f"{here.rate:g}"
            lines.append([arm, rate, _spread(here.final), "" if arm in BASELINES else _spread(here.best)])
    table = markdown_table(["arm", "lr_img", f"final, {ipc} a class", "best on the holdout"], lines)
    return f"{table}\n\nTest accuracy in %, mean ± standard deviation over seeds, in brackets every seed."


def _spread(accuracies: dict[int, float]) -> str:
    values = [100 * value for value in accuracies.values()]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation} ({', '.join(f'{value:.1f}' for value in values)})"


def failures(results: Results, ipc: int, arms: Collection[str] = tuple(ARMS)) -> list[str]:
    """What the measurement fails to show, a line each."""
    random = found(results, "random", ipc)
    lines = []
    for arm in arms:
        here = found(results, arm, ipc)
        if random is None or here is None or len(here.final.keys() & random.final.keys()) < 3:
            return ["check: expected all arms with at least three seeds; run them first"]
        gains = [here.final[seed] - random.final[seed] for seed in here.final.keys() & random.final.keys()]
        gain, deviation = statistics.fmean(gains), statistics.stdev(gains)
        if not gain > 3 * deviation:
            lines.append(
                f"{arm}, {ipc} a class: expected more than three standard deviations above random images, got "
                f"{100 * gain:.1f} ± {100 * deviation:.1f} points"
            )
    return lines


def plot(results: Results, ipc: int, path: Path, images: str = "8x8 digits") -> None:
    """A bar for each arm, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from hasten.formats import whole_file

    arms = [arm for arm in ("random", "random_soft", *ARMS, "whole") if found(results, arm, ipc) is not None]
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for place, arm in enumerate(arms):
        here = found(results, arm, ipc)
        values = [100 * value for value in here.final.values()] if here else []
        axes.bar(place, statistics.fmean(values), color="0.75" if arm in BASELINES else "C0", width=0.7)
        axes.scatter([place] * len(values), values, color="black", s=12, zorder=3)
    axes.set_xticks(range(len(arms)), arms)
    axes.set_ylim(0, 100)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{images}, {ipc} synthetic image{'s' if ipc > 1 else ''} a class (dots: seeds)", fontsize=10)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not in the result file yet, and print all of it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--arms", type=some_of(ARMS), default=list(ARMS), help="some of " + ", ".join(ARMS))
    parser.add_argument("--ipc", type=int, choices=sorted(PROTOCOLS), default=1, help="synthetic images a class")
    parser.add_argument("--seeds", type=numbers, help="e.g. 0,1,2")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a process and a thread each")
    options = parser.parse_args(arguments)
    protocol = {
        "data": "digits",
        "ipc": options.ipc,
        "iterations": PROTOCOLS[options.ipc]["iterations"],
        "whole_epochs": WHOLE_EPOCHS,
        "arms": {name: [arm.experiment, *arm.words] for name, arm in ARMS.items()},
        "rates": {name: list(arm.rates) for name, arm in ARMS.items()},
        "dry_run": options.dry_run,
    }
    path = result_path(options, f"edf_digits_ipc{options.ipc}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)

    def measured(runs: list[Run]) -> Iterator[dict[str, Any]]:
        return in_parallel(measure, runs, options.workers)

    arms, seeds = {name: ARMS[name] for name in options.arms}, options.seeds or PROTOCOLS[options.ipc]["seeds"]
    complete(results, arms, seeds, measured, ipc=options.ipc, dry=options.dry_run)
    print(report(results, options.ipc))
    plot(results, options.ipc, path.with_suffix(".png"))
    if options.check and (failed := failures(results, options.ipc)):
        raise SystemExit("\n".join(failed))


def complete(
    results: Results,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    measured: Callable[[list[Run]], Iterable[dict[str, Any]]],
    *,
    ipc: int,
    dry: bool,
) -> None:
    """Add what is missing: each step size of an arm with the first seed, and what that one chose with the others."""
    first, *others = seeds
    with progress_bar() as progress:
        task = progress.add_task("runs", total=sum(len(arm.rates) for arm in arms.values()) + len(others) * len(arms))

        def add(runs: list[Run]) -> None:
            done = {(row["name"], row["rate"], row["seed"]) for row in results.rows}
            missing = [run for run in runs if (run.arm, run.rate, run.seed) not in done]
            progress.advance(task, len(runs) - len(missing))
            for row in measured(missing):
                results.add(row)
                progress.advance(task)

        add([Run(name, rate, first, ipc, dry) for name, arm in arms.items() for rate in arm.rates])
        chosen = {name: cast(Any, found(results, name, ipc)).rate for name in arms}
        add([Run(name, rate, seed, ipc, dry) for seed, (name, rate) in product(others, chosen.items())])


def in_parallel(function: Callable[[T], dict[str, Any]], jobs: Iterable[T], workers: int) -> Iterator[dict[str, Any]]:
    """What the function makes of each job, as soon as it is there; one worker is this process."""
    if workers == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def some_of(arms: Collection[str]) -> Callable[[str], list[str]]:
    """Reads names of these with commas between them."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in arms]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(arms)}, got {', '.join(unknown)}")
        return text.split(",")

    return names


def numbers(text: str) -> list[int]:
    """Reads numbers with commas between them."""
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
