"""What runs code when pickle reads it."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any


class ByName(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 do: as ``getattr(enum, name)``.

    Attributes:
        name: instead of each member's own, if not empty.
    """

    name = ""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Enum):
            return NotImplemented
        return getattr, (type(value), self.name or value.name)


def by_name(value: Any, name: str = "") -> bytes:
    """The pickle of a value by ``ByName``."""
    file = io.BytesIO()
    pickler = ByName(file)
    pickler.name = name
    pickler.dump(value)
    return file.getvalue()


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def mkdir(marker: Path) -> Call:
    """Makes a folder, which shows that it ran."""
    return Call(os.mkdir, str(marker))
