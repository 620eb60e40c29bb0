import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hasten.functional import (
    InnerStep,
    depth_keep,
    estimated_bytes,
    hard_logits,
    inner_rows,
    loss_quantile_keep,
    matching_gradients,
    mean_matching_loss,
    soft_cross_entropy,
    start_window,
    step_bytes,
    tesla_matching_gradients,
    trajectory_matching_loss,
    unrolled_matching_gradients,
    unrolled_sgd,
)
from hasten.functional.dsa import DSA_OPS, dsa, dsa_draw

SIZE, CHANNELS, CLASSES = 6, 2, 3
SHAPES = [(4, CHANNELS, 3, 3), (4,), (4,), (4,), (CLASSES, 4 * 9), (CLASSES,)]
P = sum(math.prod(shape) for shape in SHAPES)


def step_loss(theta, images, labels, draw):
    """A ConvNet of one block, smooth, so that finite differences are good."""
    if draw is not None:
        images = dsa(images, draw)
    parts = theta.split([math.prod(shape) for shape in SHAPES])
    kernel, bias, scale, shift, weight, last = (x.view(shape) for x, shape in zip(parts, SHAPES, strict=True))
    x = F.group_norm(F.conv2d(images, kernel, bias, padding=1), 4, scale, shift)
    return soft_cross_entropy(F.linear(F.avg_pool2d(F.softplus(x), 2).flatten(1), weight, last), labels)


def problem(n=5, *, steps=3, batch_size=None, augmented=False, dtype=torch.float64):
    """(start, target, images, labels, lr, steps)."""
    generator = torch.Generator().manual_seed(n)
    start, target, images, labels = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((P,), (P,), (n, CHANNELS, SIZE, SIZE), (n, CLASSES))
    )
    rows = inner_rows(n, steps=steps, batch_size=batch_size, generator=generator)
    draws = [dsa_draw(DSA_OPS, len(r), SIZE, generator=generator) if augmented else None for r in rows]
    inner = [InnerStep(r, draw) for r, draw in zip(rows, draws, strict=True)]
    return start / 2, start / 2 + target / 10, images, labels, torch.tensor(0.3, dtype=dtype), inner


def dropping(drop):
    return partial(loss_quantile_keep, drop=drop)


def assert_close(found, expected, rel):
    for name in ("loss", "images", "labels", "lr", "end", "kept_fraction"):
        a, b = getattr(found, name), getattr(expected, name)
        assert not a.requires_grad
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= rel * b.abs().max(), name


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.375])
@pytest.mark.parametrize("batch_size", [None, 4])  # 10 = 2 + 4 + 4
def test_the_sweep_is_the_full_unroll(batch_size, alpha, augmented, steps):
    arguments = problem(10, steps=steps, batch_size=batch_size, augmented=augmented)
    found = matching_gradients(step_loss, *arguments, mask=dropping(alpha))
    expected = unrolled_matching_gradients(step_loss, *arguments, mask=dropping(alpha))
    assert expected.images.abs().max() > 0 and expected.labels.abs().max() > 0 and expected.lr != 0
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.375])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_full_unroll_is_what_finite_differences_say(batch_size, alpha, augmented):
    start, target, *learned, steps = problem(3, steps=4, batch_size=batch_size, augmented=augmented)

    def loss(images, labels, lr):
        end = unrolled_sgd(step_loss, start, images, labels, lr, steps)
        keep = loss_quantile_keep(end, target, drop=alpha)
        return trajectory_matching_loss(end, target, start, keep=keep)

    learned = [x.requires_grad_() for x in learned]
    assert torch.autograd.gradcheck(loss, learned, rtol=1e-6, atol=1e-10, fast_mode=True)
    found = unrolled_matching_gradients(step_loss, start, target, *learned, steps, mask=dropping(alpha))
    images, labels, lr = torch.autograd.grad(loss(*learned), learned)
    assert found.images.equal(images) and found.labels.equal(labels) and found.lr.equal(lr)


