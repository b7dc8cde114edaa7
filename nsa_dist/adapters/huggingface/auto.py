"""Our classes where transformers looks classes up by name.

Nothing of transformers is replaced; entries of our own names are added. Without them AutoConfig,
AutoModelForCausalLM and pipeline refuse a saved model's folder, and the Trainer takes labels for
shifted ones when it smooths them.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register(families: Iterable[tuple[type, type]]) -> None:
    """Make pairs of a model class and its config class known to transformers."""
    for model, config in families:
        name: str = config.model_type  # type: ignore[attr-defined]
        AutoConfig.register(name, config)
        AutoModelForCausalLM.register(config, model)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = model.__name__
        # FSDP2 derives a class from a model's; the Trainer goes by the class's name.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"fsdp_{name}"] = f"FSDP{model.__name__}"
