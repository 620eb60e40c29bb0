import copy
import json
from itertools import product

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from hasten.callbacks import MagnitudeProbe
from hasten.check import build, check
from hasten.datamodules import Digits
from hasten.errors import HastenError
from hasten.formats.pictures import drawn as drawn_figure
from hasten.modules import HyperNetwork, _hypernet_plots
from hasten.modules.hypernet_tasks import rotated
from hasten.nn import Choice, Range, ScaledUNet, SeparateModels, hypernetize
from hasten.run import compose


def _hyper(inputs=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return hypernetize(net, inputs or {"scale": (0.5, 2.0)}, hidden=(8,), **options)


def _adam(groups):
    return torch.optim.Adam(groups, lr=1e-2)


def _scaled(batch, scale):
    images, labels = batch
    return images * scale.view(-1, 1, 1, 1), labels


def _module(**options):
    hyper = options.pop("model", None) or _hyper(options.pop("inputs", None))
    return HyperNetwork(hyper, options.pop("loss", F.cross_entropy), _adam, **options)


def _loader(n=24, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 1, 4, 4, generator=generator) * 0.1
    images[torch.arange(n), 0, 0, labels] += 1
    return DataLoader(TensorDataset(images, labels), batch_size)


def _trainer(**settings):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **({"enable_checkpointing": False} | settings),
    )  # fmt: skip


def _validated(module, loader):
    return _trainer().validate(module, loader, verbose=False)[0]


# ---------------------------------------------------------------------- training


def test_it_learns_and_logs_the_scores_of_the_grid():
    module = _module(transform=_scaled, metrics={"acc": MulticlassAccuracy(3, average="micro")}, grid=3)
    trainer = _trainer(max_epochs=30)
    trainer.fit(module, _loader(), _loader())
    trainer.test(module, _loader(), verbose=False)
    scores = {
        f"{score}{end}" for score in ("loss", "acc") for end in ("", "_worst", "@scale=0.5", "@scale=1.25", "@scale=2")
    }
    logged = trainer.callback_metrics
    assert logged.keys() == {f"test/{score}" for score in scores}
    assert logged["test/acc_worst"] == 1.0


class Noting:
    """A transform that notes what it is told."""

    def __init__(self):
        self.seen = []

    def __call__(self, batch, scale):
        self.seen.append(scale)
        return batch


def _drawn(steps, **options):
    noting = Noting()
    settings = {"accumulate_grad_batches": options.pop("accumulate_grad_batches", 1)}
    _trainer(max_steps=steps, limit_val_batches=0, **settings).fit(_module(transform=noting, **options), _loader())
    return torch.stack(noting.seen)


@pytest.mark.parametrize(("draw", "shape"), [("batch", ()), ("sample", (8,))])
def test_inputs_are_one_a_batch_or_one_a_sample_and_new_at_every_step(draw, shape):
    drawn = _drawn(6, draw=draw)
    assert drawn.shape == (6, *shape)
    assert len(drawn.unique()) == drawn.numel()
    assert drawn.min() >= 0.5 and drawn.max() <= 2


def test_what_is_drawn_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = _drawn(4)
    torch.manual_seed(2)
    assert _drawn(4).equal(first)
    assert not torch.isin(_drawn(4, seed=1), first).any()


def test_the_batches_of_an_accumulated_step_draw_for_themselves():
    assert len(_drawn(2, accumulate_grad_batches=3).unique()) == 6


