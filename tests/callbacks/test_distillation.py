import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EMA, Distillation
from hasten.errors import HastenError
from hasten.functional import distillation_loss
from hasten.modules import Classification
from hasten.nn import VisionMamba
from hasten.nn.sharding import shard
from hasten.nn.token_merging import Merging


def net(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, classes))


def drawn_net(seed, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return net(classes)


class Foreign(LightningModule):
    """A classifier that has never heard of hasten."""

    def __init__(self, returns="tensor"):
        super().__init__()
        self.net = net()
        self.cross_entropy = nn.CrossEntropyLoss()
        self.returns = returns
        self.register_buffer("mean", torch.zeros(1))  # in the state_dict, but not the network's

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.cross_entropy(self.net(images), labels)
        return {"tensor": loss, "dict": {"loss": loss, "labels": labels}, "none": None}[self.returns]

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def foreign(cls=Foreign, *args, seed=0):
    torch.manual_seed(seed)
    return cls(*args)


def classification(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Classification(net(), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), num_classes=3, **kwargs)


def loader(batches=4, repeats=1):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * batches // repeats, 1, 4, 4, generator=generator).repeat(repeats, 1, 1, 1)
    labels = (torch.arange(4 * batches // repeats) % 3).repeat(repeats)
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def trainer(*callbacks, **kwargs):
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **(settings | kwargs),
    )


def fit(module, *callbacks, data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(3)  # dropout draws the same in every run that is compared
    run = trainer(*callbacks, **kwargs)
    run.fit(module, data or loader(), loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


def attached(folder):
    return Distillation(), foreign(), loader()


class Watch(nn.Module):
    """A teacher that notes how and with what it is called."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.inputs, self.modes = [], []

    def forward(self, images):
        self.inputs.append(images.clone())
        self.modes.append((self.training, torch.is_grad_enabled(), any(p.requires_grad for p in self.parameters())))
        return self.network(images)


class Notes(Callback):
    """Notes the loss that is optimized, what is logged and the weights, after each step."""

    def __init__(self):
        self.losses, self.distill, self.weights = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        self.distill.append(float(trainer.callback_metrics.get("train/distill", "nan")))
        self.weights.append(copy.deepcopy(pl_module.state_dict()))


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


@pytest.fixture(params=[foreign, classification])
def module(request):
    return request.param()


def network(module):
    return module.model if isinstance(module, Classification) else module.net


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("make", [foreign, functools.partial(foreign, Foreign, "dict"), classification])
def test_the_loss_gets_the_weighted_divergence_of_the_same_batch(make):
    module, plain, taught, teacher = make(), Notes(), Notes(), drawn_net(5)
    fit(copy.deepcopy(module), plain, max_steps=1)
    logits = []
    network(module).register_forward_hook(lambda *call: logits.append(call[-1].detach()))
    fit(module, Distillation(teacher, weight=0.7, temperature=2.0), taught, max_steps=1, limit_val_batches=0)
    (images, _) = next(iter(loader()))
    expected = 0.7 * distillation_loss(logits[0], teacher(images), temperature=2.0).item()
    assert expected > 0.01
    assert taught.distill[0] == pytest.approx(expected, rel=1e-6)
    assert taught.losses[0] - plain.losses[0] == pytest.approx(expected, rel=1e-5)


def test_the_foreign_path_and_the_loss_terms_train_alike():
    module, other = classification(), foreign()
    fit(module, Distillation(drawn_net(5)))
    fit(other, Distillation(drawn_net(5)))
    assert_equal(module.model.state_dict(), other.net.state_dict())


def test_a_weight_of_zero_gives_a_bit_identical_run(module):
    plain = copy.deepcopy(module)
    fit(plain)
    fit(module, Distillation(net, weight=0.0))
    assert_equal(plain.state_dict(), module.state_dict())


def test_the_teacher_sees_the_mixed_images_that_the_student_saw():
    module, teacher, seen = classification(mixup=0.8, cutmix=1.0), Watch(net()), []
    module.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    fit(module, Distillation(teacher), limit_val_batches=0)
    plain = torch.cat([images for images, _ in loader()] * 2)
    assert torch.equal(torch.cat(teacher.inputs), torch.cat(seen))
    assert not torch.equal(torch.cat(seen), plain)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_is_skipped_is_not_taught():
    teacher = Watch(net())
    fit(foreign(Foreign, "none"), Distillation(teacher), limit_val_batches=0)
    assert teacher.inputs == []


# ------------------------------------------------------------------ the teacher


def test_the_teacher_stays_in_eval_frozen_and_the_same(module):
    teacher = Watch(drawn_net(5))
    before = copy.deepcopy(teacher.state_dict())
    fit(module, Distillation(teacher))
    assert teacher.modes == 8 * [(False, False, False)]  # a validation, then module.train(), between the epochs
    assert_equal(before, teacher.state_dict())


def test_self_is_the_student_as_it_was_at_set_up(module):
    twin = copy.deepcopy(module)
    fit(module, Distillation())
    fit(twin, Distillation(copy.deepcopy(network(twin))))
    assert_equal(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_self_has_all_its_tokens_where_the_student_merges(start_epoch, tmp_path):
    vim, notes = VisionMamba(4, patch_size=1, in_chans=1, depth=4, embed_dim=8, num_classes=3), Notes()
    vim.set_token_merging(Merging(r=(0, 0, 4, 0), metric="x"))
    module = Classification(vim, functools.partial(torch.optim.SGD, lr=0.0), num_classes=3)
    fit(module, Distillation(weight=1.0, start_epoch=start_epoch), notes, default_root_dir=tmp_path)
    batches = [images for images, _ in loader()]
    merged = [vim(images).detach() for images in batches]
    vim.set_token_merging(None)
    expected = [distillation_loss(m, vim(images)).item() for m, images in zip(merged, batches, strict=True)]
    assert min(expected) > 0
    assert notes.distill[-4:] == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_holds_the_hash_of_the_teacher_and_no_weights_of_it(module, tmp_path):
    plain = fit(copy.deepcopy(module))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    taught = fit(module, Distillation())
    taught.save_checkpoint(tmp_path / "taught.ckpt")
    plain, taught = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "taught"))
    assert taught["state_dict"].keys() == plain["state_dict"].keys()
    assert len(taught["optimizer_states"][0]["state"]) == len(plain["optimizer_states"][0]["state"])
    (state,) = (state for key, state in taught["callbacks"].items() if key.startswith("Distillation"))
    assert state.keys() == {"weights"} and len(state["weights"]) == 8


@pytest.mark.parametrize("form", ["lightning", "state_dict", "compiled"])
def test_a_checkpoint_teaches_as_the_network_it_was_written_from(form, tmp_path):
    source = foreign(seed=7)
    if form == "state_dict":
        torch.save(source.net.state_dict(), tmp_path / "teacher.ckpt")
    else:
        teacher = copy.deepcopy(source)
        teacher.net = torch.compile(teacher.net, backend="eager") if form == "compiled" else teacher.net
        run = trainer()
        run.strategy.connect(teacher)
        run.save_checkpoint(tmp_path / "teacher.ckpt")
    by_path, by_module = foreign(), foreign()
    fit(by_path, Distillation(tmp_path / "teacher.ckpt"))
    fit(by_module, Distillation(source.net))
    assert_equal(by_path.state_dict(), by_module.state_dict())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_the_teacher_has_the_students_precision(precision, dtype):
    dtypes = []

    class Dtypes(Watch):
        def forward(self, images):
            logits = super().forward(images)
            dtypes.append((self.network[1].weight.dtype, logits.dtype))
            return logits

    fit(foreign(), Distillation(Dtypes(net())), precision=precision, max_steps=2)
    assert dtypes == 2 * [(dtype, torch.bfloat16)]


def test_a_teacher_of_its_own_dtype_is_given_inputs_of_it():
    teacher = Watch(net())
    fit(foreign(), Distillation(teacher, teacher_dtype="bfloat16"), max_steps=1)
    assert teacher.inputs[0].dtype == teacher.network[1].weight.dtype == torch.bfloat16


def test_the_module_may_be_compiled_in_any_way():
    plain, two_steps = foreign(), {"max_steps": 2, "limit_val_batches": 0}
    fit(plain, Distillation(drawn_net(5)), **two_steps)
    for way in ("in place", "wrapped", "whole"):
        module = foreign()
        if way == "in place":
            module.net.compile(backend="eager", fullgraph=True)
        elif way == "wrapped":
            module.net = torch.compile(module.net, backend="eager")
        else:
            module = torch.compile(module, backend="eager")
        fit(module, Distillation(drawn_net(5)), **two_steps)
        state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
        assert_equal(plain.state_dict(), state)


@pytest.mark.parametrize("ema_first", [True, False])
def test_ema_averages_the_taught_student_and_nothing_else(ema_first, module):
    alone, watch = Notes(), Watch(drawn_net(5))
    twin = copy.deepcopy(module)
    fit(twin, Distillation(drawn_net(5)), alone)
    ema, distillation, notes = EMA(0.9), Distillation(watch), Notes()
    fit(module, *((ema, distillation) if ema_first else (distillation, ema)), notes)
    for expected, found in zip(alone.weights, notes.weights, strict=True):
        assert_equal(expected, found)
    assert len(watch.inputs) == 8
    assert module.state_dict().keys() == twin.state_dict().keys()


# ------------------------------------------------------------------ leaving


class Breaks(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("breaks", [False, True])
def test_the_module_is_as_it_was_found(module, breaks):
    step, before = module.training_step, set(vars(module))
    mine = vars(module)["training_step"] = functools.partial(module.training_step)  # another's wrapper stays
    if breaks:
        with pytest.raises(RuntimeError, match="in the middle"):
            fit(module, Distillation(), Breaks())
    else:
        fit(module, Distillation())
    assert vars(module).pop("training_step") is mine and module.training_step == step
    assert not any(part._forward_hooks for part in module.modules())
    assert getattr(module, "loss_terms", {}) == {}
    assert before <= set(vars(module))


# ------------------------------------------------------------------ a later start, and resuming


def test_before_start_epoch_nothing_is_taught_and_self_is_the_student_that_enters_it(module, tmp_path):
    notes, plain = Notes(), Notes()
    fit(copy.deepcopy(module), plain, max_epochs=1)
    fit(module, Distillation(start_epoch=1), notes, max_epochs=3, default_root_dir=tmp_path)
    for expected, found in zip(plain.weights, notes.weights[:4], strict=True):
        assert_equal(expected, found)
    assert [value != value for value in notes.distill] == 4 * [True] + 8 * [False]
    snapshot = torch.load(tmp_path / "teacher.pt", weights_only=True)
    child = "model." if isinstance(module, Classification) else "net."
    entering = {name.removeprefix(child): value for name, value in plain.weights[-1].items() if name.startswith(child)}
    assert_equal(entering, snapshot)


@pytest.mark.parametrize("start_epoch", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of ModelCheckpoint
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [8, 6])  # the end of the second epoch, and its middle
def test_a_resumed_run_is_taught_by_the_same_teacher(module, start_epoch, step, tmp_path):
    module.apply(lambda part: setattr(part, "p", 0.0))  # no dropout: torch's generator starts afresh in a resumed run
    same = {"data": loader(repeats=4), "max_epochs": 3}  # so does the loader within an epoch
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    straight, resumed = copy.deepcopy(module), module
    fit(straight, Distillation(start_epoch=start_epoch), checkpoints, enable_checkpointing=True, **same)
    if start_epoch > 0:  # how the student was built no longer matters
        resumed.apply(lambda part: [nn.init.ones_(parameter) for parameter in part.parameters()])
    path = tmp_path / f"step={step}.ckpt"
    fit(resumed, Distillation(start_epoch=start_epoch), ckpt_path=path, default_root_dir=tmp_path, **same)
    assert_equal(straight.state_dict(), resumed.state_dict())


def test_the_snapshot_lies_beside_the_checkpoints_and_its_path_is_in_them(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    fit(foreign(), Distillation(start_epoch=1), checkpoints, enable_checkpointing=True, max_epochs=2)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in saved.items() if key.startswith("Distillation"))
    assert state["snapshot"] == str(tmp_path / "checkpoints" / "teacher.pt")


def _stopped(folder, teacher="self", start_epoch=0, callbacks=True):
    run = fit(foreign(), *([Distillation(teacher, start_epoch=start_epoch)] * callbacks), default_root_dir=folder)
    run.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_another_teacher_on_resume_is_refused_and_the_first_weights_mend_it(tmp_path):
    path = _stopped(tmp_path)
    with pytest.raises(HastenError, match=r"expected weights of hash .* for 'self', build the module from the weights"):
        fit(foreign(seed=1), Distillation(), ckpt_path=path, max_epochs=3)
    torch.save(foreign().net.state_dict(), tmp_path / "base.pt")
    fit(foreign(seed=1), Distillation(tmp_path / "base.pt"), ckpt_path=path, max_epochs=3)


def test_a_checkpoint_loaded_over_self_is_refused_unless_self_comes_later(tmp_path):
    path = _stopped(tmp_path, callbacks=False)
    with pytest.raises(HastenError, match="expected a checkpoint of a run with Distillation, got one without"):
        fit(foreign(seed=1), Distillation(), ckpt_path=path, max_epochs=3)
    fit(foreign(seed=1), Distillation(path), ckpt_path=path, max_epochs=3)
    fit(foreign(seed=1), Distillation(start_epoch=1), ckpt_path=path, max_epochs=3, default_root_dir=tmp_path)
    taught = torch.load(tmp_path / "teacher.pt", weights_only=True)
    student = torch.load(path, weights_only=True)["state_dict"]
    assert_equal({"mean": student["mean"]} | {f"net.{name}": value for name, value in taught.items()}, student)


def test_a_snapshot_that_moved_may_be_named(tmp_path):
    path = _stopped(tmp_path, start_epoch=1)
    (tmp_path / "teacher.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(HastenError, match=r"expected a file, got '.*teacher\.pt', which does not exist"):
        fit(foreign(), Distillation(start_epoch=1), ckpt_path=path, max_epochs=3)
    fit(foreign(), Distillation(tmp_path / "moved.pt", start_epoch=1), ckpt_path=path, max_epochs=3)


# ------------------------------------------------------------------ what is refused


class Manual(Foreign):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoNets(Foreign):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)


class CallsTwice(Foreign):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Tuples(Foreign):
    def __init__(self):
        super().__init__()
        self.net.register_forward_hook(lambda *call: (call[-1],))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0])[0], batch[1])


class OneLogit(Foreign):
    def __init__(self):
        super().__init__()
        self.net = net(1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()


class Late(Foreign):
    def configure_model(self):
        self.net = net()

    def __init__(self):
        super().__init__()
        del self.net


class NeverAsks(Foreign):
    def __init__(self):
        super().__init__()
        self.loss_terms = {}


class Taken(NeverAsks):
    def __init__(self):
        super().__init__()
        self.loss_terms["distill"] = lambda images, logits, targets: logits.sum()


@pytest.mark.parametrize(
    ("cls", "kwargs", "line"),
    [
        (Manual, {}, "Manual: expected automatic optimization, got manual"),
        (TwoNets, {}, "target: expected one child of TwoNets with parameters, got net, head; name by target="),
        (Foreign, {"target": "nett"}, "target: expected a module of Foreign, got 'nett'; did you mean 'net'?"),
        (Foreign, {"target": ""}, "target: expected a module of Foreign, got ''; choose one of: net"),
        (Late, {}, "target: expected one child of Late with parameters, got none"),
        (CallsTwice, {}, "target: expected training_step to call Sequential once, got 2 calls"),
        (Foreign, {"target": "cross_entropy", "teacher": net}, "student: expected logits .* got shape ()"),
        (TwoNets, {"target": "head"}, "target: expected training_step to call Linear once, got 0 calls"),
        (Tuples, {}, "student: expected logits .* got tuple"),
        (OneLogit, {}, r"student: expected logits \(B, K\), K > 1, with a gradient, got shape \(4, 1\)"),
        (Foreign, {"teacher": lambda: net(4)}, r"teacher: expected logits \(4, 3\) like .* got shape \(4, 4\)"),
        (Foreign, {"teacher": lambda: (3,)}, "teacher: expected a function that returns an nn.Module, got tuple"),
        (Foreign, {"teacher": "nowhere.ckpt"}, "teacher: checkpoint: expected a file, got 'nowhere.ckpt'"),
        (NeverAsks, {}, "loss_terms: expected NeverAsks.training_step to call them, got no call"),
        (Taken, {}, "loss_terms: expected no 'distill', got the module's own"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(cls, kwargs, line):
    with pytest.raises(HastenError, match=f"^distillation: {line}") as error:
        fit(foreign(cls), Distillation(**kwargs), limit_val_batches=0)
    assert "\n" not in str(error.value)


def test_a_teacher_that_shares_weights_with_the_student_is_refused():
    module = foreign()
    with pytest.raises(HastenError, match="teacher: expected weights of its own, got some of Foreign"):
        fit(module, Distillation(module.net))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_checkpoint_that_does_not_fit_is_said_in_one_line(tmp_path):
    torch.save(net(4).state_dict(), tmp_path / "four.pt")
    with pytest.raises(HastenError, match=r"4.weight is \(4, 8\), expected \(3, 8\); 4.bias is \(4,\)"):
        fit(foreign(), Distillation(tmp_path / "four.pt"))
    (tmp_path / "broken.pt").write_text("not a checkpoint")
    with pytest.raises(HastenError, match=r"broken\.pt cannot be read as plain weights") as error:
        fit(foreign(), Distillation(tmp_path / "broken.pt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "line"),
    [
        ({"teacher": 3}, TypeError, "teacher: expected 'self', a path, an nn.Module or a function, got int"),
        ({"weight": -0.5}, ValueError, "weight: expected >= 0, got -0.5"),
        ({"temperature": 0}, ValueError, "temperature: expected > 0, got 0"),
        ({"start_epoch": -1}, ValueError, "start_epoch: expected >= 0, got -1"),
        ({"teacher_dtype": "int8"}, ValueError, "teacher_dtype: expected float32, bfloat16, .* got 'int8'"),
    ],
)
def test_a_bad_argument_is_one_line(kwargs, error, line):
    with pytest.raises(error, match=f"^distillation: {line}"):
        Distillation(**kwargs)


# ------------------------------------------------------------------ several processes


class Gradients(Callback):
    """Keeps the gradients of the first step, whole, and the term of the loss."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {
            name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()
            for name, parameter in pl_module.named_parameters()
        }


class Sharded(Foreign):
    """No statistics over a batch and no dropout: two halves are as good as the whole."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def configure_model(self):
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh)


def _batches(rows):
    images, labels = next(iter(DataLoader(loader().dataset, batch_size=8)))
    return DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=8)


def _rank(kind):
    alone, together = Gradients(), Gradients()
    settings = {"max_steps": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    teacher = Distillation(foreign(Sharded, seed=5).net, weight=5.0)
    trainer(teacher, alone, **settings).fit(foreign(Sharded), _batches(slice(None)))
    rank = dist.get_rank()
    strategy = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}[kind]
    teacher = Distillation(foreign(Sharded, seed=5 + rank).net, weight=5.0)  # drawn unseeded: that of rank zero counts
    run = trainer(teacher, together, devices=2, strategy=strategy, **settings)
    run.fit(foreign(Sharded), _batches(slice(rank, None, 2)))
    for name, gradient in together.found.items():
        torch.testing.assert_close(gradient, alone.found[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_have_the_gradients_of_the_joined_batch(kind, two_processes):
    two_processes(_rank, kind)


def test_a_second_fit_has_a_teacher_of_its_own_and_its_checkpoint_says_so():
    callback, hashes = Distillation(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = foreign()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(seed)
        fit(module, callback)
        hashes.append(callback.state_dict())
    assert hashes[0] != hashes[1]
