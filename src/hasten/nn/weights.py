"""Weights out of a file into a model: nothing of the file runs, wrappers come off, every name has to fit; a hash."""

import argparse
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

KINDS = ("model", "state_dict", "model_ema")
"""Under which names trainers keep weights in a checkpoint, in the order they are looked for."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel, torch.compile and a LightningModule put before a parameter's name."""
_SHOWN = 5


def timm_model(model_name: str, *, checkpoint: str | Path | None = None, **arguments: Any) -> nn.Module:
    """A model of timm, with weights from a file where ``checkpoint`` is given.

    Args:
        model_name: as in ``timm.list_models()``.
        checkpoint: of a LightningModule that keeps the network as ``model``, a state_dict, or .safetensors; of one
            that holds averaged weights too, the others are taken.
        arguments: of ``timm.create_model``.

    Raises:
        ValueError: for a name that timm does not know, and a checkpoint that cannot be read or does not fit.

    Example:
        >>> timm_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10).num_classes
        10
    """
    import timm  # noqa: PLC0415 - seconds of import for those who build a timm model only

    if ":" not in model_name and not timm.is_model(model_name):  # hf-hub:NAME is looked up elsewhere
        near = ", ".join(timm.list_models(f"*{model_name}*")[:5]) or "none; see timm.list_models()"
        raise ValueError(f"model: timm has no {model_name!r}; near: {near}")
    model = timm.create_model(model_name, **arguments)
    if checkpoint is not None:
        state, kind = read_weights(Path(checkpoint), model.state_dict(), owner=model_name)
        check_fit(state, model.state_dict(), owner=model_name, path=checkpoint)
        model.load_state_dict(state)
        log.info("%s: loaded %s of %s", model_name, kind, checkpoint)
    return model


def read_weights(
    path: Path,
    names: Iterable[str],
    *,
    owner: str,
    kinds: tuple[str, ...] = KINDS,
    wrappers: tuple[str, ...] = WRAPPERS,
) -> tuple[dict[str, Tensor], str]:
    """The weights in a checkpoint under the model's own names, and what they were called there.

    Args:
        path: what torch or safetensors wrote.
        names: the model's own.
        owner: whose weights these are, for the errors.
        kinds: where in the checkpoint to look, first come first.
        wrappers: prefixes that come off while no name is the model's own.

    Raises:
        ValueError: where there is no such file, or it cannot be read.
    """
    checkpoint = _read(path, owner)
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    kind = next((kind for kind in kinds if isinstance(checkpoint.get(kind), dict)), "")
    state = checkpoint[kind] if kind else checkpoint
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    wanted = set(names)
    while not wanted & state.keys():
        prefix = next((wrapper for wrapper in wrappers if any(name.startswith(wrapper) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state, kind or "weights"


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, owner: str, path: str | Path) -> None:
    """Refuse weights whose names and shapes are not as wanted.

    Raises:
        ValueError: where not, in one line with the first few names.
    """
    if not state.keys() & wanted.keys():
        found = ", ".join(list(state)[:_SHOWN]) or "no tensors"
        raise ValueError(
            f"{owner}: checkpoint: expected names such as {next(iter(wanted))} in {path}, got {found}; give a "
            "checkpoint of this model"
        )
    problems = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{owner}: checkpoint: {path} does not fit: {shown}{rest}; give the model the checkpoint's sizes"
        )


def weight_hash(model: nn.Module) -> str:
    """Eight hexadecimal digits that stand for all weights and buffers of a model.

    Example:
        >>> weight_hash(nn.Identity())
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def _read(path: Path, owner: str) -> Any:
    """What the file holds; no code of it runs."""
    if not path.is_file():
        raise ValueError(
            f"{owner}: checkpoint: expected a file, got {str(path)!r}, which does not exist; give its path"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # trainers store their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half a file fails in any way
        problem = f"{owner}: checkpoint: {path} cannot be read as plain weights ({type(error).__name__})"
        raise ValueError(f"{problem}; download it again, or save its state_dict alone") from error
