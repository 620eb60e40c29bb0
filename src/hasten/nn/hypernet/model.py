"""Hypernetworks for any module: its own parameters stay, and what a small network makes of an input is added to them.

theta_t(input) = theta0_t + delta_t(E(input)) for each chosen tensor t. theta0 are the model's own parameters, E is the
encoding of constant norm, delta the network with its head. That theta0 is apart, and not the bias of the head's last
layer, changes nothing but its initial value: the two are the same class of functions.
"""

import copy
import inspect
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from hasten.errors import did_you_mean
from hasten.nn.hypernet.heads import ACTIVATIONS, HEADS, Head, Plan, size_of, within_budget
from hasten.nn.hypernet.inputs import Choice, InputEncoding, Range
from hasten.nn.hypernet.per_sample import WAYS, batch_norms, call_per_sample, way_for
from hasten.nn.modes import modes_kept
from hasten.nn.selection import ParameterChoice, select_parameters

log = logging.getLogger(__name__)

Inputs = Mapping[str, Range | Choice | tuple[float, float]]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class HyperModel(nn.Module):
    """A model whose chosen parameters depend on named inputs; built by :func:`hypernetize`.

    It is called as the model is, with the inputs as further keywords. One value of each for the whole batch costs one
    generated set of weights; (B,) or (B, D) values give every sample weights of its own. Then tensor arguments whose
    first dimension is B are taken apart sample by sample and all others shared: a table or a mask whose first dimension
    happens to be B, or a batch that stands second, is not what it seems. Outputs may be any pytree of tensors, each a
    number or with the samples first.

    A forward draws nothing and never waits for the device, ``out_of_range="error"`` and ``per_sample="unique"`` apart.
    Under torch.compile pass inputs as tensors: a Python number is a constant of the graph. The generated weights are in
    the model only while its forward runs: activation checkpointing inside of it, which runs parts of it again in the
    backward, would find theta0 there. It is refused where the model says that it does so.

    Attributes:
        model: the object that was passed in; its parameters are theta0, its state_dict keys stand under "model.".
        encoding: from inputs to E.
        hyper: from E to the deltas of all those, (..., e) -> (..., P), each flat, one after the other.
        names: the parameters of the model that are generated.

    Example:
        >>> hyper = hypernetize(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), {"angle": (0, 180)})
        >>> x = torch.randn(4, 2)
        >>> hyper(x, angle=45).shape, hyper(x, angle=torch.tensor([0.0, 45.0, 90.0, 180.0])).shape
        (torch.Size([4, 1]), torch.Size([4, 1]))
        >>> hyper.delta(angle=45)["0.weight"].shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: InputEncoding,
        hyper: nn.Module,
        names: Sequence[str],
        *,
        per_sample: str,
        model_inputs: Sequence[str],
    ):
        super().__init__()
        self.model = model
        self.encoding = encoding
        self.hyper = hyper
        self.names = tuple(names)
        self.per_sample = per_sample
        self.model_inputs = tuple(model_inputs)
        self._arguments, self._takes_any = _arguments(model)
        self._batch_norms = batch_norms(model)

    def train(self, mode: bool = True) -> Self:
        """As of any module.

        Raises:
            RuntimeError: where the model has turned to activation checkpointing.
        """
        if mode:
            _refuse_recomputation(self.model)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the weights of the inputs, which are keywords; all else goes to the model.

        Raises:
            TypeError: for an input that is missing, a keyword that nobody takes, or outputs that hide their tensors.
            ValueError: for values, shapes or batch sizes that do not fit.
            RuntimeError: for weights per sample in a model that is training its batch norms, or that vmap cannot map.
        """
        values = {name: kwargs.pop(name) for name in self.encoding.inputs if name in kwargs}
        unknown = [name for name in kwargs if name not in self._arguments]
        # a model that takes any keyword may take this one, unless an input is missing in its place
        if unknown and not (self._takes_any and len(values) == len(self.encoding.inputs)):
            wanted = ", ".join(self.encoding.inputs)
            nearest = did_you_mean(unknown[0], [*self.encoding.inputs, *self._arguments])
            raise TypeError(f"hypernet: inputs: expected {wanted}, got {', '.join(unknown)}{nearest}")
        encoded = self._encoded(values)
        passed = {name: self._as_passed(name, values[name]) for name in self.model_inputs}
        kwargs |= passed
        if encoded.ndim == 1:
            return functional_call(self.model, self._theta(encoded), args, kwargs)
        return call_per_sample(
            self.model,
            self._theta,
            encoded,
            args,
            kwargs,
            way=self.per_sample,
            norms=self._batch_norms,
            one_for_all=[value for name, value in passed.items() if not self._is_per_sample(name, value)],
        )

    def generate(self, **inputs: Any) -> dict[str, Tensor]:
        """Theta by parameter name: its shape, or ``(B, *shape)`` where an input is per sample."""
        return self._theta(self._encoded(inputs))

    def delta(self, **inputs: Any) -> dict[str, Tensor]:
        """What is added to the model's own parameters, by name: shape, or ``(B, *shape)`` for inputs per sample."""
        return self._by_name(self.hyper(self._encoded(inputs)), self._own())

    def materialize(self, *, recalibrate: Iterable[Any] | None = None, **inputs: Any) -> nn.Module:
        """A deep copy of the model with the weights of one value of each input: a plain module, to export or to keep.

        Args:
            recalibrate: batches, images or tuples that begin with them, from which the running statistics of batch
                norms are estimated anew, in training mode; those of training are a mixture over all inputs.
            inputs: one value each.
        """
        with torch.no_grad():
            encoded = self._encoded(inputs)
            if encoded.ndim > 1:
                raise ValueError(f"hypernet: materialize: expected one value of each input, got {len(encoded)}")
            model = copy.deepcopy(self.model)
            for name, weights in self._theta(encoded).items():
                model.get_parameter(name).copy_(weights)
        if recalibrate is not None:
            passed = {name: self._as_passed(name, inputs[name]) for name in self.model_inputs}
            hook = model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | passed), with_kwargs=True)
            try:
                with modes_kept(model):
                    update_bn(recalibrate, model)
            finally:
                hook.remove()
        return model

    def param_groups(self, *, base_lr: float, hyper_lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimizer, each trainable parameter once; an empty group is left out.

        Args:
            base_lr: of the model's own parameters.
            hyper_lr: of the hypernetwork.
            weight_decay: of the model's matrices and kernels; norms, biases and the hypernetwork have none.
        """
        groups: dict[str, dict[str, Any]] = {
            "base": {"lr": base_lr, "weight_decay": weight_decay},
            "base_no_decay": {"lr": base_lr, "weight_decay": 0.0},
            "hyper": {"lr": hyper_lr, "weight_decay": 0.0},
        }
        exempt = self.no_weight_decay()
        members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in self.named_parameters():
            plain = parameter.ndim <= 1 or name in exempt
            group = "hyper" if name.startswith("hyper.") else "base_no_decay" if plain else "base"
            if parameter.requires_grad:
                members[group].append(parameter)
        return [{"name": name, "params": members[name], **options} for name, options in groups.items() if members[name]]

    def no_weight_decay(self) -> set[str]:
        """Names that no optimizer should decay, in timm's convention: the hypernetwork, and what the model names."""
        of_model = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()  # type: ignore[operator]
        return {f"hyper.{name}" for name, _ in self.hyper.named_parameters()} | {f"model.{name}" for name in of_model}

    def sample_inputs(self, n: int | None = None, *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Draw one value of each input, or n, on the generator's device; they are returned on the model's."""
        device = self._like().device
        return {name: value.to(device) for name, value in self.encoding.sample(n, generator).items()}

    def _like(self) -> Tensor:
        return next(self.hyper.parameters())

    def _encoded(self, values: Mapping[str, Any]) -> Tensor:
        return self.encoding(values, self._like())

    def _theta(self, encoded: Tensor) -> dict[str, Tensor]:
        # one sum for all tensors: one for each would cost a small network as much as its layers do
        own = self._own()
        flat = torch.cat([parameter.flatten() for parameter in own])
        return self._by_name(flat + self.hyper(encoded).to(flat.dtype), own)

    def _own(self) -> list[Tensor]:
        """Theta0. By attribute, not get_parameter: under functional_call they are tensors that are no parameters."""
        places = [name.rpartition(".") for name in self.names]
        return [getattr(self.model.get_submodule(owner), leaf) for owner, _, leaf in places]

    def _by_name(self, flat: Tensor, own: Sequence[Tensor]) -> dict[str, Tensor]:
        """(..., P) -> a view for each name, (..., *shape), in the type of theta0's, which are ``own``."""
        parts = flat.split([parameter.numel() for parameter in own], dim=-1)
        lead = flat.shape[:-1]
        return {
            name: part.reshape((*lead, *parameter.shape)).to(parameter.dtype)
            for name, part, parameter in zip(self.names, parts, own, strict=True)
        }

    def _as_passed(self, name: str, value: Any) -> Any:
        """An input as the model sees it: a number or tensor as given, a list as a tensor, a choice as its position."""
        given = self.encoding.inputs[name]
        if isinstance(value, Tensor) or (isinstance(given, Range) and isinstance(value, Real)):
            return value
        return given.read(name, value, "error", self._like())

    def _is_per_sample(self, name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > len(self.encoding.inputs[name].shape)


def hypernetize(
    model: nn.Module,
    inputs: Inputs,
    *,
    params: ParameterChoice = "auto",
    hidden: Sequence[int] = (16, 64, 128),
    activation: str = "leaky_relu",
    head: str | Head = "dense",
    norm: str = "unit",
    encoding: str | None = "cos_sin",
    residual: bool = True,
    init: str = "fan_out",
    base_init: str = "keep",
    freeze_base: bool = False,
    per_sample: str = "auto",
    out_of_range: str = "clamp",
    model_inputs: Sequence[str] = (),
    max_dense_params: int = 50_000_000,
    generator: Generator | None = None,
) -> HyperModel:
    """Let chosen parameters of a model depend on named inputs, which a small network turns into changes of them.

    The model stays the object it is, with its class, its modules and its state_dict keys. Only where an argument says
    so its values change in place: ``base_init="kaiming"``, ``residual=False`` and, for requires_grad, ``freeze_base``.

    Args:
        model: any module; tied parameters stay tied.
        inputs: name -> Range, Choice or (low, high).
        params: what is generated: "auto", weights and biases of every convolution and linear layer but the last; or as
            in :func:`select_parameters`: "all", "norm", "bias", globs, classes, or (name, parameter, owner) -> bool.
        hidden: widths of the network.
        activation: "leaky_relu", "relu", "gelu", "silu" or "tanh".
        head: "dense", "basis", "lora", "chunked", or a Dense, Basis, LoRA or Chunked of your own sizes.
        norm: of the encoding: "unit", or "per_dim" as in the paper; see :func:`magnitude_invariant_encoding`.
        encoding: "cos_sin"; for comparison "complement" or None.
        residual: False sets the chosen parameters to 0 in place, where they act as the output bias: for ablations.
        init: "fan_out", or "zero": no delta at the start.
        base_init: "keep", or "kaiming", for a model trained from scratch: kernels and matrices among the chosen are
            drawn anew, normal with fan-in, their biases 0.
        freeze_base: train the hypernetwork alone.
        per_sample: how weights per sample are applied: "vmap"; "loop", a call a sample; "unique", a call for each
            distinct input; "auto": vmap, or a loop for recurrent layers, which vmap cannot serve.
        out_of_range: for tensors: "clamp"; "error", which waits for the device; "ignore", where the encoding repeats.
            Numbers are always checked.
        model_inputs: inputs that the model takes as well, under the same name.
        max_dense_params: a dense head with more parameters is refused.
        generator: of all that is drawn here, on the CPU.

    Raises:
        ValueError: for arguments that do not fit the model, and for a dense head above the budget.
        TypeError: for parameters that cannot be added to.

    Source: MIP, arXiv:2304.07645. Ours are the division by sqrt(D) and the other heads.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> hyper = hypernetize(net, {"angle": (0, 180), "noise": Range(1e-3, 1, log=True)}, head="basis")
        >>> hyper(torch.randn(2, 1, 8, 8), angle=30.0, noise=0.1).shape, hyper.names
        (torch.Size([2, 10]), ('0.weight', '0.bias'))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hypernetize: model: expected an nn.Module, got {type(model).__name__}")
    if any(isinstance(part, HyperModel) for part in model.modules()):
        raise ValueError("hypernetize: model: expected a plain module, got a HyperModel; pass its .model")
    _refuse_recomputation(model)
    for argument, given, allowed in [
        ("activation", activation, ACTIVATIONS),
        ("init", init, ("fan_out", "zero")),
        ("base_init", base_init, ("keep", "kaiming")),
        ("per_sample", per_sample, ("auto", *WAYS)),
    ]:
        if given not in allowed:
            raise ValueError(f"hypernetize: {argument}: expected one of {', '.join(allowed)}, got {given!r}")
    _check_hidden(hidden)
    chosen = _generated(model, params)
    head = within_budget(head, _shapes(chosen), hidden[-1], max_dense_params, _shapes(_norms(model)))
    encode = InputEncoding(inputs, kind=encoding, norm=norm, out_of_range=out_of_range)
    _check_arguments(model, encode.inputs, model_inputs)
    per_sample = way_for(model, per_sample)
    if norms := batch_norms(model):
        warnings.warn(
            f"hypernetize: {norms[0]}: running statistics of batch norms will mix all inputs; re-estimate them "
            "with materialize(recalibrate=batches), or use GroupNorm",
            stacklevel=2,
        )
    plan = Plan(
        _shapes(chosen), encode.out_features, encode.bound, tuple(hidden), activation, init == "zero", generator
    )
    hyper = head.build(plan)
    like = next(iter(chosen.values()))
    for part in (encode, hyper):
        part.to(like.dtype).to(like.device)
    _initialize_base(model, chosen, base_init, residual, generator)
    if freeze_base:
        model.requires_grad_(False)
    log.info(
        "hypernetize: %s parameters of %s from %s: %s",
        f"{sum(parameter.numel() for parameter in hyper.parameters()):,}",
        head,
        ", ".join(encode.inputs),
        ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in chosen.items()),
    )
    return HyperModel(model, encode, hyper, tuple(chosen), per_sample=per_sample, model_inputs=model_inputs)


def head_sizes(
    model: nn.Module, *, params: ParameterChoice = "auto", hidden: Sequence[int] = (16, 64, 128)
) -> list[dict[str, Any]]:
    """What each head would cost, a row each: head, params, weights, parameters, adam_gib (training, in float32).

    For a model with norm layers the last row is a dense head that generates these alone.

    Args:
        model: is not changed.
        params: as in :func:`hypernetize`.
        hidden: widths of the network before the head.

    Example:
        >>> rows = head_sizes(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10)))
        >>> [(row["head"], row["parameters"]) for row in rows[:2]]
        [('Dense()', 1292800), ('Basis(k=8)', 81824)]
    """
    _check_hidden(hidden)
    shapes = _shapes(_generated(model, params))
    rows = [{"params": params} | size_of(head, shapes, hidden[-1]) for head in HEADS.values()]
    if params != "norm" and (norms := _norms(model)):
        rows.append({"params": "norm"} | size_of(HEADS["dense"], _shapes(norms), hidden[-1]))
    return rows


def _generated(model: nn.Module, params: ParameterChoice) -> dict[str, nn.Parameter]:
    """The parameters that ``params`` means, by name, all of which a delta can be added to."""
    if params == "auto":
        layers = [layer for layer in model.modules() if isinstance(layer, _LAYERS)]
        if len(layers) < 2:
            raise ValueError(
                f"hypernetize: params: expected at least two convolutions or linear layers for 'auto', which leaves "
                f"out the last, got {len(layers)}; name what is to be generated, e.g. params='all'"
            )
        last = {id(parameter) for parameter in layers[-1].parameters(recurse=False)}
        chosen = select_parameters(model, lambda _, own, layer: isinstance(layer, _LAYERS) and id(own) not in last)
    else:
        chosen = select_parameters(model, params)
    for name, parameter in chosen.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(f"hypernetize: {name}: expected a shape, got a lazy parameter; run the model once before")
        if hasattr(parameter, "full_tensor"):  # a DTensor; its class takes most of a second to import
            raise TypeError(
                f"hypernetize: {name}: expected a whole parameter, got a sharded one; hypernetize, then shard"
            )
        if not parameter.is_floating_point():
            raise TypeError(
                f"hypernetize: {name}: expected floating point, got {parameter.dtype}; leave it out of params, or "
                "dequantize the model"
            )
    return chosen


def _norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of norm layers by name; none is no error here."""
    try:
        return select_parameters(model, "norm")
    except ValueError:
        return {}


def _shapes(parameters: Mapping[str, nn.Parameter]) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in parameters.values()]


