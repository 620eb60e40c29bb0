"""``hasten new`` in a clone of the test's own: what it writes, what it refuses, and what its files then owe."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hasten.cli import main

ROOT = Path(__file__).parents[2]
FILES = {
    "src/hasten/functional/edge_noise.py",
    "src/hasten/callbacks/edge_noise.py",
    "src/hasten/configs/callbacks/edge_noise.yaml",
    "src/hasten/configs/experiment/edge_noise_digits.yaml",
    "src/hasten/cards/edge_noise.md",
    "tests/functional/test_edge_noise.py",
    "tests/callbacks/test_edge_noise.py",
    "benchmarks/edge_noise.py",
}
FOLDER = "src/hasten/callbacks/dataset_distillation"
EXPORTS = {"src/hasten/functional/__init__.py", "src/hasten/callbacks/__init__.py"}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """As much of a clone as the command reads and writes."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for path in FILES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    for path in [*EXPORTS, "pyproject.toml", "src/hasten/functional/timesteps.py", "src/hasten/functional/draws.py"]:
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / FOLDER, tmp_path / FOLDER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_files_of_a_method_are_written_and_printed(clone, capsys):
    before = _texts(clone)
    (clone / "tests/functional").joinpath("sub").mkdir()
    os.chdir(clone / "tests/functional/sub")  # anywhere in the clone
    assert main(["new", "edge_noise"]) == 0
    after = _texts(clone)
    assert {path for path in after if before.get(path) != after[path]} == FILES | EXPORTS
    printed = capsys.readouterr().out
    for path in FILES:
        assert re.search(rf"wrote +{path} +owes \d+$", printed, flags=re.MULTILINE)
    for path in EXPORTS:
        assert re.search(rf"changed +{path}$", printed, flags=re.MULTILINE)
    assert "__method__" not in "".join(after[path] for path in FILES)


def test_a_family_that_there_is_gets_the_formula_at_its_end(clone):
    before = _texts(clone)
    assert main(["new", "edge_noise", "--family", "timesteps"]) == 0
    formulas = "src/hasten/functional/timesteps.py"
    after = _texts(clone)
    assert after[formulas].startswith(before[formulas])
    assert "\n\n\ndef edge_noise(gradient: Tensor" in after[formulas]
    assert "src/hasten/functional/edge_noise.py" not in after
    assert "family: timesteps" in after["src/hasten/cards/edge_noise.md"]


@pytest.mark.parametrize("family", ["dataset_distillation", "edges"])
def test_the_shell_of_a_family_goes_to_its_folder_which_is_made_where_there_is_none(clone, family):
    before = _texts(clone)
    assert main(["new", "edge_noise", "--family", family]) == 0
    after = _texts(clone)
    shells = {path for path in after.keys() - before.keys() if "/callbacks/" in path and path.startswith("src")}
    package = set() if family == "dataset_distillation" else {"src/hasten/callbacks/edges/__init__.py"}
    config = "src/hasten/configs/callbacks/edge_noise.yaml"
    assert shells == {f"src/hasten/callbacks/{family}/edge_noise.py", config} | package
    exported = after["src/hasten/callbacks/__init__.py"]
    assert f"from hasten.callbacks.{family}.edge_noise import EdgeNoise\n" in exported
    assert "tests/callbacks/test_edge_noise.py" in after


def test_a_folder_without_its_init_gets_one_and_one_that_is_there_stays(clone):
    text = (clone / FOLDER / "__init__.py").read_text()
    assert main(["new", "edge_noise", "--family", "dataset_distillation"]) == 0
    assert (clone / FOLDER / "__init__.py").read_text() == text
    (clone / FOLDER / "__init__.py").unlink()
    assert main(["new", "edge_blur", "--family", "dataset_distillation"]) == 0
    assert (clone / FOLDER / "__init__.py").read_text() == '"""The callbacks of dataset distillation."""\n'


