import argparse
import inspect
import logging
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import group_parameters

from hasten.functional.tokens import merge_tokens, ordered_bipartite_matching
from hasten.nn import VisionMamba, vim, vision_mamba
from hasten.nn.token_merging import Merging

METRICS = ("x", "b", "c", "delta")
SIZES = {"img_size": 20, "patch_size": 4, "depth": 4, "embed_dim": 16, "d_state": 4, "num_classes": 5}


def small(**changes):
    torch.manual_seed(0)
    return VisionMamba(**{**SIZES, **changes}).eval()


def randomized(model):
    """Every parameter random and of a size that matters, so that none can be left out unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) if not name.endswith("_log") else torch.rand_like(parameter)
    return model


def images(batch=3, size=20, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def merging(*r, metric="x", **how):
    return Merging(r=r, metric=metric, **how)


# ------------------------------------------------------------------ a slow Vim, written from the equations


def slow_direction(x, z, state, suffix):
    """A forward direction over (B, L, E), token by token; returns y, and what steered it."""
    a_log = state["A_b_log" if suffix else "A_log"]
    rank, states = state["dt_proj.weight"].shape[1], a_log.shape[1]
    padded = F.pad(x.transpose(1, 2), (3, 0))
    u = F.conv1d(padded, state[f"conv1d{suffix}.weight"], state[f"conv1d{suffix}.bias"], groups=x.shape[2])
    u = F.silu(u.transpose(1, 2))
    dt, b, c = (u @ state[f"x_proj{suffix}.weight"].T).split((rank, states, states), dim=-1)
    delta = dt @ state[f"dt_proj{suffix}.weight"].T
    step = F.softplus(delta + state[f"dt_proj{suffix}.bias"])
    ys = []
    h = [torch.zeros_like(x[:, 0]) for _ in range(states)]
    for t in range(x.shape[1]):
        y = state[f"D{suffix}"] * u[:, t]
        for n in range(states):
            h[n] = torch.exp(-step[:, t] * a_log[:, n].exp()) * h[n] + step[:, t] * u[:, t] * b[:, t, n, None]
            y = y + c[:, t, n, None] * h[n]
        ys.append(y * F.silu(z[:, t]))
    return torch.stack(ys, dim=1), {"b": b, "c": c, "delta": delta}


def slow_mixer(hidden, state):
    x, z = (hidden @ state["in_proj.weight"].T).chunk(2, dim=-1)
    y, steered = slow_direction(x, z, state, "")
    y_b, steered_b = slow_direction(x.flip(1), z.flip(1), state, "_b")
    out = (y + y_b.flip(1)) / 2 @ state["out_proj.weight"].T
    return out, {"x": out} | {name: (steered[name] + steered_b[name].flip(1)) / 2 for name in steered}


def slow_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def slow_vim(model, pixels, how=None):
    """The logits in float64, backward branches on flipped sequences, hidden and residual merged apart."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    patches = F.conv2d(
        pixels.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], model.patch_embed.proj.stride
    ).flatten(2)
    middle = patches.shape[-1] // 2
    tokens = [patches[..., i] for i in range(patches.shape[-1])]
    tokens.insert(middle, state["cls_token"][0].expand(len(pixels), -1))
    hidden, residual, size, place = torch.stack(tokens, dim=1) + state["pos_embed"], None, None, middle
    steered = {}
    for i in range(model.depth):
        block = {name.removeprefix(f"layers.{i}."): value for name, value in state.items() if f"layers.{i}." in name}
        if how is not None and how.r[i]:
            size = torch.ones_like(hidden[..., :1]) if size is None else size
            plan = ordered_bipartite_matching(
                steered[how.metric],
                how.r[i],
                cls_index=place,
                distance=how.distance,
                preserve_order=how.preserve_order,
                cls_rule=how.cls_rule,
            )
            reduce = "drop" if how.prune else "sum"
            merged = merge_tokens(size, plan, reduce=reduce)
            hidden, residual = (merge_tokens(x * size, plan, reduce=reduce) / merged for x in (hidden, residual))
            size, place = merged, plan.new_cls_index
        residual = hidden if residual is None else residual + hidden
        mixer = {name.removeprefix("mixer."): value for name, value in block.items()}
        hidden, steered = slow_mixer(slow_norm(residual, block["norm.weight"]), mixer)
    cls = slow_norm(residual + hidden, state["norm_f.weight"])[torch.arange(len(pixels)), place]
    return cls @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("sizes", [{}, {"img_size": (12, 20)}, {"stride": 2, "img_size": 14}, {"in_chans": 1}])
