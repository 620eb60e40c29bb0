"""A run that is asked to end: by SIGTERM, as schedulers and ``kill`` do, or by Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Stopped(BaseException):
    """A run was asked to end, and did; no Exception, so that a sweep ends with it.

    Args:
        signum: the signal.
        then: what became of the run, and how to go on.

    Example:
        >>> stopped = Stopped(signal.SIGTERM, "; nothing had begun")
        >>> print(stopped, stopped.exit_code)
        stopped by SIGTERM; nothing had begun 143
    """

    def __init__(self, signum: int, then: str = "") -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(f"stopped by {'Ctrl-C' if signum == signal.SIGINT else signal.Signals(signum).name}{then}")


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises ``Stopped`` as Ctrl-C raises KeyboardInterrupt, so that what is open is closed.

    Example:
        >>> with stopped_by_sigterm():
        ...     signal.raise_signal(signal.SIGTERM)
        Traceback (most recent call last):
        hasten.interruption.Stopped: stopped by SIGTERM
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that hears of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def stop_at_once(signum: int, frame: Any) -> NoReturn:
    """A handler of signals that ends the run where it stands."""
    raise Stopped(signum)
