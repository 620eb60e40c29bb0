"""Damaged files: what a run, a stage or a comparison reads is refused in one line or read, and never written over."""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hasten.cli import main
from hasten.run import compose, run

QUICK = ["experiment=classify_digits", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
QUICK += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "model.width=4", "callbacks.progress=null"]
# no shrinking: an example takes tenths of a second, and is short as it is
PHASES = [phase for phase in settings.default.phases if phase.name in ("explicit", "generate")]


def _many(count: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks, phases=PHASES
    )


def _main(words: Sequence[str]) -> tuple[int, list[str], str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, err.getvalue().splitlines(), out.getvalue()


def _damaged(content: bytes, where: float, how: int | None) -> bytes:
    """``content`` cut off at a share of its length, or with one bit of the byte there flipped."""
    at = min(int(where * len(content)), len(content) - 1)
    if how is None:
        return content[:at]
    return content[:at] + bytes([content[at] ^ (1 << how)]) + content[at + 1 :]


# where, and which bit; None: the file ends there
DAMAGE = st.tuples(st.floats(0, 1, exclude_max=True), st.none() | st.integers(0, 7))


def _check_read_or_refused(words: Sequence[str], damaged: Path) -> int:
    """Whether ``words``, which read ``damaged``, end in a line or a run, with the file as it is; the exit code."""
    before = damaged.read_bytes()
    code, lines, _ = _main(words)
    assert code in (0, 1)
    assert damaged.read_bytes() == before, "the damaged file was written over"
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith("hasten: ") and len(lines[0]) < 1200, lines
        assert "HYDRA_FULL_ERROR" not in lines[0], lines  # which says: nobody expected this
    return code


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a complete run of every file that others read."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        run(compose([*QUICK, "run_dir=done"]))
        net = torch.load("done/checkpoints/best.ckpt", weights_only=True)
        torch.save(net, "net.ckpt")
    return folder / "done"


@_many(10)
@given(DAMAGE)
@example((0.0, None))
@example((0.5, None))
@example((0.999, None))
@example((0.0, 0))
def test_a_damaged_checkpoint_is_refused_or_read(finished, damage):
    with contextlib.chdir(finished.parent):
        broken = Path("broken.ckpt")
        broken.write_bytes(_damaged((finished / "checkpoints/last.ckpt").read_bytes(), *damage))
        shutil.rmtree("again", ignore_errors=True)
        words = [*QUICK, "trainer.max_epochs=2", "ckpt_path=broken.ckpt", "run_dir=again", "logger=none"]
        code = _check_read_or_refused(words, broken)
        if damage[1] is None:
            assert code == 1  # a torn archive has lost its directory
        if code == 0:
            assert json.loads(Path("again/result.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"not a checkpoint", b"\x00" * 4096])
def test_what_is_no_checkpoint_is_refused_before_a_run_begins(finished, content):
    with contextlib.chdir(finished.parent):
        Path("none.ckpt").write_bytes(content)
        code, (line,), _ = _main([*QUICK, "ckpt_path=none.ckpt", "run_dir=never"])
        assert code == 1 and line.startswith("hasten: ckpt_path: 'none.ckpt' is no whole Lightning checkpoint")
        assert not Path("never").exists()


def test_the_checkpoint_of_another_optimizer_is_refused(finished):
    with contextlib.chdir(finished.parent):
        words = [*QUICK, "trainer.max_epochs=2", f"ckpt_path={finished}/checkpoints/last.ckpt", "optimizer=sgd"]
        code, (line,), _ = _main([*words, "run_dir=other"])
        assert code == 1 and "is of another optimizer than SGD" in line and "momentum" in line


@_many(6)
@given(st.sampled_from(["result.json", "config.yaml", "metrics.csv", "checkpoints/last.ckpt"]), DAMAGE)
def test_a_broken_off_run_with_a_damaged_file_is_continued_or_refused(finished, name, damage):
    with contextlib.chdir(finished.parent):
        shutil.rmtree("broken_off", ignore_errors=True)
        shutil.copytree(finished, "broken_off")
        result = json.loads((finished / "result.json").read_text())
        Path("broken_off/result.json").write_text(json.dumps(result | {"status": "interrupted"}))
        file = Path("broken_off", name)
        file.write_bytes(_damaged(file.read_bytes(), *damage))
        before = file.read_bytes()
        code, lines, _ = _main([*QUICK, "trainer.max_epochs=2", "run_dir=broken_off", "ckpt_path=last"])
        assert code in (0, 1) and (code == 0 or len(lines) == 1), lines
        if code == 1:
            assert lines[0].startswith("hasten: ") and "HYDRA_FULL_ERROR" not in lines[0], lines
            assert name != "checkpoints/last.ckpt" or file.read_bytes() == before
        else:
            assert json.loads(Path("broken_off/result.json").read_text())["status"] == "complete"


@_many(25)
@given(st.sampled_from(["result.json", "config.yaml", "metrics.csv"]), DAMAGE)
@example("result.json", (0.0, None))
@example("metrics.csv", (0.5, None))
def test_a_damaged_run_is_compared_or_left_out(finished, name, damage):
    with contextlib.chdir(finished.parent):
        shutil.rmtree("compared", ignore_errors=True)
        for run_folder in ("compared/a", "compared/b"):
            shutil.copytree(finished, run_folder, ignore=shutil.ignore_patterns("checkpoints"))
        file = Path("compared/b", name)
        file.write_bytes(_damaged(file.read_bytes(), *damage))
        before = file.read_bytes()
        code, lines, out = _main(["compare", "compared"])
        assert (code, lines) == (0, []), lines
        assert file.read_bytes() == before
        assert "test/acc" in out


# ------------------------------------------------------------------ artefacts


@pytest.mark.slow
@_many(10)
@given(DAMAGE)
@example((0.0, None))
@example((0.0, 3))
def test_a_damaged_feature_net_is_refused_or_read(finished, damage):
    with contextlib.chdir(finished.parent):
        broken = Path("broken_net.ckpt")
        broken.write_bytes(_damaged(Path("net.ckpt").read_bytes(), *damage))
        words = ["experiment=classify_digits", "callbacks=sample_distance", "run_dir=fed"]
        words += [f"callbacks.sample_distance.feature_net.checkpoint={broken}", "trainer.max_epochs=0", "logger=none"]
        _check_read_or_refused(words, broken)
        shutil.rmtree("fed", ignore_errors=True)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    """A folder with complete experts and a set that was distilled from them."""
    folder = tmp_path_factory.mktemp("distilled")
    with contextlib.chdir(folder):
        tiny = [*compose(["experiment=dm_digits"]).tiny, "callbacks.progress=null"]
        tiny.append("callbacks.evaluate_distilled.baselines=[random]")
        run(compose(["experiment=dm_digits", *tiny, "run_dir=done"]))
    return folder


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    assert found, f"nothing like {pattern} in {folder}"
    return found


@pytest.mark.slow
@_many(10)
@given(DAMAGE, st.integers(0, 100))
@example((0.0, None), 0)
@example((0.0, 6), 0)
def test_a_damaged_expert_is_refused_or_read(distilled, damage, which):
    with contextlib.chdir(distilled):
        shutil.rmtree("experts", ignore_errors=True)
        shutil.copytree(_files(distilled, "stages/*/experts/*.safetensors")[0].parent, "experts")
        files = _files(Path("experts"), "*")
        file = files[which % len(files)]
        file.write_bytes(_damaged(file.read_bytes(), *damage))
        words = ["experiment=difficulty", "first=[]", "task.experts=experts", "task.epoch=1", "run_dir=graded"]
        _check_read_or_refused(words, file)
        shutil.rmtree("graded", ignore_errors=True)


@_many(5)
@given(DAMAGE, st.integers(0, 100))
@example((0.0, None), 0)
@example((0.0, 6), 0)
def test_a_damaged_distilled_set_is_refused_or_read(distilled, damage, which):
    with contextlib.chdir(distilled):
        shutil.rmtree("set", ignore_errors=True)
        shutil.copytree(_files(distilled / "done", "distilled.safetensors")[0].parent, "set")
        files = [path for path in _files(Path("set"), "*") if path.suffix in (".safetensors", ".json", ".yaml")]
        file = files[which % len(files)]
        file.write_bytes(_damaged(file.read_bytes(), *damage))
        words = ["experiment=evaluate_distilled", "distilled=set", "data=digits", "run_dir=measured", "seeds=1"]
        words += ["task.epochs=1", "baselines=[]", "threads=1", "task.lr=0.01"]
        _check_read_or_refused(words, file)
        shutil.rmtree("measured", ignore_errors=True)


def test_a_file_of_other_tensors_is_no_distilled_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    save_file({"weights": torch.zeros(2)}, "set/distilled.safetensors")
    words = ["experiment=evaluate_distilled", "distilled=set", "data=digits", "run_dir=measured", "baselines=[]"]
    assert _check_read_or_refused(words, Path("set/distilled.safetensors")) == 1
