"""Registration of the NSA classes in transformers, which looks classes up by name.

This only adds entries. Without them Auto classes and pipeline load the folder of a saved model only
where its code is trusted, and the Trainer does not shift labels when it smooths them. What is
registered is also what a saved folder names for those who do not import this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register(families: Iterable[tuple[Any, Any]]) -> None:
    """Register pairs of a language model's class and its config class."""
    for model, config in families:
        name: str = config.model_type
        AutoConfig.register(name, config)
        config.classes[AutoConfig.__name__] = config
        register_model(AutoModelForCausalLM, config, model)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = model.__name__
        # FSDP2 derives a class from the model's; the Trainer checks the class's name.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"fsdp_{name}"] = f"FSDP{model.__name__}"


def register_model(auto: Any, config: Any, model: type) -> None:
    """Register the class that an Auto class loads for a config class of ours."""
    auto.register(config, model)
    config.classes[auto.__name__] = model
