"""The exceptions that end a run early, and the text of messages, from which secrets are removed."""

import difflib
import os
import re

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


class UserError(ValueError):
    """A message of one line: what is wrong and what to do."""

    def __init__(self, text: object) -> None:
        super().__init__(one_line(text))


class Stopped(BaseException):
    """A signal asked the run to stop. Not an `Exception`, so that no handler takes it for a damaged file."""


class ReportedByPeer(Exception):
    """Another process reports why the run ends; this one only exits with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def one_line(text: object) -> str:
    """The text on one line, secrets replaced: quoted messages of other libraries can hold newlines and tokens."""
    line = " ".join(str(text).split())
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET.search(name):
            line = line.replace(value, f"${name}")
    return line


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{prefix}{close[0]}'?" if close else f" (known: {', '.join(prefix + k for k in known)})"
