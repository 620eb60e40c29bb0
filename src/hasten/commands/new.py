"""``hasten new METHOD``: in a clone of hasten, the files of a new method, which name what is owed in each.

What is written is a whole method that does next to nothing: it composes, trains and passes the contract tests, but for
those that ask for content. Each place that owes some is marked, and tests/contract/test_owed.py fails until it is done.
"""

import ast
import importlib.util
import keyword
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from hasten.commands import _words
from hasten.errors import HastenError

_MARK = "OWED"


def main(words: Sequence[str]) -> int:
    """Write the files of the method that ``words`` name, and print them with what is owed."""
    parser = _words.parser(
        "new", "In a clone of hasten: the files of a new method, from a template, and what is owed in each."
    )
    parser.add_argument("name", nargs="?", metavar="METHOD", help="words in small letters, joined by _: edge_noise")
    parser.add_argument(
        "--family", metavar="FAMILY", help="its file of functional/ and folder of callbacks/; default: no others"
    )
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    if not asked.name:
        raise HastenError("new: expected the name of a method, got nothing; try: hasten new edge_noise")
    root = _clone()
    written = method_files(root, asked.name, asked.family)
    changed = [path for path in written if (root / path).exists()]
    _write(root, written)
    width = max(len(str(path)) for path in written)
    for path, text in written.items():
        owed = sum(f"{_MARK}: " in line for line in text.splitlines())
        said = f"{'changed' if path in changed else 'wrote  '}  {path!s:<{width}}"
        print(f"  {said}  owes {owed}" if owed else f"  {said.rstrip()}")
    print(
        f"\nIt runs, and does next to nothing: python train.py experiment={asked.name}_digits\n"
        f"What it owes is marked {_MARK} in the files; pytest tests/contract/test_owed.py names every place.\n"
        "Then benchmarks/results, and `make pages` for README.md and benchmarks/README.md; CONTRIBUTING.md says more."
    )
    return 0


def method_files(root: Path, name: str, family: str | None = None) -> dict[Path, str]:
    """What the method consists of, path in the clone -> text; of files that are there already, their new text.

    Its callback stands in the folder of its ``family``, beside the others where it has none.

    Raises:
        HastenError: for a name that is none or is taken; nothing is written here.
    """
    _check_word("METHOD", name)
    in_folder, family = family is not None, family or name
    _check_word("--family", family)
    title = "".join(word.capitalize() for word in name.split("_"))
    package = Path("src", "hasten")
    formulas = package / "functional" / f"{family}.py"
    shells = package / "callbacks"
    inner = f"{family}.{name}" if in_folder else name
    new = {
        shells / f"{inner.replace('.', '/')}.py": "callback.py",
        package / "configs" / "callbacks" / f"{name}.yaml": "callback.yaml",
        package / "configs" / "experiment" / f"{name}_digits.yaml": "experiment.yaml",
        package / "cards" / f"{name}.md": "card.md",
        Path("tests", "functional", f"test_{name}.py"): "test_function.py",
        Path("tests", "callbacks", f"test_{name}.py"): "test_callback.py",
        Path("benchmarks", f"{name}.py"): "benchmark.py",
    }
    for path in new:
        if (root / path).exists():
            raise HastenError(f"new: {name}: expected a new name, there is {path}")
    # of a folder and a file of one name, Python takes the folder
    if in_folder and (root / shells / f"{family}.py").exists():
        raise HastenError(
            f"new: --family: expected the name of a folder, got {family!r}, which would hide {shells / family}.py; "
            "move that file into the folder, or name another family"
        )
    if not in_folder and (root / shells / name).is_dir():
        raise HastenError(f"new: {name}: expected a new name, there is {shells / name}; is that its --family?")
    if importlib.util.find_spec(name) is not None:
        raise HastenError(f"new: {name}: expected a name of its own, got that of a Python package, which it would hide")

    def filled(template: str) -> str:
        text = files("hasten.commands").joinpath(f"templates/{template}.txt").read_text(encoding="utf-8")
        words = {"__Method__": title, "__method__": name, "__family__": family.replace("_", " ")}
        for mark, word in words.items():
            text = text.replace(mark, word)
        return text

    before = filled("functional.py")
    if (root / formulas).exists():
        before = (root / formulas).read_text(encoding="utf-8")
        if not re.search(r"^from torch import .*\bTensor\b", before, flags=re.MULTILINE):
            raise HastenError(f"new: --family: expected a file of formulas, which import Tensor, got {formulas}")
    texts = {formulas: before + filled("function.py")} | {path: filled(template) for path, template in new.items()}
    marker = shells / family / "__init__.py"
    if in_folder and not (root / marker).exists():
        texts[marker] = filled("family.py")
    for exports, module, export in (
        (package / "functional" / "__init__.py", f"hasten.functional.{family}", name),
        (package / "callbacks" / "__init__.py", f"hasten.callbacks.{inner}", title),
    ):
        texts[exports] = _exporting((root / exports).read_text(encoding="utf-8"), module, export)
    return texts