def test_a_vim_is_the_slow_vim(sizes):
    model = randomized(small(**sizes))
    height, width = model.patch_embed.img_size
    pixels = torch.randn(3, sizes.get("in_chans", 3), height, width)
    wanted = slow_vim(model, pixels)
    torch.testing.assert_close(model(pixels).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.double()(pixels.double()), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        *({"metric": metric} for metric in METRICS),
        {"distance": "l1"},
        {"preserve_order": False},
        {"prune": True},
        {"cls_rule": "exact"},
    ],
)
def test_a_merging_vim_is_the_slow_vim_that_merges(changes):
    model, how = randomized(small()).double(), merging(0, 4, 0, 5, **changes)
    pixels = images().double()
    unmerged = model(pixels)
    model.set_token_merging(how)
    torch.testing.assert_close(model(pixels), slow_vim(model, pixels, how), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(pixels), unmerged, atol=1e-2)


# ------------------------------------------------------------------ names, sizes, first weights


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 7_148_008), ("small", 25_796_584), ("base", 97_598_440)])
def test_timm_makes_the_published_models(name, parameters):
    with torch.device("meta"):
        model = timm.create_model(f"vim_{name}_patch16_224")
    assert isinstance(model, VisionMamba)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == 415
    assert (model.num_tokens, model.cls_index) == (197, 98)


def test_parameters_have_the_authors_names_and_shapes():
    state = small(depth=1).state_dict()
    inner, rank, states = 32, 1, 4
    mixer = {
        "A_log": (inner, states),
        "A_b_log": (inner, states),
        "D": (inner,),
        "D_b": (inner,),
        "in_proj.weight": (2 * inner, 16),
        "out_proj.weight": (16, inner),
    }
    for suffix in ("", "_b"):
        mixer |= {
            f"conv1d{suffix}.weight": (inner, 1, 4),
            f"conv1d{suffix}.bias": (inner,),
            f"x_proj{suffix}.weight": (rank + 2 * states, inner),
            f"dt_proj{suffix}.weight": (inner, rank),
            f"dt_proj{suffix}.bias": (inner,),
        }
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 26, 16),
        "patch_embed.proj.weight": (16, 3, 4, 4),
        "patch_embed.proj.bias": (16,),
        "norm_f.weight": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
        "layers.0.norm.weight": (16,),
        **{f"layers.0.mixer.{name}": shape for name, shape in mixer.items()},
    }


@pytest.mark.parametrize("init_dt_b", [False, True])
def test_first_weights_are_the_papers(init_dt_b):
    model = small(embed_dim=64, depth=4, init_dt_b=init_dt_b)
    for layer in model.layers:
        mixer = layer.mixer
        steps = F.softplus(mixer.dt_proj.bias)
        assert 1e-3 * 0.99 < steps.min() < 3e-3 and 4e-2 < steps.max() < 0.101
        backward = F.softplus(mixer.dt_proj_b.bias)
        assert (backward.max() < 0.101) if init_dt_b else torch.allclose(backward, torch.tensor(math.log(2)))
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 5).expand(128, -1))
        assert torch.equal(mixer.A_log, mixer.A_b_log) and (mixer.D == 1).all() and (mixer.D_b == 1).all()
        bound = 128**-0.5 / 4**0.5  # Linear's own, over the root of the depth
        assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
        assert 0.9 * 0.5 < mixer.dt_proj.weight.abs().max() <= 0.5  # rank 4
    for drawn in (model.pos_embed, model.head.weight):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.head.bias.any() and not model.patch_embed.proj.bias.any()


