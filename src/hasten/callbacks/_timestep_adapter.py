"""How TimestepSampling serves a module that has never heard of it.

The path of a training batch, between ``start`` and ``stop``; outside of them nothing here does anything:

1. The module draws timesteps and gives them to its scheduler: ``scheduler.add_noise(x, noise, timesteps)``.
2. ``_rewrite`` overwrites that very tensor with the sampler's draw: all that reads it from then on sees the draw.
3. The module calls its denoiser. ``_weigh`` passes the prediction on, and back its gradient, row i times w[t_i].
4. ``_prove`` ends the first batch in an error unless the module took this path.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from hasten.errors import HastenError, did_you_mean

# a graph would keep the draw of the batch it was traced in
_outside_graphs = torch.compiler.disable(reason="timesteps are drawn here; compile the denoiser, not the training step")


@dataclass(frozen=True)
class Draw:
    """What a batch was given."""

    timesteps: Tensor  # the module's own tensor, (B,), which now holds t
    t: Tensor  # (B,)
    weights: Tensor | None  # (B,)


class TimestepAdapter:
    """Overwrites the timesteps that a module gives its scheduler, and weighs the gradient its denoiser receives.

    It holds on by attributes of two instances and a hook, all closures: a bound method would have the module's deep
    copies (EMA makes one) copy this object and the sampler. ``detach`` takes everything back; once is enough.

    Args:
        draw: n -> timesteps, (n,), and their weights, (n,), or None where nothing is weighed.
        module: that trains; timesteps that are its own parameter or buffer are refused, not overwritten.
        scheduler: with ``add_noise(samples, noise, timesteps)`` and perhaps ``get_velocity``.
        denoiser: whose prediction is weighed, or None.
        weighted_channels: so many leading channels of the prediction are weighed; None: all.
    """

    def __init__(
        self,
        draw: Callable[[int], tuple[Tensor, Tensor | None]],
        module: nn.Module,
        scheduler: Any,
        denoiser: nn.Module | None = None,
        weighted_channels: int | None = None,
    ) -> None:
        self._draw = draw
        self._module = module
        self._denoiser = denoiser
        self._weighted_channels = weighted_channels
        self._active = False
        self._proven = False
        self._weighed = False
        self._drawn: Draw | None = None
        with ExitStack() as undo:
            for name in ("add_noise", "get_velocity"):
                if hasattr(scheduler, name):
                    self._shadow(scheduler, name, undo)
            if denoiser is not None:
                self._hook(denoiser, undo)
            self._undo = undo.pop_all()

    def start(self) -> None:
        """A training batch begins."""
        self._active, self._weighed, self._drawn = True, False, None

    def stop(self, *, skipped: bool) -> Draw | None:
        """A training batch is over; what it was given. One skipped before its draw leaves the proof to the next."""
        drawn, self._drawn, self._active = self._drawn, None, False
        if not (self._proven or (skipped and drawn is None)):
            self._prove(drawn)
        return drawn

    def detach(self) -> None:
        """Leave scheduler and denoiser as they were."""
        self._active, self._drawn = False, None
        self._undo.close()

    # ------------------------------------------------------------------ 2: timesteps

    def _shadow(self, scheduler: Any, name: str, undo: ExitStack) -> None:
        original = getattr(scheduler, name)
        signature = inspect.signature(original)
        if "timesteps" not in signature.parameters:
            raise HastenError(
                f"timestep_sampling: noise_scheduler: expected {name}(samples, noise, timesteps), got {name}{signature}; use "
                "attach='protocol'"
            )
        if name in vars(scheduler):
            raise HastenError(
                f"timestep_sampling: noise_scheduler: expected the {name} of its class, got one that something has put in "
                "front of it, such as another TimestepSampling; attach one of them"
            )

        @_outside_graphs
        @functools.wraps(original)
        def rewriting(*args: Any, **kwargs: Any) -> Any:
            if self._active:
                given = signature.bind(*args, **kwargs).arguments
                self._rewrite(name, given["timesteps"], n=len(next(iter(given.values()))))
            return original(*args, **kwargs)

        vars(scheduler)[name] = rewriting
        undo.callback(vars(scheduler).pop, name, None)

    def _rewrite(self, name: str, timesteps: Any, n: int) -> None:
        """Draw once a batch, into the tensor that the module made."""
        if self._drawn is not None and self._denoiser is not None and not torch.is_grad_enabled():
            return  # a preview; were it the training path after all, _check_given would tell
        _check_writable(name, timesteps, n)
        if self._drawn is None:
            if not self._proven:
                self._check_not_owned(name, timesteps)
            t, weights = self._draw(n)
            timesteps.copy_(t)
            self._drawn = Draw(timesteps, t, weights)
        elif not timesteps.is_set_to(self._drawn.timesteps):
            raise HastenError(
                f"timestep_sampling: {name}: expected the timesteps of the first call in this batch, got another "
                "tensor (two loaders in one step, or an optimizer such as LBFGS that repeats it?), and only one draw "
                "can be weighed; pass the same tensor, or use attach='protocol'"
            )

    def _check_not_owned(self, name: str, timesteps: Tensor) -> None:
        storage = timesteps.untyped_storage().data_ptr()
        for owned, tensor in chain(self._module.named_parameters(), self._module.named_buffers()):
            here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if here.untyped_storage().data_ptr() == storage:
                raise HastenError(
                    f"timestep_sampling: {name}: timesteps: expected a tensor made for this batch, got memory of "
                    f"{type(self._module).__name__}'s own {owned}, which would be overwritten; pass a copy (t.clone())"
                )

    # ------------------------------------------------------------------ 3: weights

    def _hook(self, denoiser: nn.Module, undo: ExitStack) -> None:
        @_outside_graphs
        def weighing(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            return self._weigh(args, kwargs, output)

        compiled = vars(denoiser).get("_compiled_call_impl")
        if compiled is None:
            undo.callback(denoiser.register_forward_hook(weighing, with_kwargs=True).remove)
        else:  # denoiser.compile(): its hooks would be part of the graph
            vars(denoiser)["_compiled_call_impl"] = lambda *args, **kwargs: weighing(
                denoiser, args, kwargs, compiled(*args, **kwargs)
            )
            undo.callback(setattr, denoiser, "_compiled_call_impl", compiled)

    def _weigh(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        """The same prediction, whose gradient will be weighed; without gradients (previews) the very same object."""
        if not self._active or not torch.is_grad_enabled():
            return output
        weights = None if self._drawn is None else self._drawn.weights
        weighed = output if weights is None else self._weighed_output(output, weights)
        if not self._proven:  # after the sizes: of part of a batch, they are the fault
            self._check_given(args, kwargs)
        return weighed

    def _weighed_output(self, output: Any, weights: Tensor) -> Any:
        self._weighed = True
        if isinstance(output, Tensor):
            return self._weighed_prediction(output, weights)
        if isinstance(getattr(output, "sample", None), Tensor):
            output.sample = self._weighed_prediction(output.sample, weights)
            return output
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            outputs = (self._weighed_prediction(output[0], weights), *output[1:])
            return type(output)._make(outputs) if hasattr(output, "_make") else outputs  # type: ignore[attr-defined]
        raise HastenError(
            f"timestep_sampling: denoiser: expected to return a tensor, an object with .sample or a tuple led by a "
            f"tensor, got {type(output).__name__}; pass weighting='fold'"
        )

    def _weighed_prediction(self, prediction: Tensor, weights: Tensor) -> Tensor:
        if prediction.ndim == 0 or len(prediction) != len(weights):
            raise HastenError(
                f"timestep_sampling: denoiser: expected predictions for the {len(weights)} samples given to add_noise, "
                f"got shape {tuple(prediction.shape)}; pass weighting='fold', or use attach='protocol'"
            )
        weights = weights.view(-1, *[1] * (prediction.ndim - 1))
        if self._weighted_channels is not None:
            channels = prediction.size(1) if prediction.ndim > 1 else 0
            if self._weighted_channels > channels:
                raise HastenError(
                    f"timestep_sampling: weighted_channels: expected at most {channels}, those of the denoiser's "
                    f"prediction, got {self._weighted_channels}"
                )
            channel = torch.arange(channels, device=weights.device).view(-1, *[1] * (prediction.ndim - 2))
            weights = torch.where(channel < self._weighted_channels, weights, 1.0)
        return _WeighGradient.apply(prediction, weights)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ 4: proof

    def _check_given(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """By value, which waits for the device: the module may have copied or scaled its timesteps before."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._drawn is None or not any(_same_values(leaf, self._drawn.t) for leaf in given):
            raise HastenError(
                "timestep_sampling: denoiser: expected to be given the timesteps that add_noise was given, got others "
                "(was a copy made, or t / T computed, before add_noise?); move that below add_noise, or use "
                "attach='protocol'"
            )

    def _prove(self, drawn: Draw | None) -> None:
        if drawn is None:
            raise HastenError(
                "timestep_sampling: add_noise: expected the scheduler to be called in a training batch, got no call; "
                "name the scheduler in use by noise_scheduler=, or use attach='protocol'"
            )
        if self._denoiser is not None and not self._weighed:
            raise HastenError(
                f"timestep_sampling: denoiser: expected the training batch to call {type(self._denoiser).__name__}, "
                "got no call that its hooks see (another module, .forward, or inside a compiled one?); name the "
                "outermost module called by denoiser=, or pass weighting='fold'"
            )
        self._proven = True