@pytest.mark.parametrize("stop", [2, 3, 4])  # epochs have three batches
def test_a_resumed_run_draws_as_if_it_had_never_stopped(stop, tmp_path):
    whole, first, rest = Noting(), Noting(), Noting()
    settings = {"enable_checkpointing": True, "limit_val_batches": 0}
    data = lambda: Digits(batch_size=400)  # noqa: E731 - three batches an epoch, in an order of its own, resumable

    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        return hypernetize(model, {"scale": (0.5, 2.0)}, hidden=(8,))

    def fit(noting, steps, ckpt_path=None):
        saving = ModelCheckpoint(tmp_path, "stopped", every_n_train_steps=stop, enable_version_counter=False)
        module = _module(transform=noting, model=net())
        trainer = _trainer(max_steps=steps, callbacks=[saving], **settings)
        trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path, weights_only=True)
        return module

    straight = fit(whole, 6)
    fit(first, stop)
    resumed = fit(rest, 6, ckpt_path=tmp_path / "stopped.ckpt")
    assert torch.stack(first.seen + rest.seen).equal(torch.stack(whole.seen))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert one.equal(other)


def test_the_loss_and_the_penalty_are_told_the_inputs_they_name():
    told = {}

    def loss(output, target, **inputs):
        told["loss"] = sorted(inputs)
        return F.cross_entropy(output, target, reduction="none")

    def penalty(model, b):
        told["penalty"] = b.shape
        return model.delta(a=0.5, b=b)["1.bias"].sum() * 0 + 2.0

    module = _module(inputs={"a": (0, 1), "b": (0, 1)}, loss=loss, penalty=penalty)
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader(), _loader())
    assert told == {"loss": ["a", "b"], "penalty": ()}
    logged = trainer.callback_metrics
    assert logged["train/penalty"] == 2 and logged["train/loss"] > 2 > logged["val/loss"]


def test_a_loss_may_be_a_module_and_moves_with_the_network():
    module = _module(loss=nn.CrossEntropyLoss(torch.ones(3)))
    assert _validated(module, _loader()) == pytest.approx(_validated(_module(), _loader()))
    assert module.to(torch.float64).loss.function.weight.dtype == torch.float64


