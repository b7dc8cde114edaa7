"""The scripts that draw the figures of the documents, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


def load_figure(name: str) -> Any:
    """A script of docs/figures; it draws nothing yet."""
    spec = importlib.util.spec_from_file_location(name, FIGURES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Its dataclasses look for it there.
    spec.loader.exec_module(module)
    return module
