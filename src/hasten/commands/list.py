"""``hasten list [WORD ...]``: methods, tools, experiments and what else can be chosen, with a line each."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from hasten import registry
from hasten.commands import _words
from hasten.errors import HastenError


def main(words: Sequence[str]) -> int:
    """Print methods, tools, experiments and data; or whatever has all of ``words`` in its name or its summary."""
    parser = _words.parser("list", "Methods, tools, experiments and data; or all that has to do with some words.")
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="to look for in names and summaries; all must be there"
    )
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    words = asked.words
    sections = _all() if words else _main()
    found = {title: _holding(words, lines) for title, lines in sections.items()}
    if not any(found.values()):
        near = get_close_matches(" ".join(words), {name for lines in sections.values() for name in lines}, n=3)
        meant = f"did you mean {', '.join(map(repr, near))}?" if near else "hasten list shows all of the main ones"
        raise HastenError(f"list: nothing has {' and '.join(map(repr, words))} in its name or summary; {meant}")
    print("\n\n".join("\n".join([title, *lines_of(lines)]) for title, lines in found.items() if lines))
    return 0


def _main() -> dict[str, dict[str, str]]:
    """Title of a section -> name -> summary."""
    cards = {card.name: card.summary for card in registry.cards().values()}
    return {
        "Methods and tools": cards,
        "Experiments": registry.group("experiment"),
        "Data": registry.group("data"),
    }


def _all() -> dict[str, dict[str, str]]:
    """Every group too, by the word that chooses one of it."""
    others = [name for name in registry.groups() if name not in ("experiment", "data")]
    return _main() | {f"{name}=": registry.group(name) for name in others}


def _holding(words: Sequence[str], lines: Mapping[str, str]) -> dict[str, str]:
    return {
        name: summary
        for name, summary in lines.items()
        if all(word.lower() in f"{name} {summary}".lower() for word in words)
    }


def lines_of(summaries: Mapping[str, str]) -> list[str]:
    """Names with their summaries, in two columns."""
    width = max(map(len, summaries), default=0)
    return [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
