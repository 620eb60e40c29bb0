"""How many batches a datamodule must have that hands out one an iteration, all of them in one epoch."""

from lightning import Trainer

from hasten.errors import HastenError


def check_length(trainer: Trainer | None, iterations: int, *, name: str) -> None:
    """Check that a run takes at most as many ``iterations`` as the datamodule ``name`` has batches for.

    Raises:
        HastenError: where it takes more, or goes on without end.

    Example:
        >>> from lightning import Trainer
        >>> check_length(Trainer(max_steps=20, accelerator="cpu", logger=False), 20, name="class_batches")
    """
    if trainer is None:
        return
    epochs = float("inf") if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = min(iterations * epochs, float("inf") if trainer.max_steps == -1 else trainer.max_steps)
    if steps > iterations:
        remedy = "trainer.max_epochs=1" if trainer.max_steps == -1 else f"+datamodule.iterations={steps}"
        raise HastenError(f"{name}: expected trainer.max_steps <= iterations = {iterations}, got {steps}; set {remedy}")
