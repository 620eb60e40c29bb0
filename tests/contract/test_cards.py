"""A method is a small set of files: these tests read its card and name the file that is missing."""

import importlib
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hasten import registry
from hasten.cli import main
from hasten.run import compose

ROOT = Path(__file__).parents[2]
CARDS = registry.cards()
METHODS = {name: card for name, card in CARDS.items() if card.kind == "method"}
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))

DIRTY = {
    "speed_cpu_digits": {"c300001-dirty"},
    "speed_cpu_cifar10_jpeg": {"9db5561-dirty", "7d69818-dirty"},
}
"""Result -> the commits of its rows: the oldest ones, hours of training from before this was a rule; add no other."""


def _rows(path: Path) -> list[dict]:
    results = json.loads(path.read_text(encoding="utf-8"))
    return results["rows"] if isinstance(results, dict) else results


def _sections(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


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


def test_a_script_that_measures_is_named_by_a_card_and_so_run_by_make_bench():
    scripts = {path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    named = {ROOT / path for card in METHODS.values() for path in card.front["benchmark"]}
    unnamed = sorted(path.name for path in scripts - named)
    assert not unnamed, f"benchmarks: expected a card that names {', '.join(unnamed)} as benchmark, got none; name it"


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in METHODS for path in METHODS[name].front["evidence"]]
)
def test_the_evidence_of_a_method_has_three_seeds_or_a_reason_for_one(name, path):
    if not (ROOT / path).is_file() or METHODS[name].front.get("one_seed"):
        return
    seeds: dict[str, set[int]] = {}
    for row in _rows(ROOT / path):
        if row["seed"] is not None:  # of times and sizes there are none
            seeds.setdefault(row["claim"], set()).add(row["seed"])
    most = max(map(len, seeds.values()), default=3)
    remedy = f"measure more, or give the reason in cards/{name}.md: `one_seed: REASON`"
    assert most >= 3, f"{path}: expected three seeds of at least one claim, got {most}; {remedy}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_how_it_goes_with_several_processes(name):
    assert METHODS[name].front["ddp"] in ("joined", "ranks_differ", "refused")


@pytest.mark.parametrize("name", METHODS)
def test_a_card_has_the_sections_of_the_template_in_their_order(name):
    template = files("hasten.commands").joinpath("templates/card.md.txt").read_text(encoding="utf-8")
    wanted = _sections(template)
    found = [section for section in _sections(METHODS[name].text) if section in wanted]
    assert found == wanted, f"cards/{name}.md: expected the sections {', '.join(wanted)}, got {', '.join(found)}"


@pytest.mark.parametrize("name", METHODS)
def test_a_card_ends_with_when_not_to_use_it_and_how_to_cite_it(name):
    card = METHODS[name]
    sections = re.split(r"^## (.+)$", card.text, flags=re.MULTILINE)[1:]
    assert sections[-4::2] == ["When not to use it", "Citation"], f"cards/{name}.md: these are its last two sections"
    when_not, citation = sections[-3::2]
    assert re.search(r"^- .+", when_not, flags=re.MULTILINE), f"cards/{name}.md: When not to use it: a list of cases"
    title, _, rest = card.front["paper"].partition(", ")
    plain = re.sub(r"[{}]", "", citation)
    assert title in plain, f"cards/{name}.md: Citation: expected the title of the front matter, {title!r}"
    assert re.findall(r"\d{4}\.\d{5}", rest) == re.findall(r"\d{4}\.\d{5}", plain)


@pytest.mark.parametrize("name", METHODS)
def test_the_evidence_of_a_card_says_at_which_scale(name):
    said = METHODS[name].front["evidence_here"]
    assert re.search(r"\d", said) and "\n" not in said, f"cards/{name}.md: evidence_here: one sentence with numbers"


CITING = [
    (name, experiment)
    for name, card in METHODS.items()
    for experiment in card.front["experiments"]
    if experiment.endswith("_digits") and "_separate_" not in experiment  # a control: networks without the method
]


@pytest.mark.parametrize(("name", "experiment"), CITING)
def test_an_experiment_of_a_method_cites_it(name, experiment):
    config = OmegaConf.to_container(compose([f"experiment={experiment}"]))
    used = registry.methods_used(config, experiment)
    assert [card.name for card in used] == [name], f"cards/{name}.md: exports: the first is what {experiment} builds"


def test_a_relative_of_a_method_cites_a_paper_of_its_own():
    of = registry.cards()["edf"].paper_of
    assert of("edf_digits") == of("run") == registry.cards()["edf"].front["paper"]
    papers = {word: of(f"{word}_digits") for word in ("edf", "mtt", "ftd", "datm", "pad", "tesla")}
    assert len(set(papers.values())) == 6
    assert "2203.11932" in papers["mtt"] and "2310.05773" in papers["datm"]


def test_a_control_without_the_method_does_not_cite_it():
    config = OmegaConf.to_container(compose(["experiment=speed_digits", "timestep_sampler=min_snr"]))
    assert registry.methods_used(config, "speed_digits") == []


def test_a_callback_of_two_methods_cites_both_outside_of_their_experiments():
    config = {"callbacks": [{"_target_": "hasten.callbacks.TokenMerging"}]}
    assert [card.name for card in registry.methods_used(config, "run")] == ["rmeeto", "tome"]


def test_a_run_ends_with_the_citation_of_what_it_used(tmp_path, capsys):
    words = ["experiment=tome_digits", *compose(["experiment=tome_digits"]).tiny]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    cited = [line for line in capsys.readouterr().out.splitlines() if "cite: " in line]
    assert cited == ["  cite: Token Merging: Your ViT But Faster, ICLR 2023, arXiv:2210.09461"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_was_measured_and_nothing_of_whose_machine(path):
    wanted = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}
    for row in _rows(path):
        assert row.keys() >= wanted, f"{path.name}: a row lacks {sorted(wanted - row.keys())}"
        assert row["machine"].keys() >= {"cpu", "cores", "gpu"}
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_is_of_a_commit_that_there_is(path):
    dirty = {row["commit"] for row in _rows(path) if row["commit"].endswith("-dirty")} - DIRTY.get(path.stem, set())
    remedy = "commit all that is tracked, then measure with --fresh"
    assert not dirty, f"{path.name}: expected rows of commits, got {', '.join(sorted(dirty))}; {remedy}"