def _check_hidden(hidden: Sequence[int]) -> None:
    widths = isinstance(hidden, Sequence) and all(isinstance(width, int) for width in hidden)
    if not widths:
        raise TypeError(f"hypernetize: hidden: expected a list of widths, got {hidden!r}; e.g. [16, 64, 128]")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hypernetize: hidden: expected at least one width, each at least 1, got {tuple(hidden)}")


def _arguments(model: nn.Module) -> tuple[frozenset[str], bool]:
    """The keywords that a model's forward names, and whether it takes any other."""
    parameters = inspect.signature(model.forward).parameters.values()
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = frozenset(parameter.name for parameter in parameters if parameter.kind not in open_ended)
    return named, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _check_arguments(model: nn.Module, inputs: Iterable[str], model_inputs: Sequence[str]) -> None:
    arguments, takes_any = _arguments(model)
    forward = f"{type(model).__name__}.forward"
    if isinstance(model_inputs, str):
        raise TypeError(f"hypernetize: model_inputs: expected a list of names, got {model_inputs!r}")
    for name in model_inputs:
        if name not in inputs:
            raise ValueError(f"hypernetize: model_inputs: expected names of inputs, got {name!r}")
        if name not in arguments and not takes_any:
            raise ValueError(f"hypernetize: model_inputs: expected arguments of {forward}, got {name!r}")
    for name in inputs:
        if name in arguments and name not in model_inputs:
            raise ValueError(
                f"hypernetize: inputs: expected a name that {forward} does not take, got {name!r}; rename it, or list "
                "it in model_inputs if the model is to see it too"
            )


