"""compile=true wraps a network in place: one graph for all training steps, the same numbers, the same checkpoint."""

import pytest
import torch
from torch._dynamo import register_backend

from hasten import registry
from hasten.errors import HastenError
from hasten.run import compose, run

DIGITS = [name for name in registry.group("experiment") if name.endswith("_digits")]
CONFIGS = {name: compose([f"experiment={name}"]) for name in DIGITS}
ANEW_EACH_STEP = [name for name in DIGITS if CONFIGS[name].module._target_.endswith("Matching")]
"""Their network is another one at every step, or a function that is differentiated twice: there is none to compile."""

READ_THEIR_INPUT = ["mip_lambda_separate_digits", "mip_segmentation_digits", "mip_segmentation_separate_digits"]
"""A shape, or which network, follows from a number that is drawn: there a graph ends."""

IN_ONE_GRAPH = [name for name in DIGITS if name not in ANEW_EACH_STEP + READ_THEIR_INPUT]
FAST = ["tome_digits", "mip_digits"]
TOOLS = ["image_grid", "class_consistency"]
"""They draw from the network as it is and would have it traced for other sizes, which takes most of the time."""

ATTACHED = {
    "speed_digits": [
        "+callbacks.timestep_sampling={_target_: hasten.callbacks.TimestepSampling, sampler: '${timestep_sampler}'}"
    ]
}
"""Callbacks that an experiment has not, and that compiled networks must bear as well."""

CALLS: list[int] = []
"""How often each graph with gradients has run, in the order in which they were made."""


@register_backend(name="counted")
def _counted(graph, inputs):
    """No compiler: what torch.compile hands to one, and how often it comes back to it."""
    if not torch.is_grad_enabled():
        return graph.forward
    place = len(CALLS)
    CALLS.append(0)

    def forward(*args):
        CALLS[place] += 1
        return graph(*args)

    return forward


@pytest.fixture(autouse=True)
def _afresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    CALLS.clear()


def _run(name, *words):
    cfg = CONFIGS[name]
    length = ["trainer.max_steps=4", "trainer.val_check_interval=4"]
    if cfg.trainer.max_steps < 0:
        length = ["trainer.limit_train_batches=4"]
    quiet = [f"callbacks.{tool}=null" for tool in TOOLS if cfg.callbacks.get(tool) is not None]
    short = ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    return run(compose([f"experiment={name}", *cfg.tiny, *length, *quiet, *short, *words]))


def _assert_equal(found, wanted):
    assert found.module.state_dict().keys() == wanted.module.state_dict().keys()
    for key, value in wanted.module.state_dict().items():
        torch.testing.assert_close(found.module.state_dict()[key], value, rtol=0, atol=1e-5, msg=key)
    for metric, value in wanted.metrics.items():
        if metric.startswith(("train/", "val/", "test/")):
            assert found.metrics[metric] == pytest.approx(value, abs=1e-5), metric


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in IN_ONE_GRAPH]
)
def test_all_training_steps_of_a_compiled_experiment_are_one_graph_with_the_same_numbers(name):
    plain = _run(name, *ATTACHED.get(name, []))
    compiled = _run(name, *ATTACHED.get(name, []), "compile={backend: counted, fullgraph: true}")
    steps = compiled.trainer.global_step
    assert len(CALLS) == 1 and CALLS[0] % steps == 0, f"graphs of {steps} training steps ran {CALLS} times"
    _assert_equal(compiled, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_THEIR_INPUT)
def test_a_network_that_reads_its_input_compiles_in_parts_with_the_same_numbers(name):
    _assert_equal(_run(name, "compile={backend: counted}"), _run(name))


@pytest.mark.slow
def test_merging_may_begin_in_a_later_epoch_of_a_compiled_model():
    later = ["trainer.max_epochs=2", "callbacks.token_merging.start_epoch=1", "trainer.limit_train_batches=3"]
    compiled = _run("tome_digits", *later, "compile={backend: counted, fullgraph: true}")
    assert CALLS == [3, 3]
    _assert_equal(compiled, _run("tome_digits", *later))


def test_merging_that_grows_is_refused_with_a_compiled_model():
    with pytest.raises(HastenError, match=r"^token_merging: ramp_epochs: expected 0 with a compiled model, .*$"):
        _run("tome_digits", "+callbacks.token_merging.ramp_epochs=1", "compile={backend: counted}")


def test_a_module_without_a_network_is_not_compiled_in_silence():
    with pytest.raises(HastenError, match=r"^compile: expected a network as \w+\.model, which has none.*$"):
        _run("dm_digits", "first=[]", "datamodule.experts=null", "compile=true")
