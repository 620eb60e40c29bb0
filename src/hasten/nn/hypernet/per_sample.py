"""Weights of its own for each sample: how a model is called with (B, *shape) weights and arguments of B rows.

By vmap, which makes grouped convolutions and batched products of it; by a loop; or once for each distinct input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from hasten.errors import on_one_line

Weights = dict[str, Tensor]
"""By parameter name."""

Theta = Callable[[Tensor], Weights]
"""E, (n, e) -> weights, (n, *shape)."""


def call_per_sample(
    model: nn.Module,
    theta: Theta,
    encoded: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    way: str,
    norms: Sequence[str],
    one_for_all: Sequence[Any],
) -> Any:
    """Each sample through weights of its own; the outputs are those of one call with B rows.

    Args:
        model: called with weights in the place of its own.
        theta: makes the weights.
        encoded: (B, e).
        args: of the model; tensors with B rows are taken apart, all others shared.
        kwargs: likewise.
        way: a key of WAYS.
        norms: ``batch_norms`` of the model.
        one_for_all: arguments that are shared whatever their shape.

    Raises:
        ValueError: for arguments and outputs whose rows are not the samples.
        TypeError: for outputs that are no pytree of tensors.
        RuntimeError: for a model that vmap cannot serve.
    """
    if way != "unique":
        _refuse_training_batch_norms(model, norms)
    if not len(encoded) and way != "vmap":
        raise ValueError(f"hypernet: inputs: expected at least one sample for {way!r}, got none")
    leaves, structure = tree_flatten((args, kwargs))
    mapped = _with_rows(leaves, len(encoded), one_for_all)
    rest: list[Any] = []  # of the outputs: the structure, and what is no tensor

    def call(weights: Weights, rows: Sequence[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for i, row in zip(mapped, rows, strict=True):
            filled[i] = row
        call_args, call_kwargs = tree_unflatten(filled, structure)
        flat, spec = tree_flatten(functional_call(model, weights, call_args, call_kwargs))
        _check_outputs(flat, len(rows[0]) if rows else 1)
        # vmap takes tensors alone; anything else, None perhaps, is the same for every sample
        found = [spec, *(_A_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in flat)]
        if rest and rest != found:
            raise TypeError(
                "hypernet: outputs: expected what is no tensor to be the same for every sample, got "
                f"{rest[1:]} and {found[1:]}; return tensors"
            )
        rest[:] = found
        return [leaf for leaf in flat if isinstance(leaf, Tensor)]

    watches = way == "vmap" and not torch.compiler.is_compiling()
    with _mapping(model) if watches else nullcontext():
        outputs = iter(WAYS[way](call, theta, encoded, [leaves[i] for i in mapped]))
    spec, *flat = rest
    return tree_unflatten([next(outputs) if leaf is _A_TENSOR else leaf for leaf in flat], spec)


def way_for(model: nn.Module, per_sample: str) -> str:
    """The way that is meant: "auto" is vmap, or a loop for recurrent layers.

    Raises:
        ValueError: for vmap and a recurrent layer.
    """
    recurrent = [name for name, module in model.named_modules() if isinstance(module, (nn.RNNBase, nn.LSTMCell))]
    if recurrent and per_sample == "vmap":
        raise ValueError(
            f"hypernetize: per_sample: expected 'loop' or 'unique' for the recurrent layer {recurrent[0]!r}, which "
            "vmap cannot serve, got 'vmap'; use per_sample='loop'"
        )
    return ("loop" if recurrent else "vmap") if per_sample == "auto" else per_sample


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the layers that keep statistics of what they see; instance norms may."""
    norms = nn.modules.batchnorm._NormBase
    return [name for name, layer in model.named_modules() if isinstance(layer, norms) and layer.track_running_stats]


# ---------------------------------------------------------------------- the ways

_Call = Callable[[Weights, Sequence[Tensor]], list[Tensor]]
"""(weights, tensors of n rows) -> the output's tensors: one call of the model."""

_A_TENSOR = object()
"""Stands for a tensor among what is none."""


