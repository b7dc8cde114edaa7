"""Native Sparse Attention as a torch module, on one rank or with its sequence split over many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa_dist.attention.call import Call, check_backend, make_call, make_setup, options_problem
from nsa_dist.attention.checks import inputs_problem, tensor_problem
from nsa_dist.attention.functional import KeysOrValues, NSADetails, attend, details_of
from nsa_dist.attention.selectors import (
    CompressedSelector,
    Selector,
    exact_selector_problem,
    selector_problem,
)
from nsa_dist.checks import (
    DTYPES,
    INTEGER_DTYPES,
    as_int,
    as_number,
    check,
    check_bool,
    describe,
    is_plain,
)
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.nn.compressor import BlockCompressor, check_custom
from nsa_dist.nn.dropout import drop_tokens
from nsa_dist.nn.gates import make_gate
from nsa_dist.nn.norm import SetNorm
from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
from nsa_dist.nn.tensor_parallel import ADVICE, cut_problem, project
from nsa_dist.plan.layout import make_layout
from nsa_kernels import get_backend

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "gate", "o_proj")


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention (arXiv 2502.11089, section 3) from hidden states to hidden states.

    Shard each batch once (``shard_batch``) and pass ``group=``: the same weights then compute the
    same function on any number of ranks. Each rank gets parameter gradients of its local tokens;
    sum them over the group as over data parallel ranks (FSDP2, DDP, ...).

    Args:
        hidden_size: width of the input and output.
        config: hyperparameters of the attention.
        bias: biases in the q, k, v and output projections.
        qk_norm: RMSNorm over the channels of each query and key, before rotary.
        norm_eps: epsilon of that RMSNorm.
        rotary: rotary embedding; None disables it.
        dropout: probability of zeroing an element of the output, in training mode. The mask depends
            on the token, not on the split. Its seed comes from torch's CPU generator, whose state
            must be equal on all ranks of the group.
        k_compressor, v_compressor: modules that map [C, G, l, D] to [C, G, D], with
            ``config.compress == "custom"``.
        layout: how the sequence is split: "contiguous", "zigzag" or "zigzag_per_document".
        group: process group or one-dimensional DeviceMesh over which it is split, or one with the
            dimensions "node" and "local"; None for one rank.
        backend: "auto" (Triton on an NVIDIA GPU, else PyTorch) or a name that
            ``nsa_kernels.get_backend`` knows. A config that the backend cannot compute is refused
            here if ``device`` is given, else at the first call.
        selector: selects blocks instead of NSA's compressed branch; the weights of a module become
            the layer's. See ``nsa_dist.attention.selectors``.
        fetch_again: over several ranks, free the selected blocks of other ranks after their use
            and fetch them again in backward. Then only two KV heads' are in memory at a time, and
            each backward receives as many bytes more as its forward. None: with more than two KV
            heads.
        recompute_branches: branches of which nothing but inputs is kept for backward, which
            computes their forward again.
        fetch: over several ranks, which selected blocks of other ranks are fetched: "chosen", or
            "full", all that local queries may choose. Then nothing is requested and no size is
            waited for. It is faster where nearly all are chosen.
        ranks_per_node: consecutive ranks of the group that share the fast level of links. Then
            ``fetch="chosen"`` brings a block of another node once a node, whose ranks share it, and
            gradients are summed inside a node first. None: as a DeviceMesh of nodes says, else the
            ranks of each host, where two or more hosts have equally many, at least two; 1: one
            level.
        exact_gradients: gradients of q, k, v, gates and compressors have the same bits over 1, 2,
            4, ... up to this many ranks, a power of two; lengths must be multiples of twice as
            many. 0: they agree to rounding.

    Attributes:
        communication: bytes sent by this layer, by kind, since its last ``reset``.

    Raises:
        ValueError: if an option has a value that is not allowed.
    """

    def __init__(
        self,
        hidden_size: int,
        config: NSAConfig,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: RotaryConfig | None = RotaryConfig(),  # noqa: B008  (frozen)
        dropout: float = 0.0,
        k_compressor: nn.Module | None = None,
        v_compressor: nn.Module | None = None,
        layout: str = "zigzag",
        group: GroupLike | ContextGroup = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        selector: Selector | None = None,
        fetch_again: bool | None = None,
        recompute_branches: Sequence[str] = (),
        fetch: str = "chosen",
        ranks_per_node: int | None = None,
        exact_gradients: int = 0,
    ) -> None:
        super().__init__()
        context = context_group(group)
        layout = make_layout(layout, context.size).name
        check_bool("bias", bias)
        check_bool("qk_norm", qk_norm)
        hidden_size, norm_eps = check_sizes(hidden_size, norm_eps, dtype)
        dropout = _check_options(config, rotary, dropout)
        if selector is None:
            check_custom("k_compressor", k_compressor, config, config.uses_compression)
            check_custom("v_compressor", v_compressor, config, "compressed" in config.branches)
        else:
            problem = selector_problem(selector, config)
            if problem is not None:
                raise ValueError(problem)
            given = {"k_compressor": k_compressor, "v_compressor": v_compressor}
            for name, module in given.items():
                check(module is None, name, module, "None with a selector")
        options: dict[str, Any] = {
            "fetch_again": fetch_again,
            "recompute_branches": recompute_branches,
            "fetch": fetch,
            "ranks_per_node": ranks_per_node,
            "exact_gradients": exact_gradients,
        }
        problem = options_problem(config, context, **options)
        problem = problem or exact_selector_problem(selector, exact_gradients)
        if problem is not None:
            raise ValueError(problem)
        check_backend(backend, config, device)
        self.hidden_size, self.rotary, self.dropout = hidden_size, rotary, dropout
        self.k_compressor, self.v_compressor, self.selector = k_compressor, v_compressor, selector
        self.setup = make_setup(
            config,
            layout,
            context,
            backend,
            CommunicationCounter(),
            rotary=rotary if config.compress_pre_rope else None,
            selector_grids=self._selector.grids(config),
            **options,
        )
        self.num_key_sets = len(self.setup.key_sets) if config.independent_kv else 1
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads, kv_heads = config.num_heads, config.num_kv_heads
        key_width, value_width = config.head_dim, config.value_dim
        key_rows = self.num_key_sets * kv_heads * key_width
        value_rows = config.num_value_sets * kv_heads * value_width
        self.q_proj = nn.Linear(hidden_size, heads * key_width, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, key_rows, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, value_rows, bias=bias, **factory)
        self.o_proj = nn.Linear(heads * value_width, hidden_size, bias=bias, **factory)
        self.gate = make_gate(hidden_size, config, **factory)
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = nn.RMSNorm(key_width, eps=norm_eps, **factory)
            self.k_norm = SetNorm(self.num_key_sets, key_width, norm_eps, **factory)
        if config.compress != "custom" and selector is None:
            if config.uses_compression:
                self.k_compressor = BlockCompressor(config, key_width, **factory)
            if "compressed" in config.branches:
                self.v_compressor = BlockCompressor(config, value_width, **factory)

    def reset_parameters(self) -> None:
        """Initialise all weights again from torch's generator: the same seed, the same weights.

        Call ``to_empty`` first on a layer that was built on the meta device. Custom compressors
        are reset if they have a method ``reset_parameters``.
        """
        for module in self.children():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, NSADetails]:
        """Attend from this rank's tokens to all that they may see, on any rank of the group.

        Args:
            x: [B, L, hidden_size], this rank's part of each row.
            cu_seqlens: int32 [documents + 1], boundaries of the whole padded stream, equal on all
                ranks; with B > 1 the rows are one stream, one after another, and every row's start
                is a boundary. None if each row is one document.
            position_ids: integer [B, L], positions for rotary; default each token's position in
                its document.
            return_details: also return ``NSADetails``.

        Returns:
            [B, L, hidden_size]; with ``return_details`` also the details.

        Raises:
            ValueError: on every rank of the group, if an argument of any rank is not allowed.
        """
        call = self._call(x, cu_seqlens, position_ids)
        q, k, v = self._project(x, call.plan.positions if position_ids is None else position_ids)
        config = call.config
        gates = project("gate", self.gate, x, config.num_heads, len(config.branches))
        # Check what projections return like a caller's input: hooks and wrappers may change it.
        problem = inputs_problem(q, k, v, gates, config, self.setup.key_sets)
        attended = attend(call, q, k, v, gates, self._selector, problem)
        out = attended.out_NHD.flatten(1).unflatten(0, x.shape[:2])
        out = project("o_proj", self.o_proj, out, self.hidden_size)
        if self.training and self.dropout > 0:
            out = drop_tokens(out, self.dropout, call.plan.documents, call.plan.positions)
        return (out, details_of(attended, gates)) if return_details else out

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, KeysOrValues, KeysOrValues]:
        """Queries [B, L, H, Dk], keys and values [B, L, G, D] by set, normalised and rotated."""
        config = self.config
        q_shape = (config.num_heads, config.head_dim)
        k_shape = (self.num_key_sets, config.num_kv_heads, config.head_dim)
        v_shape = (config.num_value_sets, config.num_kv_heads, config.value_dim)
        q, k, v = (
            project(name, module, x, math.prod(shape)).unflatten(-1, shape)
            for name, module, shape in (
                ("q_proj", self.q_proj, q_shape),
                ("k_proj", self.k_proj, k_shape),
                ("v_proj", self.v_proj, v_shape),
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            # Autocast may normalise in float32; queries, keys and values must share a dtype.
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k)
        if self.rotary is not None:
            cos, sin = rotary_cos_sin(self.rotary, config.head_dim, positions.view(x.shape[:2]))
            q = apply_rotary(q, cos, sin)
            if not config.compress_pre_rope:
                k = apply_rotary(k.flatten(2, 3), cos, sin).unflatten(2, k_shape[:2])
        if not config.independent_kv:
            return q, k.squeeze(2), v.squeeze(2)
        k_of = dict(zip(self.setup.key_sets, k.unbind(2), strict=True))
        return q, k_of, dict(zip(config.branches, v.unbind(2), strict=True))

    def compile_projections(self, **options: Any) -> None:
        """Compile what makes queries, keys and values of the input, in place, at its first call.

        Args:
            options: of ``torch.compile``.
        """
        self._project = torch.compile(self._project, **options)  # type: ignore[method-assign]

    @torch.compiler.disable  # The only graph break of a compiled layer: see find_plan.
    def _call(self, x: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Call:
        config = self.setup.config
        problem = input_problem(x, position_ids, self.hidden_size, self.q_proj)
        custom = ("k_compressor", "v_compressor") if config.compress == "custom" else ()
        problem = problem or cut_problem(self, (*PROJECTIONS, *custom))
        if problem is None and position_ids is not None and config.compress_pre_rope:
            problem = (
                "position_ids must be None with compress_pre_rope=True (compressed keys are "
                "rotated at positions from the document's start), got positions"
            )
        if problem is not None:
            dtype = {"dtype": str(x.dtype)} if is_plain(x) else {}
            self.setup.refuse(problem, {"x": describe(x), **dtype})
        cast = autocast_dtype(x.device.type)
        return make_call(
            self.setup,
            (x.shape[0], x.shape[1]),
            x.device,
            x.dtype,
            computes_in=cast,
            cu_seqlens=cu_seqlens,
            stated={
                "x": f"width {x.shape[-1]}",
                "rotary": repr(self.rotary),
                "qk_norm": "False" if self.q_norm is None else f"True, eps {self.q_norm.eps}",
                "dropout": repr(self.dropout if self.training else 0.0),
                "autocast": str(cast),
            },
        )

    @property
    def _selector(self) -> Selector:
        if self.selector is not None:
            return self.selector
        return CompressedSelector(self.k_compressor, self.v_compressor)

    @property
    def config(self) -> NSAConfig:
        """The hyperparameters."""
        return self.setup.config

    @property
    def layout(self) -> str:
        """Name of the layout by which the sequence is split."""
        return self.setup.layout

    @property
    def context(self) -> ContextGroup:
        """The ranks that share the sequence."""
        return self.setup.group

    @property
    def communication(self) -> CommunicationCounter:
        """Bytes sent by this layer, by kind, since its last ``reset``."""
        return self.setup.counter

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self.setup.backend

    def extra_repr(self) -> str:
        config = self.config
        # "auto" depends on the device of the weights.
        backend = get_backend(self.backend, self.q_proj.weight.device).name
        return (
            f"hidden_size={self.hidden_size}, heads={config.num_heads}/{config.num_kv_heads}, "
            f"branches={config.branches}, layout={self.layout}, ranks={self.context.size}, "
            f"backend={backend}"
        )


def input_problem(
    x: Tensor, position_ids: Tensor | None, hidden_size: int, projection: nn.Linear
) -> str | None:
    """The error in the input of ``projection`` and rotary, or None."""
    problem = tensor_problem("x", x)
    if problem is not None:
        return f"{problem}; {ADVICE}" if isinstance(x, DTensor) else problem
    if x.ndim != 3 or x.shape[-1] != hidden_size:
        return (
            f"x must have shape [batch, local tokens, hidden_size={hidden_size}], got "
            f"{tuple(x.shape)}"
        )
    if x.dtype not in DTYPES or x.is_meta:
        return f"x must hold data in one of {DTYPES}, got {describe(x)}"
    weight = projection.weight
    if type(projection) is nn.Linear and type(weight) is nn.Parameter:
        # Wrappers may cast or move weights. For plain weights only autocast casts, not float64.
        casts = autocast_dtype(x.device.type) is not None and torch.float64 not in (
            x.dtype,
            weight.dtype,
        )
        if weight.device != x.device or (weight.dtype != x.dtype and not casts):
            return (
                f"x must be {weight.dtype} on {weight.device} like the layer's weights, got "
                f"{x.dtype} on {x.device}"
            )
    if position_ids is None:
        return None
    if (
        not is_plain(position_ids)
        or position_ids.shape != x.shape[:2]
        or position_ids.dtype not in INTEGER_DTYPES
        or position_ids.device != x.device
    ):
        return (
            f"position_ids must be integers of shape {tuple(x.shape[:2])} on {x.device}, got "
            f"{describe(position_ids)}"
        )
    return None


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of linear layers under autocast; None without autocast."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_sizes(hidden_size: int, norm_eps: float, dtype: torch.dtype | None) -> tuple[int, float]:
    """Check a layer's sizes and dtype; return hidden size and epsilon as an int and a float."""
    check(dtype is None or dtype in DTYPES, "dtype", dtype, f"None or one of {DTYPES}")
    return (
        as_int("hidden_size", hidden_size, 1),
        as_number("norm_eps", norm_eps, "a positive finite number"),
    )


def _check_options(config: NSAConfig, rotary: RotaryConfig | None, dropout: float) -> float:
    """Check a layer's options; return the dropout probability as a float."""
    check(isinstance(config, NSAConfig), "config", config, "an NSAConfig")
    if rotary is not None:
        must = "a RotaryConfig or None"
        check(isinstance(rotary, RotaryConfig), "rotary", rotary, must)
        rotary.rotary_dim(config.head_dim)
    else:
        must = "a RotaryConfig with compress_pre_rope=True"
        check(not config.compress_pre_rope, "rotary", rotary, must)
    must = "a probability in [0, 1)"
    dropout = as_number("dropout", dropout, must, positive=False)
    check(0 <= dropout < 1, "dropout", dropout, must)
    return dropout
