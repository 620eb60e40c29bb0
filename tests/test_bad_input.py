"""Bad input at scale: whatever a person mistypes is one line that names it and exit code 1; what is right runs.

The oracle is how a word was made, never what the code says of it: each strategy mutates a valid command line so that
it cannot be right, or stays right, by construction.
"""

import contextlib
import inspect
import io
import json
import math
import os
import pydoc
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hasten import registry
from hasten.cli import main
from hasten.run import compose

# one of each kind of module, data around data, and a task
EXPERIMENTS = ["classify_digits", "speed_digits", "mip_digits", "rmeeto_digits", "experts_digits", "dm_digits"]
EXPERIMENTS += ["edf_digits", "difficulty"]
QUICK = ["experiment=classify_digits", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]


def _many(count: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks, phases=PHASES
    )


# no shrinking: an example takes tenths of a second, and is short as it is
PHASES = [phase for phase in settings.default.phases if phase.name in ("explicit", "generate")]


# ------------------------------------------------------------------ what a command line comes to


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder of its own for each example: a fixture would serve all of a test's."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def _main(words: Sequence[str]) -> tuple[int, list[str]]:
    """Exit code and lines on stderr; an exception fails the test by itself."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main(list(words))
    assert isinstance(code, int)
    return code, err.getvalue().splitlines()


def _key(line: str) -> str:
    return line.removeprefix("hasten: ").partition(": ")[0]


def _names(line: str, key: str) -> bool:
    """Whether ``line`` is about ``key``, what it is part of, or part of it."""
    said = re.sub(r"[^\w.].*", "", _key(line))
    return f"{said}.".startswith(f"{key}.") or f"{key}.".startswith(f"{said}.")


def _check_refused(words: Sequence[str]) -> list[str]:
    """Whether ``words`` are refused as they should, whatever the reason; the lines."""
    with _own_folder() as folder:
        code, lines = _main(words)
        left = [path.name for path in folder.rglob("*") if path.name != "runs"]
    assert code == 1, f"exit code {code} for {words}: {lines}"
    assert lines, words
    for line in lines:
        assert line.startswith("hasten: ") and len(line) < 1200, line
        assert "Traceback" not in line and "Error" not in _key(line), line
    assert not left, f"{words} left {left}"
    return lines


def _check_complete(folder: Path) -> None:
    """Whether exactly one run is in ``folder``, whole, with nothing half written."""
    (result,) = [path for path in folder.rglob("result.json") if "stages" not in path.parts]
    told = json.loads(result.read_text())
    assert told["status"] == "complete" and all(isinstance(value, float) for value in told["metrics"].values())
    assert OmegaConf.load(result.with_name("config.yaml")).seed == told["seed"]
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.startswith(".") or name.endswith(".tmp") or name == "traceback.txt"]


# ------------------------------------------------------------------ configs to mutate


@cache
def _words(experiment: str) -> tuple[str, ...]:
    return (f"experiment={experiment}", *compose([f"experiment={experiment}"]).tiny)


@cache
def _config(experiment: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose(_words(experiment)))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of everything that is written in a config, not taken from elsewhere in it."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif not name.startswith("_") and "${" not in str(value):
            yield f"{prefix}{name}", value


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and ``_target_`` of everything that is to be built."""
    for name, value in node.items():
        if isinstance(value, dict):
            if "_target_" in value:
                yield f"{prefix}{name}", value["_target_"]
            yield from _nodes(value, f"{prefix}{name}.")


# said before all else (seed, ...), or of no meaning to a run (tiny, stages, what named it)
APART = {"seed", "run_dir", "first", "tiny", "stages", "overrides", "experiment", "estimate", "ckpt_path"}
APART |= {"image"}  # read, and so said, where it is interpolated alone


def _top(key: str) -> str:
    return key.partition(".")[0]


@cache
def _apart(experiment: str) -> set[str]:
    """What is said before all else, or never: with APART the optimizer and the schedule that no module takes."""
    return APART | {group for group in ("optimizer", "scheduler") if f"${{{group}}}" not in str(_config(experiment))}


def _settable(experiment: str) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in _leaves(_config(experiment)) if _top(key) not in _apart(experiment)]


