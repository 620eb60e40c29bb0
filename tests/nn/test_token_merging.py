"""Token merging in timm's ViTs against a loop over samples, and attaching to a model, measuring it and letting go."""

import copy
import inspect
import io
from dataclasses import replace

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, ParallelThingsBlock, VisionTransformer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from hasten.nn import MergeOptions, Merging, VisionMamba, attach_token_merging, unmerged_copy
from hasten.nn.sharding import shard
from hasten.nn.token_merging import find_backbone

# family -> its model in timm, 16 patches each
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 128}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "norm_layer": "rmsnorm"}),
    "gap_registers": ("vit_medium_patch16_reg4_gap_256", {}),
    "avg_with_prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
}


def vit(family="vit", *, depth=3, **kwargs):
    """A small one with weights that leave no part of it without effect."""
    name, own = FAMILIES[family]
    small = {"img_size": 64, "depth": depth, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **{**small, **own, **kwargs})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def images(model, n=3):
    size = model.patch_embed.img_size
    return torch.randn(
        n, 3, *size, generator=torch.Generator().manual_seed(2), dtype=model.patch_embed.proj.weight.dtype
    )


# ------------------------------------------------------------------ ToMe by hand


@torch.no_grad()
def reference(model, x, r, *, prop_attn=True, prune=False):
    """Logits, (B, K), and per sample the groups of first tokens that each last token is made of."""
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    merged = [reference_tokens(model, tokens, r, prop_attn, prune) for tokens in embedded]
    return torch.stack([reference_head(model, *one[:2]) for one in merged]), [one[2] for one in merged]


def reference_tokens(model, tokens, r, prop_attn, prune):
    """(N, D) -> (N', D), their sizes and their groups."""
    sizes, groups = [1] * len(tokens), [[n] for n in range(len(tokens))]
    for block, count in zip(model.blocks, r, strict=True):
        y, metric = reference_attention(block.attn, block.norm1(tokens), sizes if prop_attn else [1] * len(sizes))
        tokens = tokens + (y * block.ls1.gamma if hasattr(block.ls1, "gamma") else y)
        tokens, sizes, groups = reference_merge(tokens, sizes, groups, metric, count, model.num_prefix_tokens, prune)
        y = block.mlp(block.norm2(tokens))
        tokens = tokens + (y * block.ls2.gamma if hasattr(block.ls2, "gamma") else y)
    return model.norm(tokens), sizes, groups


def reference_attention(attn, x, sizes):
    """Softmax over keys, each counted as often as its size, head by head; also the mean of the keys, (N, D / H)."""
    n, width = len(x), attn.head_dim
    q, k, v = (F.linear(x, attn.qkv.weight, attn.qkv.bias).reshape(n, 3, attn.num_heads, width)).unbind(1)
    heads, keys = [], []
    for head in range(attn.num_heads):
        query, key = attn.q_norm(q[:, head]), attn.k_norm(k[:, head])
        weights = torch.exp(query @ key.T / width**0.5) * torch.tensor(sizes, dtype=x.dtype)
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, head])
        keys.append(key)
    return attn.proj(attn.norm(torch.cat(heads, 1))), sum(keys) / len(keys)


def reference_merge(tokens, sizes, groups, metric, r, prefix, prune):
    if r == 0:
        return tokens, sizes, groups
    sources = [n for n in range(prefix, len(tokens)) if n % 2 == 0]
    destinations = [n for n in range(prefix, len(tokens)) if n % 2 == 1]
    partner = {}
    for a in sources:
        scores = [float(F.cosine_similarity(metric[a].double(), metric[b].double(), dim=0)) for b in destinations]
        best = max(range(len(scores)), key=scores.__getitem__)
        partner[a] = (scores[best], destinations[best])
    by_similarity = sorted(sources, key=lambda a: -partner[a][0])
    going, staying = by_similarity[:r], by_similarity[r:]
    if prefix:
        staying.sort()
    out_tokens, out_sizes, out_groups = [], [], []
    for n in [*range(prefix), *staying, *destinations]:
        members = [n] if prune else [n, *(a for a in going if partner[a][1] == n)]
        total = sum(sizes[m] for m in members)
        out_tokens.append(sum(tokens[m] * sizes[m] for m in members) / total)
        out_sizes.append(total)
        out_groups.append(sorted(n for m in members for n in groups[m]))
    return torch.stack(out_tokens), out_sizes, out_groups


