"""The signals that ask a run to stop: SIGTERM (pre-emption, a time limit) and SIGINT (Ctrl-C).

Finished work is on disk, so a run stops at once, by raising `Stopped`. In a walk or in training this would lose a layer or
many steps: there `StopAtSignal` defers the signal until the layer or the step is done. A second Ctrl-C always stops at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes

_listening = False
_deferring = False
_received: str | None = None  # the name of the signal


@contextmanager
def listening() -> Iterator[None]:
    """Handles the signals inside the context."""
    global _received, _deferring, _listening
    _received, _deferring, _listening = None, False, True
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _install()
    try:
        yield
    finally:
        _listening, _received = False, None
        if _in_main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def received() -> str | None:
    return _received


def defer_signals() -> None:
    """Also replaces Lightning's handler, which would start a collective wherever it interrupts."""
    global _deferring
    if _listening:
        _deferring = True
        _install()


def resume_signals() -> None:
    global _deferring
    _deferring = False


def ignore_signals() -> None:
    """For a run that is already ending and still has to report why."""
    if _listening and _in_main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _install() -> None:
    if _in_main_thread():  # other threads cannot set handlers
        for number in SIGNALS:
            signal.signal(number, _handle)


def _handle(number: int, frame: object) -> None:
    global _received
    again, _received = _received, signal.Signals(number).name
    if not _deferring or (again and number == signal.SIGINT):
        raise Stopped(f"stopped by {_received}")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