@cache
def _wrong_values(experiment: str) -> list[tuple[str, str]]:
    """(word, key): a value of a type, or a number, that nobody could mean."""
    found = []
    for key, value in _settable(experiment):
        if isinstance(value, bool):
            wrong = ["perhaps", "[true]", "{really: true}", "2"]
        elif isinstance(value, (int, float)):
            duration = key == "trainer.val_check_interval"  # Lightning takes {minutes: 1} there
            wrong = ["[[]]", "nan"] if duration else ["{a: 1}", "[[]]", "nan"]
        elif isinstance(value, str):
            wrong = ["{a: 1}"]
        else:
            continue
        found += [(f"{key}={each}", key) for each in wrong]
    return found


@cache
def _wrong_nodes(experiment: str) -> list[tuple[str, str]]:
    """(word, key): arguments that nothing takes, and targets that are nowhere."""
    found = []
    for key, target in _nodes(_config(experiment)):
        if target.startswith("hydra.") or _top(key) in _apart(experiment):
            continue
        kinds = {parameter.kind for parameter in inspect.signature(pydoc.locate(target)).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            found += [(f"+{key}.no_such_argument=1", f"{key}.no_such_argument")]
        found += [(f"{key}._target_={wrong}", f"{key}._target_") for wrong in (f"{target}_", "no.such", "3", "''")]
        found += [(f"++{key}._partial_=perhaps", f"{key}._partial_"), (f"+{key}._recursive_=3", f"{key}._recursive_")]
    return found


@cache
def _wrong_keys(experiment: str) -> list[str]:
    """Every key with a letter twice, none or another."""
    keys = {key for key, _ in _leaves(_config(experiment))}
    tops = {key for key in _config(experiment) if key not in ("experiment", "overrides")}
    typed = {re.sub(r"(\w)(\w)$", edit, key) for key in keys | tops for edit in (r"\1\2\2", r"\1", r"\1q\2")}
    return sorted(typed - keys - tops)


def _one_key_each(mutations: list[tuple[str, str]]) -> bool:
    """Whether none of the keys holds, or is, another: then each is said for itself."""
    keys = [re.sub(r"\._(target|partial|recursive)_$", "", key) for _, key in mutations]
    return not any(i != j and f"{a}.".startswith(f"{b}.") for i, a in enumerate(keys) for j, b in enumerate(keys))


# ------------------------------------------------------------------ what is wrong by construction


def _refuse_each(seen: set[tuple[str, str]], experiment: str, mutations: list[tuple[str, str]]) -> None:
    words = [word for word, _ in mutations]
    lines = _check_refused([*_words(experiment), *words])
    for word, key in mutations:
        assert any(_names(line, key) for line in lines), f"nothing about {word}: {lines}"
    seen |= {(experiment, word) for word in words}


def _refused_values(count: int, at_least: int) -> None:
    seen: set[tuple[str, str]] = set()

    @_many(count)
    @given(st.randoms(use_true_random=True))  # by a seed: Hypothesis would rather draw the same few words again
    def one(random: Random) -> None:
        experiment = random.choice(EXPERIMENTS)
        wrong = _wrong_values(experiment) + _wrong_nodes(experiment)
        mutations: list[tuple[str, str]] = []
        for each in random.sample(wrong, len(wrong)):
            if len(mutations) < 8 and _one_key_each([*mutations, each]):
                mutations.append(each)
        _refuse_each(seen, experiment, mutations)

    one()
    assert len(seen) >= at_least


def test_several_wrong_values_and_arguments_are_each_named_in_a_line_of_their_own():
    _refused_values(32, at_least=200)


def _refused_keys(count: int, at_least: int) -> None:
    seen: set[tuple[str, str]] = set()

    @_many(count)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        experiment = data.draw(st.sampled_from(EXPERIMENTS))
        key = data.draw(st.sampled_from(_wrong_keys(experiment)))
        (line,) = _check_refused([*_words(experiment), f"{key}=1"])
        assert _key(line) == key
        seen.add((experiment, key))

    one()
    assert len(seen) >= at_least


def test_a_mistyped_key_is_named():
    _refused_keys(6, at_least=5)


def test_a_mistyped_option_of_a_group_is_named_with_the_options():
    seen = set()
    # `recipe` and the like stand in some experiments only
    groups = sorted(set(registry.groups()) - {"recipe", "timestep_sampler", "noise_scheduler"})

    @_many(24)
    @given(st.sampled_from(groups), st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12))
    @example("experiment", "x" * 5000)
    @example("trainer", "frame")
    def one(group: str, option: str) -> None:
        option = f"x{option}" if option != "frame" else option  # no option begins with x
        (line,) = _check_refused([*QUICK, f"{group}={option}"])
        assert _names(line, group) and option[:60] in line, line
        seen.add((group, option))

    one()
    assert len(seen) >= 20