def reference_head(model, tokens, sizes):
    """(N, D) -> (K,): a token counts as often as its size."""
    if hasattr(model, "head_dist"):
        return (model.head(tokens[0]) + model.head_dist(tokens[1])) / 2
    if model.global_pool == "token":
        return model.head(model.fc_norm(tokens[0]))
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    spread = torch.cat([token.expand(size, -1) for token, size in zip(tokens[first:], sizes[first:], strict=True)])
    if model.attn_pool is not None:
        pooled = model.attn_pool(spread[None])[0]
    elif model.global_pool == "avg":
        pooled = spread.mean(0)
    else:
        pooled = (spread.mean(0) + spread.amax(0)) / 2
    return model.head(model.fc_norm(pooled))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vit_that_merges_none_is_itself(family):
    model = vit(family, drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2)
    x = images(model)
    for mode in (False, True):
        model.train(mode)
        torch.manual_seed(0)
        plain = model(x)
        with attach_token_merging(model, 0):
            torch.manual_seed(0)
            torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equals_a_loop_over_the_samples(family, prop_attn):
    model = vit(family).double()
    x = images(model)
    wanted, groups = reference(model, x, (5, 3, 0), prop_attn=prop_attn)
    with attach_token_merging(model, [5, 3], prop_attn=prop_attn, trace_source=True) as handle:
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
        source = handle.backbone.token_source
    assert [[row.nonzero().flatten().tolist() for row in sample] for sample in source] == groups
    assert (wanted - model(x)).abs().max() > 1e-3


def test_pruning_equals_a_loop_over_the_samples():
    model = vit("gap_registers").double()
    x = images(model)
    wanted, _ = reference(model, x, (5, 3, 1), prune=True)
    with attach_token_merging(model, [5, 3, 1], reduce="prune"):
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), wanted, rtol=1e-6, atol=1e-6)


def test_attention_without_a_fused_kernel_merges_the_same():
    model = vit("deit3")
    x = images(model)
    with attach_token_merging(model, 3):
        fused = model(x)
        for block in model.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(model(x), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("gated" not in inspect.signature(Attention).parameters, reason="this timm has no gated attention")
def test_a_gate_is_kept():
    model = vit()
    for block in model.blocks:
        block.attn = Attention(32, 2, qkv_bias=True, gated=True)
    plain = model(images(model))
    with attach_token_merging(model, 0):
        torch.testing.assert_close(model(images(model)), plain)


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_registers"])
def test_prefix_tokens_never_merge(family):
    model = vit(family)
    prefix = model.num_prefix_tokens
    with attach_token_merging(model, [8, 4, 2], trace_source=True) as handle:
        model(images(model))
        source = handle.backbone.token_source
    assert source.shape == (3, prefix + 2, prefix + 16)
    assert source[:, :prefix].equal(torch.eye(prefix, prefix + 16).expand(3, -1, -1))
    assert source.sum(1).equal(torch.ones(3, prefix + 16))


@pytest.mark.parametrize("options", [{"metric": "x"}, {"distance": "l1"}, {"preserve_order": True}])
def test_options_reach_the_matching(options):
    model = vit()
    with attach_token_merging(model, 3):
        default = model.forward_features(images(model))
    with attach_token_merging(model, 3, **options):
        assert not torch.allclose(model.forward_features(images(model)), default)


def test_sizes_stay_float32_in_a_bfloat16_model():
    model = vit("avg_with_prefix")
    with attach_token_merging(model, 4):
        wanted = model(images(model))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(images(model)).float(), wanted, rtol=0.1, atol=0.1 * wanted.std().item())
        model.bfloat16()
        assert model(images(model)).dtype == torch.bfloat16


def test_images_with_too_few_tokens_merge_what_they_can():
    model = vit("avgmax", dynamic_img_size=True)
    with attach_token_merging(model, 4):
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_checkpointing_changes_no_gradient(family):
    model = vit(family).train()
    gradients = []
    with attach_token_merging(model, 4):
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            model(images(model)).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_whatever_is_called_in_a_plain_vit_is_called_in_a_merging_one():
    model, called = vit("deit3", qk_norm=True, norm_layer="layernorm"), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(images(model))
    plain = set(called)
    called.clear()
    with attach_token_merging(model, 2):
        model(images(model))
    assert called == plain > {"blocks", "blocks.2.ls1", "blocks.2.attn.k_norm", "blocks.2.drop_path2"}