def test_unrolled_sgd_is_differentiable_in_the_start_too():
    start, _, images, labels, lr, steps = problem(2, steps=2)
    end = partial(unrolled_sgd, step_loss, images=images, labels=labels, lr=lr, steps=steps)
    assert torch.autograd.gradcheck(end, start.requires_grad_(), rtol=1e-6, fast_mode=True)


def test_unrolled_sgd_takes_the_steps_of_an_optimizer():
    start, _, images, labels, lr, steps = problem(5, steps=6, batch_size=2)
    theta = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([theta], lr.item())
    for step in steps:
        sgd.zero_grad()
        step_loss(theta, images[step.rows], labels[step.rows], None).backward()
        sgd.step()
    torch.testing.assert_close(unrolled_sgd(step_loss, start, images, labels, lr, steps), theta)


@pytest.mark.parametrize("alpha", [0.0, 0.375])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_tesla_is_its_formula(batch_size, alpha):
    start, target, images, labels, lr, steps = problem(10, steps=5, batch_size=batch_size, augmented=True)
    images, labels, eta = images.requires_grad_(), labels.requires_grad_(), lr.clone().requires_grad_()
    theta, gradients = start, []
    for step in steps:  # every theta_k is a constant
        theta = theta.detach().requires_grad_()
        loss = step_loss(theta, images[step.rows], labels[step.rows], step.draw)
        gradients += torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * gradients[-1].detach()
    keep = loss_quantile_keep(theta, target, drop=alpha)
    d = (start - target)[keep].square().sum()
    g_sum = sum(g.detach() for g in gradients)
    direction = 2 * (lr * (target - start) + lr**2 * g_sum) * keep / d
    sum(direction @ g for g in gradients).backward()
    ((start - eta * g_sum - target)[keep].square().sum() / d).backward()

    found = tesla_matching_gradients(step_loss, start, target, images, labels, lr, steps, mask=dropping(alpha))
    torch.testing.assert_close(found.images, images.grad, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found.labels, labels.grad, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found.lr, eta.grad, rtol=1e-9, atol=0)
    exact = matching_gradients(step_loss, start, target, images, labels, lr, steps, mask=dropping(alpha))
    torch.testing.assert_close((found.loss, found.end), (exact.loss, exact.end))
    assert not torch.allclose(found.images, exact.images, rtol=1e-3)


def test_the_sweep_is_the_full_unroll_for_one_image():
    found, expected = (f(step_loss, *problem(1)) for f in (matching_gradients, unrolled_matching_gradients))
    assert_close(found, expected, 1e-9)


GRADIENTS = [matching_gradients, unrolled_matching_gradients, tesla_matching_gradients]


