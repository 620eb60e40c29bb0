"""What two processes owe: DDP for every experiment as its card says, and FSDP2 for the modules that shard.

The ranks are gloo processes on the CPU (``two_processes``), which look like those of torchrun. An experiment that no
card lists follows the card that exports its module, and else owes what a plain recipe does: ``joined``.
"""

import csv
import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from hydra.utils import get_class
from lightning import Callback, LightningModule
from torch import Tensor
from torch.utils._pytree import tree_leaves

import hasten.configs
from hasten import registry
from hasten.check import build
from hasten.errors import HastenError
from hasten.run import _complete, compose, run, stages_of

ROOT = Path(__file__).parents[2]
CONFIGS = Path(hasten.configs.__file__).parent
CARDS = registry.cards().values()
DIGITS = [name for name in registry.group("experiment") if name.endswith("_digits")]

OWN = ("train/", "sampler/", "throughput/", "token_merge/speedup")
"""What a process logs of its own share of the data, or by its own clock; the run's is that of rank zero."""


def _tiny(name: str) -> list[str]:
    return [f"experiment={name}", *compose([f"experiment={name}"]).tiny]


def _module(name: str) -> str:
    """What an experiment trains; read from its file: the two processes too come by here, and composing takes long."""
    defaults = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())["defaults"]
    chosen = [entry["override /module"] for entry in defaults if "override /module" in entry]
    if not chosen:
        return next(_module(entry) for entry in defaults if entry in DIGITS)
    written = yaml.safe_load((CONFIGS / "module" / f"{chosen[0]}.yaml").read_text())
    return written.get("module", written)["_target_"]  # some set `datamodule` as well


def _said(name: str) -> str:
    """What the cards say of an experiment and several processes."""
    if any(name in card.front.get("ddp_refused", []) for card in CARDS):
        return "refused"
    by_name = [card for card in CARDS if name in card.front.get("experiments", [])]
    by_module = [card for card in CARDS if _module(name) in card.front["exports"]]
    return next((card.front["ddp"] for card in by_name or by_module), "joined")


