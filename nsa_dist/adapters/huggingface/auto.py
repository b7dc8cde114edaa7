"""Registration of the NSA classes in transformers, which looks classes up by name.

This only adds entries. Without them AutoConfig, AutoModelForCausalLM and pipeline refuse the folder
of a saved model, and the Trainer does not shift labels when it smooths them.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register(families: Iterable[tuple[type, type]]) -> None:
    """Register pairs of a model class and its config class."""
    for model, config in families:
        name: str = config.model_type  # type: ignore[attr-defined]
        AutoConfig.register(name, config)
        AutoModelForCausalLM.register(config, model)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = model.__name__
        # FSDP2 derives a class from the model's; the Trainer checks the class's name.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"fsdp_{name}"] = f"FSDP{model.__name__}"
