"""Norms, gates and compressors under tensor parallelism.

Their parameters are replicated over the tensor parallel ranks, except compressor weights per KV
head. A replicated weight that a rank applies to its own heads gets only that rank's share of the
gradient; ``whole_gradient`` sums the shares in backward. A weight that a rank applies to its own
tokens (under sequence parallelism) is marked ``sequence_parallel``, and Megatron's
``finalize_model_grads`` sums the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_to_all_sp2hp,
    copy_to_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from nsa_dist.checks import check
from nsa_dist.config import NSAConfig
from nsa_dist.nn.compressor import BlockCompressor
from nsa_dist.nn.gates import LinearGate, MLPGate, StaticGate
from nsa_kernels import Backend


def parameter_device(config: TransformerConfig) -> torch.device:
    """The device on which Megatron makes parameters."""
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device(torch.cuda.current_device())


def fork_rng(device: torch.device) -> Any:
    """A context that restores the random state on exit."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def whole_gradient(weight: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """``weight``, with its gradient summed over the ranks that apply it to their own heads."""
    if tp_group.size() == 1:
        return weight
    return copy_to_tensor_model_parallel_region(weight, group=tp_group)


@contextmanager
def whole_draws(config: TransformerConfig) -> Iterator[None]:
    """Draw as every rank does: from Megatron's random state for weights that are not split.

    Megatron's programs draw from the default generator of a GPU before they build a model, in
    amounts that depend on the layout. On the host every rank draws whole weights anyway.
    """
    if config.use_cpu_initialization:
        yield
    else:
        with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
            yield


@torch.no_grad()
def _draw(parameter: Tensor, shape: torch.Size, own: slice, init: Callable[[Tensor], Any]) -> None:
    """Fill a rank's part of a weight of ``shape``, so that the split does not change the whole."""
    whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
    init(whole)
    parameter.copy_(whole[own])


class Norm(nn.Module):
    """RMSNorm or LayerNorm by ``config.normalization``, for whole and split sequences.

    Takes the arguments of Megatron's norms. The output has the dtype of the weight, even if the
    residual stream is float32.

    Args:
        num_sets: number of sets of heads with their own weights; default one weight for all.
        normalization: the kind that the spec was made for; default the config's.
        per_head: whether it is applied to a rank's own heads of all tokens, instead of all heads
            of its own tokens.

    Parameters:
        weight [hidden_size] or [num_sets, hidden_size], initially ones; for LayerNorm also bias,
        initially zeros.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_sets: int | None = None,
        normalization: str | None = None,
        per_head: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        kind = config.normalization
        must = "'RMSNorm' or 'LayerNorm'"
        check(kind in ("RMSNorm", "LayerNorm"), "normalization", kind, must)
        check(
            normalization in (None, kind),
            "normalization",
            normalization,
            f"None or the TransformerConfig's {kind!r}",
        )
        zero_centered = config.layernorm_zero_centered_gamma
        must = "False with this norm"
        check(not zero_centered, "layernorm_zero_centered_gamma", zero_centered, must)
        self.eps, self.width = eps, hidden_size
        shape = (hidden_size,) if num_sets is None else (num_sets, hidden_size)
        factory: dict[str, Any] = {
            "device": parameter_device(config),
            "dtype": config.params_dtype,
        }
        self.weight = nn.Parameter(torch.ones(shape, **factory))
        self.bias = nn.Parameter(torch.zeros(shape, **factory)) if kind == "LayerNorm" else None
        if not per_head:
            for parameter in self.parameters():
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size], or [..., num_sets, hidden_size] with sets."""
        sets = self.weight.ndim == 2
        weight, bias = (None, None) if sets else (self.weight, self.bias)
        if self.bias is None:
            x = F.rms_norm(x, (self.width,), weight, self.eps)
        else:
            x = F.layer_norm(x, (self.width,), weight, bias, self.eps)
        if sets:
            x = x * self.weight if self.bias is None else x * self.weight + self.bias
        return x.to(self.weight.dtype)


