import json
import stat

import pytest

from hasten.formats import whole_file, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def write_half():
        with whole_file(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_cannot_hold_leaves_no_half_written_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "result.json", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_may_be_read_by_others_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "result.json", {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "result.json")}
    assert len(modes) == 1


def test_missing_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "result.json", [1])
    assert (tmp_path / "a" / "b" / "result.json").read_text() == "[\n  1\n]\n"
