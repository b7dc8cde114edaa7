"""Converted decoders under heads for classification, and so for rewards.

The heads are transformers' own. A sequence or token classifier of a converted model is loaded by
its Auto class, from the folder of a language model too (the head is then new), or is converted
from a dense classifier. Heads need whole sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from nsa_dist.adapters.huggingface.auto import register_model
from nsa_dist.adapters.huggingface.models import DECODERS, FAMILIES, SparseModel


class _Classifier(SparseModel):
    """A ``forward`` that refuses a split sequence, of which each rank would score its part."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the dense classifier, on whole sequences.

        Raises:
            ValueError: on every rank, if the sequence is split over ranks; and as the decoder.
        """
        runtime, _ = self._decoder.split_of_call()
        problem = None
        if runtime.context.size > 1:
            problem = (
                f"sequences must be whole for {type(self).__name__} (ranks can split those of a "
                f"causal language model), got a split over {runtime.context.size} ranks"
            )
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            nsa_problem=problem,
            **kwargs,
        )


def _classes(mapping: Any) -> dict[type, tuple[Any, Any]]:
    """By dense classifier of ``mapping``: the converted one, and its config class."""
    found: dict[type, tuple[Any, Any]] = {}
    for language_model, (_, config) in FAMILIES.items():
        dense_config = language_model.config_class  # type: ignore[attr-defined]
        if dense_config not in mapping:
            continue
        dense = mapping[dense_config]
        text = f"``{dense.__name__}`` with Native Sparse Attention in the layers of the config."
        fields = {"__module__": __name__, "__doc__": text, "config_class": config}
        found[dense] = type(f"NSA{dense.__name__}", (_Classifier, dense), fields), config
    return found


_OF_SEQUENCES = _classes(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
_OF_TOKENS = _classes(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)

HEADS: Mapping[type, tuple[Any, Any]] = _OF_SEQUENCES | _OF_TOKENS
"""Dense classifiers, and the model and config classes of their converted models."""

# Pickles look classes up here.
globals().update({model.__name__: model for model, _ in HEADS.values()})


def register_heads() -> None:
    """Register decoders and classifiers with transformers' Auto classes."""
    for config, decoder in DECODERS.items():
        register_model(AutoModel, config, decoder)
    for model, config in _OF_SEQUENCES.values():
        register_model(AutoModelForSequenceClassification, config, model)
    for model, config in _OF_TOKENS.values():
        register_model(AutoModelForTokenClassification, config, model)
