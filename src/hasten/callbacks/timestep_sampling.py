"""TimestepSampling: draw and weigh the timesteps of anyone's diffusion training by a sampler.

Who draws: the sampler, by a generator of its own on each process. Who puts the draw in place and weighs it: the module
itself (``_Protocol``, below), or an adapter around it (``_timestep_adapter.py``). When: from ``on_train_batch_start``
to ``on_train_batch_end``, never else.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Generator, Tensor, nn

from hasten.callbacks._timestep_adapter import TimestepAdapter, find_denoiser, find_scheduler, schedulers
from hasten.errors import HastenError
from hasten.functional.draws import seed_of
from hasten.nn import TimestepSampler, num_timesteps

_ATTACH = ("auto", "protocol", "adapter")
_WEIGHTING = ("grad", "fold", "none")


class TimestepSampling(Callback):
    """Draw the training timesteps of any diffusion module by a sampler, and weigh its loss by the sampler's weights.

    **By the protocol**, chosen where the module has a callable ``timestep_sampler``: its ``training_step`` calls
    ``t, w = self.timestep_sampler(n)`` and multiplies the loss of each sample by its ``w``, as described by
    ``hasten.nn.protocols.SupportsTimestepSampler``. The attribute is this callback's sampler during a training batch
    and the module's own at any other time.

    **By the adapter**, for a module as it is: ``scheduler.add_noise`` overwrites the timesteps it is given, in place,
    and row i of the gradient that reaches the denoiser's prediction is multiplied by the weight of t_i. Exact for any
    loss that is a sum over samples; a further term of the loss on the same prediction is weighed too, unless
    ``weighted_channels`` leaves it out. The loss that the module logs stays unweighted, but is an average under the
    sampler's law: curves of different samplers do not compare. Logs ``sampler/mean_t`` and ``sampler/mean_weight``. The
    first batch ends in an error unless the module took this way. What was computed from the timesteps before
    ``add_noise``, such as a loss weight, stays as it was, and no check can tell: compute everything that depends on t
    after ``add_noise``, or use the protocol.

    Validation, test and sampling draw as ever. After the fit, or an exception, the module is as it was found. A
    checkpoint holds the generators of all processes, and a resumed run draws what one that never stopped would have.

    Args:
        sampler: or what makes one from the module's noise scheduler.
        noise_scheduler: the attribute of the module, dots allowed, that adds noise; None: the only one that has
            ``add_noise`` and ``betas``.
        denoiser: the attribute whose prediction is weighed; None: the only child whose forward takes ``timestep`` or
            ``timesteps``. Of a compiled one, what is called: ``torch.compile(net)``, not ``net``.
        attach: "auto", "protocol" or "adapter".
        weighting: of the adapter: "grad" as above; "fold" moves the weights into the law (the same gradient in
            expectation, up to a constant) and needs no denoiser: for those with an unusual output, or called where no
            hook sees it; "none" leaves them out.
        weighted_channels: so many leading channels of the prediction are weighed, >= 1, e.g. the noise but not the
            variance; None: all.
        seed: of the generators, of which every rank has its own; None: the global seed.

    Raises:
        ValueError: for an unknown word or a number out of range.
        HastenError: at set-up and in the first batch, where the module cannot be served; says what would help.

    Example:
        >>> from hasten.nn import SpeeDSampler
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[TimestepSampling(SpeeDSampler)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        sampler: TimestepSampler | Callable[[Any], TimestepSampler],
        *,
        noise_scheduler: str | None = None,
        denoiser: str | None = None,
        attach: str = "auto",
        weighting: str = "grad",
        weighted_channels: int | None = None,
        seed: int | None = None,
    ) -> None:
        if not callable(sampler):
            raise TypeError(
                f"timestep_sampling: sampler: expected a TimestepSampler or a function of the noise scheduler, got "
                f"{type(sampler).__name__}"
            )
        for name, word, words in (("attach", attach, _ATTACH), ("weighting", weighting, _WEIGHTING)):
            if word not in words:
                raise ValueError(f"timestep_sampling: {name}: expected one of {', '.join(words)}, got {word!r}")
        if weighted_channels is not None and weighted_channels < 1:
            raise ValueError(f"timestep_sampling: weighted_channels: expected >= 1 or None, got {weighted_channels}")
        if weighting != "grad" and (denoiser is not None or weighted_channels is not None):
            raise ValueError(
                "timestep_sampling: weighting: expected 'grad' with denoiser= or weighted_channels=, got "
                f"{weighting!r}, which leaves the denoiser alone"
            )
        self.sampler = sampler
        self.noise_scheduler = noise_scheduler
        self.denoiser = denoiser
        self.attach = attach
        self.weighting = weighting
        self.weighted_channels = weighted_channels
        self.seed = seed
        self._attachment: _Attachment | None = None
        self._sampler: TimestepSampler | None = None  # in use; outlives the fit, for what is saved after it
        self._base_seed = 0
        self._resumed: Mapping[str, Any] | None = None

    # ------------------------------------------------------------------ attaching

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._base_seed = torch.initial_seed() if self.seed is None else self.seed
        self._resumed = None
        protocol = self.attach == "protocol" or (self.attach == "auto" and _has_sampler(pl_module))
        self._attachment = self._by_protocol(pl_module) if protocol else self._by_adapter(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def _by_protocol(self, pl_module: LightningModule) -> "_Protocol":
        if self.weighting != "grad" or self.denoiser is not None or self.weighted_channels is not None:
            raise HastenError(
                "timestep_sampling: attach: expected no weighting, denoiser or weighted_channels by the protocol, "
                f"in which {type(pl_module).__name__} weighs its own loss; leave them out, or use attach='adapter'"
            )
        if not _has_sampler(pl_module):
            raise HastenError(
                f"timestep_sampling: attach: expected {type(pl_module).__name__} to have a callable timestep_sampler, "
                "got none; set one in __init__ and let training_step call t, w = self.timestep_sampler(n)"
            )
        if isinstance(self.sampler, TimestepSampler) and self.noise_scheduler is None:
            found = list(schedulers(pl_module).values())
            scheduler = found[0] if len(found) == 1 else None  # only to compare T
        else:
            scheduler = find_scheduler(pl_module, self.noise_scheduler)
        self._sampler = self._made_for(scheduler)
        return _Protocol(pl_module, self._sampler)

    def _by_adapter(self, pl_module: LightningModule) -> TimestepAdapter:
        scheduler = find_scheduler(pl_module, self.noise_scheduler)
        if not (hasattr(scheduler, "add_noise") and isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)):
            raise HastenError(
                f"timestep_sampling: noise_scheduler: expected add_noise and alphas_cumprod over integer timesteps, got "
                f"{type(scheduler).__name__} without; use attach='protocol'"
            )
        self._sampler = sampler = self._made_for(scheduler)
        if type(sampler).update is not TimestepSampler.update:
            raise HastenError(
                f"timestep_sampling: sampler: expected one that needs no losses, got {type(sampler).__name__}, and the "
                "adapter sees none; use attach='protocol' and let training_step call self.timestep_sampler.update"
            )
        denoiser = find_denoiser(pl_module, self.denoiser) if self.weighting == "grad" else None
        return TimestepAdapter(_draw(sampler, self.weighting), pl_module, scheduler, denoiser, self.weighted_channels)

    def _made_for(self, scheduler: Any) -> TimestepSampler:
        sampler = self.sampler if isinstance(self.sampler, TimestepSampler) else self.sampler(scheduler)
        if not isinstance(sampler, TimestepSampler):
            raise HastenError(
                f"timestep_sampling: sampler: expected a function that returns a TimestepSampler, got "
                f"{type(sampler).__name__}"
            )
        if scheduler is not None and num_timesteps(scheduler) != len(sampler.probs):
            raise HastenError(
                f"timestep_sampling: sampler: expected T = {num_timesteps(scheduler)} as in the module's scheduler, "
                f"got {len(sampler.probs)}; pass the class, e.g. hasten.nn.SpeeDSampler, and it is made to fit"
            )
        return sampler

    # ------------------------------------------------------------------ drawing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed, or go on as the checkpoint says: only now are device, rank and global_step all settled."""
        sampler = cast(TimestepSampler, self._sampler)
        device = trainer.strategy.root_device
        sampler.to(device)
        sampler.generator = Generator(device)
        # a plain sum would give rank 1 of one seed the draws of rank 0 of the next
        sampler.generator.manual_seed(seed_of(self._base_seed, trainer.global_rank, trainer.global_step))
        if self._resumed is None:
            return
        sampler.load_state(self._resumed["sampler"])
        states = self._resumed["generators"]
        if len(states) == trainer.world_size and self._resumed["device"] == device.type:
            sampler.generator.set_state(states[trainer.global_rank])
        else:
            rank_zero_warn(
                f"timestep_sampling: the checkpoint is of {len(states)} processes on {self._resumed['device']}, this "
                f"run has {trainer.world_size} on {device.type}: it draws from new seeds, not as the first would have"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        cast(TimestepSampler, self._sampler).step(trainer.global_step)
        cast(_Attachment, self._attachment).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        skipped = pl_module.automatic_optimization and not outputs  # training_step returned None
        drawn = cast(_Attachment, self._attachment).stop(skipped=skipped)
        if drawn is not None:
            pl_module.log("sampler/mean_t", drawn.t.float().mean())
            if drawn.weights is not None:
                pl_module.log("sampler/mean_weight", drawn.weights.mean())

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """What the sampler needs, and the generators of all processes: Lightning keeps the file of rank zero alone."""
        if self._sampler is None or self._sampler.generator is None:
            return {}
        state = self._sampler.state()
        generators = [state.pop("generator")]
        if dist.is_available() and dist.is_initialized():
            own, generators = generators[0], [None] * dist.get_world_size()
            dist.all_gather_object(generators, own)
        return {"sampler": state, "generators": generators, "device": self._sampler.generator.device.type}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict


class _Protocol:
    """The module's ``timestep_sampler``, replaced by ours during a training batch.

    Ours lies in the instance's ``__dict__``, where it hides a registered child without being one: buffers and
    state_dict stay what they were when EMA made its copy.
    """

    def __init__(self, pl_module: LightningModule, sampler: TimestepSampler) -> None:
        attributes = vars(pl_module)
        if isinstance(attributes.get("timestep_sampler"), nn.Module):
            raise HastenError(
                f"timestep_sampling: attach: expected the {type(pl_module).__name__}'s own timestep_sampler, got one "
                "that another TimestepSampling has put there; attach one of them"
            )
        self._attributes = attributes
        self._own = {name: value for name, value in attributes.items() if name == "timestep_sampler"}
        self._sampler = sampler
        self._called = False
        self._handle = sampler.register_forward_hook(self._note_call)

    def start(self) -> None:
        """A training batch begins."""
        self._attributes["timestep_sampler"] = self._sampler

    def stop(self, *, skipped: bool) -> None:
        """A training batch is over; the first that is not skipped proves that the module asks the sampler."""
        self._restore()
        if not (self._called or skipped):
            raise HastenError(
                "timestep_sampling: protocol: expected the training batch to call self.timestep_sampler, got no call; "
                "let training_step call t, w = self.timestep_sampler(n), or use attach='adapter'"
            )

    def detach(self) -> None:
        """Leave the module as it was."""
        self._restore()
        self._handle.remove()

    def _restore(self) -> None:
        self._attributes.pop("timestep_sampler", None)
        self._attributes.update(self._own)

    def _note_call(self, *_: Any) -> None:
        self._called = True


_Attachment = _Protocol | TimestepAdapter


def _has_sampler(pl_module: LightningModule) -> bool:
    return callable(getattr(pl_module, "timestep_sampler", None))


def _draw(sampler: TimestepSampler, weighting: str) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """What draws n timesteps, (n,), and the weights of their gradients, (n,) or None."""

    def fold(n: int) -> tuple[Tensor, None]:
        # sampler.folded() of this moment, without its checks, which would wait for the device
        every = torch.arange(len(sampler.probs), device=sampler.probs.device)
        law = sampler.log_prob(every).exp() * sampler.weights
        return torch.multinomial(law, n, replacement=True, generator=sampler.generator), None

    return {"grad": sampler, "fold": fold, "none": lambda n: (sampler.sample(n), None)}[weighting]
