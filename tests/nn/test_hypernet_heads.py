"""The four heads: their size, their scale at the start, their gradients, against what the formulas say."""

import math

import pytest
import torch
from torch import nn

from hasten.nn import Basis, Chunked, Dense, LoRA
from hasten.nn.hypernet.heads import ACTIVATIONS, Plan, size_of, within_budget

SHAPES = [(16, 8, 3, 3), (16,), (32, 40), ()]
HEADS = [Dense(), Basis(4), LoRA(4), Chunked(256, embedding=4)]


def build(head, shapes=SHAPES, e=4, bound=1.0, hidden=(16, 32), activation="leaky_relu", zero=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return head.build(Plan(shapes, e, bound, hidden, activation, zero, generator))


def deltas(network, encoded, shapes=SHAPES):
    """What the network says, (..., P), a tensor for each shape."""
    flat = network(encoded)
    lead = flat.shape[:-1]
    parts = flat.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.reshape((*lead, *shape)) for part, shape in zip(parts, shapes, strict=True)]


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_head_gives_one_delta_a_tensor_and_rows_are_independent(head):
    network = build(head).double()
    for own in network.parameters():
        nn.init.normal_(own)
    encoded = unit(3, 4).double()
    together = deltas(network, encoded)
    assert [tuple(delta.shape) for delta in together] == [(3, *shape) for shape in SHAPES]
    for b in range(3):
        for delta, one in zip(together, deltas(network, encoded[b]), strict=True):
            torch.testing.assert_close(delta[b], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", [*HEADS, LoRA(1000), Chunked(10**9)], ids=repr)
def test_a_head_has_as_many_parameters_as_it_says(head):
    network = build(head)
    built = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("trunk"))
    assert head.num_parameters(SHAPES, 32) == built


def test_the_sizes_are_those_of_known_networks():
    resnet20 = [(16, 3, 3, 3)] + [(16, 16, 3, 3)] * 6 + [(32, 16, 3, 3)] + [(32, 32, 3, 3)] * 5 + [(64, 32, 3, 3)]
    resnet20 += [(64, 64, 3, 3)] * 5
    cost = size_of(Dense(), resnet20, 128)
    assert (cost["weights"], cost["parameters"]) == (267_696, 128 * 267_696)
    assert cost["adam_gib"] == pytest.approx(0.51, abs=0.01)
    assert size_of(Basis(8), resnet20, 128)["parameters"] == pytest.approx(2.2e6, rel=0.03)
    assert size_of(LoRA(8), resnet20, 128)["parameters"] == pytest.approx(0.07e6, rel=0.1)
    assert size_of(Chunked(1024), resnet20, 128)["parameters"] == pytest.approx(0.13e6, rel=0.03)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_state_dict_holds_what_learns_and_nothing_else(head):
    network = build(head)
    assert network.state_dict().keys() == {name for name, _ in network.named_parameters()}


# the start


def test_the_mlp_starts_with_fan_out_and_no_bias():
    trunk = build(Dense(), e=400, hidden=(300, 500)).trunk
    for layer in trunk[::2]:
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.out_features), rel=0.05)
        assert not layer.bias.any()


def test_the_dense_head_starts_with_fan_out_for_each_tensor():
    network = build(Dense(), [(64, 64), (40,), (7, 10)], hidden=(512,))
    assert network.head.bias is None
    for rows, numel in zip(network.head.weight.split([4096, 40, 70]), [4096, 40, 70], strict=True):
        assert rows.std().item() == pytest.approx(math.sqrt(2 / numel), rel=0.05)


def test_the_basis_starts_with_fan_out_for_each_tensor_and_coefficients_of_gain_one():
    network = build(Basis(64), [(64, 64), (40,), (7, 10)], hidden=(512,))
    for columns, numel in zip(network.bank.split([4096, 40, 70], dim=1), [4096, 40, 70], strict=True):
        assert columns.std().item() == pytest.approx(math.sqrt(2 / numel), rel=0.05)
    assert network.head.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.05)
    assert network.head.bias is None


def test_lora_starts_with_v_at_zero_and_vectors_dense():
    network = build(LoRA(8), [(512, 64), (40,)], hidden=(512,))
    s, vector = network.head.weight.split([8, 40])
    assert s.std().item() == pytest.approx(math.sqrt(2 / 8), rel=0.05)
    assert vector.std().item() == pytest.approx(math.sqrt(2 / 40), rel=0.05)
    assert network.u[0].std().item() == pytest.approx(math.sqrt(2 / 8), rel=0.05)
    assert not network.v[0].any()
    matrix, _ = deltas(network, unit(4), [(512, 64), (40,)])
    assert not matrix.any()


def test_lora_is_u_diag_s_v_of_a_flattened_kernel():
    network = build(LoRA(2), [(6, 5, 3, 3)])
    nn.init.normal_(network.v[0])
    encoded = unit(4)
    s = network.head(network.trunk(encoded))
    expected = network.u[0] @ torch.diag(s) @ network.v[0]
    torch.testing.assert_close(network(encoded), expected.flatten())


