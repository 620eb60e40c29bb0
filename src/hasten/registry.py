"""What hasten holds, read from its files alone: methods from the cards, experiments and groups from the configs.

Nothing here imports torch, so that ``hasten --help`` and ``hasten list`` answer at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from hasten.errors import HastenError

CARD_FIELDS = {
    "method": ["name", "family", "paper", "exports", "experiments", "tests", "benchmark", "saves", "costs", "evidence"]
    + ["evidence_here", "paper_reports", "ddp", "compile", "when_not"],
    "tool": ["name", "exports", "tests", "gives", "ddp"],
}
"""The front matter a card owes, by its ``kind``; a method's ``exports`` begin with the name that is the method."""


@dataclass(frozen=True)
class Card:
    """One card: its front matter, and the text below it."""

    name: str
    kind: str
    front: dict[str, Any] = field(repr=False)
    text: str = field(repr=False)

    @property
    def summary(self) -> str:
        """What it saves (a method) or gives (a tool), in one line."""
        return self.front["saves" if self.kind == "method" else "gives"]

    @property
    def title(self) -> str:
        """Its first heading, or its name where it has none."""
        return next((line.removeprefix("# ") for line in self.text.splitlines() if line.startswith("# ")), self.name)

    @property
    def known_as(self) -> list[str]:
        """What people call it besides its name: its title, its family, its papers."""
        papers = [self.front.get("paper", ""), *self.front.get("papers", {}).values()]
        return [self.title, self.front.get("family", ""), *papers]

    def paper_of(self, experiment: str) -> str:
        """What a run of ``experiment`` cites: the method's paper, or that of a relative with a word in ``papers``."""
        return self.front.get("papers", {}).get(experiment.partition("_")[0], self.front["paper"])


def cards() -> dict[str, Card]:
    """Every card by name, methods before tools.

    Example:
        >>> cards()["speed"].kind
        'method'
    """
    found = []
    for file in files("hasten").joinpath("cards").iterdir():
        if file.name.endswith(".md"):
            found.append(_card(file.name, file.read_text(encoding="utf-8")))
    return {card.name: card for card in sorted(found, key=lambda card: (card.kind, card.name))}


def methods_used(config: Any, experiment: str) -> list[Card]:
    """The methods that a plain config builds: those whose first export is a ``_target_`` in it.

    Where that is the same for several methods, the ones that list ``experiment``, if any does.

    Example:
        >>> config = {"callbacks": {"token_merging": {"_target_": "hasten.callbacks.TokenMerging", "r": 8}}}
        >>> [card.name for card in methods_used(config, "tome_digits")]
        ['tome']
    """
    targets = set(_targets(config))
    used = [card for card in cards().values() if card.kind == "method" and card.front["exports"][0] in targets]
    listing = [card for card in used if experiment in card.front["experiments"]]
    settled = {card.front["exports"][0] for card in listing}
    return [card for card in used if card in listing or card.front["exports"][0] not in settled]


def group(name: str) -> dict[str, str]:
    """The options of a config group with their one-line summaries, e.g. ``group("experiment")``.

    The summary is the first comment line of the file that is not Hydra's ``@package`` directive.

    Example:
        >>> group("logger")["none"]
        'No logger: the metrics stay in result.json.'
    """
    folder = files("hasten").joinpath("configs").joinpath(name)
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {file.removesuffix(".yaml"): _summary(folder.joinpath(file).read_text(encoding="utf-8")) for file in names}


def groups() -> list[str]:
    """The names of the config groups.

    Example:
        >>> "experiment" in groups()
        True
    """
    folders = files("hasten").joinpath("configs").iterdir()
    return sorted(folder.name for folder in folders if folder.is_dir() and not folder.name.startswith("_"))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    if isinstance(node, dict | list):
        for below in node.values() if isinstance(node, dict) else node:
            yield from _targets(below)


def _summary(text: str) -> str:
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if not line.startswith("@package")), "")


def _card(file: str, text: str) -> Card:
    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise HastenError(f"cards/{file}: expected YAML front matter between two lines '---', got none; add it")
    front = yaml.safe_load(parts[1])
    kind = front.get("kind", "method")
    if missing := [key for key in CARD_FIELDS[kind] if key not in front]:
        raise HastenError(f"cards/{file}: front matter: expected {', '.join(missing)}, got none of it; fill it in")
    return Card(name=front["name"], kind=kind, front=front, text=parts[2])