def test_of_a_single_step_all_three_are_the_same():
    found = [gradients(step_loss, *problem(steps=1), mask=dropping(0.2)) for gradients in GRADIENTS]
    assert_close(found[0], found[1], 1e-12)
    assert_close(found[2], found[1], 1e-12)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_a_mask_that_keeps_all_changes_nothing(gradients):
    found = gradients(step_loss, *problem(), mask=lambda end, target: torch.ones_like(end, dtype=torch.bool))
    assert_close(found, gradients(step_loss, *problem()), 0.0)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_without_a_step_size_images_and_labels_have_no_gradient(gradients):
    start, target, images, labels, lr, steps = problem()
    found = gradients(step_loss, start, target, images, labels, torch.zeros_like(lr), steps)
    assert not found.images.any() and not found.labels.any()
    assert found.lr != 0 and found.loss == 1 and found.end.equal(start)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_rows_that_no_step_sees_have_no_gradient(gradients):
    *arguments, _ = problem(5)
    found = gradients(step_loss, *arguments, [InnerStep(torch.tensor([0, 3])), InnerStep(torch.tensor([3]))])
    assert found.images.flatten(1).any(1).tolist() == [True, False, False, True, False]
    assert found.labels.any(1).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_gradients_are_those_of_float32_within_its_rounding_and_leave_the_arguments_alone(gradients):
    arguments = problem(10, steps=7, batch_size=4, dtype=torch.float32)
    copies = [x.clone() for x in arguments[:5]]
    with torch.no_grad():  # as in a training step that optimizes by hand
        found = gradients(step_loss, *arguments)
    assert all(x.equal(copy) and not x.requires_grad for x, copy in zip(arguments, copies, strict=False))
    exact = gradients(step_loss, *problem(10, steps=7, batch_size=4))
    for name in ("loss", "images", "labels", "lr", "end"):
        a, b = getattr(found, name), getattr(exact, name)
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_hard_labels_are_left_alone_and_poison_nothing(gradients):
    start, target, images, _, lr, steps = problem(6, steps=3, batch_size=4)
    classes = torch.arange(6) % CLASSES
    found = gradients(step_loss, start, target, images, hard_logits(classes, CLASSES).double(), lr, steps)
    assert not found.labels.any()
    softened = F.one_hot(classes, CLASSES).double().mul(1e3)  # as good as hard, and without an infinity
    assert_close(found, gradients(step_loss, start, target, images, softened, lr, steps), 1e-12)


class _Counted:
    """The bytes that graphs keep alive at once, and how often the step loss ran."""

    def __init__(self):
        self.alive = self.most = self.calls = 0

    def pack(self, x):
        counted = self
        counted.alive += x.nbytes
        counted.most = max(counted.most, counted.alive)

        class Saved:
            def __del__(self):
                counted.alive -= x.nbytes

        saved = Saved()
        saved.x = x
        return saved

    def run(self, gradients, steps):
        def counted_loss(*arguments):
            self.calls += 1
            return step_loss(*arguments)

        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.x):
            gradients(counted_loss, *problem(steps=steps))
        return self.most


def test_the_sweep_keeps_one_graph_at_a_time_and_the_unroll_all():
    assert _Counted().run(matching_gradients, 12) == _Counted().run(matching_gradients, 2)
    assert _Counted().run(tesla_matching_gradients, 12) == _Counted().run(tesla_matching_gradients, 2)
    assert _Counted().run(unrolled_matching_gradients, 12) > 5 * _Counted().run(unrolled_matching_gradients, 2)


def test_the_sweep_builds_the_last_steps_graph_once():
    counted = _Counted()
    counted.run(matching_gradients, 5)
    assert counted.calls == 9


# ---------------------------------------------------------------------- loss and masks


def test_soft_cross_entropy_is_a_slow_loop():
    logits, targets = 3 * torch.randn(2, 4, CLASSES, dtype=torch.float64)
    total = 0.0
    for z, y in zip(logits.tolist(), targets.tolist(), strict=True):
        for k in range(CLASSES):
            p = math.exp(y[k]) / sum(map(math.exp, y))
            total -= p * (z[k] - math.log(sum(map(math.exp, z))))
    assert soft_cross_entropy(logits, targets).item() == pytest.approx(total / 4, rel=1e-12)


def test_hard_logits_are_hard_labels():
    labels = torch.tensor([2, 0, 2, 1])
    hard = hard_logits(labels, CLASSES)
    assert hard.softmax(1).equal(F.one_hot(labels, CLASSES).float())
    logits = torch.randn(4, CLASSES)
    torch.testing.assert_close(soft_cross_entropy(logits, hard), F.cross_entropy(logits, labels))


