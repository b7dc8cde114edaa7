"""Which engines there are, by name."""

from __future__ import annotations

from launch.engines.base import Engine
from launch.processes.ranks import Ranks
from launch.settings import Settings


def make_engine(settings: Settings, vocab_size: int, ranks: Ranks) -> Engine:
    """The engine that ``parallel.engine`` names."""
    if settings.parallel.engine == "megatron":
        # Imported when asked for: megatron-core is optional.
        from launch.engines.megatron import MegatronEngine

        return MegatronEngine(settings, vocab_size, ranks)
    if settings.parallel.engine == "deepspeed":
        from launch.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(settings, vocab_size, ranks)
    from launch.engines.fsdp2 import Fsdp2Engine

    return Fsdp2Engine(settings, vocab_size, ranks)
