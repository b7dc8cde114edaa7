"""Steps of ``generate`` as replays of one CUDA graph.

transformers asks a model for a compiled call where a cache is static and the device a GPU. A
converted model gives ``GraphedSteps``: the first step of one token runs as it is, which compiles
kernels; the next one is captured, and it and all others are replayed. What a step has to know of
the cache is computed in the graph, from the number of cached tokens (``nsa_dist.decoding.static``).

A graph ends with its ``generate``: weights, adapters and backend may change between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nsa_dist.adapters.huggingface.cache import NSAStaticCacheLayer
from nsa_dist.checks import check

REPLAYED = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
"""Arguments of calls that may be replayed. Others, such as output_hidden_states, ask for more."""

COLLECTS = "transformers.utils.output_capturing"


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a GPU: cuBLAS keeps a workspace for each stream.

    torch's own is on the GPU that was current when it was made.
    """
    return torch.cuda.Stream(device)


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a function that has run before: its replay, and what the function returned.

    What is captured is not computed before the first replay.
    """
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as loaders of data, may go on to use the GPU.
        with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
            found = function()
    return graph.replay, found


class GraphedSteps:
    """A converted model's call for the steps of one ``generate``.

    A replay does not look at the mask: ``generate`` appends ones to that of the steps before.

    Args:
        model: the model, without hooks: a replay runs no Python.

    Raises:
        ValueError: if a module has hooks, as those that FSDP and DeepSpeed shard have.
    """

    def __init__(self, model: Any) -> None:
        must = (
            "without hooks with cache_implementation='static' (a replayed CUDA graph runs none; "
            "disable_compile=True generates without graphs)"
        )
        for name, module in model.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            # transformers leaves its own, which collect outputs when a call asks for them.
            hooks = [x for x in hooks if getattr(x, "__module__", None) != COLLECTS]
            check(not hooks, name or "model", f"a module with {len(hooks)}", must)
        self._model = model
        self._seen: Any = None
        self._graph: _Graph | None = None

    def __call__(self, **inputs: Any) -> Any:
        """As the model's call."""
        kind = self._kind(inputs)
        if kind is None:
            return self._model(**inputs)
        if self._seen != kind:
            self._seen, self._graph = kind, None
            return self._model(**inputs)
        if self._graph is None:
            self._graph = _Graph(self._model, inputs)
        return self._graph.step(inputs)

    def _kind(self, inputs: Mapping[str, Any]) -> Any:
        """What a graph is made for, or None for calls that are none of one token as usual."""
        ids, keep = inputs.get("input_ids"), inputs.get("logits_to_keep", 0)
        if not isinstance(ids, Tensor) or ids.shape[1:] != (1,) or not isinstance(keep, int):
            return None
        if not inputs.keys() <= REPLAYED or self._model.config.output_hidden_states:
            return None
        layers = inputs["past_key_values"].layers
        tables = layers[0].tables() if isinstance(layers[0], NSAStaticCacheLayer) else None
        if tables is None:
            return None
        positions = inputs.get("position_ids")
        shape = None if positions is None else (positions.shape, positions.dtype)
        return id(tables), _addresses(layers), ids.shape, ids.dtype, shape, keep


def _addresses(layers: Sequence[NSAStaticCacheLayer]) -> list[int]:
    """Where the tensors of a cache are."""
    rows = [layer.rows for layer in layers]
    buffers = [(x.keys, x.values, x.compressed_keys, x.compressed_values) for x in rows]
    return [x.data_ptr() for of_layer in buffers for x in of_layer if x is not None]


class _Graph:
    """A step that was captured, with the tensors that its arguments are copied to."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self._cache = inputs["past_key_values"]
        self._arguments = {
            name: inputs[name].clone()
            for name in ("input_ids", "position_ids")
            if inputs.get(name) is not None
        }
        self._tables = self._cache.layers[0].tables()
        past = self._cache.get_seq_length()
        others = {k: x for k, x in inputs.items() if k not in {*self._arguments, "attention_mask"}}
        try:
            self._replay, self._found = capture(
                lambda: model(**self._arguments, **others, nsa_tables=self._tables),
                self._tables.device,
            )
        except RuntimeError as error:
            raise RuntimeError(
                "model must be one whose steps the host does not wait for with "
                "cache_implementation='static' (disable_compile=True generates without a CUDA "
                f"graph), got {type(model).__name__}: {error}"
            ) from error
        # The host has counted a token that the device has not seen.
        for layer in self._cache.layers:
            layer.rows.length = past

    def step(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output, in tensors that later steps leave as they are."""
        rows = [layer.rows for layer in self._cache.layers]
        rows[0].room_for(1)
        self._tables.begin(rows[0].length)
        for name, x in self._arguments.items():
            x.copy_(inputs[name])
        self._replay()
        for row in rows:
            row.length += 1
        fields = {k: x.clone() if isinstance(x, Tensor) else x for k, x in self._found.items()}
        return type(self._found)(**fields)
