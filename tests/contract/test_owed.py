"""What `hasten new` has left to its author stands in the files themselves, and fails here until it is written."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = "OWED" + ": "
FOLDERS, SUFFIXES = ("src", "tests", "benchmarks"), (".py", ".md", ".yaml")


def test_no_file_owes_its_content():
    owed = [
        f"{path.relative_to(ROOT)}:{number}: write {line.partition(MARK)[2]}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MARK in line
    ]
    if owed:  # an assertion would cut the list
        pytest.fail("\n".join(["files owe what stands behind their marks:", *owed]), pytrace=False)
