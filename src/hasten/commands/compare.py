"""``hasten compare DIR...``: run folders as one table, mean ± sd over seeds, and their curves."""

import csv
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.commands import _words
from hasten.errors import HastenError, did_you_mean
from hasten.run_folders import config_of, is_alive, result_of

_APART = {"seed", "run_dir", "ckpt_path", "hydra.searchpath", "logger", "threads"}
"""What tells runs apart without being what is compared."""


@dataclass(frozen=True)
class Run:
    """A run that is complete, as its folder tells of it."""

    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]

    @property
    def objective(self) -> str:
        """The metric that its checkpoints were chosen by."""
        return str((self.config.get("objective") or {}).get("metric", ""))

    @property
    def metrics(self) -> dict[str, float]:
        """Its final metrics, and how long it took."""
        found = {name: float(value) for name, value in self.result.get("metrics", {}).items()}
        return found | {"duration_s": float(self.result.get("duration_s", "nan"))}

    @property
    def words(self) -> dict[str, str]:
        """What was asked for: key -> value, without what is the same run in another place."""
        pairs = (word.partition("=") for word in self.result.get("overrides", []))
        words = {key.lstrip("+"): value for key, _, value in pairs}
        chosen = {"experiment": str(self.result.get("experiment"))} | words
        return {key: value for key, value in chosen.items() if key not in _APART}


@dataclass(frozen=True)
class Group:
    """The runs that differ in nothing but their seeds, by what was swept: key -> value."""

    swept: dict[str, str]
    runs: list[Run] = field(repr=False)

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.swept.items()) or "all runs"

    def values(self, metric: str) -> list[float]:
        """Of the runs that have it, a number each."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


def main(words: Sequence[str]) -> int:
    """Compare the runs that ``words`` name: print the table, and write compare.md, compare.csv and compare.png."""
    parser = _words.parser("compare", "A table of runs, mean ± sd over seeds, and their curves.")
    parser.add_argument("folders", nargs="*", metavar="DIR", help="a run folder, or a folder of them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: next to the runs")
    parser.add_argument("--metrics", metavar="A,B", help="columns of the table; default: the objective and test/...")
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    if not asked.folders:
        raise HastenError("compare: expected run folders, got none; try: hasten compare runs/EXPERIMENT")
    runs, left_out = read_runs(map(Path, asked.folders))
    if not runs:
        said = "".join(f"\n{folder}: left out: {why}" for folder, why in left_out.items())
        raise HastenError(f"compare: expected runs that are complete, found none in {' '.join(asked.folders)}{said}")
    groups = grouped(runs)
    metrics = _columns(runs, asked.metrics)
    out = asked.out or Path(os.path.commonpath([run.folder.parent for run in runs]))
    _print(groups, metrics, left_out)
    _write(out, groups, metrics, left_out)
    for name in ("compare.md", "compare.csv", "compare.png"):
        if (out / name).exists():
            print(f"  {out / name}")
    return 0


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], dict[Path, str]]:
    """The complete runs at or below ``folders``, and of every other run the reason why it is left out.

    Raises:
        HastenError: for a folder that is not there, or holds no run at all.
    """
    runs: list[Run] = []
    left_out: dict[Path, str] = {}
    for top in folders:
        if not top.is_dir():
            raise HastenError(f"compare: expected a folder, there is no {str(top)!r}")
        found = {path.parent for name in ("result.json", "config.yaml") for path in top.rglob(name)}
        found = {folder for folder in found if "wandb" not in folder.relative_to(top).parts}
        if not found:
            raise HastenError(f"compare: expected a run, or a folder of runs, there is none in {str(top)!r}")
        for folder in sorted(found - left_out.keys() - {run.folder for run in runs}):
            run = Run(folder, result_of(folder), config_of(folder))
            if why := _flaw(run):
                left_out[folder] = why
            else:
                runs.append(run)
    return runs, left_out


def grouped(runs: Sequence[Run]) -> list[Group]:
    """``runs`` by the values of every key that not all of them have in common."""
    keys = list(dict.fromkeys(key for run in runs for key in run.words))
    table = [{key: _value(run, key) for key in keys} for run in runs]
    differ = [key for key in keys if len({row[key] for row in table}) > 1]
    groups: dict[tuple[str, ...], Group] = {}
    for run, row in zip(runs, table, strict=True):
        swept = {key: row[key] for key in differ}
        groups.setdefault(tuple(swept.values()), Group(swept, [])).runs.append(run)
    return list(groups.values())


def _flaw(run: Run) -> str:
    """Why a run cannot be compared; empty where it can."""
    status = run.result.get("status")
    if status is None:
        return "no readable result.json"
    if status == "running":
        return "still running" if is_alive(run.folder) else "killed while it was running"
    if status != "complete":
        return str(status)
    try:
        _ = run.metrics, run.words
    except (AttributeError, TypeError, ValueError):  # whatever someone has made of it
        return "no readable result.json"
    return ""


def _value(run: Run, key: str) -> str:
    """What ``key`` was for a run: as its config says, or else as it was asked for; "default" where it was not."""
    node: Any = run.config
    for part in key.lstrip("~").split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, (str, int, float, list)):
        return json.dumps(node) if isinstance(node, list) else str(node)
    return run.words.get(key, "default")


def _columns(runs: Sequence[Run], wanted: str | None) -> list[str]:
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if wanted is None:
        objectives = {run.objective: None for run in runs}
        return list(dict.fromkeys(name for name in [*objectives, *_tested(known), "duration_s"] if name in known))
    names = wanted.split(",")
    for name in names:
        if name not in known:
            raise HastenError(f"compare: --metrics: no run has {name!r}{did_you_mean(name, known)}")
    return names


def _tested(names: Iterable[str]) -> list[str]:
    """The metrics that are measured once, when a run is over."""
    return [name for name in names if name.startswith(("test/", "sample/", "eval/"))]


# ------------------------------------------------------------------ table


def _rows(groups: Sequence[Group], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table."""
    heads = [*groups[0].swept, "runs", *metrics]
    rows = [
        [*group.swept.values(), str(len(group.runs)), *(_cell(group.values(m)) for m in metrics)] for group in groups
    ]
    return heads, rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # of a run that diverged too, where those of `statistics` raise


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{_mean(values):.4g}"
    return f"{mean} ± {_sd(values):.2g}" if len(values) > 1 else mean


