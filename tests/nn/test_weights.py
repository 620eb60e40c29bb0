"""What is read out of a checkpoint, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hasten.nn import timm_model
from hasten.nn.weights import check_fit, read_weights

SIZES = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 3}


def vit():
    return timm_model("vit_tiny_patch16_224", **SIZES)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {f"model.{n}": v for n, v in state.items()} | {"val_acc.correct": torch.ones(1)}},
    ],
    ids=["plain", "lightning", "ddp", "compiled", "lightning with a metric"],
)
def test_a_timm_model_starts_from_a_checkpoint_however_it_was_wrapped(tmp_path, wrap):
    trained = vit().eval()
    torch.save(wrap(trained.state_dict()), tmp_path / "x.ckpt")
    loaded = timm_model("vit_tiny_patch16_224", checkpoint=tmp_path / "x.ckpt", **SIZES).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), trained(images))


def test_safetensors_are_read_too(tmp_path):
    trained = vit()
    save_file(trained.state_dict(), tmp_path / "x.safetensors")
    loaded = timm_model("vit_tiny_patch16_224", checkpoint=tmp_path / "x.safetensors", **SIZES)
    assert torch.equal(loaded.head.weight, trained.head.weight)


def test_a_wrapper_stays_on_where_it_is_the_models_own_name(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    torch.save(Own().state_dict(), tmp_path / "x.pt")
    state, kind = read_weights(tmp_path / "x.pt", Own().state_dict(), owner="own")
    assert list(state) == ["model.weight", "model.bias"] and kind == "weights"


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hook": print}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        read_weights(tmp_path / "x.pt", [], owner="own")


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^vit_tiny_patch16_224: checkpoint: expected a file, got 'nowhere.pt'"):
        timm_model("vit_tiny_patch16_224", checkpoint="nowhere.pt", **SIZES)


def test_what_does_not_fit_is_named_and_counted():
    wanted = {name: torch.zeros(1) for name in "abcdefgh"}
    shown = r"a is \(2,\), expected \(1,\); b is missing;.*; and 3 more"
    with pytest.raises(ValueError, match=rf"^own: checkpoint: x does not fit: {shown}; give the model"):
        check_fit({"a": torch.zeros(2)}, wanted, owner="own", path="x")
    check_fit(wanted, wanted, owner="own", path="x")


def test_a_name_that_timm_looks_up_elsewhere_is_left_to_timm(tmp_path):
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "pretrained_cfg": {"num_classes": 7}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert timm_model(f"local-dir:{tmp_path}", img_size=32, depth=1).num_classes == 7


def test_a_name_that_timm_does_not_know_is_refused_with_what_is_near():
    with pytest.raises(ValueError, match=r"^model: timm has no 'vit_tiny_patch16'; near: .*vit_tiny_patch16_224"):
        timm_model("vit_tiny_patch16")