def _cases(names: list[str]) -> list:
    """One experiment of each module in every run of the tests, the others in the slow one."""
    modules = [_module(name) for name in names]
    return [
        pytest.param(name, marks=[pytest.mark.slow] if module in modules[:i] else [])
        for i, (name, module) in enumerate(zip(names, modules, strict=True))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs of this file share what their experiments are built upon."""
    return tmp_path_factory.mktemp("processes")


class Seen(Callback):
    """What a process has trained on, the gradients of its first step, and its loss on a batch that all share."""

    def __init__(self):
        self.taken, self.gradients, self.shared_loss = [], {}, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.order = trainer.train_dataloader._order(0)
        if trainer.current_epoch == 0 and trainer.ckpt_path is None:
            self.taken.append(trainer.train_dataloader._plan[batch_idx][1])
        if batch_idx == 1 and trainer.world_size > 1:
            for leaf in tree_leaves(batch):
                if isinstance(leaf, Tensor):
                    dist.broadcast(leaf, 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.shared_loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            self.gradients = {name: whole(gradient).clone() for name, gradient in gradients.items()}


def whole(tensor: Tensor) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)()


def trained(words: list[str], folder: Path) -> dict:
    """A run as this process has seen it; all but rank zero have a folder of their own, which is to stay empty."""
    sys.modules["tests_of_processes"] = sys.modules[__name__]
    os.chdir(folder)
    cfg = compose([*words, "+callbacks.seen={_target_: tests_of_processes.Seen}"])
    if dist.is_initialized() and dist.get_rank() > 0:
        cfg.run_dir += "_of_another_rank"
    result = run(cfg)
    seen = next(callback for callback in result.trainer.callbacks if isinstance(callback, Seen))
    weights = {name: whole(weight.detach()).clone() for name, weight in result.module.named_parameters()}
    by_hand = not result.module.automatic_optimization
    noted = {name: getattr(seen, name) for name in ("taken", "order", "gradients", "shared_loss")}
    return {**noted, "weights": weights, "metrics": result.metrics, "by_hand": by_hand}


def refused(words: list[str], folder: Path) -> str:
    """What a run says instead of training."""
    os.chdir(folder)
    try:
        run(compose(words))
    except HastenError as error:
        return str(error)
    return "trained"


def _prepared(words: list[str], folder: Path) -> None:
    """Complete what comes first, as rank zero does before there are others."""
    for stage in stages_of(compose([*words, "run_dir=x"])):
        _complete(stage)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _cases([name for name in DIGITS if _said(name) != "refused"]))
def test_two_processes_train_an_experiment_as_its_card_says(name, folder, two_processes, monkeypatch):
    monkeypatch.chdir(folder)
    words = [*_tiny(name), f"run_dir={name}/ddp"]
    _prepared(words, folder)
    ranks = two_processes(trained, [*words, "trainer.strategy=ddp", "trainer.devices=2"], folder)
    _check_data(compose(words), ranks)
    _check_agreement(ranks)
    _check_files(Path(name))
    losses = [rank["shared_loss"] for rank in ranks]
    if _said(name) == "joined":
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), f"ddp: joined, but the ranks of {name} draw differently"
        _check_joined(words, ranks, folder)
    elif not ranks[0]["by_hand"]:  # the loss of a step by hand may be the mean over all ranks
        assert losses[0] != losses[1], f"ddp: ranks_differ, but the ranks of {name} draw alike"


def _check_data(cfg, ranks: list[dict]) -> None:
    """No sample twice in an epoch, and as far as batches are samples those of one process with the joined batch."""
    orders = [rank["order"] for rank in ranks]
    for rank, order in zip(ranks, orders, strict=True):
        assert rank["taken"] == order[: len(rank["taken"])]
    seen = list(chain.from_iterable(chain.from_iterable(orders)))
    assert len(seen) == len(set(seen))
    if cfg.datamodule is None:
        cfg.data.batch_size *= 2
        data = build(cfg, "data")
        data.prepare_data()
        data.setup("fit")
        joined = data.train_dataloader()._order(0)
        assert [sorted(chain(*batches)) for batches in zip(*orders, strict=True)] == list(map(sorted, joined))


def _check_agreement(ranks: list[dict]) -> None:
    one, other = ranks
    for name, weight in one["weights"].items():
        assert weight.equal(other["weights"][name]), f"{name}: the ranks' weights are not the same"
    for name, value in one["metrics"].items():
        if not name.startswith(OWN):
            assert other["metrics"][name] == value, f"{name}: not reduced over the ranks"


def _check_files(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name.startswith("ddp")] == ["ddp"], "written by two ranks"
    for path in ("result.json", "metrics.csv", "config.yaml", "checkpoints/best.ckpt"):
        assert (folder / "ddp" / path).is_file()
    with (folder / "ddp" / "metrics.csv").open(newline="") as file:
        rows = [(row["step"], *sorted(key for key in row if row[key])) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)), "a row of metrics.csv is there twice"


def _check_joined(words: list[str], ranks: list[dict], folder: Path) -> None:
    """The gradients of the first step are those of one process with both batches in one."""
    batch_size = 2 * compose(words).data.batch_size
    short = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    alone = trained([*words, *short, f"data.batch_size={batch_size}", f"{words[-1]}_alone"], folder)
    cause = "does a setup draw from the global generator, which DDP seeds anew? take one with seed: ${seed}"
    close(ranks[0]["gradients"], alone["gradients"], cause=cause)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, cause: str = "") -> None:
    """Equal to 1e-5 of the largest entry of a tensor; a difference is reported with a ``cause`` that it may have."""
    assert found.keys() == wanted.keys() != set()
    largest = {name: tensor.abs().max().item() for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        # of a bias in front of a norm all is rounding
        scale = max(largest[name], 1e-2 * max(largest.values()))
        error = (found[name] - tensor).abs().max().item() / scale
        assert error < 1e-5, f"{name}: off by {error:.1e} of its largest entry" + f"; {cause}" * bool(cause)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _cases([name for name in DIGITS if _said(name) == "refused"]))
def test_what_a_card_says_is_refused_is_refused_in_one_line(name, folder, two_processes, monkeypatch):
    monkeypatch.chdir(folder)
    words = [*_tiny(name), f"run_dir={name}/ddp"]
    _prepared(words, folder)
    lines = two_processes(refused, [*words, "trainer.strategy=ddp", "trainer.devices=2"], folder)
    assert lines[0] == lines[1]
    assert "expected one process" in lines[0] and "got 2" in lines[0] and "\n" not in lines[0]


# ------------------------------------------------------------------ sharded


def _of_each_module(*, shards: bool) -> list[str]:
    """One experiment for each module that shards its parameters itself, or for each that does not."""
    found = {}
    for name in DIGITS:
        module = get_class(_module(name))
        if (module.configure_model is not LightningModule.configure_model) == shards:
            found.setdefault(module, name)
    return list(found.values())


def _sharded(name: str) -> list[str]:
    """The tiny form of an experiment over two processes that share its parameters; an average of those cannot be."""
    words = [*_tiny(name), "trainer=fsdp2", "trainer.accelerator=cpu", "trainer.devices=2"]
    return [*words, "callbacks.ema=null"] if "ema" in compose(words).callbacks else words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _of_each_module(shards=True))
def test_two_processes_that_share_a_model_train_it_as_two_with_a_copy_each(name, folder, two_processes, monkeypatch):
    monkeypatch.chdir(folder)
    words = [*_sharded(name), f"run_dir={name}_shared/ddp"]
    ranks = two_processes(trained, words, folder)
    _check_agreement(ranks)
    _check_files(Path(f"{name}_shared"))
    copies = two_processes(trained, [*words, "trainer=ddp", "trainer.accelerator=cpu", f"{words[-1]}_copies"], folder)
    close(ranks[0]["gradients"], copies[0]["gradients"])
    if _said(name) == "joined":
        _check_joined([*words, "trainer=cpu", "trainer.devices=1", words[-1]], ranks, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _of_each_module(shards=True))
def test_what_is_shared_resumes_exactly_from_one_file_and_from_a_folder(name, folder, two_processes, monkeypatch):
    monkeypatch.chdir(folder)
    words = _sharded(name)
    words.append("trainer.max_steps=4" if compose(words).trainer.max_steps > 0 else "trainer.max_epochs=2")
    weights = []
    for kind in ("false", "true"):
        own = [*words, f"trainer.strategy.save_distributed_checkpoint={kind}"]
        run_dir = f"{name}_shared_{kind}"
        every_step = (
            "+callbacks.every_step={_target_: lightning.pytorch.callbacks.ModelCheckpoint, "
            f"dirpath: {run_dir}_steps, filename: '{{step}}', every_n_train_steps: 1, save_top_k: -1}}"
        )
        uninterrupted = two_processes(trained, [*own, every_step, f"run_dir={run_dir}/whole"], folder)[0]
        saved = [f"ckpt_path='{run_dir}_steps/step=1.ckpt'", f"run_dir={run_dir}/resumed"]
        resumed = two_processes(trained, [*own, *saved], folder)[0]
        for parameter, weight in uninterrupted["weights"].items():
            assert resumed["weights"][parameter].equal(weight), parameter
        last = Path(f"{run_dir}/resumed/checkpoints/last.ckpt")
        assert last.is_dir() == (kind == "true")
        weights.append(resumed["weights"])
        if kind == "false":  # a file as of one process
            state = torch.load(last, weights_only=True)["state_dict"]
            assert all(state[parameter].equal(weight) for parameter, weight in resumed["weights"].items())
    assert all(weight.equal(weights[1][parameter]) for parameter, weight in weights[0].items())


@pytest.mark.parametrize("name", _of_each_module(shards=False))
def test_a_module_that_does_not_shard_itself_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused([f"experiment={name}", "trainer=fsdp2", "trainer.accelerator=cpu"], tmp_path)
    assert line.startswith("trainer.strategy: expected a module that shards in configure_model, got ")
    assert "\n" not in line


@pytest.mark.slow
def test_an_average_of_shared_weights_is_refused_in_one_line(folder, two_processes):
    words = [word for word in _sharded("speed_digits") if word != "callbacks.ema=null"]
    lines = two_processes(refused, [*words, "run_dir=averaged"], folder)
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert lines[0].startswith("ema: strategy: expected whole weights on every device, got ModelParallelStrategy")


# ------------------------------------------------------------------ launching


@pytest.mark.slow
def test_the_torchrun_line_of_the_documentation_trains_word_for_word(tmp_path):
    (line,) = re.findall(r"^torchrun --standalone .+$", (ROOT / "docs/launching.md").read_text(), flags=re.MULTILINE)
    words = [word if word != "train.py" else str(ROOT / "train.py") for word in line.split()[1:]]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/two/result.json").read_text())["status"] == "complete"
    assert done.stdout.count("final metrics") == 1


@pytest.mark.parametrize(
    "started_by", [{"WORLD_SIZE": "2", "RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"}]
)
def test_processes_that_start_on_their_own_need_a_folder_in_their_words(started_by, tmp_path, monkeypatch):
    for name, value in started_by.items():
        monkeypatch.setenv(name, value)
    assert refused(["experiment=classify_digits"], tmp_path).startswith("run_dir: required under torchrun and SLURM")


def test_a_job_that_is_started_again_begins_or_goes_on_by_the_same_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*_tiny("classify_digits"), "ckpt_path=auto"]
    assert refused(words, tmp_path).startswith("run_dir: required with ckpt_path=auto, got null")
    words.append("run_dir=job")
    Path("job").mkdir()
    Path("job/result.json").write_text('{"status": "running"}')  # killed before there was a checkpoint
    Path("job/metrics.csv").write_text("step\n7\n")
    steps = run(compose(words)).trainer.global_step
    assert "7" not in Path("job/metrics.csv").read_text().split()
    assert refused(words, tmp_path).startswith("ckpt_path: auto: 'job' is complete; to train it for longer give")
    Path("job/result.json").write_text('{"status": "running"}')  # killed later
    assert run(compose([*words, "trainer.max_epochs=2"])).trainer.global_step == 2 * steps