class _WeighGradient(torch.autograd.Function):
    """Identity whose backward multiplies the gradient, in the gradient's own dtype."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        # not a view, which autograd would forbid the module to change in place
        return prediction.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        return grad * weights.to(grad.dtype), None


def _check_writable(name: str, timesteps: Any, n: int) -> None:
    fault = None
    if not isinstance(timesteps, Tensor):
        fault = type(timesteps).__name__
    elif timesteps.is_floating_point() or timesteps.shape != (n,):
        fault = f"{str(timesteps.dtype).removeprefix('torch.')} of shape {tuple(timesteps.shape)}"
    elif n > 1 and timesteps.stride(0) == 0:
        fault = "an expanded view of one number"
    elif timesteps.is_inference():
        fault = "a tensor made in inference mode"
    if fault is not None:
        raise HastenError(
            f"timestep_sampling: {name}: timesteps: expected integers of shape ({n},) that can be rewritten in place, "
            f"got {fault}; draw them by torch.randint(0, T, (n,)), or use attach='protocol'"
        )


def _same_values(given: Tensor, t: Tensor) -> bool:
    if given.numel() != t.numel() or given.dtype == torch.bool:
        return False
    return bool((given.detach().flatten() == t.to(given.device, given.dtype)).all())


# ------------------------------------------------------------------ discovery


def schedulers(pl_module: nn.Module) -> dict[str, Any]:
    """Name -> scheduler, of the module's own attributes: what has ``add_noise`` and ``betas``."""
    attributes = {**vars(pl_module), **dict(pl_module.named_children())}
    found = {id(v): (k, v) for k, v in attributes.items() if hasattr(v, "add_noise") and hasattr(v, "betas")}
    return dict(found.values())  # one name for each


