"""Owns what ends a run before its end: a message to the user, or a request to stop. And keeps secrets out of messages."""

import difflib
import os
import re

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


class UserError(ValueError):
    """One line saying what is wrong and what to do instead."""

    def __init__(self, text: object) -> None:
        super().__init__(one_line(text))


class Stopped(BaseException):
    """A signal asked the run to stop. No `Exception`, so that whoever catches those does not take it for a damaged file."""


class ReportedByPeer(Exception):
    """Another process says why the run ends; this one has only its exit `code` to give."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def one_line(text: object) -> str:
    """Other libraries' messages, quoted, run over several lines, and may hold a token that they were given."""
    line = " ".join(str(text).split())
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET.search(name):
            line = line.replace(value, f"${name}")
    return line


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """What a message about an unknown name ends with."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{prefix}{close[0]}'?" if close else f" (known: {', '.join(prefix + k for k in known)})"
