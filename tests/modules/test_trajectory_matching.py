import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from hasten.callbacks import ExactResume, SkipGuard
from hasten.datamodules.expert_trajectories import ExpertTrajectories
from hasten.datamodules.images import ImageDataModule, Splits, TensorImages
from hasten.errors import HastenError
from hasten.formats.trajectories import write_trajectory
from hasten.functional.matching import matching_gradients
from hasten.modules import TrajectoryMatching, trajectory_matching
from hasten.nn import ConvNet, SyntheticSet
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.guide import DiscriminativeArea
from hasten.nn.dataset_distillation.initial import real, real_hard
from hasten.nn.dataset_distillation.masks import DepthMask, LossQuantileMask

CLASSES, EPOCHS = 3, 8


class Stripes(ImageDataModule):
    """Noisy 6x6 images, each class with a bright row of its own."""

    name = "stripes"

    def __init__(self):
        super().__init__((1, 6, 6), CLASSES, batch_size=16)

    def read(self):
        labels = torch.arange(60) % CLASSES
        images = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.7
        images[torch.arange(60), :, 2 * labels] += 0.3
        whole = TensorImages(images, labels, self.pixels)
        return Splits(train=whole, val=whole, test=whole)


def _net(width=4):
    return ConvNet(1, 6, CLASSES, width=width, depth=1)


@cache
def _trajectories():
    """Two experts' parameters after each epoch of plain SGD, (2, E + 1, P)."""
    images, labels = (Stripes().splits.train.batch(list(range(60)))[i] for i in (0, 1))
    experts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = _net()
        optimizer, rows = torch.optim.SGD(net.parameters(), lr=0.5), [_flat(net)]
        for _ in range(EPOCHS):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                optimizer.step()
            rows.append(_flat(net))
        experts.append(torch.stack(rows))
    return torch.stack(experts)


def _flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.fixture
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    _write(folder)
    return folder


def _write(folder, net=None):
    named = dict((net or _net()).named_parameters())
    about = {"names": list(named), "shapes": [p.shape for p in named.values()], "recipe": {}}
    for i, theta in enumerate(_trajectories()):
        theta = theta if net is None else torch.zeros(EPOCHS + 1, sum(p.numel() for p in named.values()))
        acc = {"train_acc": [1.0] * (EPOCHS + 1), "val_acc": [1.0] * (EPOCHS + 1)}
        write_trajectory(folder / f"expert_{i:04d}.safetensors", theta, **about, **acc)


def _data(folder, **options):
    return ExpertTrajectories(Stripes(), folder, **({"max_start": 4, "expert_epochs": 2, "iterations": 50} | options))


def _module(ipc=2, **options):
    settings = {"syn_steps": 3, "lr_img": 1.0, "lr_label": 0.1, "lr_lr": 1e-3, "max_loss": 100.0, "init": real}
    synthetic = SyntheticSet(CLASSES, ipc, (1, 6, 6), lr=0.2, learn_labels=options.pop("learn_labels", True))
    return TrajectoryMatching(options.pop("model", None) or _net(), synthetic, **(settings | options))


def _fit(module, data, steps, *callbacks, ckpt_path=None, **settings):
    trainer = Trainer(
        callbacks=list(callbacks), accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def _learned(module):
    return [p.detach().clone() for p in (module.synthetic.images, module.synthetic.labels, module.synthetic.lr)]


class Notes(Callback):
    """What stood after every iteration."""

    def __init__(self):
        self.metrics, self.learned, self.momenta = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.learned.append(_learned(pl_module))
        state = trainer.optimizers[0].state
        self.momenta.append([state[p]["momentum_buffer"].clone() for p in pl_module.synthetic.parameters() if state[p]])


pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:.*when using `ckpt_path`, callbacks"),
]

# ---------------------------------------------------------------------- an iteration