def test_hard_labels_have_finite_first_and_second_derivatives():
    weight, x = torch.randn(4, CLASSES, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    hard = hard_logits(torch.arange(5) % CLASSES, CLASSES).requires_grad_()
    first = torch.autograd.grad(soft_cross_entropy(x @ weight, hard), (weight, x, hard), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (weight, x, hard))
    assert all(g.isfinite().all() for g in (*first, *second))
    assert not first[2].any() and not second[2].any()


def test_the_matching_loss_is_one_where_the_student_started_and_zero_at_the_target():
    start, target = torch.randn(2, P)
    keep = torch.rand(P) < 0.5
    assert trajectory_matching_loss(start, target, start) == 1
    assert trajectory_matching_loss(target, target, start) == 0
    assert trajectory_matching_loss(start, target, start, keep=keep) == 1
    assert trajectory_matching_loss(target, target, start, keep=keep) == 0


def test_the_matching_loss_has_no_scale_and_is_a_slow_loop():
    end, target, start = torch.randn(3, P, dtype=torch.float64)
    keep = loss_quantile_keep(end, target, drop=0.25)
    loss = trajectory_matching_loss(end, target, start, keep=keep)
    above = sum((end[i] - target[i]) ** 2 for i in range(P) if keep[i])
    below = sum((start[i] - target[i]) ** 2 for i in range(P) if keep[i])
    torch.testing.assert_close(loss, above / below)
    scaled = trajectory_matching_loss(8 * end, 8 * target, 8 * start, keep=keep)
    assert scaled == loss
    assert loss_quantile_keep(8 * end, 8 * target, drop=0.25).equal(keep)


def test_what_a_mask_drops_does_not_enter_the_loss_however_wrong_it_is():
    end, target, start = torch.randn(3, 4)
    end[1] = math.nan
    keep = torch.tensor([True, False, True, True])
    assert trajectory_matching_loss(end, target, start, keep=keep).isfinite()


@pytest.mark.parametrize(("drop", "n"), list(itertools.product([0.0, 0.25, 0.375, 0.5, 0.999], [1, 7, 1000])))
def test_what_is_kept_is_what_a_sort_keeps(drop, n):
    end, target = torch.randint(-9, 10, (2, n)).float()  # with ties, which may fall either way
    errors = (end - target).square()
    keep = loss_quantile_keep(end, target, drop=drop)
    assert keep.dtype == torch.bool and int((~keep).sum()) == int(drop * n)
    assert errors[keep].sort().values.equal(errors.sort().values[int(drop * n) :])


@pytest.mark.parametrize("drop", [-0.1, 1.0, math.nan])
def test_a_share_that_leaves_nothing_is_refused(drop):
    with pytest.raises(ValueError, match=r"drop: expected a share in \[0, 1\)"):
        loss_quantile_keep(torch.zeros(2), torch.zeros(2), drop=drop)
    with pytest.raises(ValueError, match=r"drop: expected a share in \[0, 1\)"):
        depth_keep(SHAPES, drop=drop)


def test_depth_drops_whole_layers_from_the_first():
    sizes = [math.prod(shape) for shape in SHAPES]  # a convolution with its norm, then the classifier
    assert depth_keep(SHAPES, drop=0.0).all()
    assert depth_keep(SHAPES, drop=0.49).all()
    assert depth_keep(SHAPES, drop=0.5).tolist() == [False] * sum(sizes[:4]) + [True] * sum(sizes[4:])
    deep = SHAPES[:4] * 3 + SHAPES[4:]
    assert int((~depth_keep(deep, drop=0.25)).sum()) == sum(sizes[:4])
    assert int((~depth_keep(deep, drop=0.5)).sum()) == 2 * sum(sizes[:4])


def test_depth_by_scalars_drops_the_share_of_numbers():
    assert depth_keep(SHAPES, drop=0.3, by="scalar").tolist() == [False] * int(0.3 * P) + [True] * (P - int(0.3 * P))
    with pytest.raises(ValueError, match="by: expected layer or scalar, got 'depth'"):
        depth_keep(SHAPES, drop=0.3, by="depth")


def test_mean_matching_sums_the_classes_distances():
    real, synthetic = torch.randn(3, 8, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    total = 0.0
    for k in range(3):
        for f in range(5):
            total += (real[k, :, f].sum() / 8 - synthetic[k, :, f].sum() / 2) ** 2
    torch.testing.assert_close(mean_matching_loss(real, synthetic), total)


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (10, 5), (7, 1), (7, 6)])
def test_rows_are_permutations_with_the_smaller_batch_first(n, batch_size):
    a_pass = math.ceil(n / batch_size)
    rows = inner_rows(n, steps=3 * a_pass + 1, batch_size=batch_size, generator=torch.Generator().manual_seed(1))
    assert len(rows) == 3 * a_pass + 1
    for first in range(0, 3 * a_pass, a_pass):
        chunks = rows[first : first + a_pass]
        assert torch.cat(chunks).sort().values.equal(torch.arange(n))
        assert [len(c) for c in chunks] == [n % batch_size or batch_size] + [batch_size] * (a_pass - 1)
    assert not torch.cat(rows[:a_pass]).equal(torch.cat(rows[a_pass : 2 * a_pass]))


