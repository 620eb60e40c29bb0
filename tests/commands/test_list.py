"""``hasten list``: all of the main ones, or whatever has to do with a word."""

import os
import subprocess
import sys

import pytest

from hasten import registry
from hasten.cli import main


def _printed(capsys, *words: str) -> str:
    assert main(["list", *words]) == 0
    return capsys.readouterr().out


def test_without_a_word_it_shows_methods_experiments_and_data(capsys):
    printed = _printed(capsys)
    titles = [line for line in printed.splitlines() if line and not line.startswith(" ")]
    families = sorted(
        {f"Methods: {card.front['family']}" for card in registry.cards().values() if card.kind == "method"}
    )
    assert titles == [*families, "Tools", "Experiments", "Data"]
    for names in (registry.cards(), registry.group("experiment"), registry.group("data")):
        for name in names:
            assert f"  {name} " in printed


def test_a_word_is_looked_for_in_names_and_summaries_whatever_its_case(capsys):
    lines = _printed(capsys, "TrajeCtory").splitlines()
    found = [line for line in lines if line.startswith("  ")]
    cards = registry.cards()
    assert found and all("trajectory" in line.lower() for line in found if line.split()[0] not in cards)
    assert any(line.startswith("  experts_digits ") for line in found)  # its summary says so
    assert any(line.startswith("  trajectory_matching ") for line in found)  # its name


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("R-MeeTo", "rmeeto"),  # its title
        ("dataset distillation", "dm"),  # its family
        ("dataset_distillation", "dm"),  # as in the names of files
        ("token merging: your vit", "tome"),  # its paper
        ("2210.09461", "tome"),
        ("Constant Memory", "edf"),  # the paper of a relative
    ],
)
def test_a_method_is_found_by_its_title_its_family_and_its_papers(word, name, capsys):
    assert f"\n  {name} " in _printed(capsys, word)


def test_options_stand_under_the_word_that_chooses_them(capsys):
    printed = _printed(capsys, "birds_easy")
    assert "recipe=\n  birds_easy_ipc1 " in printed and "Data\n" in printed
    assert "model=" not in printed


def test_several_words_must_all_be_there(capsys):
    printed = _printed(capsys, "cifar10", "pad")
    assert "  pad_cifar10 " in printed and "speed_cifar10" not in printed


def test_nothing_found_is_one_line_with_the_nearest_names(capsys):
    assert main(["list", "trajectri_matching"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hasten: list: nothing has 'trajectri_matching' in its name or summary, ")
    assert "its title, family or papers; did you mean " in line
    assert "'trajectory_matching'" in line


def test_a_flag_is_no_word_to_look_for(capsys):
    assert main(["list", "--all"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "hasten: list: unrecognized arguments: --all; see hasten list --help"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_it_takes(flag, capsys):
    assert "usage: hasten list [-h] [WORD ...]" in _printed(capsys, flag)


@pytest.mark.parametrize("word", ["speed", "--help"])
def test_python_m_hasten_answers_without_importing_anything_heavy(word):
    code = """
import runpy, sys
try:
    runpy.run_module("hasten", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("code:", end.code)
print("heavy:", sorted({"torch", "lightning", "hydra", "numpy"} & set(sys.modules)))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code, "list", word]
    done = subprocess.run(words, env=environment, timeout=60, capture_output=True, text=True)
    assert done.stdout.endswith("code: 0\nheavy: []\n"), done.stdout + done.stderr
