"""Runs that are asked to end, or killed, and go on: nothing is lost but steps, and the numbers are the same."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from hasten.checkpoints import WholeCheckpoints
from hasten.cli import main
from hasten.errors import HastenError
from hasten.interruption import Stopped, stopped_by_sigterm
from hasten.loggers import MetricsFile
from hasten.run_folders import claimed, is_alive, newest_unfinished

# 8 steps: 2 epochs of 4 batches, a validation after every 2 and one of them at the end of an epoch
SMALL = ["experiment=classify_digits", "model.width=4", "data.batch_size=16", "trainer.max_epochs=2"]
SMALL += ["trainer.limit_train_batches=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=3"]
SMALL += ["trainer.log_every_n_steps=1", "data.val=48", "data.test=0.1", "callbacks.throughput=null"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture(autouse=True)
def _as_module(monkeypatch):
    """This file's classes by an importable name, as a config asks for them; nobody has asked for anything yet."""
    monkeypatch.setitem(sys.modules, "tests_of_interruption", sys.modules[__name__])
    monkeypatch.setattr(Ask, "asked", False)


class Ask(Callback):
    """Raise a signal in a hook, when as many steps are done; in one run of several."""

    asked = False

    def __init__(self, hook: str, steps: int, signum: int = signal.SIGTERM, times: int = 1):
        self.steps, self.signum, self.times = steps, signum, times
        setattr(self, hook, self._ask)

    def _ask(self, trainer, *_, **__):
        if trainer.global_step == self.steps and not Ask.asked:
            Ask.asked = True
            for _ in range(self.times):
                signal.raise_signal(self.signum)


def ask(hook, steps, signum=signal.SIGTERM, times=1):
    what = f"hook: {hook}, steps: {steps}, signum: {int(signum)}, times: {times}"
    return f"+callbacks.ask={{_target_: tests_of_interruption.Ask, {what}}}"


def folder_of(experiment="classify_digits"):
    (folder,) = Path("runs", experiment).iterdir()
    return folder


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


