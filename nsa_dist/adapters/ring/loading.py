"""ring-flash-attn's functions, loaded without its ``__init__`` and without flash-attn.

Its ``__init__`` imports names from transformers that newer versions lack, and its modules import
functions from flash-attn. So this module loads its modules under private names, and answers their
imports from flash-attn with the functions of ``flash.py``. Other imports, of ring_flash_attn or of
anything else, are not affected.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from nsa_dist.adapters.ring.flash import INTERFACE, FlashKind, flash_functions

PACKAGE = "ring_flash_attn"


@dataclass(frozen=True)
class RingFunctions:
    """Functions of ring-flash-attn, with the signatures of version 0.1.8.

    Args:
        zigzag: rows, split over ranks in zigzag.
        zigzag_varlen: packed documents, each split over ranks in zigzag.
        llama3: packed documents in one stream, split over ranks in order; keys are gathered.
        llama3_bounds: computes the arguments of ``llama3`` from document boundaries.
    """

    zigzag: Callable[..., Any]
    zigzag_varlen: Callable[..., Any]
    llama3: Callable[..., Any]
    llama3_bounds: Callable[..., Any]


def missing_package() -> str | None:
    """The error if ring-flash-attn is not installed, or None."""
    if find_spec(PACKAGE) is not None:
        return None
    return (
        "ring-flash-attn must be installed for dense attention over several ranks (pip install "
        "nsa-dist[ring]), got no module ring_flash_attn"
    )


@functools.cache
def ring_functions(kind: FlashKind) -> RingFunctions:
    """ring-flash-attn based on the flash functions ``kind``.

    Raises:
        ImportError: if ring-flash-attn is not installed.
    """
    load = _loader_of_modules(kind, flash_functions(kind))
    zigzag, varlen = load("zigzag_ring_flash_attn"), load("zigzag_ring_flash_attn_varlen")
    llama3 = load("llama3_flash_attn_varlen")
    return RingFunctions(
        zigzag=zigzag.zigzag_ring_flash_attn_func,
        zigzag_varlen=varlen.zigzag_ring_flash_attn_varlen_func,
        llama3=llama3.llama3_flash_attn_varlen_func,
        llama3_bounds=llama3.llama3_flash_attn_prepare_cu_seqlens,
    )


def _loader_of_modules(
    kind: str, flash: Mapping[str, Callable[..., Any]]
) -> Callable[[str], ModuleType]:
    """A function that loads a module of ring-flash-attn by name."""
    missing = missing_package()
    if missing is not None:
        raise ImportError(missing)
    spec = find_spec(PACKAGE)  # Does not import a top-level package.
    assert spec is not None and spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    # The modules' relative imports need a package.
    package = ModuleType(f"{__package__}._{kind}")
    package.__path__ = [folder]
    sys.modules[package.__name__] = package

    def load(name: str) -> ModuleType:
        full_name = f"{package.__name__}.{name}"
        loader = _Loader(full_name, str(Path(folder, f"{name}.py")), flash)
        spec = spec_from_file_location(full_name, loader=loader)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[full_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full_name]
            raise
        return module

    return load


class _Loader(SourceFileLoader):
    """Loads a module and answers its imports from flash-attn with ``flash``."""

    def __init__(self, name: str, path: str, flash: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(name, path)
        self.flash = SimpleNamespace(**flash)

    def exec_module(self, module: ModuleType) -> None:
        # An import statement calls __import__ of its module's builtins.
        own = vars(builtins) | {"__import__": self._import}
        module.__dict__["__builtins__"] = own
        super().exec_module(module)

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: tuple[str, ...] | None = (),
        level: int = 0,
    ) -> Any:
        if level == 0 and name == INTERFACE:
            return self.flash
        return importlib.__import__(name, globals, locals, fromlist or (), level)
