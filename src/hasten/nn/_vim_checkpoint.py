"""Weights for a Vim: where they come from, and what may differ from the model's."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from hasten.nn.weights import KINDS, check_fit, read_weights

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


def load_checkpoint(model: "VisionMamba", source: str | Path) -> None:
    """Load weights into ``model`` in place; ``source`` is a file, ``hf-hub:<id>`` or ``hf-hub:<id>/<file>``.

    Every parameter must be there and fit, but for a classifier of other classes, which stays fresh, and positions of
    another grid, which are resampled.

    Raises:
        ValueError: where there is no such file, it cannot be read, or it does not fit; one line that says what to do.
    """
    path = _hub_file(str(source)) if str(source).startswith(HUB) else Path(source)
    wanted = model.state_dict()
    kinds = ("model_ema", "model", "state_dict") if model.embed_dim == BASE_WIDTH else KINDS
    state, kind = read_weights(path, wanted, owner="vim", kinds=kinds)
    head = state.get("head.weight")
    classes = 0 if head is None else len(head)
    if classes != model.num_classes:
        log.warning(
            "vim: %s is for %d classes, the model for %d: its classifier stays fresh", path, classes, model.num_classes
        )
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= {name: value for name, value in wanted.items() if name.startswith("head.")}
    if "pos_embed" in state:
        state["pos_embed"] = _resample(state["pos_embed"], model.grid_size)
    check_fit(state, wanted, owner="vim", path=path)
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


def _resample(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, M + 1, C) of a square grid for another, (1, M' + 1, C), the class token in the middle of both."""
    patches, new_patches = pos_embed.shape[1] - 1, grid[0] * grid[1]
    side = math.isqrt(patches)
    if grid == (side, side) or side**2 != patches:
        return pos_embed  # the same grid; or none that could be told, then its shape decides
    # timm takes the class token from the front; left in the middle it would be resampled as a patch
    before, cls, after = pos_embed.split((patches // 2, 1, patches - patches // 2), dim=1)
    pos_embed = resample_abs_pos_embed(torch.cat((cls, before, after), dim=1), list(grid))
    cls, before, after = pos_embed.split((1, new_patches // 2, new_patches - new_patches // 2), dim=1)
    return torch.cat((before, cls, after), dim=1)
