import csv
import warnings

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EMA, MagnitudeProbe, magnitude_probe
from hasten.errors import HastenError
from hasten.formats.pictures import drawn as drawn_figure
from hasten.nn import Choice, LoRA, Range, hypernetize


class Foreign(lightning.LightningModule):
    """A stranger's module with a hypernetwork somewhere inside."""

    def __init__(self, hyper):
        super().__init__()
        self.parts = nn.ModuleDict({"classifier": hyper})
        self.lr = 0.05

    def training_step(self, batch, batch_idx):
        images, labels = batch
        hyper = self.parts["classifier"]
        return F.cross_entropy(hyper(images, **hyper.sample_inputs()), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


MIP = {}
DEFAULT = {"encoding": None, "residual": False}
ENCODING_ONLY = {"residual": False}
RESIDUAL_ONLY = {"encoding": None}


def foreign(inputs=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    return Foreign(hypernetize(net, inputs or {"scale": (0, 4)}, **({"base_init": "kaiming"} | options)))


def batches():
    images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(8) % 3), batch_size=4)


def attached(folder):
    return MagnitudeProbe(n_points=3, every_n_steps=1, folder=folder / "pictures"), foreign(), batches()


def fitted(probe, module, *callbacks, steps=4, of_trainer=None, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_model_summary=False, enable_progress_bar=False, callbacks=[probe, *callbacks], max_steps=steps,
        **(of_trainer or {}),
    )  # fmt: skip
    trainer.fit(module, batches(), **settings)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def at_start(module, **options):
    """What a probe finds before training."""
    module.lr = 0.0
    return fitted(MagnitudeProbe(**options), module, steps=1)


# ---------------------------------------------------------------------- the numbers


@pytest.mark.filterwarnings("ignore:.*magnitude_probe")
@pytest.mark.parametrize(
    ("options", "delta_slope", "theta_slope"),
    [(DEFAULT, 1, 1), (ENCODING_ONLY, 0, 0), (RESIDUAL_ONLY, 1, 0), (MIP, 0, 0)],
)
def test_what_is_proportional_has_slope_one_and_what_mip_makes_has_almost_none(options, delta_slope, theta_slope):
    found = at_start(foreign(**options))
    assert found["mip/delta_slope@scale"] == pytest.approx(delta_slope, abs=1e-4 if delta_slope else 0.2)
    assert found["mip/theta_slope@scale"] == pytest.approx(theta_slope, abs=1e-4 if theta_slope else 0.2)
    if delta_slope:
        assert found["mip/delta_ratio@scale"] == pytest.approx(39, rel=1e-4)  # of the midpoints of 20 bins
        assert found["mip/delta_r@scale"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("log", [False, True])
def test_the_numbers_are_those_of_a_slow_sweep(log):
    inputs = {"scale": Range(0.01, 4.0, log=log), "kind": Choice(["a", "b"]), "shift": Range(-1.0, 1.0, dim=3)}
    module = foreign(inputs)
    found = at_start(module, n_points=5)
    hyper = module.parts["classifier"]
    z = [0.1, 0.3, 0.5, 0.7, 0.9]
    scales = [0.01 * 400**x if log else 0.01 + 3.99 * x for x in z]
    norms = {}
    for scale in scales:
        theta = hyper.generate(scale=scale, kind="a", shift=[0.0, 0.0, 0.0])
        norms[scale] = torch.cat([part.flatten() for part in theta.values()]).norm().item()
    y, x = torch.tensor(list(norms.values())), torch.tensor(z)
    assert found["mip/theta_norm@scale"] == pytest.approx(y.mean().item(), rel=1e-5)
    assert found["mip/theta_ratio@scale"] == pytest.approx((y.max() / y.min()).item(), rel=1e-5)
    slope = torch.linalg.lstsq(torch.stack([x.log(), torch.ones(5)], 1), y.log()).solution[0].item()
    assert found["mip/theta_slope@scale"] == pytest.approx(slope, rel=1e-2)
    assert found["mip/theta_r@scale"] == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), rel=1e-2)
    assert "mip/theta_slope@kind" not in found and found["mip/theta_norm@kind"] > 0
    scale = 0.2 if log else 2.005  # the middle of its range
    deltas = [hyper.delta(scale=scale, kind="a", shift=[s, s, s]) for s in (-0.8, -0.4, 0.0, 0.4, 0.8)]
    mean = sum(torch.cat([part.flatten() for part in delta.values()]).norm().item() for delta in deltas) / 5
    assert found["mip/delta_norm@shift"] == pytest.approx(mean, rel=1e-5)


