"""``hasten list [WORD ...]``: methods, tools, experiments and what else can be chosen, with a line each."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from hasten import registry
from hasten.commands import _words
from hasten.errors import HastenError


def main(words: Sequence[str]) -> int:
    """Print methods, tools, experiments and data; or whatever has to do with all of ``words``."""
    parser = _words.parser("list", "Methods, tools, experiments and data; or all that has to do with some words.")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="to look for in names and summaries, a method's title, family and papers; all must be there",
    )
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    words = asked.words
    sections = _sections(words)
    if not sections:
        names = {*registry.cards(), *(name for group in registry.groups() for name in registry.group(group))}
        near = get_close_matches(" ".join(words), names, n=3)
        meant = f"did you mean {', '.join(map(repr, near))}?" if near else "hasten list shows all of the main ones"
        wanted = " and ".join(map(repr, words))
        raise HastenError(f"list: nothing has {wanted} in its name or summary, its title, family or papers; {meant}")
    print("\n\n".join("\n".join([title, *lines_of(lines)]) for title, lines in sections.items()))
    return 0


def _sections(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """Title of a section -> name -> summary, of what has all ``words``; without any, of the main groups alone."""
    sections: dict[str, dict[str, str]] = {}
    for card in sorted(registry.cards().values(), key=lambda card: (card.kind, card.front.get("family", ""))):
        if _has(words, card.name, card.summary, *card.known_as):
            title = f"Methods: {card.front['family']}" if card.kind == "method" else "Tools"
            sections.setdefault(title, {})[card.name] = card.summary
    titles = {"experiment": "Experiments", "data": "Data"}
    for group in [*titles, *(name for name in registry.groups() if name not in titles and words)]:
        lines = {name: summary for name, summary in registry.group(group).items() if _has(words, name, summary)}
        if lines:
            sections[titles.get(group, f"{group}=")] = lines  # the others by the word that chooses one of them
    return sections


def _has(words: Sequence[str], *texts: str) -> bool:
    text = _plain(" ".join(texts))
    return all(_plain(word) in text for word in words)


def _plain(text: str) -> str:
    return text.lower().replace("_", " ")


def lines_of(summaries: Mapping[str, str]) -> list[str]:
    """Names with their summaries, in two columns."""
    width = max(map(len, summaries), default=0)
    return [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