def _clone() -> Path:
    """The clone that the present folder is in."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        project = folder / "pyproject.toml"
        if project.is_file() and re.search(r'^name = "hasten"$', project.read_text(encoding="utf-8"), re.MULTILINE):
            return folder
    raise HastenError(
        f"new: expected to stand in a clone of hasten, which it adds files to, got {str(Path.cwd())!r}; git clone it"
    )


def _check_word(argument: str, word: str) -> None:
    """Refuse a ``word`` that cannot name a file, a function and, with capitals, a class found again by its name."""
    camel = "".join(part.capitalize() for part in word.split("_"))
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z][a-z0-9]*)*", word) or keyword.iskeyword(word):
        raise HastenError(f"new: {argument}: expected words in small letters, joined by _, got {word!r}")
    if re.sub(r"(?<=[a-z])(?=[A-Z])", "_", camel).lower() != word:  # as tests/contract/test_callbacks.py reads it
        raise HastenError(
            f"new: {argument}: expected words of two letters or more, digits at the end only, got {word!r}"
        )


def _exporting(text: str, module: str, name: str) -> str:
    """An ``__init__.py`` that exports ``name`` of ``module`` as well, in the order that the linter wants."""
    lines, tree = text.splitlines(), ast.parse(text)
    imports = {node.module: node for node in tree.body if isinstance(node, ast.ImportFrom)}
    [exported] = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    names = ast.literal_eval(exported.value)
    if name in names:
        raise HastenError(f"new: {name}: expected a new name, {module.rpartition('.')[0]} exports it already")
    lines[exported.lineno - 1 : exported.end_lineno] = [
        "__all__ = [",
        *(f'    "{each}",' for each in sorted([*names, name], key=_order)),
        "]",
    ]
    together = [name, *(alias.name for alias in imports[module].names)] if module in imports else [name]
    line = f"from {module} import {', '.join(sorted(together, key=_order))}"
    if len(line) > 120 or (module in imports and imports[module].lineno != imports[module].end_lineno):
        listed = "".join(f"    {each},\n" for each in sorted(together, key=_order))
        line = f"from {module} import (\n{listed})"
    if module in imports:
        first, last = imports[module].lineno - 1, imports[module].end_lineno
    else:
        later = [node.lineno - 1 for other, node in imports.items() if str(other) > module]
        first = last = min(later, default=max(node.end_lineno or 0 for node in imports.values()))
    lines[first:last] = [line]
    return "\n".join(lines) + "\n"


def _order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _write(root: Path, texts: Mapping[Path, str]) -> None:
    """All files or none: first beside their places, then into them; what was there comes back where one fails.

    A folder is made for its ``__init__.py`` alone: another one that is missing says that the clone is not whole.
    """
    folders = [path.parent for path in texts if path.name == "__init__.py" and not (root / path).parent.exists()]
    beside = {path: (root / path).with_name(f".{path.name}.new") for path in texts}
    there: dict[Path, str | None] = {}
    try:
        for folder in folders:
            (root / folder).mkdir()
        for path, text in texts.items():
            beside[path].write_text(text, encoding="utf-8")
        for path in texts:
            old = (root / path).read_text(encoding="utf-8") if (root / path).exists() else None
            os.replace(beside[path], root / path)
            there[path] = old
    except OSError as error:
        for path, old in there.items():
            if old is None:
                (root / path).unlink()
            else:
                (root / path).write_text(old, encoding="utf-8")
        raise HastenError(f"new: cannot write {error.filename}: {error.strerror}; nothing was written") from error
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):  # it holds files, unless a write has failed
                (root / folder).rmdir()