def test_neither_the_hypernetwork_nor_vectors_decay():
    module = _module()
    decayed, plain = module.parameter_groups()
    assert [id(p) for p in decayed["params"]] == [id(p) for p in module.model.model.parameters() if p.ndim > 1]
    assert {id(p) for p in plain["params"]} >= {id(p) for p in module.model.hyper.parameters()}
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("penalised", [False, True])
def test_a_step_is_one_on_the_mean_loss_and_the_penalty(penalised):
    def of_each(output, target):
        return F.cross_entropy(output, target, reduction="none")

    noting, hyper = Noting(), _hyper()
    slow = copy.deepcopy(hyper)
    module = HyperNetwork(hyper, of_each, _sgd, transform=noting, penalty=_size if penalised else None)
    _trainer(max_steps=1, limit_val_batches=0).fit(module, _loader())
    (scale,), (images, labels) = noting.seen, next(iter(_loader()))
    loss = F.cross_entropy(slow(images, scale=scale), labels)
    if penalised:
        loss = loss + _size(slow, scale)
    optimizer = _sgd(slow.parameters())
    loss.backward()
    optimizer.step()
    for one, other in zip(hyper.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("n", [16, 21])
def test_scores_are_those_of_plain_networks_at_every_point_whatever_the_batches(n):
    metrics = {"acc": MulticlassAccuracy(3, average="micro"), "ece": MulticlassCalibrationError(3, n_bins=4)}
    module = _module(inputs={"scale": Range(0.5, 2.0, log=True), "kind": Choice(["a", "b"])}, transform=_scaled,
                     metrics=metrics, grid=3)  # fmt: skip
    found = _validated(module, _loader(n))
    images, labels = _loader(n).dataset.tensors
    slow = {}
    for scale, kind in product((0.5, 1.0, 2.0), ("a", "b")):
        net = module.model.materialize(scale=scale, kind=kind)
        logits = net(images * scale).detach()
        ece = MulticlassCalibrationError(3, n_bins=4)(logits, labels)  # no mean over batches
        accuracy = (logits.argmax(1) == labels).float().mean()
        slow[scale, kind] = {"loss": F.cross_entropy(logits, labels), "acc": accuracy, "ece": ece}
    wanted = {}
    for name, worst in (("loss", max), ("acc", min), ("ece", max)):
        values = {point: float(scores[name]) for point, scores in slow.items()}
        wanted |= {f"val/{name}": _mean(values.values()), f"val/{name}_worst": worst(values.values())}
        for v in (0.5, 1.0, 2.0):
            wanted[f"val/{name}@scale={v:g}"] = _mean(x for (scale, _), x in values.items() if scale == v)
        for v in ("a", "b"):
            wanted[f"val/{name}@kind={v}"] = _mean(x for (_, kind), x in values.items() if kind == v)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def _mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def test_two_dimensions_of_one_input_have_a_curve_each():
    found = _validated(_module(inputs={"shift": Range(0.0, 1.0, dim=2)}, grid=2), _loader())
    assert found.keys() == {"val/loss", "val/loss_worst"} | {f"val/loss@shift[{i}]={v}" for i in (0, 1) for v in (0, 1)}


def test_more_than_two_dimensions_are_evaluated_at_sixteen_seeded_points():
    def evaluated():
        noting = Noting()
        module = _module(inputs={"scale": Range(0.5, 2.0, dim=3)}, transform=noting)
        return _validated(module, _loader(8)), torch.stack(noting.seen)

    (found, points), (again, same) = evaluated(), evaluated()
    assert found.keys() == {"val/loss", "val/loss_worst"}
    assert found == again and points.equal(same)
    assert points.shape == (16, 3) and len(points.unique()) == 48


def test_the_pictures_are_curves_of_the_last_validation():
    module = _module(metrics={"acc": MulticlassAccuracy(3)}, inputs={"scale": (0.5, 2.0), "kind": Choice(["a", "b"])})
    assert module.pictures() == {}
    _validated(module, _loader())
    pictures = module.pictures()
    assert pictures.keys() == {f"{score}_over_{name}" for score in ("loss", "acc") for name in ("scale", "kind")}
    for picture in pictures.values():
        assert picture.shape[:3] == (1, 1, 3) and 0 <= picture.min() < 0.5 and picture.max() == 1
    assert not pictures["loss_over_scale"].equal(pictures["loss_over_kind"])


def test_values_that_look_alike_in_short_are_named_in_full():
    logged = _validated(_module(inputs={"scale": (1_000_000, 1_000_008)}, grid=9, loss=_anything), _loader())
    assert {"val/loss@scale=1000000.0", "val/loss@scale=1000001.0"} <= logged.keys()
    assert sum(name.startswith("val/loss@") for name in logged) == 9
    logged = _validated(_module(inputs={"kind": Choice([1, "1"])}, loss=_anything), _loader())
    assert {"val/loss@kind=1", "val/loss@kind='1'"} <= logged.keys()


def _anything(output, target):
    return output.sum()


def test_the_ensemble_sees_the_outputs_at_all_points_of_the_grid():
    class Outputs(MeanMetric):
        def update(self, outputs, target):
            seen.append((outputs, target))

    seen = []
    module = _module(inputs={"noise": Range(0.0, 1.0, dim=3)}, ensemble={"spread": Outputs()})
    assert "val/spread" in _validated(module, _loader(12))
    (outputs, target), (rest, _) = seen
    images, labels = _loader(12).dataset.tensors
    assert (outputs.shape, rest.shape) == ((16, 8, 3), (16, 4, 3)) and target.equal(labels[:8])
    for point, output in zip(module._points, outputs, strict=True):
        torch.testing.assert_close(output, module(images[:8], **point))


def test_operations_are_counted_at_every_point_and_belong_to_a_sample():
    torch.manual_seed(0)
    net = ScaledUNet(1, 1, widths=(2, 2))
    hyper = hypernetize(net, {"scale": (0.25, 1.0)}, hidden=(4,), model_inputs=["scale"])
    # in evaluation as under test: without gradients, and in inference mode
    found = _validated(_module(model=hyper, loss=lambda output, _: output.mean(), flops=True, grid=2), _loader(8))
    generated = sum(net.get_parameter(name).numel() for name in hyper.names)
    made = 2 * (2 * 4 + 4 * generated)  # the MLP and the dense head, once a batch
    for scale, low in ((0.25, 1), (1, 16)):
        convolutions = 16 * (1 * 2 + 2 * 2 + 4 * 2 + 2 * 2) + low * (2 * 2 + 2 * 2)
        wanted = 2 * (9 * convolutions + 16 * 2) + made / 8
        assert found[f"val/mflops@scale={scale}"] == pytest.approx(wanted / 1e6)


def test_scores_are_drawn_over_each_other_and_beside_those_of_another_run(tmp_path):
    other = {"val/loss@scale=0.5": 0.1, "val/acc@scale=0.5": 0.9, "val/loss@scale=2": 0.3}
    (tmp_path / "result.json").write_text(json.dumps({"metrics": other}))
    options = {"metrics": {"acc": MulticlassAccuracy(3)}, "trade_offs": {"loss": "acc"}, "grid": 3}
    pictures = {}
    for dots in (None, tmp_path):
        module = _module(dots=dots, **options)
        assert module.pictures() == {}
        _validated(module, _loader())
        pictures[dots] = module.pictures()
        assert pictures[dots].keys() == {"loss_over_scale", "acc_over_scale", "acc_over_loss_along_scale"}
    for name, picture in pictures[None].items():
        assert picture.shape[:3] == (1, 1, 3) and not picture.equal(pictures[tmp_path][name])


def test_separate_models_are_trained_and_evaluated_as_a_hypernetwork_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    module = _module(model=SeparateModels(net, {"scale": (0.5, 2.0)}, n=2), transform=_scaled, grid=2)
    trainer = _trainer(max_epochs=60)
    trainer.fit(module, _loader(), _loader())
    found = _validated(module, _loader())
    assert found.keys() == {"val/loss", "val/loss_worst", "val/loss@scale=0.5", "val/loss@scale=2"}
    images, labels = _loader().dataset.tensors
    for net, scale in zip(module.model.models, (0.5, 2.0), strict=True):
        loss = F.cross_entropy(net(images * scale), labels).item()
        assert found[f"val/loss@scale={scale:g}"] == pytest.approx(loss, rel=1e-4) and loss < 0.5


def test_the_state_holds_the_network_under_its_own_keys():
    module = _module(metrics={"acc": MulticlassAccuracy(3)})
    keys = module.state_dict().keys()
    assert {f"model.model.{key}" for key in module.model.model.state_dict()} < keys
    assert all(key.startswith("model.") for key in keys)


class OfTheMean(MulticlassAccuracy):
    """Of the mean of all outputs."""

    def update(self, outputs, target):
        super().update(outputs.mean(0), target)


def test_a_second_validation_knows_nothing_of_the_first():
    def module():
        metrics, ensemble = {"acc": MulticlassAccuracy(3, average="micro")}, {"mean": OfTheMean(3, average="micro")}
        return _module(transform=_scaled, metrics=metrics, ensemble=ensemble, flops=True, grid=2)

    trainer, again = _trainer(), module()
    assert trainer.validate(again, _loader(24), verbose=False)[0] != (alone := _validated(module(), _loader(7)))
    assert trainer.validate(again, _loader(7), verbose=False)[0] == alone


def test_a_test_leaves_the_pictures_of_the_validation():
    module, trainer = _module(grid=2), _trainer()
    trainer.validate(module, _loader(24), verbose=False)
    before = module.pictures()["loss_over_scale"]
    trainer.test(module, _loader(7), verbose=False)
    assert module.pictures()["loss_over_scale"].equal(before)


def test_the_sixteen_points_follow_the_seed():
    one, same, other = (
        torch.stack([point["noise"] for point in _module(inputs={"noise": Range(0, 1, dim=3)}, seed=seed)._points])
        for seed in (0, 0, 1)
    )
    assert one.equal(same) and not torch.isin(other, one).any()


def test_a_choice_is_evaluated_at_all_its_values_however_small_the_grid():
    found = _validated(_module(inputs={"kind": Choice("abcde")}, grid=2), _loader(8))
    assert found.keys() == {"val/loss", "val/loss_worst"} | {f"val/loss@kind={value}" for value in "abcde"}


def test_operations_are_those_of_the_first_batch_and_the_most_are_the_worst():
    torch.manual_seed(0)
    net = ScaledUNet(1, 1, widths=(2, 2))
    hyper = hypernetize(net, {"scale": (0.25, 1.0)}, hidden=(4,), model_inputs=["scale"])
    # a smaller last batch, whose samples share what is generated with fewer
    found = _validated(_module(model=hyper, loss=lambda output, _: output.mean(), flops=True, grid=2), _loader(12))
    few, many = found["val/mflops@scale=0.25"], found["val/mflops@scale=1"]
    assert few < many == found["val/mflops_worst"]
    assert found["val/mflops"] == pytest.approx((few + many) / 2)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, beside their pixels."""
    seen = []
    monkeypatch.setattr(_hypernet_plots, "drawn", lambda figure: seen.append(figure) or drawn_figure(figure))
    return seen


def _lines(figure):
    return [list(zip(*map(list, line.get_data()), strict=True)) for line in figure.axes[0].lines]


def test_a_picture_has_the_scores_that_were_logged_their_mean_and_the_other_runs_dots(figures, tmp_path):
    other = {"val/loss@scale=0.5": 0.1, "val/acc@scale=0.5": 0.9, "val/loss@scale=1.25": 0.3}
    (tmp_path / "result.json").write_text(json.dumps({"metrics": other}))
    metrics = {"acc": MulticlassAccuracy(3, average="micro")}
    module = _module(metrics=metrics, trade_offs={"loss": "acc"}, dots=tmp_path, grid=3, transform=_scaled)
    found = _validated(module, _loader(8))
    module.pictures()
    loss, acc = ([found[f"val/{score}@scale={v}"] for v in ("0.5", "1.25", "2")] for score in ("loss", "acc"))
    over_scale, _, trade_off = figures
    curve, mean, dots = _lines(over_scale)
    assert [x for x, _ in curve] == [0, 1, 2] and [y for _, y in curve] == pytest.approx(loss)
    assert [y for _, y in mean] == pytest.approx([_mean(loss)] * 2)
    assert [text.get_text() for text in over_scale.axes[0].texts] == [f"mean {_mean(loss):.3g}"]
    assert dots == [(0, 0.1), (1, 0.3)]
    curve, dots = _lines(trade_off)
    assert [x for x, _ in curve] == pytest.approx(loss) and [y for _, y in curve] == pytest.approx(acc)
    assert dots == [(0.1, 0.9)]
    assert [text.get_text() for text in trade_off.axes[0].texts] == ["0.5", "1.25", "2"]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model": nn.Linear(2, 2)}, "model: expected a HyperModel, got Linear; make one with hasten.nn.hypernetize"),
        ({"draw": "both"}, "draw: expected batch or sample, got 'both'"),
        ({"grid": 1}, "grid: expected at least 2 values of each input, got 1"),
        ({"metrics": {"acc": F.cross_entropy}}, "metrics.acc: expected a torchmetrics metric .*, got function"),
        ({"metrics": {"mean": MeanMetric()}}, "metrics.mean: expected a torchmetrics metric .*, got MeanMetric"),
        ({"trade_offs": {"loss": "acc"}}, "trade_offs: expected pairs of loss, got 'acc'"),
        ({"dots": "nowhere"}, "dots: expected the folder of a finished run, found no result.json in 'nowhere'"),
    ],
)
def test_bad_arguments_are_one_line(options, line):
    with pytest.raises(HastenError, match=f"^hypernetwork: {line}"):
        _module(**options)


def test_a_batch_that_is_no_pair_is_refused_and_so_is_training_without_an_optimizer():
    module = _module()
    with pytest.raises(HastenError, match=r"batch: expected \(x, target\), got Tensor"):
        _validated(module, DataLoader(torch.zeros(4, 16)))
    module.transform = None
    with pytest.raises(HastenError, match="optimizer: required to train, got None"):
        _trainer(max_steps=1).fit(HyperNetwork(_hyper(), F.cross_entropy), _loader())


def test_weights_per_sample_refuse_a_batch_norm_in_training():
    net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="batch norms will mix"):
        hyper = hypernetize(nn.Sequential(nn.Flatten(), net), {"scale": (0, 1)})
    with pytest.raises(RuntimeError, match="draw='batch'"):
        _trainer(max_steps=1).fit(_module(model=hyper, draw="sample"), _loader())


# ---------------------------------------------------------------------- rotation


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 5, 5), (1, 4, 4)])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_exact(size, quarters):
    images = torch.rand(2, *size) * 2 - 1
    turned, labels = rotated((images, torch.arange(2)), torch.tensor(90.0 * quarters))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)), atol=1e-5, rtol=0)
    assert labels.tolist() == [0, 1]


def test_a_turn_keeps_distances_where_the_sides_differ():
    """A dot at a pixel's centre, turned by hand, one sample at a time."""
    images = torch.full((3, 1, 5, 9), -1.0)
    images[:, :, 2, 6] = 1.0  # two to the right of the centre
    turned, _ = rotated((images, torch.zeros(3)), torch.tensor([0.0, 90.0, 180.0]))
    bright = [tuple(divmod(int(image.argmax()), 9)) for image in turned]
    assert bright == [(2, 6), (0, 4), (2, 2)]


def test_what_comes_in_at_the_corners_is_the_fill():
    turned, _ = rotated((torch.ones(1, 1, 9, 9), torch.zeros(1)), torch.tensor(45.0), fill=-0.5)
    assert turned[0, 0, 0, 0] == -0.5 and turned[0, 0, 4, 4] == 1


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("word", "encoded", "own"),
    [
        ("mip_default", False, False),
        ("mip_encoding_only", True, False),
        ("mip_residual_only", False, True),
        ("mip", True, True),
    ],
)
def test_the_ablation_is_a_swap_of_one_word(word, encoded, own):
    cfg = compose(["experiment=mip_digits", f"model={word}", "run_dir=x"])
    check(cfg)
    hyper = build(cfg, "model")
    assert (hyper.encoding.kind == "cos_sin", bool(hyper.model.get_parameter("0.weight").any())) == (encoded, own)
    assert hyper(torch.zeros(2, 1, 8, 8), angle=90.0).shape == (2, 10)


