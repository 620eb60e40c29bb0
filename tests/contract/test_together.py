"""What goes together: each pair of tools, and each tool with each method, trains or is refused in one line.

docs/together.md is the table of it, and each pair is held to what stands there. To write it anew, in two minutes:

    python tests/contract/test_together.py
"""

import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import Callback
from torch import Tensor
from torch._dynamo.utils import counters

from hasten.errors import HastenError
from hasten.run import _complete, compose, run, stages_of

PAGE = Path(__file__).parents[2] / "docs" / "together.md"
REMEDY = "; if that is as it should be: python tests/contract/test_together.py"

TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]
TOOLS = {
    "EMA": ["+callbacks.ema={_target_: hasten.callbacks.EMA, decay: 0.999}"],
    "compile": ["compile={backend: aot_eager}"],
    "DDP": ["trainer=ddp", *TWO],
    "FSDP2": ["trainer=fsdp2", *TWO],
    "bf16-mixed": ["precision=bf16-mixed"],
    "token merging": ["+callbacks.token_merging={_target_: hasten.callbacks.TokenMerging, r: 8}"],
    "timestep sampling": [
        "+callbacks.timestep_sampling={_target_: hasten.callbacks.TimestepSampling, "
        "sampler: {_target_: hasten.nn.SpeeDSampler, _partial_: true}}"
    ],
    "accumulation": ["trainer.accumulate_grad_batches=2"],
}
"""What a run is told for each."""

BOTH = ["trainer=ddp", *TWO, "trainer.strategy=[ddp,fsdp2]"]
"""Of DDP and FSDP2; of two such words, as of any two, the later counts."""

BRIEF = [
    *["callbacks=default", "logger=none", "optimizer=sgd"],
    *["trainer.max_epochs=-1", "trainer.max_steps=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"],
    *["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=3"],
]
CONVNET = ["experiment=classify_digits", *BRIEF, "model.width=8"]
VIT = ["experiment=vit_digits", *BRIEF, "scheduler.warmup_steps=0", "model.depth=2", "model.embed_dim=16"]
"""What classifies: with token merging the second."""

DIFFUSION = [
    *["experiment=speed_digits", *BRIEF, "callbacks.ema=null", "callbacks.image_grid=null", "module.sample_steps=2"],
    *["model=dit", "~model.model", "model.patch_size=2", "model.width=16", "model.depth=2", "model.heads=2"],
]
DISTILLED = [*BRIEF, "callbacks.evaluate_distilled=null", "callbacks.last.every_n_train_steps=3"]
METHODS = {
    "classification": [],
    "distillation": ["+callbacks.distillation={_target_: hasten.callbacks.Distillation}"],
    "diffusion (SpeeD)": DIFFUSION,
    "hypernetwork (MIP)": ["experiment=mip_digits", *BRIEF, "callbacks.image_grid=null"],
    "trajectory matching (EDF)": [
        *["experiment=edf_digits", *DISTILLED, "first=[experts_digits:tiny]", "datamodule.max_start=2"],
        *["datamodule.initial_max_start=1", "module.syn_steps=2"],
        "module.init._target_=hasten.nn.dataset_distillation.initial.real",
    ],
    "distribution matching (DM)": [
        *["experiment=dm_digits", *DISTILLED, "first=[]", "datamodule.experts=null", "datamodule.per_class=4"],
    ],
    "expert training": [
        *["experiment=experts_digits", "logger=none", "module.experts=2", "module.epochs=2", "model.width=8"],
        *["trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"],
    ],
}
"""What a run is told for each, to train for a moment; the first two beside what classifies."""

TOLD_NOTHING = "a diffusion module that knows no timestep samplers"
ADAPTED = ["timestep_sampler=uniform", "+callbacks.timestep_sampling.attach=adapter"]
MEET_ON = {"token merging": "classification", "timestep sampling": TOLD_NOTHING}
"""What two tools meet on, where one of them asks for something; else classification."""

CLASSIFIES = ("classification", "distillation")
"""Their training draws nothing: the same images in other portions are the same gradients."""