def test_the_gradients_are_those_of_the_hypernetwork_since_the_last_probe():
    module, norms = foreign(), []

    class Notes(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            hyper = module.parts["classifier"].hyper
            norms.append(torch.cat([p.grad.flatten() for p in hyper.parameters()]).norm())

    found = fitted(MagnitudeProbe(every_n_steps=3), module, Notes(), steps=6)
    since = torch.stack(norms[3:])
    assert found["mip/grad_cv"] == pytest.approx((since.std() / since.mean()).item(), rel=1e-5)


def test_the_averaged_weights_are_measured_and_training_does_not_notice():
    norms = fitted(MagnitudeProbe(every_n_steps=2), with_probe := foreign(), EMA(0.9))
    fitted(EMA(0.9), without := foreign())
    for one, other in zip(with_probe.parameters(), without.parameters(), strict=True):
        assert one.equal(other)
    plain = fitted(MagnitudeProbe(every_n_steps=2), foreign())
    assert plain["mip/delta_norm@scale"] != norms["mip/delta_norm@scale"]


def test_what_is_no_number_is_left_out():
    found = at_start(foreign(residual=False, init="zero"))
    assert {name for name in found if name.startswith("mip/")} == {"mip/delta_norm@scale", "mip/theta_norm@scale"}
    assert found["mip/delta_norm@scale"] == found["mip/theta_norm@scale"] == 0


def test_the_precision_of_the_trainer_does_not_round_the_numbers():
    def found(precision):
        module = foreign()
        module.lr = 0.0
        return fitted(MagnitudeProbe(), module, steps=1, of_trainer={"precision": precision})

    assert found("bf16-mixed") == found("32-true")


# ---------------------------------------------------------------------- files


def test_a_row_stands_for_every_step_input_value_and_tensor(tmp_path):
    inputs = {"scale": (0.0, 4.0), "kind": Choice(["a", "b"])}
    fitted(MagnitudeProbe(n_points=4, every_n_steps=2, folder=tmp_path), foreign(inputs), steps=3)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "magnitude.csv", "magnitude_kind.png", "magnitude_scale.png",
    ]  # fmt: skip
    with (tmp_path / "magnitude.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["step"], row["input"], row["tensor"], row["value"]) for row in rows]
    assert found == [
        (step, name, tensor, value)
        for step in ("0", "2", "3")
        for name, values in (("scale", ["0.5", "1.5", "2.5", "3.5"]), ("kind", ["a", "b"]))
        for tensor in ("all", "1.weight", "1.bias")
        for value in values
    ]
    for row in rows:
        if row["tensor"] == "all":
            parts = [r for r in rows if r["tensor"] != "all" and r | {"tensor": 0, "delta_norm": 0, "theta_norm": 0} ==
                     row | {"tensor": 0, "delta_norm": 0, "theta_norm": 0}]  # fmt: skip
            total = sum(float(part["delta_norm"]) ** 2 for part in parts) ** 0.5
            assert float(row["delta_norm"]) == pytest.approx(total, rel=1e-6)


def test_a_resumed_run_adds_to_the_file_and_keeps_what_was_before_training(tmp_path):
    saving = ModelCheckpoint(tmp_path, "stopped", every_n_train_steps=2)
    options = {"n_points": 2, "every_n_steps": 2, "per_tensor": False, "folder": tmp_path / "pictures"}
    first, rest = MagnitudeProbe(**options), MagnitudeProbe(**options)
    fitted(first, foreign(), saving, steps=2)
    fitted(rest, foreign(), steps=4, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    with (tmp_path / "pictures" / "magnitude.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "0", "2", "2", "4", "4"]
    assert rest.state_dict()["before"] == first.state_dict()["before"]


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted(MagnitudeProbe(), foreign())
    assert list(tmp_path.iterdir()) == []


def test_the_picture_has_what_is_generated_in_one_panel_and_the_weights_in_the_other(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(magnitude_probe, "drawn", lambda figure: figures.append(figure) or drawn_figure(figure))
    fitted(MagnitudeProbe(n_points=4, every_n_steps=3, folder=tmp_path), foreign(), steps=3)
    with (tmp_path / "magnitude.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["tensor"] == "all"]
    for panel, kind in zip(figures[-1].axes, ("delta_norm", "theta_norm"), strict=False):
        before, now = ([float(row[kind]) for row in rows if row["step"] == step] for step in ("0", "3"))
        assert before != now
        assert [line.get_ydata().tolist() for line in panel.lines] == [pytest.approx(before), pytest.approx(now)]


def _rank(folder):
    trainer = {"devices": 2, "strategy": "ddp"}
    fitted(MagnitudeProbe(n_points=2, folder=folder / str(dist.get_rank())), foreign(), steps=1, of_trainer=trainer)


@pytest.mark.slow
def test_one_of_two_ranks_writes(two_processes, tmp_path):
    two_processes(_rank, tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]


# ---------------------------------------------------------------------- one fit and the next


class Validated(Foreign):
    def validation_step(self, batch, batch_idx):
        pass


def test_a_second_fit_begins_anew_and_a_validation_in_between_changes_nothing(tmp_path):
    probe = MagnitudeProbe(n_points=2, per_tensor=False, folder=tmp_path)
    fitted(probe, foreign(), steps=1)
    first = probe.state_dict()["before"]
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[probe])
    trainer.validate(Validated(foreign().parts["classifier"]), batches(), verbose=False)
    assert probe.state_dict()["before"] == first
    fitted(probe, foreign(head="basis"), steps=2)
    assert probe.state_dict()["before"] != first
    with (tmp_path / "magnitude.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "0", "2", "2"]


class Stops(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError("stopped")


def test_no_model_is_kept_after_a_fit_or_an_exception():
    probe = MagnitudeProbe()
    fitted(probe, foreign(), steps=1)
    assert probe._model is None
    with pytest.raises(RuntimeError, match="stopped"):
        fitted(probe, foreign(), Stops())
    assert probe._model is None


# ---------------------------------------------------------------------- the alarm


def _warned(probe, module, steps=4):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(probe, module, steps=steps)
    return [str(each.message) for each in caught if str(each.message).startswith("magnitude_probe")]


def test_weights_that_are_in_proportion_to_the_input_are_one_warning():
    (line,) = _warned(MagnitudeProbe(), foreign(**DEFAULT))
    assert line == (
        "magnitude_probe: scale: expected weights of about one size over its range, got the largest 39 times the "
        "smallest at step 0; use encoding='cos_sin' and residual=True"
    )


@pytest.mark.parametrize("options", [MIP, ENCODING_ONLY, RESIDUAL_ONLY, {"init": "zero"}, {"head": LoRA(2)}])
def test_what_trains_is_no_alarm(options):
    assert _warned(MagnitudeProbe(every_n_steps=2), foreign(**options)) == []


def test_what_never_generates_anything_is_one_warning_at_the_second_probe_after_the_start():
    def dead():
        module = foreign(init="zero")
        module.lr = 0.0
        return module

    (line,) = _warned(MagnitudeProbe(every_n_steps=1), dead(), steps=3)
    assert line.startswith("magnitude_probe: the hypernetwork has generated exactly 0 up to step 2; expected it to ")
    assert _warned(MagnitudeProbe(every_n_steps=3), dead(), steps=3) == []
    assert _warned(MagnitudeProbe(every_n_steps=1, alarm=False), dead()) == []


def test_two_zero_factors_of_a_product_are_found():
    module = foreign(head=LoRA(2), params="*.weight")
    hyper = module.parts["classifier"].hyper
    nn.init.zeros_(hyper.head.weight)  # V is 0 already
    (line,) = _warned(MagnitudeProbe(every_n_steps=2), module)
    assert "two factors of a product" in line


class Switched(Foreign):
    """A hypernetwork that learns nothing, and generates something in some steps."""

    def __init__(self, alive):
        super().__init__(foreign(init="zero").parts["classifier"])
        self.lr = 0.0
        self.alive = alive

    def on_train_batch_start(self, batch, batch_idx):
        nn.init.constant_(self.parts["classifier"].hyper.head.weight, 0.01 * self.alive[self.global_step])


@pytest.mark.parametrize(
    ("alive", "alarms"),
    [([0, 1, 0, 1, 0], 0), ([1, 0, 0, 1, 0], 1), ([1e-30] * 5, 0)],  # whose squares are 0 in float32
)
def test_two_probes_that_follow_each_other_must_find_exactly_nothing(alive, alarms):
    assert len(_warned(MagnitudeProbe(every_n_steps=1), Switched(alive), steps=5)) == alarms


def test_a_run_that_was_resumed_between_two_dead_probes_warns(tmp_path):
    saving = ModelCheckpoint(tmp_path, "stopped", every_n_train_steps=2)
    fitted(MagnitudeProbe(every_n_steps=2), Switched([0] * 4), saving, steps=2)
    with pytest.warns(UserWarning, match="magnitude_probe: .* generated exactly 0 up to step 4"):
        fitted(MagnitudeProbe(every_n_steps=2), Switched([0] * 4), steps=4, ckpt_path=tmp_path / "stopped.ckpt",
               weights_only=True)  # fmt: skip


def test_what_generates_something_for_one_value_is_alive():
    module = foreign({"kind": Choice(["a", "b"])}, hidden=(2,))
    module.lr, hyper = 0.0, module.parts["classifier"].hyper
    nn.init.eye_(hyper.trunk[0].weight)
    nn.init.zeros_(hyper.head.weight[:, 0])  # of "a"
    assert _warned(MagnitudeProbe(every_n_steps=1), module) == []


@pytest.mark.parametrize(("n_points", "alarms"), [(5, 0), (6, 1)])  # from the first bin's middle to the last's: 9, 11
def test_weights_ten_times_as_large_as_others_are_too_large(n_points, alarms):
    assert len(_warned(MagnitudeProbe(n_points=n_points), foreign(**DEFAULT), steps=1)) == alarms


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("options", [{"n_points": 1}, {"every_n_steps": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"^magnitude_probe: "):
        MagnitudeProbe(**options)


def test_a_module_without_a_hypernetwork_and_one_with_two_are_refused_in_one_line():
    with pytest.raises(HastenError, match=r"^magnitude_probe: Foreign: expected one HyperModel in it, got none; make"):
        fitted(MagnitudeProbe(), Foreign(nn.Linear(2, 2)))
    module = foreign()
    module.second = foreign().parts["classifier"]
    with pytest.raises(HastenError, match=r"got parts\.classifier, second; "):
        fitted(MagnitudeProbe(), module)


def test_a_compiled_hypernetwork_is_found_once():
    module = foreign()
    module.parts["classifier"] = torch.compile(module.parts["classifier"])
    MagnitudeProbe().on_fit_start(lightning.Trainer(logger=False, accelerator="cpu"), module)