@pytest.mark.parametrize("batch_size", [None, 5, 9])
def test_without_batches_every_step_sees_all_rows(batch_size):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert all(r.equal(torch.arange(5)) for r in inner_rows(5, steps=3, batch_size=batch_size, generator=generator))
    assert generator.get_state().equal(before)


def test_rows_are_a_function_of_the_generator_alone():
    one, other = (inner_rows(9, steps=8, batch_size=2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"), [({"steps": 0}, "steps"), ({"batch_size": 0, "steps": 1}, "batch_size"), ({"steps": -1}, "-1")]
)
def test_rows_of_nothing_are_refused(wrong, said):
    with pytest.raises(ValueError, match=f"inner_rows.*{said}"):
        inner_rows(5, generator=torch.Generator(), **wrong)


def test_the_window_grows_evenly_and_then_stays():
    window = partial(start_window, min_start=0, max_start=10, initial_max_start=5, expansion=1000)
    assert [window(i) for i in (0, 199, 200, 399, 400, 999, 1000, 1001, 9999)] == [5, 5, 6, 6, 7, 9, 10, 10, 10]


def test_without_a_first_size_the_window_is_whole_at_once():
    assert [start_window(i, min_start=3, max_start=20, expansion=1000) for i in (0, 500, 5000)] == [20, 20, 20]


def test_a_window_may_stay_as_it_is():
    assert [start_window(i, min_start=4, max_start=5, initial_max_start=5, expansion=1) for i in (0, 7)] == [5, 5]


@pytest.mark.parametrize(
    "wrong",
    [{"max_start": 2}, {"initial_max_start": 2}, {"initial_max_start": 11}, {"min_start": -1}, {"expansion": 0}],
)
def test_an_empty_window_is_refused(wrong):
    with pytest.raises(ValueError, match="start_window: "):
        start_window(0, **{"min_start": 2, "max_start": 10, "expansion": 100, **wrong})


# ---------------------------------------------------------------------- memory


def saved(n):
    start, _, images, labels, *_ = problem(n)
    return step_bytes(step_loss, start, images, labels, None)


def test_the_bytes_of_a_step_grow_evenly_with_the_batch():
    assert saved(20) - saved(10) == saved(30) - saved(20) > 0


def test_the_bytes_of_a_step_count_a_storage_once_and_hold_what_a_second_derivative_needs():
    counted = _Counted()
    one_step = counted.run(matching_gradients, 1)
    assert 0.3 * one_step < saved(5) <= one_step


def test_the_estimate_orders_the_three_and_knows_no_other():
    estimate = partial(estimated_bytes, saved=100 * 2**20, numel=320_010, steps=20)
    assert estimate(tesla_matching_gradients) < estimate(matching_gradients) < estimate(unrolled_matching_gradients)
    with pytest.raises(ValueError, match="estimated_bytes: gradients"):
        estimate(unrolled_sgd)
