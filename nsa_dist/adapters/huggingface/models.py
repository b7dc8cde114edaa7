"""Dense models with Native Sparse Attention, as subclasses of transformers' classes.

The classes give checkpoints a ``model_type`` of their own, so that they cannot be loaded as dense
models. Their decoders read a batch's padding, documents and cache (``SparseDecoder``). Everything
else is transformers', including ``forward`` of the head, of the decoder and of its layers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import MODEL_MAPPING, LlamaForCausalLM, Qwen3ForCausalLM
from transformers.utils import CONFIG_NAME
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from nsa_dist.adapters.huggingface.attention import NSAAttention
from nsa_dist.adapters.huggingface.batch import Runtime
from nsa_dist.adapters.huggingface.batch_invariant import set_batch_invariant
from nsa_dist.adapters.huggingface.checks import (
    check_config,
    check_labels,
    check_layers,
    check_scale,
)
from nsa_dist.adapters.huggingface.cuda_graphs import GraphedSteps
from nsa_dist.adapters.huggingface.decoder import SparseDecoder, make_runtime
from nsa_dist.adapters.huggingface.families import DENSE, activation_field
from nsa_dist.adapters.huggingface.split import targets_per_rank
from nsa_dist.checks import check
from nsa_dist.comm.group import ContextGroup, GroupLike
from nsa_dist.config import NSAConfig

SPARSE = "native_sparse_attention"
"""The name of these layers in ``layer_types`` of configs that older versions saved."""

MARK = f" with {SPARSE} (nsa_dist.adapters.huggingface.from_pretrained loads this model)"
"""Suffix of the activation in a saved config. A dense model looks this name up and so raises
KeyError with these words before it loads weights. transformers' base config, with which tokenizers
and the Trainer read ``config.json``, accepts any string."""

NO_FOLDER = (
    "none: this model was converted and not loaded (TRL takes a reference model from a folder: "
    "save_pretrained, then from_pretrained; or give ref_model= where the trainer takes it)"
)
"""What is looked for where a converted model's path is."""

MODELING_FILE = "modeling_nsa"
"""Module beside ``config.json`` from which transformers takes the classes, if it is trusted."""


class NoFolder(str):
    """The path in the config of a converted model: empty. Libraries that look for it, as TRL does
    for a reference model, show it in their error; so it is shown as a sentence."""

    def __str__(self) -> str:
        return NO_FOLDER


