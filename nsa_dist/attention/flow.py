"""The flow of one pass through the attention on one rank.

    halo exchange -> window branch
                  -> compress own blocks -> all-gather -> compressed branch -> choose blocks
                  -> request and fetch the chosen remote blocks -> selected branch
    -> gate and add

Each step is a function of the backend or an autograd pair of ``nsa_dist.comm``. With one rank the
same steps run and nothing moves. Every rank runs the same steps in the same order, whatever it
holds: a node that one rank's graph skipped would leave the others waiting in backward. The ranks
have agreed on the plan before it starts, and agree again before its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.comm import (
    CommunicationCounter,
    FetchBlocks,
    GatherCompressed,
    HaloExchange,
    request_blocks,
)
from nsa_dist.comm.agreement import AgreeInBackward, agree
from nsa_dist.comm.group import ContextGroup
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.nn.compressor import apply_compressor
from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
from nsa_dist.plan import Plan
from nsa_kernels import Backend

# What a module of the user's may raise. Checkpointing ends a recomputation by an exception that is
# none of these.
USERS_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
Rotary = RotaryConfig | tuple[Tensor, Tensor]


class ZeroGradient(torch.autograd.Function):
    """Pass ``out`` on, and give ``unused`` a gradient of zeros instead of none.

    Keeps parameters that only choose blocks, and the collectives behind them, in every backward.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(unused)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (unused,) = ctx.saved_tensors
        return grad, torch.zeros_like(unused)


