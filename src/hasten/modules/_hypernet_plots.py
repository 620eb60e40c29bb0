"""Pictures of how a hypernetwork's scores go with its input, (3, H, W) in [0, 1]."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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

    def draw(axes: Any) -> None:
        axes.plot(values, "-o", label="this network")
        mean = sum(values) / len(values)
        axes.axhline(mean, color="grey", linestyle=":", linewidth=1)
        axes.annotate(f"mean {mean:.3g}", (0.99, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel(name)
        axes.set_ylabel(f"val/{score}")
        _dot(axes, range(len(labels)), dots)

    return _drawn(draw)


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

    def draw(axes: Any) -> None:
        axes.plot(*values, "-o", label="this network")
        for x, y, label in zip(*values, labels, strict=True):
            axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set_title(f"along {names[2]}", fontsize=10)
        axes.set_xlabel(f"val/{names[0]}")
        axes.set_ylabel(f"val/{names[1]}")
        _dot(axes, *dots)

    return _drawn(draw)


def _dot(axes: Any, x: Sequence[float | None] | range, y: Sequence[float | None]) -> None:
    pairs = [pair for pair in zip(x, y, strict=True) if None not in pair]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), "x", color="black", label="the other run")
        axes.legend(frameon=False, fontsize=8)


def _drawn(draw: Callable[[Any], None]) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only those who draw wait for it
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5.6, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # draws into memory, whatever backend the user has chosen
    draw(figure.add_subplot())
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].permute(2, 0, 1).float() / 255
