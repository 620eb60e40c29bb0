import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from hasten.optim import GSAM


def loss_of(weights, x, y):
    """A function of three parameters of which all second derivatives are non-zero."""
    a, b, c = weights
    return ((torch.tanh(a * x) * b + c * x**2 - y) ** 2).mean() + (a * b * c) ** 2


def slow_step(weights, x, y, *, lr, rho, alpha, adaptive):
    """GSAM of plain SGD on numbers, by autograd and in float64, as the paper's symbols stand."""
    at = [w.item() for w in weights]

    def gradient(place):
        leaves = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in place]
        return [float(g) for g in torch.autograd.grad(loss_of(leaves, x, y), leaves)]

    g1 = gradient(at)
    scale = [abs(w) if adaptive else 1.0 for w in at]
    length = sum((s * g) ** 2 for s, g in zip(scale, g1, strict=True)) ** 0.5 + 1e-12
    worse = [w + rho * s**2 * g / length for w, s, g in zip(at, scale, g1, strict=True)]
    g2 = gradient(worse)
    n1, n2 = (sum(g**2 for g in each) ** 0.5 for each in (g1, g2))
    cosine = sum(p * q for p, q in zip(g1, g2, strict=True)) / (n1 * n2 + 1e-12)
    orthogonal = [p - cosine * n1 * q / (n2 + 1e-12) for p, q in zip(g1, g2, strict=True)]
    return [w - lr * (q - alpha * o) for w, q, o in zip(at, g2, orthogonal, strict=True)]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 3])
def test_steps_equal_the_formula_on_three_parameters(adaptive, alpha, groups):
    x, y = torch.randn(2, 7, dtype=torch.float64)
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.7, -1.3, 0.4)]
    params = weights if groups == 1 else [{"params": [w]} for w in weights]
    optimizer = GSAM(params, partial(SGD, lr=0.1), rho=0.2, alpha=alpha, adaptive=adaptive)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(weights, x, y)
        loss.backward()
        return loss

    for _ in range(3):
        wanted = slow_step(weights, x, y, lr=0.1, rho=0.2, alpha=alpha, adaptive=adaptive)
        before = loss_of(weights, x, y).item()
        assert optimizer.step(closure).item() == before
        assert [w.item() for w in weights] == pytest.approx(wanted, rel=1e-12)


def net_and_closure(optimizer_of, *, wrecks=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    optimizer = optimizer_of(net.parameters())
    calls = []

    def closure():
        calls.append([p.detach().clone() for p in net.parameters()])
        if wrecks and len(calls) == 2:
            raise RuntimeError("in the second pass")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return net, optimizer, closure, calls


def test_without_a_distance_it_is_the_base():
    for base in (partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1), partial(Adam, lr=0.01)):
        net, optimizer, closure, _ = net_and_closure(partial(GSAM, base=base, rho=0.0, alpha=0.0))
        plain, other, plain_closure, _ = net_and_closure(base)
        for _ in range(3):
            optimizer.step(closure)
            other.step(plain_closure)
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_second_pass_is_elsewhere_and_the_step_starts_from_exactly_where_it_was():
    # a base that does not move shows whether the weights come back bit for bit
    net, optimizer, closure, calls = net_and_closure(partial(GSAM, base=partial(SGD, lr=0.0), rho=0.37))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(closure)
    assert len(calls) == 2
    assert any(not torch.equal(*pair) for pair in zip(calls[1], before, strict=True))
    for now, then in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(now.data, then, rtol=0, atol=0)


def test_an_error_in_the_second_pass_leaves_the_weights_as_they_were():
    net, optimizer, closure, _ = net_and_closure(partial(GSAM, base=partial(SGD, lr=0.1), rho=0.5), wrecks=True)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="second pass"):
        optimizer.step(closure)
    for now, then in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(now.data, then, rtol=0, atol=0)


def test_parameters_without_a_gradient_stay():
    used, unused = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    optimizer = GSAM([used, unused], partial(SGD, lr=0.1, weight_decay=0.5))
    optimizer.step(lambda: (optimizer.zero_grad(), (used**2).sum().backward()))
    assert unused.item() == 1 and used.item() < 1


def test_a_schedule_of_it_is_one_of_the_base():
    net, optimizer, closure, _ = net_and_closure(partial(GSAM, base=partial(SGD, lr=0.1)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.step(closure)
    schedule.step()
    moved = copy.deepcopy(net.state_dict())
    optimizer.step(closure)
    torch.testing.assert_close(net.state_dict(), moved, rtol=0, atol=0)


def test_a_state_dict_carries_the_momentum_of_the_base():
    make = partial(GSAM, base=partial(SGD, lr=0.1, momentum=0.9), rho=0.05)
    net, optimizer, closure, _ = net_and_closure(make)
    for _ in range(2):
        optimizer.step(closure)
    other, resumed, other_closure, _ = net_and_closure(make)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(closure)
        resumed.step(other_closure)
    torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_loading_the_state_of_a_new_one_forgets_the_momentum():
    make = partial(GSAM, base=partial(SGD, lr=0.1, momentum=0.9))
    net, optimizer, closure, _ = net_and_closure(make)
    new, start = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    optimizer.step(closure)
    once = copy.deepcopy(net.state_dict())
    net.load_state_dict(start)
    optimizer.load_state_dict(new)
    optimizer.step(closure)
    torch.testing.assert_close(net.state_dict(), once, rtol=0, atol=0)


def test_without_a_closure_it_says_what_it_needs():
    optimizer = GSAM([torch.zeros(1, requires_grad=True)], partial(SGD, lr=0.1))
    with pytest.raises(TypeError, match=r"expected a closure.*bf16-mixed"):
        optimizer.step()


@pytest.mark.parametrize("wrong", [{"rho": -0.1}, {"alpha": -1.0}])
def test_negative_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="gsam: rho and alpha: expected >= 0"):
        GSAM([torch.zeros(1, requires_grad=True)], partial(SGD, lr=0.1), **wrong)
