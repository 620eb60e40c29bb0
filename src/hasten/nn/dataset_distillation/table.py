"""The numbers of a comparison: a row an arm and net, the scores, and the table that people and programs read."""

import csv
import io
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.formats.files import whole_file, write_json
from hasten.nn.dataset_distillation.evaluation import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)


@dataclass(frozen=True)
class Row:
    """How the nets of one arm did on the test split.

    Args:
        arm: its name.
        net: name of the architecture.
        lr: learning rate.
        lr_from: "learned", "given" or "holdout", which chose it.
        epochs: passes over the arm's images.
        accuracies: of each net, in [0, 1].
    """

    arm: str
    net: str
    lr: float
    lr_from: str
    epochs: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the nets."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Of a sample, with n - 1; None for a single net."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def reading(self) -> str:
        """Mean +- std, as the table has it."""
        return f"{self.mean:.4f}" + ("" if self.std is None else f" ± {self.std:.4f}")


@dataclass(frozen=True)
class Table:
    """The rows of all arms and nets, the scores of the first net, and what a reader must know about both."""

    rows: tuple[Row, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def row(self, arm: str, net: str) -> Row | None:
        """The row of that arm and net, if there is one."""
        return next((row for row in self.rows if (row.arm, row.net) == (arm, net)), None)

    def markdown(self) -> str:
        """For people."""
        lines = ["| trained on | net | lr | epochs | test accuracy | nets |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.arm} | {row.net} | {row.lr:.4g} ({row.lr_from}) | {row.epochs} | {row.reading} | "
            f"{len(row.accuracies)} |"
            for row in self.rows
        ]
        scores = "   ".join(f"{name.upper()} {value:.4f}" for name, value in self.scores.items())
        return "\n".join([*lines, *(["", scores] if scores else []), "", *(f"- {note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """For spreadsheets: a line each row, its mean and std last."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["arm", "net", "lr", "lr_from", "epochs", "nets", "mean", "std"])
        for row in self.rows:
            std = "" if row.std is None else row.std
            writer.writerow([row.arm, row.net, row.lr, row.lr_from, row.epochs, len(row.accuracies), row.mean, std])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """For programs: every accuracy as it was measured."""
        rows = [asdict(row) | {"mean": row.mean, "std": row.std} for row in self.rows]
        return {"rows": rows, "scores": dict(self.scores), "notes": list(self.notes)}

    def write(self, folder: Path, **also: Any) -> None:
        """``table.md``, ``table.csv`` and ``evaluation.json``; the last with what ``also`` is to be said, for JSON."""
        for name, text in (("table.md", self.markdown()), ("table.csv", self.csv())):
            with whole_file(folder / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        write_json(folder / "evaluation.json", also | {"table": self.to_json()})

    def metrics(self, net: str) -> dict[str, float]:
        """Arm -> mean accuracy of that net's rows."""
        return {row.arm: row.mean for row in self.rows if row.net == net}


def scores(table: Mapping[str, float], *, own: str, hard_labels: bool) -> dict[str, float]:
    """DD-Ranking's numbers from arm -> accuracy, as far as their arms were measured.

    Args:
        table: of one net.
        own: the arm of the distilled set with its own labels.
        hard_labels: whether those are hard: then it is compared with random images of hard labels.
    """
    found = {}
    if "whole" in table:
        found["hlr"] = hard_label_recovery(table["whole"], table[own if hard_labels else f"{own}, hard labels"])
    peer = "random" if hard_labels else "random_soft"
    if peer in table:
        found["ior"] = improvement_over_random(table[own], table[peer])
        plain = [table.get(f"{arm}, no augmentation") for arm in (own, peer)]
        if plain[0] is not None and plain[1] is not None:
            found["ars"] = augmentation_robust_score(found["ior"], improvement_over_random(plain[0], plain[1]))
    if found.keys() >= {"hlr", "ior"}:
        found["lrs"] = label_robust_score(found["hlr"], found["ior"])
    return found