def test_a_family_never_hides_a_file_and_a_method_never_a_folder(clone, capsys):
    (clone / "src/hasten/callbacks/edges.py").write_text("")
    before = _texts(clone)
    assert main(["new", "edge_noise", "--family", "edges"]) == 1
    assert "got 'edges', which would hide src/hasten/callbacks/edges.py; move that file" in capsys.readouterr().err
    assert main(["new", "dataset_distillation"]) == 1
    assert f"there is {FOLDER}; is that its --family?" in capsys.readouterr().err
    assert _texts(clone) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected the name of a method"),
        (["Edge"], "expected words in small letters"),
        (["edge-noise"], "expected words in small letters"),
        (["../edge"], "expected words in small letters"),
        (["lambda"], "expected words in small letters"),
        (["a_b"], "expected words of two letters or more"),
        (["json"], "got that of a Python package"),
        (["bipartite_soft_matching"], "hasten.functional exports it already"),
        (["throughput"], "hasten.callbacks exports it already"),
        (["edge_noise", "--family", "Edges"], "--family: expected words in small letters"),
        (["edge_noise", "--family", "draws"], "expected a file of formulas"),
        (["edge_noise", "noise"], "see hasten new --help"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_and_nothing_written(clone, words, said, capsys):
    before = _texts(clone)
    assert main(["new", *words]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hasten: new: ") and said in line
    assert _texts(clone) == before


@pytest.mark.parametrize("path", sorted(FILES - {"src/hasten/functional/edge_noise.py"}))
def test_a_name_that_is_taken_by_any_file_is_refused(clone, path, capsys):
    (clone / path).write_text("taken")
    before = _texts(clone)
    assert main(["new", "edge_noise"]) == 1
    assert f"there is {path}" in capsys.readouterr().err
    assert _texts(clone) == before


def test_a_write_that_fails_half_way_leaves_nothing(clone, capsys, monkeypatch):
    before, replaced, replace = _texts(clone), [], os.replace

    def fails_at_the_last(source, target):
        if len(replaced) == len(FILES | EXPORTS) - 1:
            raise OSError(28, "No space left on device", str(target))
        replaced.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_at_the_last)
    assert main(["new", "edge_noise", "--family", "edges"]) == 1
    assert "No space left on device; nothing was written" in capsys.readouterr().err
    assert _texts(clone) == before and not (clone / "src/hasten/callbacks/edges").exists()


def test_a_folder_that_is_missing_is_said_and_nothing_written(clone, capsys):
    shutil.rmtree(clone / "benchmarks")
    before = _texts(clone)
    assert main(["new", "edge_noise"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert _texts(clone) == before


def test_help_says_what_it_takes_and_writes_nothing(clone, capsys):
    before = _texts(clone)
    assert main(["new", "edge_noise", "--help"]) == 0
    assert "usage: hasten new [--family FAMILY] [-h] [METHOD]" in capsys.readouterr().out
    assert _texts(clone) == before


def test_without_a_clone_it_says_that_it_needs_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "edge_noise"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "expected to stand in a clone of hasten" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_written_keeps_the_form_of_a_method_and_fails_where_content_is_owed(tmp_path, monkeypatch):
    for folder in ("src", "tests", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "_build", "_pages", "*.png")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    assert main(["new", "edge_noise"]) == 0
    written = sorted(FILES | EXPORTS)
    python = [path for path in written if path.endswith(".py")]
    for words in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *words, "--no-cache", *python], check=True)
    contract = ["cards", "experiments", "callbacks", "public_names", "owed"]
    tests = [*(f"tests/contract/test_{name}.py" for name in contract), "tests/test_registry.py", "tests/test_pages.py"]
    # by id: the callback, the function, the card, the experiment; with src and tests of the copy
    chosen = "edge_noise or EdgeNoise or owed or the_readme or keeps_to_fifteen or exports_a_name_once"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *tests,
            *(path for path in python if path in FILES and "benchmarks" not in path),
        ]
        + ["-k", chosen, "-p", "no:cacheprovider", "--junitxml=report.xml"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    cases = {case.get("name", ""): case for case in ElementTree.parse("report.xml").iter("testcase")}
    failures = {name: case.find("failure") for name, case in cases.items()}
    failed = {
        name: f"{failure.get('message')}\n{failure.text}" for name, failure in failures.items() if failure is not None
    }
    assert not [name for name, case in cases.items() if case.find("error") is not None]
    # form: it composes, is checked, has its header lines, trains, resumes, and its callback keeps every promise
    passed = cases.keys() - failed.keys()
    for test in (
        "test_an_experiment_composes_and_is_found_right[edge_noise_digits]",
        "test_the_header_of_an_experiment_gives_command_cost_and_expected_result[edge_noise_digits]",
        "test_a_digits_experiment_trains_and_resumes_in_its_tiny_form[edge_noise_digits]",
        "test_every_option_of_a_group_composes_and_is_found_right[callbacks-edge_noise]",
        "test_a_card_exports_public_names_that_import[edge_noise]",
        "test_the_tests_of_a_card_exist[edge_noise]",
        "test_a_method_says_how_it_goes_with_several_processes[edge_noise]",
        "test_a_callback_leaves_a_strangers_module_as_it_found_it[EdgeNoise]",
        "test_a_public_name_has_a_docstring_and_an_example_that_runs_as_a_doctest[callbacks-EdgeNoise]",
        "test_a_public_name_has_a_docstring_and_an_example_that_runs_as_a_doctest[functional-edge_noise]",
        "test_it_is_the_formula_a_number_at_a_time",
        "test_a_step_is_as_large_as_it_says",
    ):
        assert test in passed, failed.get(test, f"{test} did not run")
    # content: every file is named with what to write
    owed = failed.pop("test_no_file_owes_its_content")
    for path in FILES:
        assert f"{path}:" in owed
    assert "cards/edge_noise.md:14: write benchmarks/results/edge_noise_cpu.json" in owed
    # what else fails is about the card, and says so
    for test, said in failed.items():
        assert "cards/edge_noise.md" in said, f"{test}: {said}"
