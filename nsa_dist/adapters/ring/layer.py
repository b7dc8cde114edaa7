"""A dense attention layer and block with the interface of the NSA layer and block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.adapters.ring.attention import DensePlan, dense_attention, find_dense_plan
from nsa_dist.adapters.ring.loading import missing_package
from nsa_dist.block import PreNormBlock
from nsa_dist.checks import as_int, as_number, check, check_bool, describe, is_plain
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.layer import PROJECTIONS, autocast_dtype, input_problem
from nsa_dist.nn.dropout import drop_tokens
from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
from nsa_dist.nn.tensor_parallel import cut_problem, project
from nsa_dist.plan.layout import make_layout
from nsa_dist.plan.statement import Statement


class DenseAttention(nn.Module):
    """Causal softmax attention over all earlier tokens of the document.

    It replaces ``NativeSparseAttention`` in some or all layers of a model, over the same group and
    layout. It has the weights of that layer with shared K, V, without gates and compressors.
    Gradients, dropout and ``group=`` are the same.

    Args:
        hidden_size: width of the input and output.
        config: sets heads, widths and scale; other options are ignored.
        bias: biases in the q, k, v and output projections.
        qk_norm: RMSNorm over the channels of each query and key, before rotary.
        norm_eps: epsilon of that RMSNorm.
        rotary: rotary embedding; None disables it.
        dropout: probability of zeroing an element of the output, in training mode; the mask
            depends on the token, not on the split.
        layout: how the sequence is split; ``dense_attention`` lists the combinations.
        group: process group or one-dimensional DeviceMesh over which it is split; None for one
            rank.

    Attributes:
        communication: bytes sent by this layer, by kind, since its last ``reset``.

    Raises:
        ValueError: if an option has a value that is not allowed.
        ImportError: for several ranks, if ring-flash-attn is not installed.
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
        layout: str = "zigzag",
        group: GroupLike | ContextGroup = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context = context_group(group)
        layout = make_layout(layout, self.context.size).name
        hidden_size = as_int("hidden_size", hidden_size, 1)
        check_bool("bias", bias)
        check_bool("qk_norm", qk_norm)
        norm_eps = as_number("norm_eps", norm_eps, "a positive finite number")
        must = "a probability in [0, 1)"
        dropout = as_number("dropout", dropout, must, positive=False)
        check(0 <= dropout < 1, "dropout", dropout, must)
        check(isinstance(config, NSAConfig), "config", config, "an NSAConfig")
        if rotary is not None:
            is_config = isinstance(rotary, RotaryConfig)
            check(is_config, "rotary", rotary, "a RotaryConfig or None")
            rotary.rotary_dim(config.head_dim)
        missing = missing_package()
        if self.context.size > 1 and missing is not None:
            raise ImportError(missing)
        self.hidden_size, self.config, self.rotary = hidden_size, config, rotary
        self.dropout, self.layout = dropout, layout
        self.communication = CommunicationCounter()

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads, kv_heads = config.num_heads, config.num_kv_heads
        width, value_width = config.head_dim, config.value_dim
        self.q_proj = nn.Linear(hidden_size, heads * width, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_heads * width, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_heads * value_width, bias=bias, **factory)
        self.o_proj = nn.Linear(heads * value_width, hidden_size, bias=bias, **factory)
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = nn.RMSNorm(width, eps=norm_eps, **factory)
            self.k_norm = nn.RMSNorm(width, eps=norm_eps, **factory)

    def reset_parameters(self) -> None:
        """Initialise all weights again from torch's generator, in a fixed order."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            linear.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend from this rank's tokens to all that they may see, on any rank of the group.

        Args:
            x: [B, L, hidden_size], this rank's part of each row.
            cu_seqlens: int32 [documents + 1], boundaries of the whole padded stream, equal on all
                ranks, with B = 1; None if each row is one document.
            position_ids: integer [B, L], positions for rotary; default each token's position in
                its document.

        Returns:
            [B, L, hidden_size].

        Raises:
            ValueError: on every rank of the group, if an argument of any rank is not allowed.
        """
        dense_plan = self._plan(x, cu_seqlens, position_ids)
        plan, rows = dense_plan.plan, x.shape[:2]
        positions = plan.positions.view(rows) if position_ids is None else position_ids
        out = dense_attention(
            *self._project(x, positions),
            group=self.context,
            scale=self.config.softmax_scale,
            plan=dense_plan,
            communication=self.communication,
        )
        out = project("o_proj", self.o_proj, out.flatten(2), self.hidden_size)
        if self.training and self.dropout > 0:
            out = drop_tokens(out, self.dropout, plan.documents, plan.positions)
        return out

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, L, H, Dk], keys [B, L, G, Dk], values [B, L, G, Dv], normalised, rotated."""
        config = self.config
        q, k, v = (
            project(name, module, x, heads * width).unflatten(-1, (heads, width))
            for name, module, heads, width in (
                ("q_proj", self.q_proj, config.num_heads, config.head_dim),
                ("k_proj", self.k_proj, config.num_kv_heads, config.head_dim),
                ("v_proj", self.v_proj, config.num_kv_heads, config.value_dim),
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            # Autocast may norm in float32; queries, keys and values share a dtype.
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        if self.rotary is not None:
            cos, sin = rotary_cos_sin(self.rotary, config.head_dim, positions)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q, k, v

    def compile_projections(self, **options: Any) -> None:
        """Compile what makes queries, keys and values of the input, in place, at its first call.

        Args:
            options: of ``torch.compile``.
        """
        self._project = torch.compile(self._project, **options)  # type: ignore[method-assign]

    @torch.compiler.disable
    def _plan(self, x: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> DensePlan:
        if not is_plain(x):
            problem = f"x must be a plain tensor, got {describe(x)}"
            statement = Statement({"call": "dense forward"})
            agree(statement, problem, self.context, self.communication)
        rows = tuple(x.shape[:2]) if x.ndim >= 2 else (0, 0)
        cast = autocast_dtype(x.device.type)
        return find_dense_plan(
            self.layout,
            self.context,
            batch=rows[0],
            local_length=rows[1],
            cu_seqlens=cu_seqlens,
            dtype=x.dtype if cast is None or x.dtype == torch.float64 else cast,
            device=x.device,
            counter=self.communication,
            inputs={
                "x": f"{x.dtype}, width {x.shape[-1]}" if x.ndim == 3 else describe(x),
                "heads": repr((self.config.num_heads, self.config.num_kv_heads)),
                "widths": repr((self.config.head_dim, self.config.value_dim)),
                "scale": repr(self.config.softmax_scale),
                "rotary": repr(self.rotary),
                "qk_norm": "False" if self.q_norm is None else f"True, eps {self.q_norm.eps}",
                "dropout": repr(self.dropout if self.training else 0.0),
            },
            problem=input_problem(x, position_ids, self.hidden_size, self.q_proj)
            or cut_problem(self, PROJECTIONS),
        )

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"hidden_size={self.hidden_size}, heads={config.num_heads}/{config.num_kv_heads}, "
            f"layout={self.layout}, ranks={self.context.size}"
        )


class DenseBlock(PreNormBlock):
    """``NSABlock`` with dense attention: norm, attention, norm, SwiGLU, with residuals.

    Args:
        hidden_size, config: as for ``DenseAttention``, which gets all other keyword arguments.
        mlp_hidden: hidden width of the SwiGLU.
        norm_eps: epsilon of every RMSNorm.
    """

    attention_type = DenseAttention

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, L, hidden_size] to the same shape; arguments as for ``DenseAttention``."""
        attended = self.attention(
            self.attention_norm(x), cu_seqlens=cu_seqlens, position_ids=position_ids
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))
