"""Weights of its own for each sample: every way of applying them is B single calls."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hasten.nn import Basis, Choice, Chunked, Dense, LoRA, Range, hypernetize

INPUTS = {"angle": (0, 180), "shift": Range(-1, 1, dim=3), "kind": Choice("abc", dim=4)}
WAYS = ["vmap", "loop", "unique"]


class Net(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = norm or nn.GroupNorm(2, 8)
        self.tied = nn.Conv2d(8, 8, 3)
        self.again = nn.Conv2d(8, 8, 3)
        self.again.weight = self.tied.weight
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.again(self.tied(x)).relu().mean((2, 3)))


class Outputs(nn.Module):
    """Everything a model may take and return."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, pair, mask=None, *, table, words="none"):
        y = self.fc(pair["x"]) + table.sum() + (0 if mask is None else mask)
        return {
            "rows": y,
            "pairs": torch.stack([y, -y], dim=1),
            "mean": y.mean(),
            "nothing": None,
            "words": (words, [y[:, 0]]),
        }


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.layer(x)[0][:, -1])


class Coded(nn.Module):
    """A model without an argument."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.ones(1, 4))
        self.fc = nn.Linear(4, 2)

    def forward(self):
        return self.fc(self.code)


def hypernetized(per_sample, head="dense", model=None, **options):
    torch.manual_seed(1)
    model = Net() if model is None else model
    return hypernetize(model.double(), INPUTS, head=head, per_sample=per_sample, **options)


def values(n, repeated=False):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(max(1, n // 2), (n,), generator=generator) if repeated else torch.arange(n)
    drawn = {
        "angle": torch.rand(n, generator=generator, dtype=torch.float64)[rows] * 180,
        "shift": torch.rand(n, 3, generator=generator, dtype=torch.float64)[rows] * 2 - 1,
        "kind": torch.randint(3, (n,), generator=generator)[rows],
    }
    return drawn


def images(n):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def single_calls(hyper, x, inputs):
    return torch.cat([hyper(x[b : b + 1], **{name: value[b] for name, value in inputs.items()}) for b in range(len(x))])


@pytest.mark.parametrize("head", [Dense(), Basis(4), LoRA(4), Chunked(64)], ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_as_many_single_calls_with_their_gradients(way, head):
    hyper = hypernetized(way, head, params="all")
    for own in hyper.hyper.parameters():  # LoRA starts without a delta
        nn.init.normal_(own, std=0.2)
    x, inputs = images(6).requires_grad_(), values(6, repeated=True)
    together, alone = hyper(x, **inputs), single_calls(hyper, x, inputs)
    assert together.shape == (6, 3)
    assert (together - alone).abs().max() <= 1e-12
    wanted = [x, *hyper.parameters()]
    weights = torch.randn_like(alone)
    found, expected = (torch.autograd.grad((out * weights).sum(), wanted) for out in (together, alone))
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= 1e-11


@pytest.mark.parametrize("way", WAYS)
def test_samples_with_the_same_input_need_not_be_as_many_as_others(way):
    hyper = hypernetized(way)
    x, inputs = images(6), {name: value[[0, 1, 0, 0, 2, 2]] for name, value in values(3).items()}
    torch.testing.assert_close(hyper(x, **inputs), single_calls(hyper, x, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_the_inputs_have_the_gradients_of_single_calls(way):
    hyper, x, inputs = hypernetized(way), images(3), values(3)
    wanted = [inputs["angle"].requires_grad_(), inputs["shift"].requires_grad_()]
    outputs = hyper(x, **inputs), single_calls(hyper, x, inputs)
    found, expected = (torch.autograd.grad(out.square().sum(), wanted) for out in outputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.all()


@pytest.mark.parametrize("way", WAYS)
def test_one_sample_keeps_its_dimension(way):
    hyper = hypernetized(way)
    x, inputs = images(1), values(1)
    assert hyper(x, **inputs).shape == (1, 3)
    assert (hyper(x, **inputs) - single_calls(hyper, x, inputs)).abs().max() <= 1e-12
    assert hyper.generate(**inputs)["conv.weight"].shape == (1, 8, 1, 3, 3)


def test_generate_and_delta_have_a_row_a_sample():
    hyper = hypernetized("vmap")
    inputs = values(4)
    theta, delta = hyper.generate(**inputs), hyper.delta(**inputs)
    for b in range(4):
        one = hyper.generate(**{name: value[b] for name, value in inputs.items()})
        for name in hyper.names:
            torch.testing.assert_close(theta[name][b], one[name], rtol=0, atol=1e-12)
            torch.testing.assert_close(delta[name][b], one[name] - hyper.model.get_parameter(name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_one_input_per_sample_and_the_rest_for_all(way):
    hyper = hypernetized(way)
    x, inputs = images(3), {"angle": [0, 90, 180], "shift": [0.5, 0, 1], "kind": "b"}
    together = hyper(x, **inputs)
    alone = torch.cat([hyper(x[b : b + 1], **inputs | {"angle": inputs["angle"][b]}) for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_rows_of_arguments_are_mapped_the_rest_shared_and_outputs_are_as_deep_as_the_models(way):
    hyper = hypernetized(way, model=Outputs(), params="all")
    x, mask, table, inputs = (torch.randn(3, 4), torch.randn(3, 2), torch.randn(5), values(3))
    x, mask, table = x.double(), mask.double(), table.double()
    found = hyper({"x": x}, mask, table=table, words="said", **inputs)
    each = [
        hyper({"x": x[b : b + 1]}, mask[b : b + 1], table=table, **{name: value[b] for name, value in inputs.items()})
        for b in range(3)
    ]
    for name in ["rows", "pairs"]:
        torch.testing.assert_close(found[name], torch.cat([one[name] for one in each]))
    torch.testing.assert_close(found["mean"], torch.stack([one["mean"] for one in each]))
    assert found["nothing"] is None
    words, (last,) = found["words"]
    assert words == "said" and last.equal(found["rows"][:, 0])


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_a_model_without_arguments_has_a_row_for_each_value(way):
    hyper, inputs = hypernetized(way, model=Coded(), params="all"), values(3)
    alone = [hyper(**{name: value[b] for name, value in inputs.items()}) for b in range(3)]
    torch.testing.assert_close(hyper(**inputs), torch.cat(alone))


def test_unique_calls_the_model_once_for_each_distinct_input():
    hyper = hypernetized("unique")
    calls = []
    hyper.model.fc.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    inputs = {name: value[[0, 1, 0, 0]] for name, value in values(2).items()}
    hyper(images(4), **inputs)
    assert sorted(calls) == [1, 3]


def test_unique_wants_a_row_a_sample():
    hyper = hypernetized("unique", model=Outputs(), params="all")
    with pytest.raises(ValueError, match="expected outputs with a row for each sample for 'unique', got a number; use"):
        hyper({"x": torch.randn(3, 4).double()}, table=torch.zeros(5).double(), **values(3))


@pytest.mark.parametrize("layer", [nn.LSTM(4, 5, batch_first=True), nn.GRU(4, 5, batch_first=True)])
def test_recurrent_layers_loop_by_themselves_and_refuse_vmap(layer):
    hyper = hypernetized("auto", model=Recurrent(layer), params="all")
    assert hyper.per_sample == "loop"
    x, inputs = torch.randn(3, 6, 4).double(), values(3)
    torch.testing.assert_close(hyper(x, **inputs), single_calls(hyper, x, inputs))
    with pytest.raises(
        ValueError, match="expected 'loop' or 'unique' for the recurrent layer 'layer', which vmap cannot"
    ):
        hypernetized("vmap", model=Recurrent(layer), params="all")


def test_a_recurrent_cell_loops_too():
    assert hypernetized("auto", model=nn.LSTMCell(4, 5), params="all").per_sample == "loop"


def test_auto_is_vmap_elsewhere():
    assert hypernetized("auto").per_sample == "vmap"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch maps attention on a CPU by a loop
def test_attention_has_weights_per_sample():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    hyper = hypernetized("vmap", model=layer, params="all")
    x, inputs = torch.randn(3, 5, 4).double(), values(3)
    for mode in [True, False]:
        hyper.train(mode)
        torch.testing.assert_close(hyper(x, **inputs), single_calls(hyper, x, inputs))


def test_dropout_differs_between_samples():
    hyper = hypernetized("vmap", model=nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)), params="all")
    x, inputs = (
        torch.randn(64, dtype=torch.float64).expand(2, 64),
        {name: v[:1].expand(2, *v.shape[1:]) for name, v in values(1).items()},
    )
    one, two = hyper(x, **inputs).eq(0)
    assert not one.equal(two)


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_a_training_batch_norm_is_refused_with_the_remedies(way):
    with pytest.warns(UserWarning, match="norm: running statistics of batch norms will mix all inputs"):
        hyper = hypernetized(way, model=Net(nn.BatchNorm2d(8)))
    x, inputs = images(4), values(4)
    with pytest.raises(RuntimeError) as error:
        hyper(x, **inputs)
    for remedy in ["GroupNorm", "draw='batch'", "per_sample='unique'", "torch.func.replace_all_batch_norm_modules_"]:
        assert remedy in str(error.value)
    assert "hypernet: norm: " in str(error.value) and "\n" not in str(error.value)
    assert hyper.model.norm.num_batches_tracked == 0
    hyper(x, angle=3, shift=[0, 0, 0], kind="a")  # one input a batch
    hyper.eval()
    torch.testing.assert_close(hyper(x, **inputs), single_calls(hyper, x, inputs))
    hyper.train()
    torch.func.replace_all_batch_norm_modules_(hyper.model)
    assert hyper(x, **inputs).shape == (4, 3)


def test_the_batch_norm_itself_says_whether_it_trains():
    with pytest.warns(UserWarning, match="running statistics"):
        hyper = hypernetized("vmap", model=Net(nn.BatchNorm2d(8)))
    x, inputs = images(4), values(4)
    hyper.model.norm.eval()  # frozen, in a model that trains
    torch.testing.assert_close(hyper(x, **inputs), single_calls(hyper, x, inputs))
    hyper.eval().model.norm.train()
    with pytest.raises(RuntimeError, match="hypernet: norm: expected no batch norm in training mode"):
        hyper(x, **inputs)


def test_unique_trains_batch_norms_on_the_samples_of_one_input():
    with pytest.warns(UserWarning, match="running statistics"):
        hyper = hypernetized("unique", model=Net(nn.BatchNorm2d(8)))
    inputs = {name: value[[0, 1, 0, 1]] for name, value in values(2).items()}
    hyper(images(4), **inputs)
    assert hyper.model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_every_input_per_sample(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    hyper = hypernetized("vmap", model=nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    compiled = torch.compile(hyper, backend=counter, fullgraph=True)
    x = torch.randn(4, 4).double()
    for factor in [0.2, 0.6, 1.0]:
        inputs = {name: value * factor if value.is_floating_point() else value for name, value in values(4).items()}
        out = compiled(x, **inputs)
        torch.testing.assert_close(out, hyper(x, **inputs))
    out.sum().backward()
    assert hyper.hyper.head.weight.grad.any()
    assert counter.frame_count == 1


def test_it_runs_under_autocast():
    hyper = hypernetized("vmap").float()
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in values(4).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = hyper(images(4).float(), **inputs)
    torch.testing.assert_close(found.float(), hyper(images(4).float(), **inputs), rtol=0.1, atol=0.05)


def test_batch_sizes_must_agree():
    hyper = hypernetized("vmap")
    with pytest.raises(
        ValueError, match=r"expected as many as an argument has rows, got 3 and arguments of shape \(4, 1,"
    ):
        hyper(images(4), **values(3))
    with pytest.raises(ValueError, match=r"expected one batch size, got angle \(2,\), shift \(3, 3\), kind \(3,\)"):
        hyper(images(3), **values(3) | {"angle": torch.zeros(2)})
