"""The one error a user of hasten sees, and the wording its messages share."""

from collections.abc import Iterable
from difflib import get_close_matches


class HastenError(Exception):
    """A set-up that cannot work: one line that says what, where, wanted, got and how to mend it."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as the end of an error line, or all of them where none is near and they are few.

    Example:
        >>> did_you_mean("batchsize", ["batch_size", "val"])
        "; did you mean 'batch_size'?"
        >>> did_you_mean("x", ["cpu", "gpu"])
        '; choose one of: cpu, gpu'
    """
    choices = sorted(set(choices))
    near = get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose one of: {', '.join(choices)}" if 0 < len(choices) <= 20 else ""


def on_one_line(error: object) -> str:
    """What an exception says, with every run of blanks and line breaks as one blank.

    Example:
        >>> on_one_line(ValueError("no such   key"))
        'no such key'
    """
    return " ".join(str(error).split())