@_many(30)
@given(st.text(min_size=1, max_size=40))
@example("'1")
@example('"')
@example("${")
@example("${seed}")
@example("${nowhere}")
@example("${oc.env:NO_SUCH_VARIABLE}")
@example("${no_such_resolver:1}")
@example("ünï")
@example("9" * 5000)
@example("1e400")
@example("")
def test_a_seed_that_is_no_number_is_named(text):
    if re.fullmatch(r"\s*[+-]?[\d_]+\s*", text) and len(text) < 100:
        return  # it may be one
    (line,) = _check_refused([*QUICK, f"seed={text}"])
    assert _key(line).lstrip("'\"").startswith("seed"), line


@_many(60)
@given(st.text(max_size=30))
@example("x" * 5000)
@example("hélp")
@example(" ")
def test_what_is_no_command_is_quoted(text):
    word = f"q{text}".replace("=", "")
    (line,) = _check_refused([word])
    assert line.startswith(f"hasten: {word!r}: expected a command"[:600]), line


# (words after a valid command line, the key that the line must name)
SINGLE = {
    "classify_digits": [
        ("+x=1", "x"),
        ("++x=1", "x"),
        ("+mode=max", "mode"),  # a part of objective.mode, which is read
        ("+modle=unet", "modle"),
        ("+image.sise=8", "image.sise"),
        ("+objective.mod=max", "objective.mod"),
        ("~seed", "seed"),
        ("~first", "first"),
        ("~threads", "threads"),
        ("~objective", "objective"),
        ("~nothing", "~nothing"),
        ("+model=unet", "model"),
        ("+experiment=speed_digits", "experiment"),
        ("+callbacks=ema", "callbacks"),
        ("callbacks=[default,emaa]", "callbacks"),
        ("callbacks.progress=5", "callbacks.progress"),
        ("callbacks.best.mode=up", "callbacks.best"),
        ("+logger.mine={a: 1}", "logger.mine"),
        ("objective=val/loss", "objective"),
        ("image=5", "image"),
        ("trainer=null", "trainer"),
        ("trainer=frame", "trainer"),
        ("trainer.devices=0", "trainer"),
        ("trainer.devices=many", "trainer"),
        ("trainer.accelerator=gpuu", "trainer"),
        ("trainer.strategy=ddpp", "trainer"),
        ("trainer.precision=bananas", "trainer.precision"),
        ("precision=bf15", "precision"),
        ("precision=16-true", "precision"),
        ("trainer.max_epochs=-5", "trainer"),
        ("trainer.max_steps=0", "trainer.max_steps"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val"),
        ("trainer.log_every_n_steps=-3", "trainer.log_every_n_steps"),
        ("+trainer.callbacks=[]", "trainer.callbacks"),
        ("+trainer.logger=false", "trainer.logger"),
        ("trainer._target_=torch.nn.ReLU", "trainer._target_"),
        ("module._target_=builtins.int", "module._target_"),
        ("+model._partial_=true", "model"),
        ("+model._convert_=perhaps", "model._convert_"),
        ("+model._args_=5", "model._args_"),
        ("optimizer.lr=inf", "optimizer.lr"),
        ("optimizer.lr=-1", "optimizer"),
        ("scheduler.min_lr=-1", "scheduler"),
        ("model=vim_digits", "model.width"),
        ("model.depth=0", "model"),
        ("model.width=-4", "model"),
        ("data.batch_size=0", "data"),
        ("data.val=5000", "data"),
        ("image.channels=3", "image.channels"),
        ("threads=1000000000", "threads"),
        ("threads=-1", "threads"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("seed=0,1", "seed"),
        ("first=3", "first"),
        ("first=[classify_digit]", "first"),
        ("first=['a=b']", "first"),
        ("first=['../x']", "first"),
        ("task=5", "task"),
        ("task=[1]", "task"),
        ("task={_target_: builtins.nope}", "task._target_"),
        ("datamodule=digits", "datamodule"),
        ("datamodule={_target_: torch.nn.ReLU}", "datamodule._target_"),
        ("run_dir=''", "run_dir"),
        ("run_dir=/dev/null", "run_dir"),
        ("run_dir=/dev/null/below", "run_dir"),
        (f"run_dir={'x' * 5000}", "run_dir"),
        ("ckpt_path=''", "ckpt_path"),
        ("ckpt_path=.", "ckpt_path"),
        ("ckpt_path=last", "ckpt_path"),
        ("ckpt_path=nowhere.ckpt", "ckpt_path"),
        ("hydra.mode=twice", "hydra.mode"),
        ("hydra.nothing=1", "hydra.nothing"),
        ("data=image_folder", "data.root"),
    ],
    "speed_digits": [
        ("module.image_shape=[1,8]", "module"),
        ("model.model.widths=[0]", "model.model"),
        ("model.model.blocks=0", "model.model"),
        ("model.model.dropout=2", "model.model"),
        ("image.mean_square=-1", "model"),
        ("callbacks.ema.decay=2", "callbacks.ema"),
        ("timestep_sampler=sped", "timestep_sampler"),
        ("noise_scheduler=null", "noise_scheduler"),
        ("module.solver=dimm", "module"),
        ("model=unet", "model.model"),
    ],
    "mip_digits": [
        ("module.grid=0", "module"),
        ("module.dots=nowhere", "module"),
        ("module.draw=all", "module"),
        ("model=convnet", "model.inputs"),
    ],
    "rmeeto_digits": [
        ("model.patch_size=0", "model"),
        ("model.embed_dim=0", "model"),
        ("model.drop_path_rate=2", "model"),
        ("model.checkpoint=nowhere.pt", "model"),
        ("model.checkpoint=${stages.vim_digits}/checkpoints/best.ckpt", "model.checkpoint"),
        ("callbacks.token_merging.r=-1", "callbacks.token_merging"),
    ],
    "experts_digits": [
        ("scheduler=cosine", "scheduler"),
        ("optimizer.rho=-1", "optimizer"),
        ("module.epochs=0", "module.epochs"),
        ("module.augment.ops=[colour]", "module.augment"),
        ("module.augment.ops={a: 1}", "module.augment.ops"),
    ],
    "dm_digits": [("first=[]", "datamodule.experts"), ("module.momentum=2", "module"), ("optimizer=sgd", "optimizer")],
    "edf_digits": [("recipe=nope", "recipe"), ("module.syn_steps=0", "module"), ("module.mask.alpha=2", "module.mask")],
    "difficulty": [("first=null", "first"), ("task.epoch=one", "task.epoch")],
}


def _refuse_single(experiment: str, word: str, key: str) -> None:
    lines = _check_refused([*_words(experiment), word])
    assert len({_key(line) for line in lines}) == len(lines)
    assert any(_names(line, key) or _key(line).startswith(key) for line in lines), lines


CASES = [(experiment, word, key) for experiment, cases in SINGLE.items() for word, key in cases]


@pytest.mark.parametrize(("experiment", "word", "key"), CASES[::3])
def test_a_mistake_is_named_by_the_key_that_a_person_would_change(experiment, word, key):
    _refuse_single(experiment, word, key)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "word", "key"), [*CASES[1::3], *CASES[2::3]])