@pytest.mark.parametrize("experiment", ["mip_lambda_digits", "mip_bayes_digits", "mip_segmentation_digits"])
@pytest.mark.parametrize("word", ["mip_default", "mip_encoding_only", "mip_residual_only", "mip"])
def test_it_is_one_in_the_other_experiments_too(experiment, word):
    cfg = compose([f"experiment={experiment}", f"model={word}", "first=[]", "module.dots=null", "run_dir=x"])
    check(cfg)
    hyper, plain = build(cfg, "model"), build(compose([f"experiment={experiment}"]), "model.model")
    assert type(hyper.model) is type(plain)  # the network is the experiment's, whatever the word
    assert hyper.encoding.kind == (None if word in ("mip_default", "mip_residual_only") else "cos_sin")
    assert any(hyper.model.get_parameter(name).any() for name in hyper.names) == (word in ("mip_residual_only", "mip"))


def test_any_network_may_stand_in_the_middle():
    cfg = compose(["experiment=mip_digits", "model@model.model=convnet", "model.model.depth=2", "run_dir=x"])
    check(cfg)
    assert build(cfg, "model")(torch.zeros(2, 1, 8, 8), angle=90.0).shape == (2, 10)


# ---------------------------------------------------------------------- several processes


def _deep(head):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3))
    return hypernetize(net, {"scale": (0.5, 2.0)}, hidden=(8, 8), head=head)


