"""What runs code when pickle reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def mkdir(marker: Path) -> Call:
    """Makes a folder, which shows that it ran."""
    return Call(os.mkdir, str(marker))