# ------------------------------------------------------------------ attach, suspend, remove


class Project(nn.Module):
    """Somebody's model with a backbone in it."""

    def __init__(self, backbone):
        super().__init__()
        self.net = nn.ModuleDict({"backbone": backbone})

    def forward(self, x):
        return self.net["backbone"](x)


def test_removing_leaves_the_model_as_it_was():
    model = Project(vit("siglip"))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    keys, plain = list(model.state_dict()), model(images(model.net["backbone"]))
    handle = attach_token_merging(model, 4)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(images(handle.module)), plain)
    handle.remove()
    handle.remove()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model(images(handle.module)).equal(plain)


def test_an_exception_inside_a_with_removes_too():
    model = vit()
    with pytest.raises(KeyError), attach_token_merging(model, 4):
        raise KeyError
    assert "forward" not in vars(model)


def test_a_handle_suspends_resumes_and_changes():
    model = vit()
    x = images(model)
    plain = model(x)
    with attach_token_merging(model, 4) as handle:
        merged = model(x)
        with handle.suspended():
            assert handle.active is None
            assert model(x).equal(plain)
        assert model(x).equal(merged)
        handle.set(replace(handle.merging, r=(1, 1, 1)))
        assert model.forward_features(x).shape[1] == 14
        with pytest.raises(ValueError, match="block 0"):
            handle.set(replace(handle.merging, r=(9, 0, 0)))
        assert model.forward_features(x).shape[1] == 14
    with pytest.raises(ValueError, match="attach again"):
        handle.set(None)


def test_a_second_handle_is_refused_until_the_first_is_removed():
    model = vit()
    handle = attach_token_merging(model, 4)
    with pytest.raises(ValueError, match="remove"):
        attach_token_merging(Project(model), 2)
    handle.remove()
    with attach_token_merging(model, 2):
        handle.remove()
        assert model.forward_features(images(model)).shape[1] == 17 - 3 * 2


def test_what_does_not_fit_leaves_the_model_alone():
    model = vit()
    with pytest.raises(ValueError, match="block 1"):
        attach_token_merging(model, 6)
    assert "forward" not in vars(model)
    attach_token_merging(model, 4).remove()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_merges_with_its_own_blocks(how):
    model = Project(vit("dinov2_registers"))
    x = images(model.net["backbone"])
    with attach_token_merging(model, 4):
        merged = model(x)
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert copied(x).equal(merged)
    assert copied(x).equal(merged)
    with attach_token_merging(copied, 2):
        assert copied.net["backbone"].forward_features(x).shape[1] == 21 - 3 * 2
    assert all("forward" not in vars(module) for module in copied.modules())


@pytest.mark.parametrize("make", [vit, lambda: VisionMamba(64, patch_size=16, depth=4, embed_dim=32, num_classes=5)])
def test_an_unmerged_copy_is_the_plain_model(make):
    model = Project(make().eval())
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    with attach_token_merging(model, 4):
        merged = model(x)
        copied = unmerged_copy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert copied(x).equal(plain)
    assert not torch.equal(merged, plain)


# ------------------------------------------------------------------ dense use


@pytest.mark.parametrize("family", ["siglip", "gap_registers", "avgmax"])
def test_forward_head_alone_is_refused_where_it_needs_sizes(family):
    model = vit(family)
    with attach_token_merging(model, 4):
        features = model.forward_features(images(model))
        with pytest.raises(ValueError, match="call the model"):
            model.forward_head(features)


def test_forward_head_alone_serves_a_class_token():
    model = vit()
    with attach_token_merging(model, 4):
        x = images(model)
        assert model.forward_head(model.forward_features(x)).equal(model(x))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model, x: model(x, attn_mask=torch.zeros(17, 17)), "attn_mask"),
        (lambda model, x: model.forward_features(x, is_causal=True), "is_causal"),
        (lambda model, x: model.forward_intermediates(x), "forward_intermediates"),
        (lambda model, x: model.get_intermediate_layers(x), "forward_intermediates"),
    ],
)
def test_dense_use_is_refused(call, named):
    model = vit()
    with attach_token_merging(model, 4), pytest.raises(ValueError, match=f"{named}.*grid"):
        call(model, images(model))