def _sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def _rank(kind, head, draw):
    rank = dist.get_rank()
    strategy = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}[kind]
    noting = Noting()
    metrics = {"acc": MulticlassAccuracy(3, average="micro")}
    module = HyperNetwork(
        _deep(head), F.cross_entropy, _sgd, transform=noting, draw=draw, penalty=_size, metrics=metrics
    )
    probe = MagnitudeProbe(n_points=2, every_n_steps=2)
    trainer = _trainer(max_steps=3, devices=2, strategy=strategy, use_distributed_sampler=False, callbacks=[probe])
    trainer.fit(module, _share(rank))
    probed = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("mip/")}
    drawn = torch.stack(noting.seen)
    parts = dict(module.model.named_parameters())
    if kind == "fsdp2" and not all(isinstance(part, DTensor) for part in parts.values()):
        raise AssertionError("expected every parameter in two halves")
    whole = {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in parts.items()}
    weights = {name: part.detach() for name, part in whole.items()}
    scores = trainer.validate(module, _share(rank), verbose=False)[0]
    return {"drawn": drawn, "weights": weights, "scores": scores, "probed": probed}


def _size(model, scale):
    return 0.1 * sum(delta.square().sum() for delta in model.delta(scale=scale).values())


def _share(rank):
    images, labels = _loader().dataset.tensors
    return DataLoader(TensorDataset(images[rank::2], labels[rank::2]), 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "head", "draw"), [("ddp", "dense", "batch"), ("fsdp2", "dense", "sample"), ("fsdp2", "lora", "batch")]
)
def test_two_ranks_draw_differently_train_on_both_and_validate_as_one(kind, head, draw, two_processes):
    ranks = two_processes(_rank, kind, head, draw)
    assert not torch.isin(ranks[0]["drawn"], ranks[1]["drawn"]).any()
    slow = _deep(head)
    optimizer = _sgd(slow.parameters())
    for step, batches in enumerate(zip(_share(0), _share(1), strict=True)):
        optimizer.zero_grad()
        for rank, (images, labels) in zip(ranks, batches, strict=True):
            scale = rank["drawn"][step]
            loss = F.cross_entropy(slow(images, scale=scale), labels) + _size(slow, scale)
            (loss / 2).backward()
        optimizer.step()
    for name, parameter in slow.named_parameters():
        torch.testing.assert_close(ranks[0]["weights"][name], parameter.detach(), rtol=1e-4, atol=1e-6)
    deltas = [slow.delta(scale=0.5 + 1.5 * z) for z in (0.25, 0.75)]  # where the probe looks
    norms = [torch.cat([part.flatten() for part in delta.values()]).norm().item() for delta in deltas]
    assert ranks[0]["probed"] == ranks[1]["probed"]
    assert ranks[0]["probed"]["mip/delta_norm@scale"] == pytest.approx(_mean(norms), rel=1e-4)
    assert ranks[0]["probed"]["mip/grad_cv"] > 0
    metrics = {"acc": MulticlassAccuracy(3, average="micro")}
    alone = _validated(HyperNetwork(slow, F.cross_entropy, metrics=metrics), _loader())
    assert ranks[0]["scores"] == ranks[1]["scores"] == pytest.approx(alone, rel=1e-4)


def _unequal(n):
    images, labels = _loader().dataset.tensors
    share = [slice(0, n), slice(n, None)][dist.get_rank()]
    loader = DataLoader(TensorDataset(images[share], labels[share]), 8)
    trainer = _trainer(devices=2, strategy="ddp", use_distributed_sampler=False)
    return trainer.validate(_module(metrics={"acc": MulticlassAccuracy(3, average="micro")}), loader, verbose=False)[0]


@pytest.mark.slow
def test_two_ranks_count_as_their_samples_do(two_processes):
    first, second = two_processes(_unequal, 20)
    alone = _validated(_module(metrics={"acc": MulticlassAccuracy(3, average="micro")}), _loader())
    assert first == second == pytest.approx(alone, rel=1e-4)