def _print(groups: Sequence[Group], metrics: Sequence[str], left_out: Mapping[Path, str]) -> None:
    from rich.console import Console  # noqa: PLC0415 - `hasten` answers a mistake without it
    from rich.table import Table  # noqa: PLC0415

    heads, rows = _rows(groups, metrics)
    console, table = Console(soft_wrap=True), Table(*heads, title="mean ± sd over runs", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for folder, why in left_out.items():
        console.print(f"  left out: {folder}: {why}", highlight=False, markup=False)


def _write(out: Path, groups: Sequence[Group], metrics: Sequence[str], left_out: Mapping[Path, str]) -> None:
    from hasten.formats import whole_file  # noqa: PLC0415 - loads torch

    try:
        with whole_file(out / "compare.md") as file:
            file.write_text(_markdown(groups, metrics, left_out), encoding="utf-8")
        with whole_file(out / "compare.csv") as file, file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows(_csv(groups))
        curves = _curves(groups, metrics)
        if curves:
            with whole_file(out / "compare.png") as file:
                _plot(curves, file)
    except OSError as error:
        raise HastenError(f"compare: cannot write to {str(out)!r}: {error.strerror}; give --out FOLDER") from error


def _markdown(groups: Sequence[Group], metrics: Sequence[str], left_out: Mapping[Path, str]) -> str:
    heads, rows = _rows(groups, metrics)
    lines = [heads, ["---"] * len(heads), *rows]
    text = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    text = f"Mean ± sd over runs; every metric is in compare.csv.\n\n{text}"
    if left_out:
        text += "\nLeft out:\n\n" + "".join(f"- `{folder}`: {why}\n" for folder, why in left_out.items())
    return text


def _csv(groups: Sequence[Group]) -> list[list[Any]]:
    """All metrics, with their means and deviations as numbers of their own."""
    names = sorted({name for group in groups for run in group.runs for name in run.metrics})
    rows = [[*groups[0].swept, "runs", "seeds", *(f"{name} {part}" for name in names for part in ("mean", "sd"))]]
    for group in groups:
        cells: list[Any] = [*group.swept.values(), len(group.runs)]
        cells.append(" ".join(str(run.result.get("seed")) for run in group.runs))
        for values in map(group.values, names):
            cells.append(_mean(values) if values else "")
            cells.append(_sd(values) if len(values) > 1 else "")
        rows.append(cells)
    return rows


# ------------------------------------------------------------------ curves


def _curves(groups: Sequence[Group], metrics: Sequence[str]) -> dict[str, dict[str, list[dict[int, float]]]]:
    """Metric -> name of a group -> for each of its runs: step -> value; of what was logged more than once."""
    curves: dict[str, dict[str, list[dict[int, float]]]] = {}
    for group in groups:
        for run in group.runs:
            for metric, curve in _logged(run.folder / "metrics.csv", [*metrics, "train/loss"]).items():
                curves.setdefault(metric, {}).setdefault(group.name, []).append(curve)
    return curves


def _logged(path: Path, metrics: Iterable[str]) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for metric, curve in curves.items():
                    if row.get(metric) and row.get("step"):
                        curve[int(float(row["step"]))] = float(row[metric])
    except (OSError, ValueError, csv.Error):
        return {}  # a run without a logger, or a file that someone has edited: the table stands without its curve
    return {metric: curve for metric, curve in curves.items() if len(curve) > 1}


def _plot(curves: Mapping[str, Mapping[str, list[dict[int, float]]]], path: Path) -> None:
    """A panel a metric: each run as a thin line, and the mean of a group wherever all of its runs have a value."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import; Figure needs no display

    figure = Figure(figsize=(6 * len(curves), 4), layout="constrained")
    names = list(dict.fromkeys(name for by_group in curves.values() for name in by_group))
    for axes, (metric, by_group) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, runs in by_group.items():
            color = f"C{names.index(name)}"
            if len(runs) > 1:
                for run in runs:
                    axes.plot(list(run), list(run.values()), color=color, linewidth=0.6, alpha=0.4)
            shared = sorted(set.intersection(*map(set, runs)))
            axes.plot(shared, [_mean([run[step] for run in runs]) for step in shared], color=color, label=name)
        axes.set(xlabel="step", title=metric)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
