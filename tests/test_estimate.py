"""What a run would cost: numbers against the run itself and against formulas, and nothing left behind."""

import csv
import json
import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

import hasten
from hasten import registry
from hasten.cli import main
from hasten.errors import HastenError
from hasten.estimate import Cost, Estimate, as_text, estimate
from hasten.estimate.probe import Evaluation
from hasten.modules import Classification
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


def _made_up(**figures) -> Cost:
    plain = Cost("cpu", 1000, 1000, 2_000, 3 * 2**20, 1, 0.0, 0, 0.0, 0.0, 0, {}, None)
    return replace(plain, **figures)


def _rows(printed: str) -> dict[str, str]:
    """Name -> figure, of one printed estimate."""
    return {line[2:16].strip(): line[16:] for line in printed.splitlines()[1:]}


def _sleeps(monkeypatch, step: str, seconds: float) -> None:
    """Make a step of the classifier so slow that nothing else counts."""
    taken = getattr(Classification, step)

    def slow(*args):
        time.sleep(seconds)
        return taken(*args)

    monkeypatch.setattr(Classification, step, slow)


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


@pytest.mark.parametrize("accumulated", [2, 3, 8, 100])
@pytest.mark.parametrize("ends", ["trainer.max_epochs=3", "trainer.max_steps=7"])
def test_the_last_step_of_an_epoch_takes_what_is_left_of_it(accumulated, ends):
    # as Lightning does, batch by batch: of the 19 batches of an epoch the last one steps too
    cost = _cost("experiment=classify_digits", f"trainer.accumulate_grad_batches={accumulated}", ends)
    steps = batches = 0
    limit = {"epochs": 3, "steps": math.inf} if "epochs" in ends else {"epochs": 10, "steps": 7}
    for _epoch in range(limit["epochs"]):
        for i in range(1, 20):
            if steps == limit["steps"]:
                break
            batches += 1
            steps += i % accumulated == 0 or i == 19
    assert cost.steps == steps
    assert cost.flops * steps == pytest.approx(batches * _cost(*CLASSIFY).flops, rel=1e-6)