class _NSAConfigMixin:
    """Two more fields, and a ``config.json`` that names our classes and dense models refuse."""

    nsa: dict[str, Any] | None
    nsa_layers: list[int] | None
    classes: ClassVar[dict[str, type]]  # By the name of the Auto class that loads them.

    def to_dict(self) -> dict[str, Any]:
        """As in the dense config, with its activation marked, and ``auto_map``."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if self.nsa is not None:
            field = activation_field(self)
            values[field] = getattr(self, field) + MARK
            values["auto_map"] = {
                auto: f"{MODELING_FILE}.{made.__name__}" for auto, made in self.classes.items()
            }
        return values

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As in the dense config; beside a ``config.json`` also the module that it names."""
        super().to_json_file(json_file_path, use_diff)  # type: ignore[misc]
        path = Path(json_file_path)
        if self.nsa is not None and path.name == CONFIG_NAME:
            lines = [f"from {x.__module__} import {x.__name__}\n" for x in self.classes.values()]
            path.with_name(f"{MODELING_FILE}.py").write_text("".join(lines), encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: transformers would save a copy of our source in place of the import."""

    def __post_init__(self, **kwargs: Any) -> None:
        field = activation_field(self)
        setattr(self, field, getattr(self, field).removesuffix(MARK))
        # Older versions named our layers in layer_types, which not all families have.
        if SPARSE in (kwargs.get("layer_types") or ()):
            del kwargs["layer_types"]
        types = getattr(self, "layer_types", None)
        if types is not None:
            self.layer_types = ["full_attention" if x == SPARSE else x for x in types]
        super().__post_init__(**kwargs)  # type: ignore[misc]


class SparseModel:
    """What models with a head add to their dense class; the decoder does the rest."""

    @property
    def nsa_config(self) -> NSAConfig:
        """The attention."""
        return self._decoder.nsa_config

    @property
    def nsa_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have it."""
        return self._decoder.nsa_layers

    @property
    def nsa_runtime(self) -> Runtime:
        """Group, layout and backend, as set."""
        return self._decoder.nsa_runtime

    @property
    def _decoder(self) -> SparseDecoder:
        decoder: SparseDecoder = self.base_model  # type: ignore[attr-defined]
        return decoder

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing, as in the config."""

    def _become_sparse(
        self, config: NSAConfig, attention: Mapping[int, NSAAttention], runtime: Runtime
    ) -> None:
        """Make the decoder a sparse one, with attention modules by layer index."""
        decoder: Any = self._decoder
        decoder.__class__ = DECODERS[type(self.config)]  # type: ignore[attr-defined]
        decoder.become_sparse(config, attention, runtime)

    def use_group(
        self,
        group: GroupLike | ContextGroup = None,
        *,
        layout: str = "zigzag",
        backend: str = "auto",
    ) -> None:
        """Set the ranks over which sequences are split, and the layout.

        Args:
            group: process group or one-dimensional DeviceMesh; None if each rank has whole
                sequences, which overrides accelerate's, DeepSpeed's and torch's.
            layout: "contiguous", "zigzag" or "zigzag_per_document", as given to ``shard_batch``.
            backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.

        Raises:
            ValueError: if an argument has a value that is not allowed.
        """
        self._use(group, layout, backend, group_is_set=True)

    def use_batch_invariant(self, on: bool = True) -> None:
        """Let a token's bits depend on its document alone, or no longer.

        Then a forward over a whole sequence, in training or not, and one over a cache, token by
        token and in any batch, give the same logits bit for bit, on one backend, GPU model and
        dtype. Linear layers and norms run as products of rows (``MultiplyRows``), and decoding runs
        the operators of training: slower. Turn it on after all else that changes the model.

        Raises:
            ValueError: if a module may compute a token's bits from other tokens.
        """
        set_batch_invariant(self, self._decoder, on)

    def _use(
        self, group: GroupLike | ContextGroup, layout: str, backend: str, *, group_is_set: bool
    ) -> None:
        self._decoder.use_runtime(group, layout, backend, group_is_set=group_is_set)


class _NSAMixin(SparseModel):
    """``forward`` of all families' language models, whose loss is that of whole sequences."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        nsa, layers, runtime = read_config(config)
        self._become_sparse(nsa, make_attention(self, nsa, layers), runtime)

    def generate(
        self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the dense model, without ``assistant_early_exit``.

        Raises:
            ValueError: if an argument has a value that is not allowed.
        """
        model: Any = self
        settings = model.generation_config if generation_config is None else generation_config
        option = "assistant_early_exit"
        early = kwargs.get(option, getattr(settings, option, None))
        must = "None (a smaller model, as assistant_model=, works)"
        check(early is None, option, early, must)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Any, attention_mask: Any, *_: Any, **__: Any
    ) -> Any:
        """The mask of two dimensions: with a static cache transformers would make one of four."""
        return attention_mask

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What ``generate`` calls with a static cache on a GPU: CUDA graphs in place of a compiler.

        Raises:
            ValueError: with a ``compile_config``.
        """
        must = (
            "None with cache_implementation='static' (a CUDA graph of a step is captured as it is)"
        )
        check(compile_config is None, "compile_config", compile_config, must)
        return GraphedSteps(self)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refused: also what ``generate_batch`` calls.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generation must be by generate, which takes a padded batch, got continuous batching "
            "(generate_batch), whose paged cache these layers do not read"
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the dense model; on a split sequence, for this rank's part of the batch.

        Args:
            input_ids, inputs_embeds, labels, logits_to_keep: as in the dense model. Labels of a
                split sequence cannot be shifted here: also pass ``shift_labels`` and
                ``num_items_in_batch`` from ``shard_batch``. The loss is then this rank's share.
                Where torch's ``context_parallel`` splits the sequence, ``num_items_in_batch`` may
                be left out: the mean over ranks of their losses is then that of the whole. Where
                DeepSpeed does, the loss is then the mean over this rank's targets.
            attention_mask: [B, cached and new tokens], zeros only before and after a row's tokens;
                on a split sequence this rank's part, zeros only at the end of whole rows.
            position_ids: positions in the document, [B, L]; computed by default. Positions that
                start again within a row mark packed documents, as in the dense model; these allow
                neither padding nor a cache. On a split sequence they start at 0.
            past_key_values: a ``DynamicCache`` or, without gradients, a ``StaticCache``, empty or
                filled by this model.
            use_cache: default ``config.use_cache`` outside of training with one document per row,
                else False.
            cu_seqlens: int32 boundaries of packed documents, of the whole padded stream, equal on
                all ranks, with B = 1. The collators' name ``cu_seq_lens_q`` is accepted too; if
                both are given they must be equal.

        Raises:
            ValueError: if an argument has a value that is not allowed.
        """
        runtime, by_others = self._decoder.split_of_call()
        problem = None
        if runtime.context.size > 1:
            problem = check_labels(by_others, labels, kwargs)
            given = labels is None or kwargs.get("num_items_in_batch") is not None
            if problem is None and not given and by_others and not by_others.mean_of_parts:
                targets = targets_per_rank(runtime, kwargs["shift_labels"])
                kwargs["num_items_in_batch"] = targets
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            cu_seqlens=cu_seqlens,
            nsa_problem=problem,
            **kwargs,
        )


def _sparse_classes(dense: Any) -> tuple[Any, Any]:
    """The model and the config class of a family, subclasses of ``dense`` and its config class."""
    dense_config = dense.config_class
    config_type = type(
        f"NSA{dense_config.__name__}",
        (_NSAConfigMixin, dense_config),
        {
            "__module__": __name__,
            "__doc__": f"``{dense_config.__name__}`` with ``nsa``, the fields of an ``NSAConfig``, "
            "and ``nsa_layers``.",
            "__annotations__": {"nsa": dict[str, Any] | None, "nsa_layers": list[int] | None},
            "model_type": f"nsa_{dense_config.model_type}",
            "nsa": None,
            "nsa_layers": None,
            "classes": {},
        },
    )
    model_type = type(
        f"NSA{dense.__name__}",
        (_NSAMixin, dense),
        {
            "__module__": __name__,
            "__doc__": f"``{dense.__name__}`` with Native Sparse Attention in the layers "
            "``config.nsa_layers``.",
            "config_class": config_type,
        },
    )
    return model_type, config_type


FAMILIES: Mapping[type, tuple[Any, Any]] = {dense: _sparse_classes(dense) for dense in DENSE}
"""Dense model classes, and the model and config classes of their converted models."""

# Pickles and the modules of saved folders look classes up here.
globals().update({made.__name__: made for pair in FAMILIES.values() for made in pair})
NSALlamaForCausalLM, NSALlamaConfig = FAMILIES[LlamaForCausalLM]
NSAQwen3ForCausalLM, NSAQwen3Config = FAMILIES[Qwen3ForCausalLM]


class _NSADecoder(SparseDecoder):
    """A decoder that is made from a converted model's config, as by ``AutoModel``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        nsa, layers, runtime = read_config(config)
        self.become_sparse(nsa, make_attention(self, nsa, layers), runtime)


def _decoder_class(dense: Any, config_type: type) -> Any:
    """The decoder class of a family, a subclass of the decoder class of the model ``dense``."""
    decoder = MODEL_MAPPING[dense.config_class]
    text = f"``{decoder.__name__}`` with Native Sparse Attention in the layers of the config."
    fields = {"__module__": __name__, "__doc__": text, "config_class": config_type}
    made: Any = type(f"NSA{decoder.__name__}", (_NSADecoder, decoder), fields)
    # A dense decoder's constructor does this, by name; a converted one only changes its class.
    _CAN_RECORD_REGISTRY[str(made)] = made._can_record_outputs
    return made


DECODERS: Mapping[type, Any] = {
    config: _decoder_class(dense, config) for dense, (_, config) in FAMILIES.items()
}
"""Decoder classes by the config class of a converted model."""

# Pickles look classes up here.
globals().update({decoder.__name__: decoder for decoder in DECODERS.values()})


def make_attention(
    model: Any, config: NSAConfig, layers: tuple[int, ...]
) -> dict[int, NSAAttention]:
    """New attention modules by layer index; ``model``, or its decoder, does not change.

    Raises:
        ValueError: if the config has another softmax scale than the model.
    """
    dense = {i: model.base_model.layers[i].self_attn for i in layers}
    for attention in dense.values():
        check_scale(config, attention)
    return {i: NSAAttention(attention, config) for i, attention in dense.items()}


def read_config(config: Any) -> tuple[NSAConfig, tuple[int, ...], Runtime]:
    """The attention, layers and runtime (for one rank) of a converted model's config.

    Raises:
        ValueError: if the config has no or wrong settings of the attention.
    """
    if config.nsa is None or config.nsa_layers is None:
        raise ValueError(
            "nsa must be set, as in the config of a model that convert_to_nsa made, got None in a "
            f"{type(config).__name__}"
        )
    nsa, layers = NSAConfig(**config.nsa), check_layers(config.nsa_layers, config)
    check_config(nsa, config, nsa.gate_init)
    runtime = make_runtime(
        None, "zigzag", "auto", layers, config.num_hidden_layers, group_is_set=False
    )
    return nsa, layers, runtime


def write_config(dense: Any, config_type: type, nsa: NSAConfig, layers: tuple[int, ...]) -> Any:
    """A config of ``config_type`` with all fields of ``dense``, including private ones.

    Except for the path: there is the dense model, which TRL would load as a reference.
    """
    config: Any = copy.deepcopy(dense)
    config.__class__ = config_type
    config._name_or_path = NoFolder()
    config.nsa = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(nsa).items()}
    config.nsa_layers = list(layers)
    return config