@torch.no_grad()
def _initialize_base(
    model: nn.Module, chosen: Mapping[str, nn.Parameter], base_init: str, residual: bool, generator: Generator | None
) -> None:
    """Set theta0 in place, as far as an argument asks for it."""
    for name, parameter in chosen.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not residual:
            parameter.zero_()
        elif base_init == "kaiming" and isinstance(owner, _LAYERS):
            if parameter.ndim > 1:
                std = math.sqrt(2) / math.sqrt(_fan_in(owner, parameter))
                parameter.copy_(torch.empty_like(parameter, device="cpu").normal_(std=std, generator=generator))
            else:
                parameter.zero_()
    if not residual:
        log.warning("hypernetize: residual=False: %d parameters of the model were set to 0 in place", len(chosen))


def _fan_in(layer: nn.Module, weight: Tensor) -> int:
    """How many inputs each output of a layer is a sum over, strides apart."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # its weight is (C_in, C_out / groups, ...)
        return weight.shape[0] // layer.groups * weight[0, 0].numel()
    return weight[0].numel()


def _refuse_recomputation(model: nn.Module) -> None:
    """Refuse activation checkpointing, as timm, transformers and torchvision name it: see HyperModel."""
    for name, part in model.named_modules():
        for flag in ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint"):
            if getattr(part, flag, False) is True:
                raise RuntimeError(
                    f"hypernet: {f'{name}.{flag}'.lstrip('.')}: expected no activation checkpointing inside of the "
                    "model, whose backward would find other weights there, got True; turn it off, or recompute the "
                    "whole call by torch.utils.checkpoint"
                )