def test_every_mistake_is_named_by_the_key_that_a_person_would_change(experiment, word, key):
    _refuse_single(experiment, word, key)


@pytest.mark.slow
def test_wrong_values_and_keys_at_scale():
    _refused_values(60, at_least=250)
    _refused_keys(25, at_least=20)


@pytest.mark.parametrize(
    "words",
    [
        ["="], ["=3"], ["+="], ["~"], ["++"], ["+"], ["seed"], ["seed=1 model.width=3"], ["seed=["], ["seed='"],
        ["seed={a:"], ["--nonsense"], ["--cfg"], ["--cfg", "all_of_it"], ["--multirun=3"], ["--config-name", "nope"],
        ["--config-dir", "nope"], ["-m", "seed=["], ["-m", "ckpt_path=last"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(words):
    assert len(_check_refused([*QUICK, *words])) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["help", "me"], ["lis"], ["compare"], ["compare", "nowhere"],
        ["compare", "--metrics"], ["compare", ".", "--by", "seed"], ["compare", "."], ["compare", ""], [""], [" "],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_refuse_words_that_they_do_not_know(words):
    assert len(_check_refused(words)) == 1


# ------------------------------------------------------------------ what is right by construction


RIGHT = [
    ["seed=4294967295"], ["++seed=0"], ["+optimizer.amsgrad=true"], ["optimizer=sgd"], ["scheduler=constant"],
    ["callbacks.progress=null"], ["callbacks.best=null"], ["callbacks=[default,ema]"], ["logger=none"], ["~logger"],
    ["~tiny"], ["precision=bf16-mixed"], ["run_dir=named_${seed}"], ["run_dir='a b=c,d'"], ["run_dir='ünï'"],
    ["data.batch_size=100000"], ["model.pad_to=16"], ["objective.metric=val/loss", "objective.mode=min"],
    ["experiment=speed_digits", "experiment=classify_digits"], ["trainer=cpu"], ["image.size=16"],
    ["trainer.gradient_clip_val=0"], ["data.val=0.2"], ["data.val=0", "callbacks.best=null"], ["model.norm=batch"],
]  # fmt: skip


def test_what_is_right_runs_and_leaves_one_whole_run():
    seen = []

    @_many(9)
    @given(st.permutations(RIGHT))
    def one(order: list[list[str]]) -> None:
        # two at a time, of those that have not been tried yet
        words = [word for each in [each for each in order if each not in seen][:2] for word in each]
        seen.extend(each for each in order if each not in seen and set(each) <= set(words))
        with _own_folder() as folder:
            code, lines = _main([*QUICK, *words])
            assert (code, lines) == (0, []), (words, lines)
            _check_complete(folder)

    one()
    assert len(seen) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["speed_digits", "mip_digits", "rmeeto_digits", "experts_digits"])
def test_a_tiny_run_of_every_kind_of_module_with_another_seed_is_whole(experiment):
    with _own_folder() as folder:
        assert _main([*_words(experiment), "seed=7", "data.batch_size=32"]) == (0, [])
        _check_complete(folder)


def test_a_sweep_goes_on_where_a_job_is_wrong_and_says_which():
    with _own_folder() as folder:
        code, lines = _main(["-m", *QUICK, "model.norm=instance,nope", "logger=none"])
        assert code == 1
        assert [_key(line) for line in lines[:-1]] == ["model"] and "1 of the sweep's jobs failed" in lines[-1]
        _check_complete(folder)


# ------------------------------------------------------------------ as a shell sees it


def _shell(folder: Path, *words: str) -> subprocess.CompletedProcess:
    train = Path(__file__).parents[1] / "train.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(train), *words], cwd=folder, capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["lst"], ["help", "me"], ["compare", "nowhere"], ["--nonsense"], ["experiment=speed_digit"], ["seed='"],
        ["experiment=classify_digits", "ckpt_path=last"], ["experiment=classify_digits", "model.widht=3"],
        ["experiment=classify_digits", "module._target_=hasten.modules.Clasification"],
        ["experiment=classify_digits", "optimizer.lr=-1", "data.batch_size=big", "+trainer.x=1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_shell_sees_exit_code_1_and_nothing_but_the_lines(words, tmp_path):
    done = _shell(tmp_path, *words)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("hasten: ") for line in lines), done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["seed=3"], ["run_dir='a b'", "logger=none", "callbacks.progress=null"]])
def test_a_shell_sees_exit_code_0_of_a_run(words, tmp_path):
    done = _shell(tmp_path, *QUICK, *words)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "final metrics" in done.stdout
    _check_complete(tmp_path)
    assert all(map(math.isfinite, json.loads(next(tmp_path.rglob("result.json")).read_text())["metrics"].values()))