def find_scheduler(pl_module: nn.Module, name: str | None) -> Any:
    """The scheduler called ``name``, dots allowed, or else the only one."""
    wanted = "with add_noise and betas"
    return _find(pl_module, "noise_scheduler", name, schedulers(pl_module), wanted)


def find_denoiser(pl_module: nn.Module, name: str | None) -> nn.Module:
    """The denoiser called ``name``, dots allowed, or else the only child whose forward takes timesteps."""
    children = {name: child for name, child in pl_module.named_children() if _takes_timesteps(child)}
    wanted = "a child made in __init__ whose forward takes timestep or timesteps"
    denoiser = _find(pl_module, "denoiser", name, children, wanted)
    if not isinstance(denoiser, nn.Module):
        raise HastenError(
            f"timestep_sampling: denoiser: expected {name!r} to be an nn.Module, got {type(denoiser).__name__}"
        )
    return denoiser


def _find(pl_module: nn.Module, role: str, name: str | None, candidates: Mapping[str, Any], wanted: str) -> Any:
    owner = type(pl_module).__name__
    if name is not None:
        try:
            return attrgetter(name)(pl_module)
        except AttributeError as error:
            remedy = did_you_mean(name, candidates) or "; dots allowed; keep it as an attribute"
            raise HastenError(
                f"timestep_sampling: {role}: expected an attribute of {owner}, got {name!r}{remedy}"
            ) from error
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    got = ", ".join(candidates) or "none"
    raise HastenError(
        f"timestep_sampling: {role}: expected one in {owner}, {wanted}, got {got}; pass {role}='<attribute>', dots "
        "allowed; keep it as an attribute"
    )


def _takes_timesteps(module: nn.Module) -> bool:
    forward = getattr(module, "_orig_mod", module).forward  # torch.compile(module).forward takes (*args, **kwargs)
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):  # a scripted or traced forward has no signature
        return False
    return not {"timestep", "timesteps"}.isdisjoint(parameters)
