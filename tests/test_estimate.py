"""What a run would cost: numbers against the run itself and against formulas, and nothing left behind."""

import csv
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import hasten
from hasten import registry
from hasten.cli import main
from hasten.errors import HastenError
from hasten.estimate import Cost, Estimate, as_text, estimate
from hasten.run import compose, run, stages_of

CONFIGS = Path(hasten.__file__).parent / "configs/experiment"
DIGITS = [name for name in registry.group("experiment") if name.endswith("_digits")]
CLASSIFY = ["experiment=classify_digits", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def _cost(*words: str) -> Cost:
    return estimate(compose(words))[-1].cost


def _params() -> list:
    """Every digits experiment; slow where it only changes settings of another one."""
    configs = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in DIGITS}
    variants = [name for name in DIGITS if set(DIGITS) & {str(entry) for entry in configs[name].get("defaults", [])}]
    return [pytest.param(name, marks=[pytest.mark.slow] if name in variants else []) for name in DIGITS]


def _states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.filterwarnings("ignore:.*but have no `validation_step`")
@pytest.mark.parametrize("name", _params())
def test_a_digits_experiment_is_estimated_without_a_trace(name):
    before = _states()
    words = [f"experiment={name}"]
    *stages, found = estimate(compose([*words, *compose(words).tiny]))
    assert _states() == before
    assert list(Path().iterdir()) == []
    assert found.experiment == name
    if found.cost is None:  # where a stage writes what no stand-in can be: it says which
        assert any(found.note.startswith(f"not known before {stage.experiment} has run") for stage in stages)
        return
    assert found.cost.parameters >= found.cost.trainable > 0
    assert found.cost.flops > 0 and found.cost.step_s > 0 and found.cost.total_s >= found.cost.training_s > 0
    assert found.cost.steps == 2 or found.cost.experts
    assert "checkpoints/best.ckpt" in found.writes
    assert all(stage.cost or "task" in stage.note or "not known" in stage.note for stage in stages)


def test_flops_are_those_of_the_layers_forward_and_backward():
    # two 3x3 convolutions on 8x8 and, behind a pooling, 4x4 pixels, and a classifier of 2x2; two per multiply-add
    first, second, last = (2 * 64 * per_image for per_image in (9 * 32 * 64, 9 * 32 * 32 * 16, 32 * 4 * 10))
    # the first needs no gradient of its input
    assert _cost(*CLASSIFY).flops == 2 * first + 3 * second + 3 * last


def test_an_accumulated_step_costs_as_many_batches():
    one = _cost(*CLASSIFY)
    two = _cost(*CLASSIFY, "trainer.accumulate_grad_batches=2")
    assert (one.steps, two.steps) == (2, 1)
    assert two.flops == 2 * one.flops


def test_parameters_and_the_size_of_a_checkpoint_are_those_of_the_run():
    cost = _cost(*CLASSIFY)
    result = run(compose(CLASSIFY))
    assert cost.parameters == sum(parameter.numel() for parameter in result.module.parameters())
    assert cost.steps == result.trainer.global_step
    size = (result.folder / "checkpoints/best.ckpt").stat().st_size
    assert 0.8 * size < cost.checkpoint_bytes <= size


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"],
        ["trainer.max_epochs=5", "trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=0.5"],
        ["trainer.max_epochs=-1", "trainer.max_steps=7"],
        ["trainer.max_epochs=-1", "trainer.max_steps=7", "trainer.check_val_every_n_epoch=null"]
        + ["trainer.val_check_interval=3"],
    ],
    ids=" ".join,
)
def test_validations_are_as_many_as_the_run_has(words):
    words = [*CLASSIFY, "trainer.limit_train_batches=4", *words]
    result = run(compose(words))
    with (result.folder / "metrics.csv").open() as file:
        validations = [row for row in csv.DictReader(file) if row.get("val/acc")]
    assert _cost(*words).validations == len(validations)


def test_a_run_without_an_end_has_no_time():
    (found,) = estimate(compose(["experiment=classify_digits", "trainer.max_epochs=-1"]))
    assert found.cost.steps == float("inf")
    assert "without an end" in as_text([found])


def test_a_fit_that_must_not_stop_early_is_stopped_nevertheless():
    (found,) = estimate(compose(["experiment=classify_digits", "+trainer.min_epochs=1000", "trainer.max_epochs=2000"]))
    assert found.cost.steps == 2000 * 19