HALVE = ("DDP", "FSDP2", "accumulation")
"""They make a step of twice as many batches."""

PAIRS = [*combinations(TOOLS, 2), *((method, tool) for method in METHODS for tool in TOOLS)]
FAST = [
    ("EMA", "accumulation"),
    ("EMA", "bf16-mixed"),
    ("token merging", "timestep sampling"),
    ("distillation", "compile"),
]
IMAGES = 8
"""In a step."""

Case = tuple[str, ...]
"""The method of a run, and its tools."""


# ------------------------------------------------------------------ runs


class Seen(Callback):
    """What a process sees of a fit: parameters before the first step, after each and at the end; gradients, losses."""

    def __init__(self):
        self.found = {"weights": [], "gradients": {}, "losses": []}

    def on_train_start(self, trainer, pl_module):
        self.found["weights"].append(_parameters(pl_module))
        self.found["world_size"] = trainer.world_size
        self.found["sharded"] = any(hasattr(weight, "full_tensor") for weight in pl_module.parameters())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.found["gradients"]:
            gradients = {name: weight.grad for name, weight in pl_module.named_parameters() if weight.grad is not None}
            self.found["gradients"] = {name: _whole(gradient) for name, gradient in gradients.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found["losses"].append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
        if trainer.global_step == len(self.found["weights"]):
            self.found["weights"].append(_parameters(pl_module))

    def on_fit_end(self, trainer, pl_module):
        self.found["kept"] = _parameters(pl_module)
        self.found["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.found["graphs"] = counters["stats"]["unique_graphs"]


def _parameters(module: Any) -> dict[str, Tensor]:
    return {name: _whole(weight.detach()) for name, weight in module.named_parameters()}


def _whole(tensor: Any) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().clone()


def trained(words: list[str], folder: Path) -> dict[str, Any] | str:
    """What this process has seen of a run, or the line in which it is refused."""
    sys.modules["tests_of_pairs"] = sys.modules[__name__]
    os.chdir(folder)
    torch.compiler.reset()
    counters.clear()
    cfg = compose([*words, "+callbacks.seen={_target_: tests_of_pairs.Seen}"])
    if dist.is_initialized() and dist.get_rank() > 0:
        cfg.run_dir += "_of_another_rank"
    try:
        result = run(cfg)
    except (HastenError, ValueError) as error:
        if "\n" in str(error):
            raise
        return str(error)
    return next(callback.found for callback in result.trainer.callbacks if isinstance(callback, Seen))


class Runs:
    """Runs of cases, each once: what two processes have seen, or one, or the line in which it is refused."""

    def __init__(self, folder: Path, two_processes: Callable[..., list[Any]]):
        self.folder, self.two_processes = folder, two_processes
        self.numbers = count()
        self.found: dict[Case, list[dict[str, Any]] | str] = {}

    def __call__(self, case: Case) -> list[dict[str, Any]] | str:
        if case not in self.found:
            self.found[case] = self._run(case)
        return self.found[case]

    def _run(self, case: Case) -> list[dict[str, Any]] | str:
        words = [*words_of(case), f"run_dir=pairs/{next(self.numbers)}"]
        if {"DDP", "FSDP2"}.isdisjoint(case):
            ranks = [trained(words, self.folder)]
        else:
            os.chdir(self.folder)
            for stage in stages_of(compose(words)):
                _complete(stage)  # as rank zero does before there are others
            ranks = self.two_processes(trained, words, self.folder)
        lines = [rank for rank in ranks if isinstance(rank, str)]
        if not lines:
            return ranks
        assert lines == [lines[0]] * len(ranks), f"refused by some processes only: {lines}"
        return lines[0]


def words_of(case: Case) -> list[str]:
    method, *tools = case
    words = list(METHODS.get(method, DIFFUSION))
    if method in CLASSIFIES:
        words = [*(VIT if "token merging" in tools else CONVNET), *words]
    words += BOTH if {"DDP", "FSDP2"} <= set(tools) else chain.from_iterable(TOOLS[tool] for tool in tools)
    if method == TOLD_NOTHING:
        words += ADAPTED
    return [*words, f"data.batch_size={IMAGES // 2 ** len(set(tools) & set(HALVE))}"]


def cases_of(pair: tuple[str, str]) -> list[Case]:
    """The runs of a pair: one, or two where its tools ask for different things."""
    if pair[0] in METHODS:
        return [pair]
    return [(method, *pair) for method in [MEET_ON[tool] for tool in pair if tool in MEET_ON] or ["classification"]]


# ------------------------------------------------------------------ what is owed


def outcome(pair: tuple[str, str], runs: Runs) -> tuple[str, ...]:
    """The lines in which a pair is refused; none where it works, which is checked."""
    lines = []
    for case in cases_of(pair):
        found = runs(case)
        if isinstance(found, str):
            lines.append(found)
        else:
            check(case, found, runs)
    assert len(lines) in (0, len(cases_of(pair))), f"{pair}: refused on one module, but not on the other: {lines}"
    return tuple(lines)


def check(case: Case, ranks: list[dict[str, Any]], runs: Runs) -> None:
    """Whether a run has trained, with every tool at work, and as one without those that change no number."""
    method, *tools = case
    one, other = ranks[0], ranks[-1]
    assert len(one["weights"]) > 2 and all(map(math.isfinite, one["losses"]))
    assert not any(weight.isnan().any() for weights in (*one["weights"], one["kept"]) for weight in weights.values())
    assert any(not weight.equal(one["weights"][0][name]) for name, weight in one["weights"][-1].items())
    for here, there in zip((*one["weights"], one["kept"]), (*other["weights"], other["kept"]), strict=True):
        assert all(weight.equal(there[name]) for name, weight in here.items()), "the ranks' weights are not the same"

    assert all(weight.dtype == torch.float32 for weight in one["kept"].values())
    close(one["kept"], average(one["weights"]) if "EMA" in tools else one["weights"][-1], 1e-6)
    assert (one["graphs"] > 0) == ("compile" in tools)
    assert one["sharded"] == ("FSDP2" in tools)
    assert one["world_size"] == len(ranks) == (1 if {"DDP", "FSDP2"}.isdisjoint(tools) else 2)
    assert (one["metrics"].get("token_merge/ratio", 1.0) < 1) == ("token merging" in tools)
    if len(ranks) == 2 and method != "trajectory matching (EDF)":  # whose loss is the mean of both
        assert one["losses"] != other["losses"], "the ranks have trained on the same"

    same = {"compile", "bf16-mixed", *(HALVE if method in CLASSIFIES else ())}
    if same.isdisjoint(tools) or not same.issuperset(set(HALVE).intersection(tools)):
        return
    (wanted,) = runs((method, *(tool for tool in tools if tool not in same)))
    rough = "bf16-mixed" in tools
    close(one["gradients"], wanted["gradients"], 0.2 if rough else 1e-5)
    close(moved(one), moved(wanted), 0.5 if rough else 1e-4)
    if rough:
        assert one["losses"] != wanted["losses"], "autocast was not on"


def average(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The moving average of the weights after each step, in float64, by its definition."""
    found = {name: weight.double() for name, weight in weights[1].items()}
    for n, after in enumerate(weights[2:], start=1):
        decay = min(0.999, (1 + n) / (10 + n))
        found = {name: old - (1 - decay) * less(old, after[name]) for name, old in found.items()}
    return found


def moved(rank: dict[str, Any]) -> dict[str, Tensor]:
    return {name: less(weight, rank["weights"][0][name]) for name, weight in rank["kept"].items()}


def less(one: Tensor, other: Tensor) -> Tensor:
    """The difference; of two that are infinite alike, as the logits of hard labels are, none."""
    return torch.where(one == other, 0.0, one - other)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Equal to a share of the largest entry of a tensor, or of a tenth of that of all."""
    assert found.keys() == wanted.keys() != set()
    largest = {name: tensor[tensor.isfinite()].abs().max().item() for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        # of a bias in front of a norm all is rounding
        scale = max(largest[name], 0.1 * max(largest.values()))
        error = less(found[name], tensor).abs().max().item() / scale
        assert error < tolerance, f"{name}: off by {error:.1e} of its largest entry"


# ------------------------------------------------------------------ the page

Found = dict[tuple[str, str], tuple[str, ...]]
"""Pair -> the lines in which it is refused."""

INTRODUCTION = """\
# What goes together

`yes`: the two train together. A number: they are refused before the first step, in one line, which stands below the
table."""

HOW = f"""\
Written by `python tests/contract/test_together.py`, and tests hold each pair to it. Each was trained for a few steps of
{IMAGES} of scikit-learn's digits on the CPU, by small networks: a ConvNet, or a ViT where tokens merge; for diffusion
a DiT; for the other methods that of their experiment. `compile` is `compile: {{backend: aot_eager}}`, which traces
forward and backward and generates no code; DDP and FSDP2 are two gloo processes; accumulation over two batches. Tools
meet on a classifier, or with timestep sampling on a diffusion module that does not know of it (`attach: adapter`).

What was seen of a `yes`: parameters that move, stay float32 and are the same on both processes; with EMA, the average
of the weights after each step by its definition; with `compile`, gradients and weights as without; in bf16, those of
float32 to its rounding. Classification and distillation draw nothing while they train: with DDP, FSDP2 and
accumulation, gradients and weights are those of one process with the joined batch."""


def page(found: Found) -> str:
    """All of docs/together.md."""
    lines = list(dict.fromkeys(line for refused in found.values() for line in refused))

    def cell(row: str, column: str) -> str:
        if row == column:
            return "-"
        refused = found[(row, column) if (row, column) in found else (column, row)]
        return ", ".join(str(lines.index(line) + 1) for line in refused) or "yes"

    rows = [["", *TOOLS], ["---"] * (len(TOOLS) + 1)]
    rows += [[row, *(cell(row, column) for column in TOOLS)] for row in (*TOOLS, *METHODS)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"{number}. ``{line}``" for number, line in enumerate(lines, start=1))
    return "\n\n".join([INTRODUCTION, table, notes, HOW]) + "\n"


def written() -> Found:
    """What the page says of each pair."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    lines = re.findall(r"^\d+\. ``(.+)``$", text, flags=re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    cells = {(row, tool): cell for row, *found in rows for tool, cell in zip(TOOLS, found, strict=True)}
    return {
        pair: tuple(lines[int(number) - 1] for number in re.findall(r"\d+", cells[pair]))
        for pair in PAIRS
        if pair in cells
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, two_processes):
    return Runs(tmp_path_factory.mktemp("together"), two_processes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[] if pair in FAST else [pytest.mark.slow], id=" x ".join(pair)) for pair in PAIRS],
)
def test_a_pair_works_or_is_refused_as_the_page_says(pair, runs, monkeypatch):
    monkeypatch.chdir(runs.folder)
    found, wanted = outcome(pair, runs), written().get(pair)
    assert found == wanted, f"docs/together.md: {' x '.join(pair)}: expected {wanted}, got {found}{REMEDY}"


def test_the_page_is_what_the_pairs_make_of_it():
    found = written()
    assert list(found) == PAIRS, f"docs/together.md: expected a cell for each pair{REMEDY}"
    assert PAGE.read_text(encoding="utf-8") == page(found), f"docs/together.md was written by hand{REMEDY}"


def write_page() -> None:
    """Run all pairs and write docs/together.md."""
    spec: Any = importlib.util.spec_from_file_location("two_processes", Path(__file__).parents[1] / "two_processes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    two_processes = module.TwoProcesses()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs = Runs(Path(folder), two_processes)
            PAGE.write_text(page({pair: outcome(pair, runs) for pair in PAIRS}), encoding="utf-8")
    finally:
        two_processes.stop()


if __name__ == "__main__":
    import test_together  # the processes know this file by that name

    test_together.write_page()