def rows_in(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def state_in(path):
    """What a checkpoint holds, but for where and how long."""
    checkpoint = torch.load(path, weights_only=True)
    callbacks = checkpoint.pop("callbacks")
    scores = {name: state["best_model_score"] for name, state in callbacks.items() if "ModelCheckpoint" in name}
    return checkpoint | {"scores": scores}


def difference(one, other, where=""):
    """Where two nested things differ in a bit; empty where they do not."""
    if isinstance(one, torch.Tensor):
        return "" if torch.equal(one, other) else where
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        found = [difference(one.get(key), other.get(key), f"{where}.{key}") for key in one.keys() | other.keys()]
        return next(filter(None, found), "")
    return "" if one == other else f"{where}: {one} and {other}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    before, home = Path.cwd(), tmp_path_factory.mktemp("whole")
    os.chdir(home)
    try:
        assert main(SMALL) == 0
    finally:
        os.chdir(before)
    return next((home / "runs/classify_digits").iterdir())


def check_equal(folder, whole):
    assert result_in(folder)["status"] == "complete"
    assert result_in(folder)["metrics"] == result_in(whole)["metrics"]
    for name in ("last.ckpt", "best.ckpt"):
        assert not difference(state_in(folder / "checkpoints" / name), state_in(whole / "checkpoints" / name)), name
    assert rows_in(folder) == rows_in(whole)
    assert sorted(path.name for path in folder.rglob("*")) == sorted(path.name for path in whole.rglob("*"))


# ------------------------------------------------------------------ asked to end


MOMENTS = {
    "within a step": ("on_before_zero_grad", 2),
    "in a validation": ("on_validation_batch_start", 2),
}
MORE_MOMENTS = {
    "at the end of a batch that is validated": ("on_train_batch_end", 2),
    "in the validation at the end of an epoch": ("on_validation_batch_start", 4),
    "at the end of an epoch": ("on_train_epoch_end", 4),
    "in the last step": ("on_before_zero_grad", 7),
    "in the last validation": ("on_validation_batch_start", 8),
    "after the last step": ("on_train_end", 8),
    "in the test": ("on_test_batch_start", 8),
}


def goes_on(words, whole, capsys):
    assert main(words) == 143
    folder = folder_of()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"hasten: stopped by SIGTERM; {folder} holds its last checkpoint: run_dir={folder} ckpt_path=last continues it"
    )
    assert result_in(folder)["status"] == "interrupted"
    assert not (folder / "traceback.txt").exists()
    assert main(["experiment=classify_digits", "ckpt_path=last"]) == 0
    assert f"continuing {folder}" in capsys.readouterr().out
    check_equal(folder_of(), whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_sigterm_ends_goes_on_as_if_it_had_not(moment, whole, capsys):
    goes_on([*SMALL, ask(*MOMENTS[moment])], whole, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MORE_MOMENTS)
def test_it_goes_on_from_any_moment(moment, whole, capsys):
    goes_on([*SMALL, ask(*MORE_MOMENTS[moment])], whole, capsys)


@pytest.mark.slow
def test_it_goes_on_from_any_moment_of_a_run_counted_in_steps(tmp_path, monkeypatch, capsys):
    words = [*SMALL, "trainer.max_epochs=-1", "trainer.max_steps=7"]
    assert main(words) == 0
    whole = folder_of().absolute()
    for number, moment in enumerate([*MOMENTS.values(), *MORE_MOMENTS.values(), ("on_validation_batch_start", 6)]):
        home = tmp_path / str(number)
        home.mkdir()
        monkeypatch.chdir(home)
        monkeypatch.setattr(Ask, "asked", False)
        hook, steps = moment
        goes_on([*words, ask(hook, min(steps, 7 if "test" in hook or "end" in hook else 6))], whole, capsys)


@pytest.mark.slow
def test_it_goes_on_with_averaged_weights_from_the_middle_of_a_validation(tmp_path, monkeypatch, capsys):
    words = [*SMALL, "callbacks=[default,ema]"]
    assert main(words) == 0
    whole = folder_of().absolute()
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    goes_on([*words, ask("on_validation_batch_start", 2)], whole, capsys)


@pytest.fixture
def _as_at_a_terminal():
    """SIGINT as an interactive shell leaves it; in the background of a script it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_as_at_a_terminal")
def test_ctrl_c_saves_and_a_second_one_does_not_wait(whole, capfd):
    assert main([*SMALL, ask("on_before_zero_grad", 3, signal.SIGINT)]) == 130
    (hint, line) = filter(None, capfd.readouterr().err.splitlines())
    assert hint == "hasten: saving at the end of this batch; Ctrl-C again ends at once"
    assert line.startswith(f"hasten: stopped by Ctrl-C; {folder_of()} holds its last checkpoint")
    assert torch.load(folder_of() / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    Ask.asked = False
    assert main(["ckpt_path=last", f"run_dir={folder_of()}", "callbacks.ask.steps=6", "callbacks.ask.times=2"]) == 130
    assert torch.load(folder_of() / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert main(["ckpt_path=last", "experiment=classify_digits"]) == 0
    check_equal(folder_of(), whole)


def test_a_run_that_is_asked_before_its_first_step_says_that_there_is_nothing_to_continue(capsys):
    assert main([*SMALL, ask("setup", 0)]) == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"hasten: stopped by SIGTERM before there was a checkpoint; {folder_of()} can be deleted"
    assert result_in(folder_of())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def write_half(folder: Path) -> dict[str, float]:
    """A task that is asked to end when it has done a half, and does the rest when it runs again."""
    if not (folder / "half").exists():
        (folder / "half").write_text("first")
        signal.raise_signal(signal.SIGTERM)
    return {"halves": 2.0}


def _own_experiment(name, text):
    Path("own/experiment").mkdir(parents=True, exist_ok=True)
    Path(f"own/experiment/{name}.yaml").write_text(f"# @package _global_\n# Own.\n{text}")
    return ["hydra.searchpath=[file://own]", f"experiment={name}"]


def test_a_task_goes_on_by_its_files_in_the_same_folder(capsys):
    words = _own_experiment("halves", "task: {_target_: tests_of_interruption.write_half, _partial_: true}\n")
    assert main(words) == 143
    folder = folder_of("halves")
    assert f"{folder} holds what is done: run_dir={folder} ckpt_path=last continues it" in capsys.readouterr().err
    assert main(["ckpt_path=last", "experiment=halves"]) == 0
    result = result_in(folder_of("halves"))
    assert (result["status"], result["metrics"]) == ("complete", {"halves": 2.0})


def test_a_stage_goes_on_from_its_own_checkpoint(whole, capsys):
    tiny = json.dumps([*SMALL[1:], ask("on_before_zero_grad", 5)])
    _own_experiment("small", f"defaults: [classify_digits]\ntiny: {tiny}\n")
    words = _own_experiment("staged", "defaults: [classify_digits]\ntrainer: {max_epochs: 1}\nfirst: ['small:tiny']\n")
    words += ["trainer.limit_train_batches=1", "data.batch_size=16", "data.val=48", "data.test=0.1"]
    assert main(words) == 143
    (stage,) = (path for path in Path("runs/stages").iterdir() if path.is_dir())
    line = f"stopped by SIGTERM; {stage} holds its last checkpoint: the same words continue it"
    assert capsys.readouterr().err == f"hasten: {line}\n"
    assert not Path("runs/staged").exists()
    assert main(words) == 0
    assert rows_in(stage) == rows_in(whole)
    assert result_in(folder_of("staged"))["status"] == "complete"


# ------------------------------------------------------------------ ckpt_path=last


def test_new_words_come_after_those_of_the_run_that_goes_on(capsys):
    assert main([*SMALL, ask("on_before_zero_grad", 2)]) == 143
    assert (
        main(["experiment=classify_digits", "ckpt_path=last", "trainer.max_epochs=3", "+trainer.benchmark=false"]) == 0
    )
    folder = folder_of()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    words = result_in(folder)["overrides"]
    assert words[: len(SMALL) - 2] == [word for word in SMALL if "max_epochs" not in word and "experiment" not in word]
    assert {"experiment=classify_digits", "trainer.max_epochs=3", "+trainer.benchmark=false"} < set(words)
    assert len(rows_in(folder)) == len({(row["step"], row["train/loss"] == "") for row in rows_in(folder)})


@pytest.mark.slow
def test_a_run_that_was_moved_keeps_the_memory_of_its_best_checkpoint(tmp_path, monkeypatch, recwarn):
    assert main([*SMALL, ask("on_before_zero_grad", 3)]) == 143
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere/runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["experiment=classify_digits", "ckpt_path=last"]) == 0
    saved = torch.load(folder_of() / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    best = next(state for name, state in saved.items() if "ModelCheckpoint" in name and state["monitor"])
    assert best["best_model_path"] == str(folder_of().absolute() / "checkpoints/best.ckpt")
    assert not [warning for warning in recwarn if "dirpath has changed" in str(warning.message)]


def run_folder(name, status, *, checkpoint=True):
    folder = Path("runs/classify_digits", name)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"status": status, "overrides": []}))
    (folder / "config.yaml").write_text("callbacks: {last: {_target_: x}}\n")
    if checkpoint:
        (folder / "checkpoints/last.ckpt").write_text("")
    return folder


def test_the_newest_run_that_can_be_continued_and_is_not_alive_is_found():
    expected = run_folder("2026-01-02_00-00-00_0", "running")
    run_folder("2026-01-01_00-00-00_0", "interrupted")
    run_folder("2026-01-03_00-00-00_0", "failed", checkpoint=False)
    run_folder("2026-01-04_00-00-00_0", "complete")
    with claimed(run_folder("2026-01-05_00-00-00_0", "running")):
        assert newest_unfinished("classify_digits") == expected


def test_a_folder_is_let_go_when_its_process_is_killed(tmp_path):
    code = "import sys, pathlib\nfrom hasten.run_folders import claimed\n"
    code += "with claimed(pathlib.Path()):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert is_alive(tmp_path)
        process.kill()
    assert not is_alive(tmp_path)


MISTAKES = {
    "none": (["experiment=classify_digits"], "expected an unfinished run of 'classify_digits' with a checkpoint in "),
    "complete": (["run_dir=runs/classify_digits/done"], "expected an unfinished run in 'runs/classify_digits/done', "),
    "no run": (["run_dir=nowhere"], "expected an unfinished run in 'nowhere', found none"),
    "sweep": (["-m", "seed=0,1"], "expected one run, got a sweep (--multirun); continue its jobs one by one"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_nothing_to_continue_is_one_line(name, capsys):
    run_folder("done", "complete")
    words, line = MISTAKES[name]
    assert main([*words, "ckpt_path=last"]) == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"hasten: ckpt_path: last: {line}")


def test_a_run_that_is_alive_is_not_continued_by_another(capsys):
    folder = run_folder("alive", "running")
    with claimed(folder):
        assert main([f"run_dir={folder}", "ckpt_path=last", *SMALL]) == 1
    assert capsys.readouterr().err == (
        f"hasten: run_dir: {str(folder)!r} is of a run that is alive; wait for it or stop it\n"
    )


# ------------------------------------------------------------------ whole or not there


class Breaks:
    """Cannot be written."""

    def __reduce__(self):
        raise RuntimeError("no such thing on a disk")


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    with pytest.raises(RuntimeError, match="no such thing"):
        WholeCheckpoints().save_checkpoint({"weight": torch.zeros(1000), "step": Breaks()}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(HastenError, match=r"^checkpoint: cannot write '.*': File too large; the one before"):
            WholeCheckpoints().save_checkpoint({"weight": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert WholeCheckpoints().load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_metrics_are_cut_back_to_what_a_checkpoint_had_seen(tmp_path):
    logger = MetricsFile(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": float(step)}, step=step)
    assert logger.rows() == 3
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("9.0,3\n8.")  # of a process that was killed
    logger = MetricsFile(tmp_path)
    logger.keep(2)
    logger.log_metrics({"loss": 7.0, "more": 1.0}, step=2)
    assert logger.rows() == 3
    assert rows_in(tmp_path) == [
        {"loss": "0.0", "more": "", "step": "0"},
        {"loss": "1.0", "more": "", "step": "1"},
        {"loss": "7.0", "more": "1.0", "step": "2"},
    ]


def test_sigterm_outside_of_a_run_ends_what_is_open():
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM$"), stopped_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ------------------------------------------------------------------ processes of their own


def hasten(*words):
    """A process that finds this file's classes too."""
    here = Path(__file__).parent
    paths = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(here.parent / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )


def wait_for_rows(process, rows):
    """The folder of a run that has logged as many rows."""
    deadline_s = time.monotonic() + 200
    while time.monotonic() < deadline_s and process.poll() is None:
        for path in Path("runs/classify_digits").glob("*/metrics.csv"):
            if path.read_text().count("\n") > rows:
                return path.parent
        time.sleep(0.01)
    pytest.fail(f"no {rows} rows: {process.communicate()}")


LONGER = [word for word in SMALL if "max_epochs" not in word] + ["trainer.max_epochs=15"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_at_any_time_goes_on_as_if_it_had_not(tmp_path, monkeypatch, signum):
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert main(LONGER) == 0
    whole = folder_of().absolute()
    monkeypatch.chdir(tmp_path)
    for ends, rows in enumerate([20, 60], start=1):
        process = hasten(*(LONGER if ends == 1 else ["experiment=classify_digits", "ckpt_path=last"]))
        folder = wait_for_rows(process, rows)
        time.sleep(0.037 * ends)  # not always at the same moment of a step
        process.send_signal(signum)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == (143 if signum == signal.SIGTERM else -9), errors
        step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert step >= rows / 2  # two validations an epoch: a row for each of its four steps, and for each of those
    assert main(["experiment=classify_digits", "ckpt_path=last"]) == 0
    check_equal(folder_of(), whole)


class NoRoom(Callback):
    """From a step on, no file of this process may become larger than a result.json."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.slow
def test_a_disk_without_room_ends_the_run_in_one_line_and_leaves_the_checkpoint_before():
    process = hasten(*SMALL, "+callbacks.no_room={_target_: test_interruption.NoRoom}")
    _, errors = process.communicate(timeout=200)
    folder = folder_of()
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("hasten: ")]
    assert len(lines) == 1 and "Traceback" not in errors
    assert lines[0].startswith(f"hasten: checkpoint: cannot write '{(folder / 'checkpoints').absolute()}")
    assert "File too large; the one before, if any, is whole" in lines[0]
    assert result_in(folder)["status"] == "failed"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert main(["experiment=classify_digits", "ckpt_path=last", "callbacks.no_room=null"]) == 0
    assert result_in(folder)["status"] == "complete"


@pytest.mark.slow
def test_two_processes_end_at_the_same_batch_whichever_was_asked():
    two = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.limit_val_batches=1", "trainer.max_epochs=500"]
    process = hasten(*(word for word in SMALL if "max_epochs" not in word and "limit_val" not in word), *two)
    wait_for_rows(process, 20)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 143, errors
    assert sum("stopped by SIGTERM" in line for line in errors.splitlines()) == 1
    states = torch.load(folder_of() / "checkpoints/last.ckpt", weights_only=True)["exact_resume"]["states"]
    assert len(states) == 2