# ------------------------------------------------------------------ find the backbone


def tiny(name, **kwargs):
    return timm.create_model(name, num_classes=2, **kwargs)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: tiny("eva02_tiny_patch14_224", depth=1), "Eva: later"),
        (lambda: tiny("vit_small_patch16_dinov3", depth=1), "Eva: later"),
        (lambda: tiny("beit_base_patch16_224", depth=1, embed_dim=24), "Beit: .*fixed grid"),
        (lambda: tiny("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12, num_heads=(1, 1)), "Swin.*: .*grid"),
        (lambda: tiny("maxvit_tiny_rw_224", embed_dim=(32,), depths=(1,)), "MaxxVit: .*grid"),
        (lambda: tiny("pvt_v2_b0"), "PyramidVisionTransformerV2: .*grid"),
        (lambda: tiny("naflexvit_base_patch16_gap", depth=1, embed_dim=24, num_heads=1), "NaFlexVit: "),
        (lambda: tiny("resnet10t"), "ResNet: no one sequence of tokens"),
        (lambda: tiny("convnext_atto", depths=(1, 1, 1, 1)), "ConvNeXt: no one sequence of tokens"),
        (lambda: vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
        (lambda: tiny("vit_srelpos_small_patch16_224", depth=1), "VisionTransformerRelPos"),
    ],
)
def test_what_cannot_merge_is_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        attach_token_merging(nn.Sequential(make()), 2)


@pytest.mark.parametrize("name", ["ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock"])
def test_other_blocks_of_timm_are_refused_by_name(name):
    block = getattr(timm.models.vision_transformer, name, None)
    if block is None:
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(ValueError, match=name):
        attach_token_merging(vit(block_fn=block), 2)


class OwnBlock(Block):
    pass


class OwnAttention(Attention):
    pass


class OwnPooling(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x.median(1).values


def test_subclasses_are_refused_for_what_they_may_have_changed():
    with pytest.raises(ValueError, match="OwnBlock"):
        attach_token_merging(vit(block_fn=OwnBlock), 2)
    model = vit()
    model.blocks[1].attn = OwnAttention(32, 2)
    with pytest.raises(ValueError, match="OwnAttention"):
        attach_token_merging(model, 2)
    with pytest.raises(ValueError, match="OwnPooling: its own pool"):
        attach_token_merging(OwnPooling(img_size=32, depth=1, embed_dim=24, num_heads=1), 2)
    model = vit()
    model.blocks[0].forward = model.blocks[0].forward
    with pytest.raises(ValueError, match="forward of a Block"):
        attach_token_merging(model, 2)


class PreTrainedModel(nn.Module):
    """Stands for transformers', which hasten does not need."""

    __module__ = "transformers.modeling_utils"
    __qualname__ = "PreTrainedModel"


class ViTModel(PreTrainedModel):
    pass


def test_a_hugging_face_model_is_refused():
    with pytest.raises(ValueError, match="ViTModel: later"):
        attach_token_merging(Project(ViTModel()), 2)


def test_the_only_backbone_is_found_and_several_are_told_apart():
    assert find_backbone(vit())[0] == ""
    assert find_backbone(Project(vit()))[0] == "net.backbone"
    compiled = Project(torch.compile(vit(), backend="eager"))
    assert find_backbone(compiled) == ("net.backbone", compiled.net["backbone"]._orig_mod)
    pair = nn.ModuleDict({"student": Project(vit()), "teacher": vit(), "stem": nn.Conv2d(3, 3, 1)})
    with pytest.raises(ValueError, match=r"student\.net\.backbone, teacher; give target"):
        find_backbone(pair)
    assert find_backbone(pair, "student") == ("student.net.backbone", pair["student"].net["backbone"])
    assert find_backbone(pair, "teacher") == ("teacher", pair["teacher"])
    with pytest.raises(ValueError, match="in Conv2d, got none"):
        find_backbone(pair, "stem")
    with pytest.raises(ValueError, match=r"target: expected the path of a module in ModuleDict, got 'head'"):
        find_backbone(pair, "head")


# ------------------------------------------------------------------ from words to a Merging


def test_words_mean_what_fits_the_backbone():
    vim = VisionMamba(64, patch_size=8, depth=6, embed_dim=32, num_classes=5)
    assert MergeOptions(5).resolve(vim) == Merging(r=(0, 0, 5, 0, 5, 0), metric="x")
    assert MergeOptions(5, interval=3).resolve(vim).r == (0, 0, 0, 5, 0, 0)
    assert MergeOptions(5, layers=[1, 3]).resolve(vim).r == (0, 5, 0, 5, 0, 0)
    assert MergeOptions((8, -0.5)).resolve(vim).r == (0, 0, 12, 0, 4, 0)
    assert MergeOptions([0, 3]).resolve(vim).r == (0, 3, 0, 0, 0, 0)
    assert MergeOptions(5, method="none").resolve(vim).removed == 0
    with attach_token_merging(vit(), 4) as handle:
        assert handle.merging == Merging(r=(4, 4, 4), metric="k", preserve_order=False, prop_attn=True)
    with attach_token_merging(vit(), 0.25, retrained=True) as handle:
        assert handle.merging == Merging(r=(4, 3, 2), metric="k", preserve_order=False)
    with attach_token_merging(vit(), 0.25, reduce="prune", interval=2, preserve_order=True) as handle:
        assert handle.merging == Merging(r=(4, 0, 3), metric="k", prune=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": -1}, "0 or more"),
        ({"r": 0.5}, "0.5"),
        ({"method": "evit"}, "method.*auto, rmeeto, tome, none"),
        ({"metric": "q"}, "metric"),
        ({"distance": "dot"}, "distance"),
        ({"reduce": "mean"}, "reduce"),
        ({"cls_rule": "first"}, "cls_rule"),
        ({"preserve_order": "yes"}, "preserve_order"),
        ({"prop_attn": "yes"}, "prop_attn"),
        ({"interval": 0}, "interval"),
        ({"interval": 2, "layers": [1]}, "layers or interval"),
    ],
)
def test_options_that_fit_no_backbone_are_refused_at_once(options, named):
    with pytest.raises(ValueError, match=named):
        MergeOptions(**options)


def test_an_r_of_another_type_is_refused_at_once():
    for r in ("8", None, True, [1, 0.5, 2]):
        with pytest.raises(TypeError, match="r: expected"):
            MergeOptions(r)


@pytest.mark.parametrize(
    ("backbone", "options", "named"),
    [
        ("vit", {"method": "rmeeto"}, "method: expected auto, none or tome"),
        ("vit", {"metric": "b"}, "metric: expected k or x"),
        ("vit", {"cls_rule": "exact"}, "cls_rule"),
        ("vit", {"layers": [3]}, "blocks from 0 to 2"),
        ("vit", {"r": [1, 1, 1, 1]}, "at most 3 entries"),
        ("vim", {"method": "tome"}, "method: expected auto, none or rmeeto"),
        ("vim", {"metric": "k"}, "metric: expected x, b, c or delta"),
        ("vim", {"prop_attn": True}, "prop_attn"),
        ("vim", {"layers": [0, 2]}, "block 0"),
    ],
)
def test_options_that_do_not_fit_the_backbone_are_refused(backbone, options, named):
    model = vit() if backbone == "vit" else VisionMamba(64, patch_size=16, depth=3, embed_dim=32, num_classes=5)
    with pytest.raises(ValueError, match=named):
        attach_token_merging(model, **{"r": 2, **options})


# ------------------------------------------------------------------ what it saves


def test_the_table_has_the_tokens_of_each_block():
    with attach_token_merging(vit("dinov2_registers"), [4, 0, 2]) as handle:
        assert [tuple(row) for row in handle.table()] == [(0, 21, 17), (1, 17, 17), (2, 17, 15)]


def test_flops_are_those_of_the_formula():
    model = vit()
    with attach_token_merging(model, [6, 4]) as handle, handle.suspended():
        plain, merged = handle.flops(images(model, 2))
        assert handle.active is None
    width, patch = 32, 2 * 16 * 32 * 3 * 16 * 16

    def block(n, left):
        attention = 4 * n * width**2 + 2 * n**2 * width
        return 2 * attention + 2 * 2 * left * 4 * width**2

    head = 2 * width * 5
    assert plain == 2 * (patch + 3 * block(17, 17) + head)
    without_matching = 2 * (patch + block(17, 11) + block(11, 7) + block(7, 7) + head)
    assert without_matching < merged < 1.02 * without_matching


def test_throughput_leaves_modes_and_draws_alone():
    model = vit(drop_path_rate=0.1).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with attach_token_merging(model, 4) as handle:
        plain, merged = handle.throughput(images(model), repeats=1)
        assert handle.active == handle.merging
    assert plain > 0 < merged
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model.modules()] == modes