def _vmapped(call: _Call, theta: Theta, encoded: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    def of_one(weights: Weights, row: Sequence[Tensor]) -> list[Tensor]:
        return call(weights, [part.unsqueeze(0) for part in row])

    outputs = vmap(of_one, randomness="different")(theta(encoded), rows)
    return [output if output.ndim == 1 else output.flatten(0, 1) for output in outputs]


def _looped(call: _Call, theta: Theta, encoded: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    weights = {name: stacked.unbind() for name, stacked in theta(encoded).items()}
    calls = [
        call({name: each[b] for name, each in weights.items()}, [row[b : b + 1] for row in rows])
        for b in range(len(encoded))
    ]
    return [torch.cat(parts) if parts[0].ndim else torch.stack(parts) for parts in zip(*calls, strict=True)]


def _grouped(call: _Call, theta: Theta, encoded: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """One call for all samples with the same input."""
    _, group, sizes = encoded.detach().unique(dim=0, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    members = order.split(sizes.tolist())
    # the mean of what is equal, so that the gradient goes to all members and not to the first
    equal = torch.stack([encoded[m].mean(0) for m in members])
    weights = {name: each.unbind() for name, each in theta(equal).items()}
    calls = []
    for k, samples in enumerate(members):
        outputs = call({name: each[k] for name, each in weights.items()}, [row[samples] for row in rows])
        if not all(output.ndim for output in outputs):
            raise ValueError(
                "hypernet: per_sample: expected outputs with a row for each sample for 'unique', got a number; use "
                "per_sample='loop'"
            )
        calls.append(outputs)
    back = order.argsort()
    return [torch.cat(parts)[back] for parts in zip(*calls, strict=True)]


WAYS = {"vmap": _vmapped, "loop": _looped, "unique": _grouped}


# ---------------------------------------------------------------------- what is refused

_SAID = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def _check_outputs(outputs: Sequence[Any], rows: int) -> None:
    """Refuse outputs of a call with so many rows that cannot be put together."""
    for output in outputs:
        if isinstance(output, Tensor):
            if output.ndim and len(output) != rows:
                raise ValueError(
                    f"hypernet: outputs: expected numbers, or a row for each of {rows} samples in the first dimension, "
                    f"got shape {tuple(output.shape)}; return the samples first, or pass one value for the batch"
                )
        elif not isinstance(output, _SAID):
            raise TypeError(
                f"hypernet: outputs: expected tensors in tuples, lists and dicts, got {type(output).__name__}; return "
                "such, or register it with torch.utils._pytree.register_pytree_node"
            )


def _with_rows(leaves: Sequence[Any], samples: int, one_for_all: Sequence[Any]) -> list[int]:
    """Which of the arguments are taken apart."""
    shared = [id(value) for value in one_for_all]
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and id(leaf) not in shared]
    mapped = [i for i in tensors if leaves[i].shape[:1] == (samples,)]
    if tensors and not mapped:
        raise ValueError(
            f"hypernet: inputs: expected as many as an argument has rows, got {samples} and arguments of shape "
            f"{', '.join(str(tuple(leaves[i].shape)) for i in tensors)}; pass one value for the whole batch"
        )
    return mapped


def _refuse_training_batch_norms(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        norm = model.get_submodule(name)
        if norm.training and getattr(norm, "running_mean", None) is not None:
            raise RuntimeError(
                f"hypernet: {name}: expected no batch norm in training mode with weights per sample, got one that "
                "keeps running statistics; use GroupNorm, one input a batch (draw='batch'), per_sample='unique', or "
                "torch.func.replace_all_batch_norm_modules_(model)"
            )


@contextmanager
def _mapping(model: nn.Module) -> Iterator[None]:
    """Say what helps where vmap cannot serve the model, and leave none of vmap's tensors in it."""
    buffers = dict(model.named_buffers())
    try:
        yield
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise RuntimeError(
            f"hypernet: per_sample: expected a forward that vmap can map, got {type(model).__name__}'s, of which it "
            f"says: {on_one_line(error)}; use per_sample='loop'"
        ) from error
    finally:
        replaced = _put_back(model, buffers)
    if replaced:
        raise RuntimeError(
            f"hypernet: {replaced[0]}: expected no buffer that a forward replaces, with weights per sample, got one; "
            "use per_sample='loop', or one input a batch (draw='batch')"
        )


def _put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> list[str]:
    """The names of buffers that were replaced, and are no longer."""
    replaced = [name for name, buffer in model.named_buffers() if buffers.get(name) is not buffer]
    for name in replaced:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffers.get(name))
    return replaced