def test_drop_path_grows_over_the_blocks_and_ends_behind_the_last():
    model = small(drop_path_rate=0.3)
    rates = [layer.drop_path.drop_prob for layer in model.layers] + [model.drop_path.drop_prob]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3])


def test_every_parameter_gets_a_gradient():
    model = small(drop_path_rate=0.1).train()
    model.set_token_merging(merging(0, 3, 0, 3))
    model(images()).square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"depth": 0}, "depth: expected >= 1, got 0"),
        ({"patch_size": 32, "stride": 4}, "patch_size: expected to fit into img_size = 20, got 32"),
    ],
)
def test_sizes_that_make_no_vim_are_refused(sizes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        small(**sizes)


def test_images_of_another_size_are_refused():
    with pytest.raises(AssertionError, match=r"Input height \(16\) doesn't match model \(20\)"):
        small()(images(size=16))


def test_an_empty_batch_gives_empty_logits():
    model = small()
    model.set_token_merging(merging(0, 4, 0, 0))
    assert model(images(batch=0)).shape == (0, 5)


# ------------------------------------------------------------------ merging


def two_stream(model, pixels, how):
    """Hidden and residual merged apart, as the authors do, over the model's own blocks."""
    hidden, residual, size, place, metric = model._embed(pixels), None, None, (model.num_tokens - 1) // 2, None
    for i, layer in enumerate(model.layers):
        if how.r[i]:
            size = torch.ones_like(hidden[..., :1]) if size is None else size
            plan = ordered_bipartite_matching(metric, how.r[i], cls_index=place)
            merged = merge_tokens(size, plan)
            hidden, residual = (merge_tokens(stream * size, plan) / merged for stream in (hidden, residual))
            size, place = merged, plan.new_cls_index
        residual = hidden if residual is None else residual + layer.drop_path(hidden)
        hidden, metric = layer(residual, how.metric)
    return model.norm_f(residual + model.drop_path(hidden)), place


@pytest.mark.parametrize("metric", METRICS)
def test_merging_the_sum_is_merging_both_streams_with_drop_path_on(metric):
    model, how = small(drop_path_rate=0.5).train(), merging(0, 4, 5, 3, metric=metric)
    model.set_token_merging(how)
    torch.manual_seed(2)
    one = model.forward_features(images(batch=8))
    torch.manual_seed(2)
    two, place = two_stream(model, images(batch=8), how)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert place == model.cls_index


@pytest.mark.parametrize(("r", "tokens", "place"), [(5, 142, 65), (11, 76, 34)])
def test_the_published_schedules_leave_the_published_tokens(r, tokens, place):
    model = small(img_size=224, patch_size=16, depth=24, embed_dim=8, d_state=1)
    model.set_token_merging(merging(*(r if i and i % 2 == 0 else 0 for i in range(24))))
    assert model.forward_features(images(batch=1, size=224)).shape == (1, tokens, 8)
    assert model.cls_index == place


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("preserve_order", [False, True])
def test_the_class_token_stays_alone_and_where_cls_index_says(preserve_order, prune):
    model = randomized(small())
    model.set_token_merging(
        merging(0, 4, 6, 3, metric="b", preserve_order=preserve_order, prune=prune, trace_source=True)
    )
    model(images())
    made_of = model.token_source[:, model.cls_index]
    assert torch.equal(made_of, F.one_hot(torch.tensor(12), 26).float().expand(3, -1))
    assert (model.token_source.sum((1, 2)) == (13 if prune else 26)).all()


def test_the_exact_rule_keeps_the_class_token_between_its_neighbours():
    model = randomized(small())
    model.set_token_merging(merging(0, 9, 0, 0, cls_rule="exact", trace_source=True))
    model(images(batch=16))
    for source in model.token_source:
        stands = []
        for row in source:
            members = [n for n in range(26) if row[n]]
            # among the patches, without the class token at 12, odd ones are destinations
            destinations = [n for n in members if n != 12 and (n - (n > 12)) % 2]
            stands.append((destinations or members)[0])
        assert stands == sorted(stands)


def test_the_exact_rule_lets_the_model_find_the_class_token_of_each_sample():
    model = randomized(small())
    model.set_token_merging(merging(0, 4, 6, 3, cls_rule="exact", trace_source=True))
    logits, features = model(images(batch=16)), model.forward_features(images(batch=16))
    place = model.token_source[:, :, 12].argmax(1)
    assert len(place.unique()) > 1
    assert torch.equal(model.forward_head(features, cls_index=place), logits)
    assert model.cls_index is None
    with pytest.raises(ValueError, match="cls_index: needed with cls_rule='exact'"):
        model.forward_head(features)


def test_without_merging_again_all_is_as_before():
    model = small()
    before, keys = model(images()), set(model.state_dict())
    model.set_token_merging(merging(0, 4, 0, 4, trace_source=True))
    model(images())
    assert set(model.state_dict()) == keys and not list(model.buffers())
    model.set_token_merging(None)
    assert torch.equal(model(images()), before)
    assert (model.cls_index, model.token_source) == (12, None)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (merging(0, 4, 4), "r: expected one entry for each of 4 blocks, got 3"),
        (merging(2, 0, 0, 0), "r: expected 0 at block 0, where there is no residual yet, got 2"),
        (merging(0, 12, 7, 0), "block 2: expected r from 0 to 6"),
        (merging(0, -1, 0, 0), "block 1: expected r from 0 to 12"),
        (merging(0, 4, 0, 0, metric="k"), "metric: expected one of x, b, c, delta, got 'k'"),
        (merging(0, 4, 0, 0, distance="cos"), "distance"),
        (merging(0, 4, 0, 0, cls_rule="left"), "cls_rule"),
        (merging(0, 4, 0, 0, prop_attn=True), "prop_attn: expected False"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_before_it_does_and_changes_nothing(how, words):
    model = small()
    model.set_token_merging(merging(0, 4, 0, 0))
    with pytest.raises(ValueError, match=re.escape(words)):
        model.set_token_merging(how)
    assert model.forward_features(images()).shape[1] == 22


# ------------------------------------------------------------------ precision, recomputation, graphs


def gradients(model, checkpointing):
    model.set_grad_checkpointing(checkpointing)
    model.zero_grad()
    torch.manual_seed(3)
    model(images()).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("metric", ["x", "delta"])
def test_recomputing_blocks_changes_no_gradient(metric):
    model = small(drop_path_rate=0.5, drop_rate=0.1).train()
    model.set_token_merging(merging(0, 4, 0, 5, metric=metric))
    kept, recomputed = gradients(model, False), gradients(model, True)
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name


def test_recomputing_blocks_keeps_less():
    def kept(checkpointing):
        saved = []
        model.set_grad_checkpointing(checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            model(images())
        return sum(saved)

    model = small().train()
    assert kept(True) < kept(False) / 2


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of what the model hands to the scan and to the merge, and of what it gets from the merge."""
    dtypes = {"delta and A": set(), "residual": set(), "sizes": set()}
    scan, merge = vision_mamba.selective_scan, vision_mamba.merge_weighted

    def scan_spy(u, delta, A, *rest, **options):
        dtypes["delta and A"] |= {delta.dtype, A.dtype}
        return scan(u, delta, A, *rest, **options)

    def merge_spy(x, size, plan, **options):
        merged, size = merge(x, size, plan, **options)
        dtypes["residual"] |= {x.dtype, merged.dtype}
        dtypes["sizes"].add(size.dtype)
        return merged, size

    monkeypatch.setattr(vision_mamba, "selective_scan", scan_spy)
    monkeypatch.setattr(vision_mamba, "merge_weighted", merge_spy)
    return dtypes


def test_under_autocast_steps_sizes_and_the_residual_stay_float32(seen):
    model = randomized(small())
    model.set_token_merging(merging(0, 4, 0, 5, metric="delta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images())
    low.square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert seen == {what: {torch.float32} for what in seen}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_in_a_bfloat16_vim_too(seen):
    model = small().bfloat16()
    model.set_token_merging(merging(0, 4, 0, 5, metric="b"))
    assert model(images().bfloat16()).dtype == torch.bfloat16
    assert seen == {what: {torch.float32} for what in seen}


def test_autocast_changes_the_logits_by_rounding_only():
    model = randomized(small())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images())
    torch.testing.assert_close(low.float(), model(images()), rtol=0.1, atol=0.1)


def test_a_merging_vim_is_one_graph():
    model = small(depth=2, drop_path_rate=0.1).train()
    model.set_token_merging(merging(0, 4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs, grads = [], []
    for run in (model, compiled):
        torch.manual_seed(4)
        model.zero_grad()
        outputs.append(run(images()))
        outputs[-1].square().sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_an_exported_vim_merges_too():
    model = small(depth=3)
    model.set_token_merging(merging(0, 4, 5, metric="delta", cls_rule="exact"))
    program = torch.export.export(model, (images(),))
    other = images() + 1
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-5)


def test_a_vim_on_meta_tells_its_shapes():
    with torch.device("meta"):
        model = small()
        model.set_token_merging(merging(0, 4, 0, 5))
        assert model.forward_features(torch.empty(2, 3, 20, 20)).shape == (2, 17, 16)


# ------------------------------------------------------------------ timm's conventions


def test_weight_decay_spares_what_is_no_matrix_of_a_linear_map():
    model = small(depth=2)
    dynamics = {f"layers.{i}.mixer.{name}" for i in range(2) for name in ("A_log", "A_b_log", "D", "D_b")}
    assert model.no_weight_decay() == dynamics | {"cls_token", "pos_embed"}
    assert model.no_weight_decay() <= set(model.state_dict())


def test_layers_are_grouped_from_stem_to_head():
    groups = group_parameters(small(depth=2), small(depth=2).group_matcher())
    layer_of = {name: layer for layer, names in groups.items() for name in names}
    assert layer_of["pos_embed"] == layer_of["patch_embed.proj.weight"] == 0
    assert layer_of["layers.0.norm.weight"] == 1 and layer_of["layers.1.mixer.D"] == 2
    assert layer_of["norm_f.weight"] <= layer_of["head.weight"]


def test_the_classifier_can_be_replaced_and_left_out():
    model = small()
    features = model.forward_features(images())
    model.reset_classifier(7)
    assert model(images()).shape == (3, 7)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 12])
    model.reset_classifier(0)
    assert torch.equal(model(images()), features[:, 12])
    with pytest.raises(ValueError, match="global_pool: expected 'token', the class token, got 'avg'"):
        model.reset_classifier(3, "avg")


def test_timm_passes_sizes_on_and_refuses_feature_maps():
    sizes = {name: value for name, value in SIZES.items() if name != "patch_size"}
    model = timm.create_model("vim_tiny_patch16_224", **{**sizes, "img_size": 32, "in_chans": 1})
    assert model(images(size=32, channels=1)).shape == (3, 5)
    with pytest.raises(ValueError, match="features_only: not supported"):
        timm.create_model("vim_tiny_patch16_224", features_only=True)


# ------------------------------------------------------------------ checkpoints


def test_the_factory_hands_every_argument_on():
    changed = {"img_size": 24, "patch_size": 6, "stride": 3, "depth": 3, "embed_dim": 32, "d_state": 2, "in_chans": 1}
    changed |= {"num_classes": 4, "drop_rate": 0.1, "drop_path_rate": 0.2, "init_dt_b": True, "scan_backend": "ref"}
    made, given = inspect.signature(vim).parameters, inspect.signature(VisionMamba).parameters
    assert {name: (made[name].default, made[name].annotation) for name in given} == {
        name: (parameter.default, parameter.annotation) for name, parameter in given.items()
    }
    assert changed.keys() == given.keys() and made.keys() - given.keys() == {"checkpoint"}
    torch.manual_seed(0)
    wanted = VisionMamba(**changed)
    torch.manual_seed(0)
    got = vim(**changed)
    assert str(got) == str(wanted) and got.layers[0].mixer.scan_backend == "ref"
    assert all(map(torch.equal, got.state_dict().values(), wanted.state_dict().values()))


@pytest.fixture
def trained():
    return randomized(small())


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def test_checkpoints_load_in_every_wrapping(trained, tmp_path):
    state, stale = trained.state_dict(), small().state_dict()
    args = argparse.Namespace(model="vim", lr=1e-3)
    wrappings = {
        "vim": {"model": state, "epoch": 3, "args": args},
        "vim_ema": {"model": state, "model_ema": stale, "optimizer": {"state": {}}, "args": args},
        "ddp": {"model": prefixed(state, "module."), "args": args},
        "bare": state,
        "lightning": {
            "state_dict": prefixed(state, "model.") | {"val_acc.total": torch.zeros(1)},
            "pytorch-lightning_version": "2.6.1",
            "hyper_parameters": {"lr": 0.1},
        },
        "compiled": {"state_dict": prefixed(state, "model._orig_mod.")},
    }
    for name, wrapped in wrappings.items():
        torch.save(wrapped, tmp_path / f"{name}.pth")
    save_file(state, tmp_path / "bare.safetensors")
    for path in sorted(tmp_path.iterdir()):
        model = vim(checkpoint=path, **SIZES).eval()
        assert torch.equal(model(images()), trained(images())), path.name


def test_the_base_takes_averaged_weights_where_there_are_some(tmp_path, caplog):
    sizes = {**SIZES, "embed_dim": 768, "depth": 1, "d_state": 1}
    plain, averaged = VisionMamba(**sizes).state_dict(), VisionMamba(**sizes).state_dict()
    torch.save({"model": plain, "model_ema": averaged}, tmp_path / "both.pth")
    with caplog.at_level(logging.INFO, logger="hasten"):
        model = vim(checkpoint=tmp_path / "both.pth", **sizes)
    assert torch.equal(model.pos_embed, averaged["pos_embed"])
    assert caplog.messages == [f"vim: loaded model_ema of {tmp_path / 'both.pth'}"]


@pytest.mark.parametrize("classes", [3, 0])
def test_a_head_of_other_classes_stays_fresh_and_is_said(trained, tmp_path, caplog, classes):
    torch.save(trained.state_dict(), tmp_path / "five.pth")
    with caplog.at_level(logging.INFO, logger="hasten"):
        model = vim(checkpoint=tmp_path / "five.pth", **{**SIZES, "num_classes": classes}).eval()
    assert torch.equal(model.forward_features(images()), trained.forward_features(images()))
    path = tmp_path / "five.pth"
    assert caplog.messages == [
        f"vim: {path} is for 5 classes, the model for {classes}: its classifier stays fresh",
        f"vim: loaded weights of {path}",
    ]


def test_positions_are_resampled_as_a_grid_around_the_class_token(trained, tmp_path):
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    ramp = torch.stack((rows.flatten(), columns.flatten()), dim=1)  # along both sides of the grid
    with torch.no_grad():
        trained.pos_embed[0, :, :2] = torch.cat((ramp[:12], torch.full((1, 2), 100.0), ramp[12:]))
    torch.save(trained.state_dict(), tmp_path / "five.pth")
    for image_size, (height, width) in {(36, 36): (9, 9), (24, 40): (6, 10), (20, 20): (5, 5)}.items():
        loaded = vim(checkpoint=tmp_path / "five.pth", **{**SIZES, "img_size": image_size}).pos_embed[0].detach()
        middle = height * width // 2
        assert torch.equal(loaded[middle], trained.pos_embed[0, 12])
        grid = torch.cat((loaded[:middle, :2], loaded[middle + 1 :, :2])).view(height, width, 2)
        assert (grid[1:, :, 0] > grid[:-1, :, 0]).all() and (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
        assert grid.abs().max() < 5  # nothing of the class token's 100


def test_positions_there_and_back_keep_the_class_token(trained, tmp_path):
    smooth = torch.linspace(0, 1, 25)[:, None].expand(-1, 16)
    with torch.no_grad():
        trained.pos_embed[0] = torch.cat((smooth[:12], torch.full((1, 16), -9.0), smooth[12:]))
    torch.save(trained.state_dict(), tmp_path / "there.pth")
    torch.save(vim(checkpoint=tmp_path / "there.pth", **{**SIZES, "img_size": 40}).state_dict(), tmp_path / "back.pth")
    back = vim(checkpoint=tmp_path / "back.pth", **SIZES).pos_embed
    assert torch.equal(back[0, 12], trained.pos_embed[0, 12])
    torch.testing.assert_close(back, trained.pos_embed.detach(), rtol=0, atol=0.05)


def refusal(source, **changes):
    with pytest.raises(ValueError) as error:
        vim(checkpoint=source, **{**SIZES, **changes})
    message = str(error.value)
    assert "\n" not in message and message.startswith("vim: checkpoint: ")
    return message


def test_what_does_not_fit_is_named_five_times_and_counted(trained, tmp_path):
    state = trained.state_dict()
    torch.save({"model": state}, tmp_path / "four.pth")
    message = refusal(tmp_path / "four.pth", depth=5)
    assert message.count("is missing") == 5 and "and 12 more" in message
    message = refusal(tmp_path / "four.pth", in_chans=1)
    assert "patch_embed.proj.weight is (16, 3, 4, 4), expected (16, 1, 4, 4)" in message
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "more.pth")
    assert "extra is unknown" in refusal(tmp_path / "more.pth")
    oblong = small(img_size=(12, 20)).state_dict()["pos_embed"]
    torch.save({**state, "pos_embed": oblong}, tmp_path / "oblong.pth")
    assert "pos_embed is (1, 16, 16), expected (1, 26, 16)" in refusal(tmp_path / "oblong.pth")
    del state["norm_f.weight"]
    torch.save(state, tmp_path / "less.pth")
    assert "norm_f.weight is missing" in refusal(tmp_path / "less.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "is missing" in refusal(tmp_path / "list.pth")


class Anything:
    pass


def test_what_cannot_be_read_is_refused_with_a_remedy(trained, tmp_path):
    assert "which does not exist" in refusal(tmp_path / "nothing.pth")
    torch.save(trained.state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name in ("half.pth", "half.safetensors", "empty.pth"):
        (tmp_path / name).write_bytes(whole[: 0 if name == "empty.pth" else len(whole) // 2])
        assert "download it again" in refusal(tmp_path / name)
    torch.save({"model": trained.state_dict(), "object": Anything()}, tmp_path / "code.pth")
    assert "save its state_dict alone" in refusal(tmp_path / "code.pth")


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """The hub's cache in an empty folder, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_without_a_network_the_file_to_download_is_named(hub_cache):
    message = refusal("hf-hub:hustvl/Vim-tiny-midclstok")
    assert "download vim_t_midclstok_76p1acc.pth and set model.checkpoint to it" in message
    with pytest.raises(ValueError, match=r"download vim_s_midclstok_80p5acc\.pth and set model\.checkpoint"):
        timm.create_model("vim_small_patch16_224", pretrained=True, depth=1)
    assert "expected hf-hub:<id>/<file>, or an id of hustvl/Vim-tiny" in refusal("hf-hub:someone/vim")


def test_the_hub_serves_the_factory_and_timm(trained, hub_cache):
    snapshot = hub_cache / "models--hustvl--Vim-tiny-midclstok" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for file in ("vim_t_midclstok_76p1acc.pth", "other.pth"):
        torch.save({"model": trained.state_dict(), "args": argparse.Namespace()}, snapshot / file)
    for source in ("hf-hub:hustvl/Vim-tiny-midclstok", "hf-hub:hustvl/Vim-tiny-midclstok/other.pth"):
        assert torch.equal(vim(checkpoint=source, **SIZES).eval()(images()), trained(images()))
    model = timm.create_model("vim_tiny_patch16_224", pretrained=True, **SIZES).eval()
    assert torch.equal(model(images()), trained(images()))


def test_timm_loads_a_file_by_the_same_rules(trained, tmp_path, caplog):
    torch.save({"model": trained.state_dict(), "model_ema": small().state_dict()}, tmp_path / "vim.pth")
    overlay = {"file": str(tmp_path / "vim.pth")}
    with caplog.at_level(logging.INFO, logger="hasten"):
        model = timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **SIZES)
    assert torch.equal(model.eval()(images()), trained(images()))
    assert f"vim: loaded model of {tmp_path / 'vim.pth'}" in caplog.messages
