"""The documentation: `make docs` builds it into docs/_build, without a network, and fails on any warning.

What the project says elsewhere is not said again here: the README, CONTRIBUTING, the method cards, the benchmarks' page
and the docstrings become pages under docs/_pages each time.
"""

import importlib
import inspect
import os
import re
import shutil
from pathlib import Path

from hasten import __version__, registry

ROOT, DOCS = Path(__file__).parents[1], Path(__file__).parent
PAGES = DOCS / "_pages"
CARDS = Path("src/hasten/cards")
PACKAGES = ["functional", "nn", "optim", "modules", "callbacks", "datamodules", "formats"]
MODULES = ["run", "estimate", "loggers", "checkpoints"]

project, author, release = "hasten", "the authors of hasten", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"hasten {__version__}"
exclude_patterns = ["_build", "_pages/readme.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 100
napoleon_use_rtype = False


def write_pages() -> None:
    """Write docs/_pages from the files of the project, their links turned towards the other pages."""
    cards = registry.cards()
    # source -> its page, and the page that its links are read from: index.md includes the README
    pages = {
        Path("README.md"): PAGES / "readme.md",
        Path("CONTRIBUTING.md"): PAGES / "contributing.md",
        Path("benchmarks/README.md"): PAGES / "benchmarks.md",
    } | {CARDS / f"{name}.md": PAGES / f"cards/{name}.md" for name in cards}
    shutil.rmtree(PAGES, ignore_errors=True)
    for source, page in pages.items():
        if source.parent == CARDS:
            title, _, body = cards[source.stem].text.lstrip().partition("\n")
            text = f"{title}\n\n{_facts(cards[source.stem])}\n{body}"
        else:
            text = (ROOT / source).read_text(encoding="utf-8")
        _write(page, _turned(text, source.parent, DOCS if page.stem == "readme" else page.parent, pages))
    for package in PACKAGES:
        _write(PAGES / f"api/{package}.md", _reference(package))
    for module in MODULES:
        directive = f"```{{eval-rst}}\n.. automodule:: hasten.{module}\n```\n"
        _write(PAGES / f"api/{module}.md", f"# hasten.{module}\n\n{directive}")


def _write(page: Path, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def _turned(text: str, source: Path, page: Path, pages: dict[Path, Path]) -> str:
    """``text`` of a file in folder ``source`` with its links as from folder ``page``; what has no page is plain."""

    def turn(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path = Path(os.path.normpath(source / target.partition("#")[0]))
        shown = (ROOT / path).is_file() and (path.parts[0] == "docs" or mark == "!")
        to = pages.get(path, ROOT / path if shown else None)
        return label if to is None else f"{mark}[{label}]({os.path.relpath(to, page)})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", turn, text)


def _facts(card: registry.Card) -> str:
    """The front matter of a card as a table."""
    front = card.front
    rows = {
        "Saves": front.get("saves"),
        "Gives": front.get("gives"),
        "Costs": front.get("costs"),
        "Paper": front.get("paper"),
        "Names": ", ".join(f"`{name}`" for name in front.get("exports", [])),
        "Experiments": ", ".join(f"`{name}`" for name in front.get("experiments", [])),
        "torch.compile": front.get("compile"),
    }
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _reference(package: str) -> str:
    """Every public name of ``hasten.<package>``, from its docstring."""
    module = importlib.import_module(f"hasten.{package}")
    lines = [f"# hasten.{package}", "", inspect.getdoc(module) or "", ""]
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
        lines += ["```{eval-rst}", f".. auto{kind}:: hasten.{package}.{name}", "```", ""]
    return "\n".join(lines)


write_pages()