def test_parameters_and_the_size_of_a_checkpoint_are_those_of_the_run():
    cost = _cost(*CLASSIFY)
    result = run(compose(CLASSIFY))
    assert cost.parameters == sum(parameter.numel() for parameter in result.module.parameters())
    assert cost.steps == result.trainer.global_step
    size = (result.folder / "checkpoints/best.ckpt").stat().st_size
    assert cost.checkpoint_bytes == pytest.approx(size, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"],
        ["trainer.max_epochs=5", "trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=0.5"],
        ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=3"],
        ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=100"],
        ["trainer.max_epochs=-1", "trainer.max_steps=10"]
        + ["trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=0.5"],
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


def test_a_training_step_that_sleeps_takes_as_long_as_its_batches(monkeypatch):
    _sleeps(monkeypatch, "training_step", 0.05)
    cost = _cost(*CLASSIFY, "trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=3", "data.val=64")
    assert cost.steps == 2
    assert 5 / 2 * 0.05 <= cost.step_s < 2 * 5 / 2 * 0.05


def test_validations_and_the_test_are_timed_apart_from_the_steps(monkeypatch):
    _sleeps(monkeypatch, "validation_step", 0.2)
    _sleeps(monkeypatch, "test_step", 0.05)
    words = ["trainer.limit_train_batches=1", "trainer.max_epochs=5", "data.val=320", "data.test=640"]
    cost = _cost(*CLASSIFY, *words)
    assert cost.validations == 5
    assert 5 * 0.2 <= cost.validation_s < 1.9 * 5 * 0.2
    assert 10 * 0.05 <= cost.test_s < 1.9 * 10 * 0.05
    assert cost.step_s < 0.2  # of a validation, one batch of which stands between any two


def test_an_evaluation_is_all_its_batches_at_the_mean_of_those_behind_the_first():
    evaluation = Evaluation()
    assert evaluation.total_s == 0.0
    evaluation.begin([6, 4], 100.0)
    evaluation.batch(103.0)
    assert evaluation.total_s == 10 * 3.0
    evaluation.batch(104.0)
    evaluation.batch(106.0)
    assert evaluation.total_s == 10 * 1.5


def test_a_cost_adds_up():
    cost = _made_up(steps=100, step_s=0.5, validations=4, validation_s=3.0, test_s=7.0)
    assert cost.training_s == 50.0
    assert cost.total_s == 50.0 + 12.0 + 7.0
    assert _made_up(steps=0, step_s=math.nan).total_s == 0.0
    assert _rows(as_text([Estimate("x", cost, "", "runs/x", {})])) == {
        "parameters": "1,000",
        "a step": "0.50 s, 2 kFLOP forward and backward",
        "memory": "3.0 MiB beside Python and its libraries",
        "training": "50 s: 100 steps",
        "validation": "12 s: 4 times, 3.0 s each",
        "test": "7.0 s",
        "together": "69 s",
    }


def test_what_is_frozen_and_what_is_left_out_is_said():
    cost = _made_up(trainable=400, tools={"image_grid": "every 200 steps", "class_consistency": "at the end"})
    rows = _rows(as_text([Estimate("x", cost, "from its beginning", "runs/x", {})]))
    assert rows["measured"] == "from its beginning"
    assert rows["parameters"] == "1,000, 400 trainable"
    assert rows["not in it"] == "image_grid (every 200 steps), class_consistency (at the end)"


def test_the_sum_is_of_what_is_left_and_names_what_is_not_in_it():
    plain, tools = _made_up(steps=60, step_s=1.0), {"image_grid": "at the end"}
    complete = Estimate("done", plain, "", "runs/done", {}, complete=True)
    unknown = Estimate("difficulty", None, "a task, not a fit", "runs/difficulty", {})
    known = Estimate("stage", plain, "", "runs/stage", {})
    with_tools = Estimate("run", _made_up(steps=60, step_s=1.0, tools=tools), "", "runs/run", {})

    def together(*estimates):
        return as_text(estimates).splitlines()[-1]

    assert together(known, known) == "all together  2.0 min"
    assert together(complete, known) == "all together  60 s"
    assert together(complete, unknown, known) == "all together  60 s, and difficulty"
    assert together(known, with_tools) == "all together  2.0 min, without the tools named above"
    assert together(unknown, with_tools) == "all together  60 s, and difficulty, without the tools named above"


def test_tools_are_left_out_and_work_when_their_config_says():
    tools = _cost("experiment=speed_digits", *compose(["experiment=speed_digits"]).tiny).tools
    assert tools == {"image_grid": "every 200 steps", "class_consistency": "at the end"}


def test_a_logger_writes_to_a_folder_of_its_own_in_the_run_folder():
    (found,) = estimate(compose([*CLASSIFY, "logger=wandb"]))
    assert found.writes["wandb/"] == "wandb"
    assert "./" not in found.writes


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
    assert small < 100 * 2**20  # Python with torch alone is more


def test_the_command_prints_and_runs_nothing(capsys):
    assert main([*CLASSIFY, "estimate=true", "seed=3"]) == 0
    printed = capsys.readouterr().out
    for word in ["parameters    10,986", "a step", "training", "together", "runs/classify_digits/<time>_3"]:
        assert word in printed
    assert printed.endswith("nothing has run; the same words without estimate=true run it\n")
    assert list(Path().iterdir()) == []


def test_one_process_of_several_prints_it(capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert main([*CLASSIFY, "estimate=true"]) == 0
    assert capsys.readouterr().out == ""


def test_what_a_run_refuses_is_refused():
    sharded = ["trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2"]
    for words in (["experiment=experts_digits", *sharded], [*CLASSIFY, "ckpt_path=nowhere.ckpt"]):
        with pytest.raises(HastenError) as refused:
            run(compose(words))
        with pytest.raises(HastenError, match=f"^{re.escape(str(refused.value))}$"):
            estimate(compose(words))


def test_a_run_that_continues_is_estimated_from_its_beginning_and_says_so():
    words = [*CLASSIFY, "run_dir=there"]
    (begins,) = estimate(compose([*words, "ckpt_path=auto"]))  # there is none yet
    run(compose(words))
    for path in ("there/checkpoints/last.ckpt", "auto"):
        (found,) = estimate(compose([*words, f"ckpt_path={path}"]))
        assert found.note == "from its beginning"
        assert found.cost.steps == begins.cost.steps == 2
    assert begins.note == ""
    with pytest.raises(HastenError, match=r"^ckpt_path: .* is of another model"):
        estimate(compose([*words, "ckpt_path=there/checkpoints/last.ckpt", "model.width=16"]))


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
