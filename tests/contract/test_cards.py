"""A method is a small set of files: these tests read its card and name the file that is missing."""

import importlib
import json
import re
from pathlib import Path

import pytest

from hasten import registry

ROOT = Path(__file__).parents[2]
CARDS = registry.cards()
METHODS = {name: card for name, card in CARDS.items() if card.kind == "method"}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_exports_public_names_that_import(name):
    for export in CARDS[name].front["exports"]:
        package, _, attribute = export.rpartition(".")
        assert hasattr(importlib.import_module(package), attribute), f"cards/{name}.md: no {export}"
        assert attribute in importlib.import_module(package).__all__, f"{package}.__all__ lacks {attribute}"


@pytest.mark.parametrize("name", CARDS)
def test_the_tests_of_a_card_exist(name):
    for path in CARDS[name].front["tests"]:
        assert (ROOT / path).is_file(), f"cards/{name}.md: there is no {path}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_experiments_and_one_of_them_needs_no_download(name):
    experiments = METHODS[name].front["experiments"]
    for experiment in experiments:
        assert experiment in registry.group("experiment"), f"cards/{name}.md: there is no experiment {experiment}"
    assert any(experiment.endswith("_digits") for experiment in experiments)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_benchmark_and_its_results(name):
    for path in METHODS[name].front["benchmark"]:
        assert (ROOT / path).is_file(), f"cards/{name}.md: there is no {path}"
    for path in METHODS[name].front["evidence"]:
        assert (ROOT / path).is_file(), f"cards/{name}.md: there is no {path}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_how_it_goes_with_several_processes(name):
    assert METHODS[name].front["ddp"] in ("joined", "ranks_differ", "refused")


@pytest.mark.parametrize("name", METHODS)
def test_a_card_ends_with_when_not_to_use_it_and_how_to_cite_it(name):
    headings = re.findall(r"^## (.+)$", METHODS[name].text, flags=re.MULTILINE)
    assert headings[-2:] == ["When not", "Citation"]


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_lists_the_method(name):
    row = re.search(rf"^\| \[[^\]]+\]\(cards/{name}\.md\) \|.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert row, f"README.md: the table of methods has no row for cards/{name}.md"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_was_measured_and_nothing_of_whose_machine(path):
    results = json.loads(path.read_text())
    wanted = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}
    for row in results["rows"] if isinstance(results, dict) else results:
        assert row.keys() >= wanted, f"{path.name}: a row lacks {sorted(wanted - row.keys())}"
        assert row["machine"].keys() >= {"cpu", "cores", "gpu"}
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())