def test_a_chunk_is_the_mlp_of_the_encoding_beside_its_normalised_embedding():
    shapes = [(5, 3), (10,)]
    network = build(Chunked(8, embedding=3), shapes, bound=2.0)
    encoded = 2 * unit(4)
    assert network.head.weight.std().item() == pytest.approx(math.sqrt(2 / 8), rel=0.1)
    chunks = []
    for embedding in network.embedding:
        seen = torch.cat([encoded / 2, embedding / embedding.norm()]) / math.sqrt(2)
        assert seen.norm().item() == pytest.approx(1, abs=1e-6)
        chunks.append(network.head(network.trunk(seen)))
    assert len(chunks) == 4
    flat = torch.cat(chunks)
    first, second = deltas(network, encoded, shapes)
    torch.testing.assert_close(first, flat[:15].view(5, 3) * math.sqrt(8 / 15))
    torch.testing.assert_close(second, flat[15:25] * math.sqrt(8 / 10))


@pytest.mark.parametrize("head", [Dense(), Basis(64), Chunked(256, embedding=8)], ids=repr)
def test_every_delta_starts_with_the_norm_of_the_encoding_times_root_two(head):
    shapes = [(32, 8, 3, 3), (32,), (40, 30)]
    norms = []
    for seed in range(30):
        network = build(head, shapes, hidden=(128, 128), seed=seed)
        norms.append(torch.stack([delta.norm() for delta in deltas(network, unit(4), shapes)]))
    assert torch.stack(norms).square().mean(0).sqrt().tolist() == pytest.approx([math.sqrt(2)] * 3, rel=0.1)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_zero_start_is_zero_for_every_input(head):
    assert not build(head, zero=True)(unit(5, 4)).any()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_every_weight_learns_by_the_second_step(head, zero):
    network = build(head, zero=zero)
    targets = [torch.randn(shape) for shape in SHAPES]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        given = deltas(network, unit(8, 4))
        sum((delta - target).square().mean() for delta, target in zip(given, targets, strict=True)).backward()
        optimizer.step()
    assert [name for name, own in network.named_parameters() if not own.grad.any()] == []


def test_what_lora_makes_of_matrices_alone_teaches_its_head():
    network = build(LoRA(2), [(6, 5), (4, 3)])
    for v in network.v:
        nn.init.normal_(v)
    network(unit(4)).sum().backward()
    assert all(row.any() for row in network.head.weight.grad)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_generator_decides_the_start_and_the_global_one_is_left_alone(head):
    state = torch.get_rng_state()
    one, same, other = build(head, seed=1), build(head, seed=1), build(head, seed=2)
    assert torch.get_rng_state().equal(state)
    assert all(p.equal(q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not one.trunk[0].weight.equal(other.trunk[0].weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_runs(activation):
    assert build(Dense(), activation=activation)(unit(4)).isfinite().all()


# the budget


def test_a_dense_head_above_the_budget_is_refused_with_what_the_others_cost():
    shapes, norms = [(512, 512, 3, 3)] * 3, [(512,)] * 4
    with pytest.raises(ValueError) as error:
        within_budget("dense", shapes, 128, 50_000_000, norms)
    message = str(error.value)
    assert "\n" not in message
    assert "expected at most 50,000,000 parameters for a dense head, got Dense() 905.97M (Adam 13.50 GiB)" in message
    assert "Basis(k=8) 56.62M (Adam 0.84 GiB)" in message
    assert "LoRA(r=8) 0.13M" in message
    assert "Chunked(size=1024, embedding=8) 0.19M" in message
    assert "params='norm' with Dense() 0.26M" in message
    assert within_budget("dense", shapes, 128, 10**9, norms) == Dense()


def test_a_head_of_exactly_the_budget_is_accepted(caplog):
    for head in HEADS:
        assert within_budget(head, SHAPES, 32, head.num_parameters(SHAPES, 32), []) == head
    assert caplog.text == ""


def test_other_heads_above_the_budget_are_logged(caplog):
    assert within_budget(Basis(8), [(512, 512, 3, 3)], 128, 1000, []) == Basis(8)
    assert "Basis(k=8) 18.88M (Adam 0.28 GiB) is above the 1,000 of max_dense_params" in caplog.text


def test_a_head_is_a_word_or_a_head():
    assert within_budget("lora", SHAPES, 128, 10**9, []) == LoRA(8)
    with pytest.raises(ValueError, match="head: expected one of dense, basis, lora, chunked, got 'densse'"):
        within_budget("densse", SHAPES, 128, 10**9, [])
    with pytest.raises(TypeError, match="head: expected a word, Dense, Basis, LoRA or Chunked, got 8"):
        within_budget(8, SHAPES, 128, 10**9, [])


@pytest.mark.parametrize(
    ("build_head", "message"),
    [
        (lambda: Basis(0), "basis: k: expected at least 1, got 0"),
        (lambda: LoRA(0), "lora: r: expected at least 1, got 0"),
        (lambda: Chunked(0), "chunked: size: expected at least 1, got 0"),
        (lambda: Chunked(8, embedding=0), "chunked: embedding: expected at least 1, got 0"),
    ],
)
def test_a_head_without_size_is_refused(build_head, message):
    with pytest.raises(ValueError, match=message):
        build_head()