def test_merging_away_most_of_a_long_sequence_is_faster():
    model = vit(img_size=256, embed_dim=192, num_heads=3, depth=4)
    with attach_token_merging(model, [120, 60, 30]) as handle:
        plain, merged = handle.throughput(images(model, 4), repeats=3)
    assert merged > plain


# ------------------------------------------------------------------ graphs and shards


def test_an_export_is_the_merging_model():
    model = vit("siglip", depth=2).train()
    model.set_grad_checkpointing()
    with attach_token_merging(model, 4, trace_source=True) as handle:
        exported = handle.export(images(model))
        model.eval()
        torch.testing.assert_close(exported.module()(images(model)), model(images(model)))


def test_a_merging_vit_is_one_graph_that_is_found_again():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model = vit(depth=1)
    x = images(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), attach_token_merging(model, 4) as handle:
        for merging in (handle.merging, None, handle.merging):
            handle.set(merging)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_attaching_to_a_compiled_vit_and_changing_r_is_one_graph_each():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model = vit("gap_registers", depth=2)
    x = images(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with attach_token_merging(compiled, 4) as handle:
            other = replace(handle.merging, r=(2, 2))
            for merging in (handle.merging, other, None, handle.merging, other):
                handle.set(merging)
                torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 3


@pytest.mark.slow
def test_a_compiled_step_has_the_gradients_of_the_eager_one():
    torch.compiler.reset()
    model = vit("deit3", depth=2).train()
    model.set_grad_checkpointing()
    x = images(model)
    with attach_token_merging(model, 4):
        gradients = []
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            run(x).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_wrappers_of_activation_checkpointing_are_looked_through():
    model = vit()
    x = images(model)
    with attach_token_merging(model, 4):
        wanted = model(x)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    with attach_token_merging(model, 4):
        assert model(x).equal(wanted)
    assert all("forward" not in vars(module) for module in model.modules())


def _rank(first):
    joined = vit("gap_registers")
    x = images(joined, 4)
    with attach_token_merging(joined, 4):
        joined(x).square().mean().backward()
    model = vit("gap_registers")
    if first == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    elif first == "shard":
        shard(model, init_device_mesh("cpu", (2,)))
        run = model
    handle = attach_token_merging(model, 4)
    if first == "attach":
        shard(model, init_device_mesh("cpu", (2,)))
        run = model
    run(x[dist.get_rank() :: 2]).square().mean().backward()
    for parameter, whole in zip(model.parameters(), joined.parameters(), strict=True):
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-3, atol=1e-5)
    handle.remove()
    if any("forward" in vars(module) for module in model.modules()):
        raise AssertionError("expected nothing to be left")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "shard", "attach"])
def test_two_ranks_have_the_gradients_of_the_joined_batch(first, two_processes):
    two_processes(_rank, first)


def test_a_vits_trace_of_pruned_tokens_leaves_out_what_was_dropped():
    model = vit()
    with attach_token_merging(model, r=3, reduce="prune", trace_source=True) as handle:
        model(images(model))
        source = handle.backbone.token_source
    assert source.shape == (3, 17 - 9, 17)
    assert torch.equal(source.sum(2), torch.ones(3, 8))  # each token is itself alone


@pytest.mark.parametrize("make", [vit, lambda: VisionMamba(64, depth=4, embed_dim=16, num_classes=5)])
def test_only_evaluation_is_traced(make):
    model = make()
    with attach_token_merging(model, r=2, trace_source=True) as handle:
        model.train()(images(model))
        assert handle.backbone.token_source is None
        model.eval()(images(model))
        assert handle.backbone.token_source is not None
