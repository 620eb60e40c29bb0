"""What hasten exports is documented, and the tree keeps the promises of CONTRIBUTING.md."""

import doctest
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["functional", "nn", "optim", "modules", "callbacks", "datamodules", "formats"]
PUBLIC = [
    (package, name)
    for package in PACKAGES
    for name in getattr(importlib.import_module(f"hasten.{package}"), "__all__", [])
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_a_public_name_has_a_docstring_and_an_example_that_runs_as_a_doctest(package, name):
    documented = getattr(importlib.import_module(f"hasten.{package}"), name)
    if not (inspect.isclass(documented) or inspect.isfunction(documented)):
        return
    text = inspect.getdoc(documented) or ""
    assert text, f"hasten.{package}.{name}: expected a docstring"
    examples = doctest.DocTestParser().get_examples(text)
    assert examples, f"hasten.{package}.{name}: expected an example in its docstring"
    assert len(examples) <= 8, f"hasten.{package}.{name}: expected a short example, got {len(examples)} statements"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_a_name_once_and_has_it(package):
    module = importlib.import_module(f"hasten.{package}")
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines()]


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the clone, not the sdist")


@needs_git
def test_nothing_imports_through_the_doors_at_the_root():
    door = re.compile(r"^\s*(from|import) (callbacks|datamodules|configs|cards)\b", flags=re.MULTILINE)
    through = [str(path.relative_to(ROOT)) for path in _tracked("*.py", "*.ipynb") if door.search(path.read_text())]
    assert through == []


@needs_git
def test_no_tracked_file_is_large_but_pictures_in_docs():
    large = [path for path in _tracked() if path.is_file() and path.stat().st_size > 1_000_000]
    assert [str(path) for path in large if "docs" not in path.parts] == []


@needs_git
def test_nothing_that_a_run_writes_is_tracked():
    assert _tracked("*.ckpt", "runs/*", "data/*", "wandb/*", "lightning_logs/*", "checkpoints/*") == []


@needs_git
def test_notebooks_carry_no_outputs():
    import nbformat

    for path in _tracked("notebooks/*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


FOLDERS = sorted({path.parent for path in (ROOT / "src" / "hasten").rglob("*.py")})


def test_a_folder_keeps_to_fifteen_files():
    for folder in FOLDERS:
        own = sorted(path.name for path in folder.glob("*.py") if not path.name.startswith("_"))
        at = folder.relative_to(ROOT)
        assert len(own) <= 15, (
            f"{at}: expected 15 files that do not begin with _, got {len(own)}: {', '.join(own)}; move those of one "
            f"family to {at}/<family>/, with an __init__.py, and import their names in {at}/__init__.py from there"
        )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_modules_is_a_package(folder):
    at = folder.relative_to(ROOT)
    missing = f"{at}: expected an __init__.py, got none; without it lint-imports sees no import of the folder"
    assert (folder / "__init__.py").is_file(), missing