def test_a_stage_that_has_not_run_is_estimated_and_stood_in_for():
    words = ["experiment=tome_digits", "first=[vit_digits:tiny]", "model.depth=2", "trainer.max_epochs=1"]
    words.append("trainer.limit_train_batches=2")
    stage, found = estimate(compose(words))
    assert (stage.experiment, found.experiment) == ("vit_digits", "tome_digits")
    assert stage.cost.parameters == found.cost.parameters
    assert found.note == "before vit_digits has run, with weights that have learned nothing"
    assert re.search(r"^all together ", as_text([stage, found]), flags=re.MULTILINE)


def test_a_stage_that_is_complete_costs_nothing():
    words = [*CLASSIFY, "first=[classify_digits:tiny]"]
    before, _ = estimate(compose(words))
    run(compose(words))
    after, found = estimate(compose(words))
    assert before.cost is not None and not before.complete
    assert after.complete and after.folder == before.folder
    assert found.cost is not None and found.note == ""


def test_experts_are_told_one_by_one():
    (found,) = estimate(compose(["experiment=experts_digits", "module.experts=3", "module.epochs=2"]))
    assert found.cost.steps == 3 * 2 * 19
    assert "3 experts, " in as_text([found])
    assert found.writes["experts/expert_*.safetensors"].startswith("3 files of 129 KiB")


def test_what_is_compiled_is_timed_and_not_counted():
    (found,) = estimate(compose([*CLASSIFY, "compile={backend: eager}"]))
    assert found.cost.flops is None and found.cost.step_s > 0
    assert "FLOPs not counted" in as_text([found])


def test_a_task_is_known_when_it_has_run():
    (found,) = estimate(compose(["experiment=import_buffer", "source=nowhere"]))
    assert found.cost is None and "a task" in found.note


def test_memory_grows_with_the_batch():
    wide = ["model.width=128", "data.val=100", "data.test=100"]
    small, large = (_cost(*CLASSIFY, *wide, f"data.batch_size={size}").memory_bytes for size in (16, 512))
    if small is None:
        pytest.skip("the system does not say")
    assert large > small + 50 * 2**20


def test_the_command_prints_and_runs_nothing(capsys):
    assert main([*CLASSIFY, "estimate=true", "seed=3"]) == 0
    printed = capsys.readouterr().out
    for word in ["parameters    10,986", "a step", "training", "together", "runs/classify_digits/<time>_3"]:
        assert word in printed
    assert printed.endswith("nothing has run; the same words without estimate=true run it\n")
    assert list(Path().iterdir()) == []


def test_mistakes_are_said_as_in_a_run(capsys):
    assert main([*CLASSIFY, "estimate=true", "optimizer.lr=high"]) == 1
    assert main([*CLASSIFY, "estimate=7"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("hasten: optimizer.lr: expected float")
    assert second == "hasten: estimate: expected bool, got 7"


def test_a_run_asked_for_in_python_is_not_begun_by_mistake():
    with pytest.raises(HastenError, match=r"^estimate: true: expected a command line, or hasten\.estimate"):
        run(compose([*CLASSIFY, "estimate=true"]))


def test_the_word_estimate_makes_no_other_stage():
    words = [*CLASSIFY, "first=[classify_digits:tiny]"]
    (one,), (other,) = (stages_of(compose([*words, *more])) for more in ([], ["estimate=true"]))
    assert one.run_dir == other.run_dir


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0041, "4.1 ms"), (0.48, "0.48 s"), (3.51, "3.5 s"), (57.2, "57 s"), (300, "5.0 min"), (27_000, "7.5 h")],
)
def test_times_are_said_as_a_person_says_them(seconds, said):
    cost = Cost("cpu", 1, 1, 2_000, 3 * 2**20, 1, seconds, 0, 0.0, 0.0, 0, {}, None)
    printed = as_text([Estimate("x", cost, "", "runs/x", {})])
    assert f"together      {said}\n" in f"{printed}\n"
    assert "2 kFLOP" in printed and "3.0 MiB" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["experiment=classify_digits"], ["experiment=experts_digits", "module.experts=2"]],
    ids=["classify_digits", "experts_digits"],
)
def test_the_time_is_that_of_the_run_within_a_factor_of_two(words):
    before = _cost(*words).total_s
    result = run(compose(words))
    after = _cost(*words).total_s  # others may use this machine too
    took = json.loads((result.folder / "result.json").read_text())["duration_s"]
    assert min(before, after) / 2 < took < 2 * max(before, after)