class ParallelCompressor(BlockCompressor):
    """A compressor for a rank's own KV heads.

    Args:
        config: config with the rank's own heads.
        dim: width of the keys or values.
        whole: config with all heads.
        megatron: sets dtype, device and initialisation.
        tp_group: ranks that share the heads.

    Weights shared by all heads are replicated; weights per head are sharded like the heads, along
    their first dimension. ``init_method`` initialises matrices.
    """

    def __init__(
        self,
        config: NSAConfig,
        dim: int,
        *,
        whole: NSAConfig,
        megatron: TransformerConfig,
        tp_group: dist.ProcessGroup,
    ) -> None:
        device = parameter_device(megatron)
        with fork_rng(device):
            super().__init__(config, dim, device=device, dtype=megatron.params_dtype)
        self.tp_group, self.per_head = tp_group, config.compress_per_head
        heads, rank = config.num_kv_heads, tp_group.rank()
        own = slice(rank * heads, (rank + 1) * heads) if self.per_head else slice(None)
        for name, parameter in self.named_parameters():
            if self.per_head:
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            is_drawn = self._parameters_of_kind[name].init == "linear"
            if is_drawn and megatron.perform_initialization:
                shape = parameter.shape
                if self.per_head:
                    shape = torch.Size((whole.num_kv_heads, *shape[1:]))
                with whole_draws(megatron):
                    _draw(parameter, shape, own, megatron.init_method)

    def forward(self, x: Tensor, block_rows: Tensor, backend: Backend) -> Tensor:
        """[E, G, D] to [C, G, D], as in ``BlockCompressor``."""
        params: dict[str, Tensor] = dict(self.named_parameters())
        if not self.per_head:
            params = {name: whole_gradient(p, self.tp_group) for name, p in params.items()}
        return backend.compress(x, block_rows, self.block, self.kind, params)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weights per head are split along their first dimension, others replicated."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            dict.fromkeys(state, 0) if self.per_head else {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def make_parallel_gate(config: NSAConfig, megatron: TransformerConfig) -> nn.Module:
    """The gate module of all heads, replicated over tensor parallel ranks.

    ``init_method`` initialises weights; the last bias, or the static logits, start at
    ``gate_init``, the other bias at zero.
    """
    kind = {"linear": LinearGate, "mlp": MLPGate, "static": StaticGate}[config.gate]
    device = parameter_device(megatron)
    with fork_rng(device):
        gate = kind(megatron.hidden_size, config, device=device, dtype=megatron.params_dtype)
    if megatron.perform_initialization:
        for name, parameter in gate.named_parameters():
            if name.endswith("weight"):
                with whole_draws(megatron):
                    _draw(parameter, parameter.shape, slice(None), megatron.init_method)
        if isinstance(gate, MLPGate):
            nn.init.zeros_(gate.up.bias)
    if megatron.sequence_parallel and config.gate != "static":
        for parameter in gate.parameters():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
    return gate


def local_gate_logits(
    gate: nn.Module, x: Tensor, tokens: torch.Size, tp_group: dist.ProcessGroup, *, split: bool
) -> Tensor:
    """Gate logits of a rank's own heads, for all tokens of its context parallel rank.

    Each rank computes the logits of all heads for its tokens, which is cheap, and only logits are
    sent (one per head, branch and token) instead of hidden states as in a column parallel layer.
    With ``split`` an all-to-all exchanges them; without it backward gathers their gradients.

    Args:
        x: [s, b, hidden_size]; [s/tp, b, hidden_size] with ``split``.
        tokens: (s, b).

    Returns:
        [s, b, own heads * branches].
    """
    if isinstance(gate, StaticGate):
        logits = whole_gradient(gate.logits, tp_group).chunk(tp_group.size())[tp_group.rank()]
        return logits.flatten().expand(*tokens, -1)
    if isinstance(gate, MLPGate):
        logits = gate.down(F.silu(gate.up(x)))
    else:
        assert isinstance(gate, LinearGate)
        logits = gate.proj(x)
    if split:
        return all_to_all_sp2hp(logits, group=tp_group).view(*tokens, -1)
    return scatter_to_tensor_model_parallel_region(logits, group=tp_group)
