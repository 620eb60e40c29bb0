"""Pictures of how a hypernetwork's scores go with its input, (3, H, W) in [0, 1]."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hasten.formats.pictures import drawn, new_figure


def plotted_curve(
    values: Sequence[float], labels: Sequence[str], score: str, name: str, dots: Sequence[float | None]
) -> Tensor:
    """A score over an input; ``dots``, of another run, are None where that has none.

    Args:
        values: of the score, one a label.
        labels: values of the input, evenly as the encoding sees them, those of a logarithmic range too.
        score: its name.
        name: of the input.
        dots: one a label.
    """
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    axes.plot(values, "-o", label="this network")
    mean = sum(values) / len(values)
    axes.axhline(mean, color="grey", linestyle=":", linewidth=1)
    axes.annotate(f"mean {mean:.3g}", (0.99, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel(name)
    axes.set_ylabel(f"val/{score}")
    _dot(axes, range(len(labels)), dots)
    return drawn(figure)


def plotted_trade_off(
    values: tuple[Sequence[float], Sequence[float]],
    labels: Sequence[str],
    names: tuple[str, str, str],
    dots: tuple[Sequence[float | None], Sequence[float | None]],
) -> Tensor:
    """One score over another along an input.

    Args:
        values: of the first score and of the other, one a label each.
        labels: values of the input.
        names: of the scores and of the input.
        dots: the scores of another run, None where that has none.
    """
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    axes.plot(*values, "-o", label="this network")
    for x, y, label in zip(*values, labels, strict=True):
        axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_title(f"along {names[2]}", fontsize=10)
    axes.set_xlabel(f"val/{names[0]}")
    axes.set_ylabel(f"val/{names[1]}")
    _dot(axes, *dots)
    return drawn(figure)


def _dot(axes: Any, x: Sequence[float | None] | range, y: Sequence[float | None]) -> None:
    pairs = [pair for pair in zip(x, y, strict=True) if None not in pair]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), "x", color="black", label="the other run")
        axes.legend(frameon=False, fontsize=8)