@dataclass(frozen=True, eq=False)
class Flow:
    """One call's backend, plan and group, and the steps over local rows [N, heads, D]."""

    ops: Backend
    config: NSAConfig
    plan: Plan
    group: ContextGroup
    counter: CommunicationCounter
    rotary: Rotary | None

    def run(
        self,
        q: Tensor,
        keys: dict[str, Tensor],
        values: dict[str, Tensor],
        gates: Tensor,
        k_compressor: nn.Module | None,
        v_compressor: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """All branches, gated and added.

        Args:
            q: [N, H, Dk].
            keys, values: [N, G, D] by branch; shared ones are one object.
            gates: [N, H, nb].

        Returns:
            out [N, H, Dv], log-sum-exp [N, H] by branch, chosen blocks int32 [N, G, n] or None.
        """
        config = self.config
        extended = self._exchange_halos(self._rotate(keys), values)
        outputs: dict[str, Tensor] = {}
        lse: dict[str, Tensor] = {}
        selected = k_cmp = None
        if config.uses_compression:
            k_cmp, v_cmp = self._compress(*extended["compressed"], k_compressor, v_compressor)
        if "window" in config.branches:
            outputs["window"], lse["window"] = self.ops.window_attention(
                q,
                *extended["window"],
                self.plan.segments,
                window=config.window,
                scale=config.softmax_scale,
            )
        if k_cmp is not None:
            outputs["compressed"], lse["compressed"] = self._attend_compressed(q, k_cmp, v_cmp)
        if k_cmp is not None and "selected" in config.branches:
            selected = self._choose(q, k_cmp, lse["compressed"])
            outputs["selected"], lse["selected"] = self._attend_selected(
                q, *extended["selected"], selected
            )
        out = self.ops.combine([outputs[branch] for branch in config.branches], gates)
        if k_cmp is not None and "compressed" not in config.branches:
            out = ZeroGradient.apply(out, k_cmp)
        if self.group.size > 1:
            # Where nothing needs a gradient autograd makes no node, and its message is not sent.
            moved = {branch: k.requires_grad for branch, (k, _) in extended.items()}
            if k_cmp is not None:
                moved["compressed blocks"] = k_cmp.requires_grad
            needs = tuple(name for name, needed in moved.items() if needed)
            out = AgreeInBackward.apply(out, self.plan.statement, needs, self.group, self.counter)
        return out, lse, selected

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        if isinstance(self.rotary, RotaryConfig):
            return rotary_cos_sin(self.rotary, self.config.head_dim, positions)
        cos, sin = self.rotary
        return cos[positions], sin[positions]

    def _rotate(self, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rotate the keys that came unrotated for compression's sake, all but compression's."""
        if not self.config.compress_pre_rope:
            return keys
        cos, sin = self._cos_sin(self.plan.positions)
        rotated: dict[str, Tensor] = {}
        for branch, k in keys.items():
            if branch == "compressed":
                rotated[branch] = k
                continue
            same = [b for b in rotated if b != "compressed" and keys[b] is k]
            rotated[branch] = rotated[same[0]] if same else apply_rotary(k, cos, sin)
        return rotated

    def _exchange_halos(
        self, keys: dict[str, Tensor], values: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Extended K [E, G, Dk] and V [E, G, Dv] of each key branch; what is shared moves once."""
        extended: dict[str, tuple[Tensor, Tensor]] = {}
        for branch, k in keys.items():
            v = values.get(branch)
            same = [b for b in extended if keys[b] is k and values.get(b) is v]
            if same:
                extended[branch] = extended[same[0]]
                continue
            if v is None:  # Keys that only choose blocks have no values.
                v = k.new_zeros(*k.shape[:2], 0)
            halo = self.plan.halos[branch]
            extended[branch] = HaloExchange.apply(k, v, halo, self.group, self.counter, self.plan)
        return extended

    def _compress(
        self,
        k_ext: Tensor,
        v_ext: Tensor,
        k_compressor: nn.Module | None,
        v_compressor: nn.Module | None,
    ) -> tuple[Tensor, Tensor]:
        """Compress own blocks and gather all ranks': K [C, G, Dk], V [C, G, Dv].

        V is empty ([C, G, 0]) where only selection reads the compressed keys.
        """
        config, blocks = self.config, self.plan.compressed
        assert blocks is not None and k_compressor is not None
        rows, block = blocks.own_rows, config.compress_block

        def own_blocks() -> tuple[Tensor, Tensor]:
            k = apply_compressor(k_compressor, k_ext, rows, block, self.ops)
            if "compressed" not in config.branches:
                return k, k.new_zeros(*k.shape[:2], 0)
            assert v_compressor is not None
            return k, apply_compressor(v_compressor, v_ext, rows, block, self.ops)

        custom = config.compress == "custom" and self.group.size > 1
        k_own, v_own = self._agreed(own_blocks) if custom else own_blocks()
        if config.compress_pre_rope:
            middle = blocks.own_index * config.compress_stride + (block - 1) // 2
            k_own = apply_rotary(k_own, *self._cos_sin(middle))
        return GatherCompressed.apply(k_own, v_own, blocks, self.group, self.counter, self.plan)

    def _agreed(self, compress: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What the user's modules return; an error of one rank's is raised on every rank."""
        statement = self.plan.statement.also(call="forward of custom compressors")
        try:
            result = compress()
        except USERS_ERRORS as error:
            said = f"custom compressor raised {type(error).__name__}: {error}"
            problem = str(error) if str(error).startswith("custom compressor ") else said
            agree(statement, problem, self.group, self.counter, error)
            raise
        agree(statement, None, self.group, self.counter)
        return result

    def _attend_compressed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if "compressed" not in self.config.branches:
            q, k, v = q.detach(), k.detach(), k.detach()  # Only the log-sum-exp is wanted.
        return self.ops.compressed_attention(
            q,
            k,
            v,
            self.plan.segments,
            block=self.config.compress_block,
            stride=self.config.compress_stride,
            scale=self.config.softmax_scale,
        )

    def _choose(self, q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
        config = self.config
        with torch.no_grad():
            return self.ops.select_blocks(
                q,
                k_cmp,
                lse,
                self.plan.segments,
                block=config.compress_block,
                stride=config.compress_stride,
                select_block=config.select_block,
                num_selected=config.num_selected,
                num_init_blocks=config.num_init_blocks,
                num_local_blocks=config.num_local_blocks,
                scale=config.softmax_scale,
            )

    def _attend_selected(
        self, q: Tensor, k_ext: Tensor, v_ext: Tensor, selected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fetch and attend, the KV heads of one transfer after another."""
        blocks = self.plan.selected
        assert blocks is not None
        fetch = request_blocks(selected, self.plan, self.group, self.counter)
        width = fetch.heads_per_transfer
        outputs, lses = [], []
        for transfer, q_g, k_g, v_g, selected_g, rows_g in zip(
            fetch.transfers,
            q.split(width * self.config.heads_per_group, dim=1),
            k_ext.split(width, dim=1),
            v_ext.split(width, dim=1),
            selected.split(width, dim=1),
            fetch.block_rows.split(width),
            strict=True,
        ):
            k_own, v_own, k_fetched, v_fetched = FetchBlocks.apply(
                k_g, v_g, transfer, self.group, self.counter, self.plan
            )
            out, lse = self.ops.selected_attention(
                q_g,
                k_own,
                v_own,
                k_fetched,
                v_fetched,
                selected_g,
                rows_g,
                blocks.lengths,
                self.plan.segments,
                select_block=self.config.select_block,
                scale=self.config.softmax_scale,
            )
            outputs.append(out)
            lses.append(lse)
        return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)
