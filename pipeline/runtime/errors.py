"""The exceptions that end a run early, and the text of messages, from which secrets are removed."""

import difflib
import os
import re
import sysconfig
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = {ROOT / "pipeline", ROOT / "callbacks"}
STANDARD = Path(sysconfig.get_path("stdlib"))
LIBRARIES = {"site-packages", "dist-packages"}
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


def unexpected(error: Exception) -> str:
    """The message for an exception that nobody expected. It names the innermost line of a user's file, or of code that came
    with a model; if there is none, the exception is a bug."""
    where = "a bug in Espalier"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        ours = OWN & {*path.parents} or LIBRARIES & {*path.parts} or STANDARD in path.parents
        if not ours and path != ROOT / "launch.py" and os.path.isfile(path):
            where = f"{path}, line {frame.lineno}"
    return f"{type(error).__name__}: {error} ({where}: debug=true shows the traceback)"


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{prefix}{close[0]}'?" if close else f" (known: {', '.join(prefix + k for k in known)})"
