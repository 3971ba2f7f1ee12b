"""What a check finds, and how it is written down without telling who the user is."""

import getpass
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    """Something found: `text` for people, `value` for programs."""

    topic: str
    name: str
    text: str
    value: Any


@dataclass(frozen=True)
class Problem:
    """Something wrong and what to do about it. `fails`: tlcli cannot train like this."""

    text: str
    fails: bool


Finding = Fact | Problem


def private(text: str | Path) -> str:
    """A text without the user's home directory and name."""
    text = re.sub(re.escape(str(Path.home())) + r"(?=[/\\]|$|\W)", "~", str(text))
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "$USER", text)
