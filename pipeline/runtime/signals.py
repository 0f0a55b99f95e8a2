"""Owns the signals that ask a run to stop: SIGTERM (pre-emption, a time limit) and SIGINT (Ctrl-C).

What is finished is on disk and whole, so a run may stop anywhere, and does so at once by raising `Stopped`. In a walk or a
training it would lose a layer or many steps: `StopAtSignal` makes it patient there, and the signal is kept until the layer
or the step is done. A second Ctrl-C stops even then.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on here

_listening = False
_patient = False
_asked: str | None = None  # the name of the signal that was kept


@contextmanager
def listening() -> Iterator[None]:
    """While inside, the signals are ours."""
    global _asked, _patient, _listening
    _asked, _patient, _listening = None, False, True
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _listen()
    try:
        yield
    finally:
        _listening, _asked = False, None
        if _in_main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def asked() -> str | None:
    return _asked


def defer_signals() -> None:
    """Also takes the signals back from Lightning, whose own handler would start a collective wherever it interrupts."""
    global _patient
    if _listening:  # else they are not ours
        _patient = True
        _listen()


def resume_signals() -> None:
    global _patient
    _patient = False


def ignore_signals() -> None:
    """The run is ending already, and has something to say."""
    if _listening and _in_main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _listen() -> None:
    if _in_main_thread():  # the only one that may
        for number in SIGNALS:
            signal.signal(number, _received)


def _received(number: int, frame: object) -> None:
    global _asked
    again, _asked = _asked, signal.Signals(number).name
    if not _patient or (again and number == signal.SIGINT):
        raise Stopped(f"stopped by {_asked}")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