class HalfWeight:
    """A guide that weighs the left half of every image double; it has no map."""

    net, cam = nn.Identity(), None

    def weight(self, images, labels, *, iteration, generator):
        weight = torch.ones(len(images), 1, *images.shape[2:])
        weight[..., :3] = 2
        return weight

    def state_dict(self):
        return {}


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("guide", [None, HalfWeight()])
def test_three_iterations_are_those_written_by_hand(experts, alpha, guide):
    data, notes = _data(experts), Notes()
    module = _module(mask=LossQuantileMask(alpha), guide=guide, momentum_img=0.5, momentum_label=0.9)
    _fit(module, data, 3, notes)

    again = _module()
    _fit(again, data, 1)  # for what a set starts with
    images, labels = again.initial.flatten(0, 1), real(data, again.student, data.experts, ipc=2, generator=_begins())[1]
    learned, momenta = [images, labels, torch.tensor(0.2)], [0.0, 0.0, 0.0]
    for i in range(3):
        segment = data.train_dataloader().dataset.batch([i])
        inputs = [x.clone().requires_grad_() for x in learned]
        net, theta = _net(), segment["start"].clone().requires_grad_()
        for _ in range(3):
            named, parts = dict(net.named_parameters()), theta.split([p.numel() for p in net.parameters()])
            parts = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
            logits = torch.func.functional_call(net, parts, (inputs[0],))
            loss = -(inputs[1].softmax(1) * logits.log_softmax(1)).sum(1).mean()
            theta = theta - inputs[2] * torch.autograd.grad(loss, theta, create_graph=True)[0]
        errors, distances = (theta - segment["target"]).square(), (segment["start"] - segment["target"]).square()
        kept = errors.argsort()[int(alpha * len(errors)) :]
        loss = errors[kept].sum() / distances[kept].sum()
        gradients = list(torch.autograd.grad(loss, inputs))
        if guide is not None:
            gradients[0] = gradients[0] * guide.weight(images, None, iteration=i, generator=None)
        for j, (lr, momentum) in enumerate(((1.0, 0.5), (0.1, 0.9), (1e-3, 0.5))):
            momenta[j] = momentum * momenta[j] + gradients[j]
            learned[j] = learned[j] - lr * momenta[j]
        for found, wanted in zip(notes.learned[i], learned, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        logged = notes.metrics[i]
        assert logged["train/matching_loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["train/start_epoch"] == segment["epoch"]
        assert logged["train/syn_lr"] == pytest.approx(learned[2].item(), rel=1e-5)
        assert logged["train/kept_fraction"] == pytest.approx(len(kept) / len(errors))
        assert logged["train/grad_norm_images"] == pytest.approx(gradients[0].norm().item(), rel=1e-3)
        assert logged.get("train/guide_mean") == (None if guide is None else 1.5)


def _begins():
    """The generator of ``_module``'s beginning."""
    return _module()._generator("init")


def test_every_inner_step_sees_other_images_and_another_draw(experts):
    seen = []

    def noting(step_loss, start, target, images, labels, lr, steps, *, mask):
        seen.append([(step.rows.tolist(), step.draw.op, len(step.draw.values[0])) for step in steps])
        return matching_gradients(step_loss, start, target, images, labels, lr, steps, mask=mask)

    ops = ["color", "crop", "cutout", "scale", "rotate"]
    _fit(_module(syn_steps=12, batch_syn=4, gradients=noting, augment=DSA(ops)), _data(experts), 2)
    assert [len(rows) for rows, _, _ in seen[0]] == [2, 4] * 6 == [n for _, _, n in seen[0]]
    for i in range(0, 12, 2):
        assert sorted(seen[0][i][0] + seen[0][i + 1][0]) == list(range(6))
    assert len({op for _, op, _ in seen[0]}) > 1
    assert seen[0] != seen[1]


def test_every_process_takes_its_own_inner_steps(monkeypatch):
    def drawn(rank):
        monkeypatch.setattr(TrajectoryMatching, "global_rank", rank)
        steps = _module(syn_steps=12, batch_syn=4, augment=DSA(["crop"]))._inner_steps(5)
        return [step.rows.tolist() for step in steps], str([step.draw for step in steps])

    assert drawn(0) == drawn(0)
    for one, other in zip(drawn(0), drawn(1), strict=True):
        assert one != other


def test_the_loss_falls(experts):
    notes = Notes()
    _fit(_module(ipc=1, syn_steps=6, lr_img=5.0), _data(experts, expert_epochs=1, max_start=2), 40, notes)
    losses = torch.tensor([metrics["train/matching_loss"] for metrics in notes.metrics])
    assert losses[-10:].mean() < 0.7 * losses[:10].mean()


def test_the_same_seed_gives_the_same_images_and_another_seed_others(experts):
    def fitted(seed):
        module = _module(seed=seed, batch_syn=4, augment=DSA(["crop", "cutout"]))
        _fit(module, _data(experts), 3)
        return module.synthetic.images

    assert fitted(0).equal(fitted(0))
    assert not fitted(0).equal(fitted(1))


def test_labels_that_are_not_learned_stay(experts):
    module, notes = _module(init=real_hard, learn_labels=False), Notes()
    _fit(module, _data(experts), 2, notes)
    assert module.synthetic.labels.softmax(1).equal(F.one_hot(module.synthetic.classes, CLASSES).float())
    assert not notes.learned[0][0].equal(notes.learned[1][0])


def test_the_step_size_stays_above_its_floor(experts):
    module = _module(lr_lr=1e3)
    _fit(module, _data(experts), 6)
    assert module.synthetic.lr >= 1e-6


def test_a_depth_mask_hears_the_shapes_of_the_student(experts):
    module = _module(mask=DepthMask(0.5))
    trainer = _fit(module, _data(experts), 1)
    classifier = sum(p.numel() for p in _net().classifier.parameters())
    share = classifier / sum(p.numel() for p in _net().parameters())
    assert trainer.callback_metrics["train/kept_fraction"].item() == pytest.approx(share)


def test_the_state_holds_the_set_and_nothing_of_the_student():
    names = {"iteration", "initial", "synthetic.images", "synthetic.labels", "synthetic.lr", "synthetic.classes"}
    module = _module(guide=DiscriminativeArea(_net()))
    assert set(module.state_dict()) == names
    assert [p.shape for p in module.parameters()] == [(6, 1, 6, 6), (6, 3), ()]


# ---------------------------------------------------------------------- what does not count


def _spoilt(at, **parts):
    """Gradients that are replaced, in iteration ``at``, where ``parts`` says."""
    calls = []

    def gradients(*arguments, mask):
        calls.append(1)
        matching = matching_gradients(*arguments, mask=mask)
        wrong = {name: torch.full_like(getattr(matching, name), value) for name, value in parts.items()}
        return replace(matching, **wrong) if len(calls) in at else matching

    return gradients


@pytest.mark.parametrize("wrong", [{"loss": 3.0}, {"loss": math.nan}, {"images": math.inf}, {"labels": math.nan}])
@pytest.mark.parametrize("guarded", [False, True])
def test_what_fails_the_test_leaves_images_labels_step_size_and_momentum_as_they_were(experts, wrong, guarded):
    notes = Notes()
    module = _module(gradients=_spoilt([2], **wrong), max_loss=2.0)
    trainer = _fit(module, _data(experts), 3, *([SkipGuard()] if guarded else []), notes)
    for kind in (notes.learned, notes.momenta):
        for first, second, third in zip(*kind, strict=True):
            assert first.equal(second) and not second.equal(third)
    assert module.iteration == trainer.global_step == 3
    if guarded:
        finite = wrong == {"loss": 3.0}
        counts = {name: notes.metrics[-1][f"train/{name}"] for name in ("skipped", "non_finite")}
        assert counts == {"skipped": 1, "non_finite": 0 if finite else 1}


def test_the_guard_stops_with_the_good_set_on_disk_and_says_what_to_change(experts, tmp_path):
    end = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    module, notes = _module(gradients=_spoilt([3, 4, 5], loss=math.nan)), Notes()
    line = (
        r"^skip_guard: loss or gradients were nan or infinite 3 times in a row at step 5: start epoch \d, syn_lr "
        r"0\.\d+; lower lr_img \(1\) or lr_lr \(0.001\), or train the experts longer$"
    )
    with pytest.raises(HastenError, match=line):
        _fit(module, _data(experts), 9, SkipGuard(patience=3), notes, end)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["synthetic.images"].equal(notes.learned[1][0])


@pytest.mark.parametrize(
    ("max_loss", "remedy"),
    [(0.5, r"raise max_loss \(0.5\)"), (1e-3, r"lower lr_img \(1\) or lr_lr \(0.001\), or train the experts longer")],
)
def test_losses_over_the_limit_are_named_when_the_guard_stops(experts, max_loss, remedy):
    line = r"2 updates in a row were left out at step 2: start epoch \d, syn_lr 0.2, losses [\d.]+ to [\d.]+; "
    with pytest.raises(HastenError, match=f"{line}{remedy}$"):
        _fit(_module(max_loss=max_loss), _data(experts), 9, SkipGuard(skip_patience=2))


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_fit_ends_as_one_that_never_stopped(experts, tmp_path, stop):
    def fit(steps, ckpt_path=None):
        guide = DiscriminativeArea(every=3)
        module = _module(batch_syn=4, augment=DSA(["crop", "cutout", "scale"]), guide=guide, mask=LossQuantileMask(0.2))
        notes, saving = Notes(), ModelCheckpoint(tmp_path / "at", "stopped", every_n_train_steps=stop)
        data = _data(experts, initial_max_start=1, expansion=5)
        callbacks = [notes, ExactResume(), *([saving] if steps == stop else [])]
        trainer = _fit(module, data, steps, *callbacks, ckpt_path=ckpt_path)
        return module, notes, guide, trainer

    whole, whole_notes, whole_guide, _ = fit(7)
    fit(stop)
    rest, rest_notes, guide, trainer = fit(7, tmp_path / "at" / "stopped.ckpt")
    assert rest.iteration == trainer.global_step == 7
    assert whole_notes.metrics[stop:] == rest_notes.metrics
    for kind in ("learned", "momenta"):
        straight, resumed = getattr(whole_notes, kind)[-1], getattr(rest_notes, kind)[-1]
        assert all(one.equal(other) for one, other in zip(straight, resumed, strict=True))
    assert whole.initial.equal(rest.initial)
    assert guide.cam.equal(whole_guide.cam)
    assert guide.state_dict()["renewed_at"] == whole_guide.state_dict()["renewed_at"] == 6


def test_a_resumed_fit_steps_as_it_is_told_now(experts, tmp_path):
    saving = ModelCheckpoint(tmp_path, "stopped", every_n_train_steps=2)
    _fit(_module(), _data(experts), 2, saving)
    module, notes = _module(lr_img=0.0, lr_label=1.0), Notes()
    _fit(module, _data(experts), 3, notes, ckpt_path=tmp_path / "stopped.ckpt")
    before = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    assert module.synthetic.images.equal(before["synthetic.images"])
    moved = before["synthetic.labels"] - module.synthetic.labels.detach()
    torch.testing.assert_close(moved, notes.momenta[0][1])


# ---------------------------------------------------------------------- pictures


def test_the_pictures_are_the_set_now_and_before_and_what_the_guide_sees(experts):
    module = _module(ipc=12, init=real, guide=DiscriminativeArea(every=5))
    seen = {}

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.update(pl_module.pictures())

    data = _data(experts)
    _fit(module, data, 2, Looks())
    assert {name: tuple(picture.shape) for name, picture in seen.items()} == {
        "synthetic": (3, 10, 1, 6, 6), "initial": (3, 10, 1, 6, 6), "cam": (3, 10, 3, 6, 6)}  # fmt: skip
    now = data.denormalize(module.synthetic.images.detach().view(3, 12, 1, 6, 6)[:, :10])
    assert seen["synthetic"].equal(now) and not seen["initial"].equal(now)
    before = real(data, module.student, data.experts, ipc=12, generator=_begins())[0].view(3, 12, 1, 6, 6)
    assert seen["initial"].equal(data.denormalize(before[:, :10]))
    overlay, weight = seen["cam"][:, ::2], seen["cam"][:, 1::2]
    cam = module.guide.cam.view(3, 12, 6, 6)[:, :5]
    image = now[:, :5, 0].clamp(0, 1)
    torch.testing.assert_close(overlay[:, :, 0], (image + (3 * cam).clamp(max=1)) / 2)
    torch.testing.assert_close(overlay[:, :, 2], (image + (3 * cam - 2).clamp(min=0)) / 2)
    threshold = cam.mean((2, 3), keepdim=True)
    wanted = torch.where(cam >= threshold, cam + 1, torch.ones(()))
    torch.testing.assert_close(weight[:, :, 1], wanted / module._guide_weight.view(3, 12, 6, 6)[:, :5].max())


def test_without_a_guide_there_is_no_map(experts):
    module = _module()
    seen = {}

    class Looks(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update(pl_module.pictures())

    _fit(module, _data(experts), 1, Looks())
    assert seen.keys() == {"synthetic", "initial"}


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"syn_steps": 0}, "syn_steps: expected >= 1, got 0"),
        ({"batch_syn": 0}, "batch_syn: expected >= 1, got 0"),
        ({"max_loss": 0.0}, "max_loss: expected > 0, got 0.0"),
        ({"max_loss": math.nan}, "max_loss: expected > 0, got nan"),
        ({"lr_img": -1.0}, "lr_img: expected >= 0, got -1.0"),
        ({"lr_lr": math.inf}, "lr_lr: expected >= 0, got inf"),
        ({"momentum_label": 1.0}, r"momentum_label: expected in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, line):
    with pytest.raises(HastenError, match=f"^trajectory_matching: {line}"):
        _module(**options)


def test_data_without_experts_are_refused():
    with pytest.raises(HastenError, match=r"datamodule: expected .* got Stripes; put hasten.datamodules.ExpertTraj"):
        _fit(_module(), Stripes(), 1)


def test_experts_of_another_network_are_refused_by_its_first_parameter(experts, tmp_path):
    line = (
        r"^trajectory_matching: model: parameter 0: expected blocks.0.0.weight \(4, 1, 3, 3\) as in "
        r"expert_0000.safetensors, got blocks.0.0.weight \(8, 1, 3, 3\); set model to theirs"
    )
    with pytest.raises(HastenError, match=line):
        _fit(_module(model=_net(width=8)), _data(experts), 1)
    _write(tmp_path, nn.Sequential(*_net().blocks))
    with pytest.raises(HastenError, match=r"parameter 0: expected 0.0.weight|parameter \d: expected"):
        _fit(_module(), _data(tmp_path), 1)


def test_a_set_of_another_form_than_the_data_is_refused(experts):
    synthetic = SyntheticSet(CLASSES, 1, (1, 8, 8))
    with pytest.raises(HastenError, match=r"synthetic: expected 3 classes of images \(1, 6, 6\) as in the data, got 3"):
        _fit(TrajectoryMatching(_net(), synthetic), _data(experts), 1)


def test_a_precision_that_does_not_resolve_an_inner_step_is_refused(experts):
    with pytest.raises(HastenError, match="precision: expected 32-true, got bf16-mixed"):
        _fit(_module(), _data(experts), 1, precision="bf16-mixed")


def test_what_cannot_start_or_guide_is_one_line_before_the_first_iteration(experts):
    with pytest.raises(HastenError, match=r"^trajectory_matching: initial: class '0': expected at least ipc = 21"):
        _fit(_module(ipc=21), _data(experts), 1)
    with pytest.raises(HastenError, match=r"^trajectory_matching: guide: layer"):
        _fit(_module(guide=DiscriminativeArea(nn.Flatten())), _data(experts), 1)


def test_the_memory_that_an_iteration_needs_is_told(experts, capsys):
    _fit(_module(ipc=20, batch_syn=30), _data(experts), 1)
    line = r"trajectory matching: 3 steps on 30 images need about \d+ MiB \(a full unroll \d+ MiB\), [\d.]+ .iB free\n"
    assert re.fullmatch(line, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("free_mib", "line"),
    [
        (16, "needs about 30 MiB, 16 MiB free; lower batch_syn from 30 to 15"),
        (5, "needs about 30 MiB, 5.0 MiB free; lower batch_syn from 30 to 3"),
        (0, "needs about 30 MiB, 0 B free; lower syn_steps from 3, or take a smaller net"),
    ],
)
def test_too_little_memory_is_refused_with_what_would_fit(experts, monkeypatch, free_mib, line):
    mib = 2**20
    monkeypatch.setattr(trajectory_matching, "free_bytes", lambda device: free_mib * mib)
    monkeypatch.setattr(trajectory_matching, "step_bytes", lambda step_loss, theta, images, *_: len(images) * mib)
    monkeypatch.setattr(trajectory_matching, "estimated_bytes", lambda gradients, *, saved, numel, steps: saved)
    with pytest.raises(HastenError, match=f"^trajectory_matching: {line}$"):
        _fit(_module(ipc=20, batch_syn=30), _data(experts), 1)


# ---------------------------------------------------------------------- several processes


def _rank(experts):
    noted = []

    def noting(*arguments, mask):
        matching = matching_gradients(*arguments, mask=mask)
        if len(noted) == 2 and dist.get_rank() == 1:
            matching = replace(matching, loss=torch.tensor(math.nan))  # on one rank alone
        noted.append({"loss": matching.loss, "images": matching.images, "labels": matching.labels, "lr": matching.lr})
        return matching

    module, notes = _module(batch_syn=4, gradients=noting, guide=DiscriminativeArea(every=2)), Notes()
    _fit(module, _data(experts), 4, SkipGuard(), notes, devices=2, strategy="ddp")
    return {"noted": noted, "learned": notes.learned, "metrics": notes.metrics}


@pytest.mark.slow
def test_two_processes_step_together_by_the_mean_of_their_segments_and_skip_together(experts, two_processes):
    one, other = two_processes(_rank, experts)
    for mine, others in zip(one["learned"], other["learned"], strict=True):
        assert all(a.equal(b) for a, b in zip(mine, others, strict=True))
    assert not one["noted"][0]["images"].equal(other["noted"][0]["images"])
    assert all(a.equal(b) for a, b in zip(one["learned"][1], one["learned"][2], strict=True))  # NaN on one rank
    assert one["metrics"][-1]["train/skipped"] == other["metrics"][-1]["train/skipped"] == 1
    labels, momentum = real(_data(experts), _module().student, _data(experts).experts, ipc=2, generator=_begins())[1], 0
    for i in (0, 1):
        momentum = 0.9 * momentum + (one["noted"][i]["labels"] + other["noted"][i]["labels"]) / 2
        labels = labels - 0.1 * momentum
        torch.testing.assert_close(one["learned"][i][1], labels)
        mean = (one["noted"][i]["loss"] + other["noted"][i]["loss"]) / 2
        assert one["metrics"][i]["train/matching_loss"] == pytest.approx(mean.item())
