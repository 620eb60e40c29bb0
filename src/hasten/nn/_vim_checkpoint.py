"""Weights for a Vim: where they come from, how they are unwrapped, and what may differ from the model's."""

import argparse
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

if TYPE_CHECKING:
    from hasten.nn.vision_mamba import VisionMamba

log = logging.getLogger(__name__)

HUB = "hf-hub:"
HUB_FILES = {
    "hustvl/Vim-tiny-midclstok": "vim_t_midclstok_76p1acc.pth",
    "hustvl/Vim-small-midclstok": "vim_s_midclstok_80p5acc.pth",
    "hustvl/Vim-base-midclstok": "vim_b_midclstok_81p9acc.pth",
}
"""The authors' models on the hub, and which file of each has the class token in the middle."""

BASE_WIDTH = 768  # of the one model whose published accuracy is that of the averaged weights
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel, torch.compile and a LightningModule put before a parameter's name."""


def load_checkpoint(model: "VisionMamba", source: str | Path) -> None:
    """Load weights into ``model`` in place; ``source`` is a file, ``hf-hub:<id>`` or ``hf-hub:<id>/<file>``.

    Every parameter must be there and fit, but for a classifier of other classes, which stays fresh, and positions of
    another grid, which are resampled.

    Raises:
        ValueError: where there is no such file, it cannot be read, or it does not fit; one line that says what to do.
    """
    path = _hub_file(str(source)) if str(source).startswith(HUB) else Path(source)
    state, kind = _unwrap(_read(path), averaged=model.embed_dim == BASE_WIDTH)
    wanted = model.state_dict()
    head = state.get("head.weight")
    classes = 0 if head is None else len(head)
    if classes != model.num_classes:
        log.info(
            "vim: %s is for %d classes, the model for %d: its classifier stays fresh", path, classes, model.num_classes
        )
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= {name: value for name, value in wanted.items() if name.startswith("head.")}
    if "pos_embed" in state:
        state["pos_embed"] = _resample(state["pos_embed"], model.grid_size)
    if problems := _problems(state, wanted):
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"vim: checkpoint: {path} does not fit: {shown}; give the model the checkpoint's sizes")
    model.load_state_dict(state)
    log.info("vim: loaded %s of %s", kind, source)


def _hub_file(source: str) -> Path:
    """The file behind ``hf-hub:owner/name`` or ``hf-hub:owner/name/file``, from the hub or its cache."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - for those who load from the hub only

    owner, name, file = (*source.removeprefix(HUB).split("/", 2), "", "")[:3]
    repo = f"{owner}/{name}"
    file = file or HUB_FILES.get(repo, "")
    if not file:
        known = ", ".join(HUB_FILES)
        raise ValueError(f"vim: checkpoint: expected {HUB}<id>/<file>, or an id of {known}; got {source!r}")
    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # the hub's errors have no common base
        problem = f"vim: checkpoint: no {file} from {HUB}{repo} ({type(error).__name__})"
        raise ValueError(f"{problem}; download {file} and set model.checkpoint to it") from error


def _read(path: Path) -> Any:
    """What the file holds; no code of it runs."""
    if not path.is_file():
        raise ValueError(f"vim: checkpoint: expected a file or {HUB}<id>, got {str(path)!r}, which does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # Vim's trainer stores its arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half a file fails in any way
        problem = f"vim: checkpoint: {path} cannot be read as plain weights ({type(error).__name__})"
        raise ValueError(f"{problem}; download it again, or save its state_dict alone") from error


def _unwrap(checkpoint: Any, *, averaged: bool) -> tuple[dict[str, Tensor], str]:
    """The state_dict in a trainer's checkpoint under the model's own names, and what it was called there."""
    kinds = ("model_ema", "model", "state_dict") if averaged else ("model", "state_dict", "model_ema")
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    kind = next((kind for kind in kinds if isinstance(checkpoint.get(kind), dict)), "")
    state = checkpoint[kind] if kind else checkpoint
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in WRAPPERS if any(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state, kind or "weights"


def _resample(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, M + 1, C) of a square grid for another, (1, M' + 1, C), the class token in the middle of both."""
    patches, new_patches = pos_embed.shape[1] - 1, grid[0] * grid[1]
    if patches == new_patches or math.isqrt(patches) ** 2 != patches:
        return pos_embed  # as many patches: the same grid; no square: refused for its shape
    # timm takes the class token from the front; left in the middle it would be resampled as a patch
    before, cls, after = pos_embed.split((patches // 2, 1, patches - patches // 2), dim=1)
    pos_embed = resample_abs_pos_embed(torch.cat((cls, before, after), dim=1), list(grid))
    cls, before, after = pos_embed.split((1, new_patches // 2, new_patches - new_patches // 2), dim=1)
    return torch.cat((before, cls, after), dim=1)


def _problems(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """What keeps ``state`` from being loaded, a few words for each name."""
    missing = [f"{name} is missing" for name in wanted if name not in state]
    unexpected = [f"{name} is unknown" for name in state if name not in wanted]
    others = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    return [*others, *missing, *unexpected]
