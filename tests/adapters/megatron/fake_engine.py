"""Stands for TransformerEngine, which is a build of its own: its modules in plain torch.

Megatron's wrappers of them (``TENorm``, ``TEColumnParallelLinear``, ...) are Megatron's own code.
Names, arguments, parameters and their attributes are those of TransformerEngine 2.6; nothing is
computed in 8 bits. For test processes of their own that have not imported Megatron.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "2.6.0"


class State:
    """What ``fp8_autocast`` has set, and which linear layers ran under it."""

    in_8_bits = False
    linears_in_8_bits: list[nn.Module] = []  # noqa: RUF012 (of the whole process)


class _Module(nn.Module):
    """Saves the scales of its tensors in 8 bits, of which there are none."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


def _normed(
    x: Tensor, kind: str, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool
) -> Tensor:
    if zero_centered:
        weight = weight + 1
    if kind == "LayerNorm":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _Norm(_Module):
    kind = ""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        width: Any = hidden_size if normalized_shape is None else normalized_shape
        self.eps, self.zero_centered = eps, zero_centered_gamma
        factory: Any = {"dtype": params_dtype, "device": device}
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = nn.Parameter(start(width, **factory))
        self.bias = None
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(width, **factory))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.kind, self.weight, self.bias, self.eps, self.zero_centered)


class LayerNorm(_Norm):
    kind = "LayerNorm"


class RMSNorm(_Norm):
    kind = "RMSNorm"


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        rng_tracker_name: str | None = None,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.save_original_input = save_original_input
        if parallel_mode == "column":
            self.out_features = out_features // tp_size
        elif parallel_mode == "row":
            self.in_features = in_features // tp_size
        factory: Any = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **factory))
        tracker = get_rng_state_tracker
        forked = tracker().fork(*filter(None, [rng_tracker_name])) if tracker else None
        with forked or contextlib.nullcontext():
            assert init_method is not None
            init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(self.out_features, **factory)) if bias else None
        self._mark(self.weight, dim=1 if parallel_mode == "row" else 0)
        if self.bias is not None and parallel_mode == "column":
            self._mark(self.bias, dim=0)
        elif self.bias is not None:
            self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def _mark(self, parameter: Any, dim: int) -> None:
        parameter.tensor_model_parallel = self.parallel_mode is not None
        parameter.partition_dim, parameter.partition_stride = dim, 1

    def _linear(self, x: Tensor) -> Any:
        from megatron.core.tensor_parallel import mappings

        if State.in_8_bits:
            State.linears_in_8_bits.append(self)
        group: Any = {"group": self.tp_group}
        if self.parallel_mode == "column" and self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, **group)
        elif self.parallel_mode == "column":
            x = mappings.copy_to_tensor_model_parallel_region(x, **group)
        x = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.sequence_parallel:
            x = mappings.reduce_scatter_to_sequence_parallel_region(x, **group)
        elif self.parallel_mode == "row":
            x = mappings.reduce_from_tensor_model_parallel_region(x, **group)
        if self.return_bias:
            return x, self.bias
        return x if self.bias is None else x + self.bias

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._linear(x)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **options: Any,
    ) -> None:
        assert not return_layernorm_output
        super().__init__(in_features, out_features, **options)
        self.eps, self.kind, self.zero_centered = eps, normalization, zero_centered_gamma
        like: Any = {"dtype": self.weight.dtype, "device": self.weight.device}
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = nn.Parameter(start(in_features, **like))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **like))
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = options["sequence_parallel"]  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        norm = self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered
        return self._linear(_normed(x, self.kind, *norm))


class DotProductAttention(_Module):
    """Is built and saved; never called here."""

    def __init__(self, num_attention_heads: int, kv_channels: int, **_: Any) -> None:
        super().__init__()


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None
) -> Iterator[None]:
    before, State.in_8_bits = State.in_8_bits, enabled
    try:
        yield
    finally:
        State.in_8_bits = before


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    """For weights in 8 bits, which there are none of."""
    assert not enabled
    yield


@contextlib.contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    yield


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return State.in_8_bits

    @staticmethod
    def get_fp8_recipe() -> None: ...


def _recipe(name: str) -> type:
    def start(self: Any, **options: Any) -> None:
        vars(self).update(options)

    return type(name, (), {"__init__": start})


def install() -> None:
    """Once in a process, before Megatron is imported."""
    if "transformer_engine" in sys.modules:
        return
    assert "megatron.core.extensions.transformer_engine" not in sys.modules

    def module(name: str, **names: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(names)
        sys.modules[name] = made
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, made)
        return made

    module("transformer_engine", __version__=VERSION)
    module("transformer_engine.common")
    recipes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    formats = type("Format", (), {"E4M3": "E4M3", "HYBRID": "HYBRID"})
    module(
        "transformer_engine.common.recipe",
        Format=formats,
        **{name: _recipe(name) for name in recipes},
    )
    modules = (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention)
    module(
        "transformer_engine.pytorch",
        fp8_autocast=fp8_autocast,
        fp8_model_init=fp8_model_init,
        GroupedLinear=type("GroupedLinear", (Linear,), {}),
        **{x.__name__: x for x in modules},
    )
    module(
        "transformer_engine.pytorch.fp8",
        FP8GlobalStateManager=FP8GlobalStateManager,
        fp8_autocast=fp8_autocast,
        fp8_model_init=fp8_model_init,
    )
    module("transformer_engine.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (), {}))
    module(
        "transformer_engine.pytorch.distributed",
        CudaRNGStatesTracker=type("CudaRNGStatesTracker", (), {}),
        activation_recompute_forward=activation_recompute_forward,
    )
    fused = type("FusibleOperation", (nn.Module,), {})
    module("transformer_engine.pytorch.ops", FusibleOperation=fused, Sequential=fused)
