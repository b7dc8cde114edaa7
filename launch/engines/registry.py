"""Which engines there are.

Settings are checked by their engine, and engines import the settings. To keep imports free of
circles, an engine's module is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.engines.base import Engine, EngineSpec
    from launch.processes.ranks import Ranks
    from launch.settings import Settings

ENGINES = {
    "fsdp2": "launch.engines.fsdp2",
    "megatron": "launch.engines.megatron",
    "deepspeed": "launch.engines.deepspeed",
}
"""By the value of ``parallel.engine`` the module whose ``SPEC`` is the engine's."""


def engine_spec(name: str) -> EngineSpec:
    """The engine of that name, which is one of ``ENGINES``."""
    spec: EngineSpec = importlib.import_module(ENGINES[name]).SPEC
    assert spec.name == name
    return spec


def all_specs() -> list[EngineSpec]:
    """All engines."""
    return [engine_spec(name) for name in ENGINES]


def make_engine(settings: Settings, vocab_size: int, ranks: Ranks) -> Engine:
    """The engine that ``parallel.engine`` names, built. Collective."""
    return engine_spec(settings.parallel.engine).build(settings, vocab_size, ranks)
