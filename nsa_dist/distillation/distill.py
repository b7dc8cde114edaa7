"""Losses by which sparse layers learn what dense attention does with their queries and keys.

Every layer, function and adapter attends through ``nsa_dist.attention.functional.attend``, so that
a watcher of its calls serves all of them. The teacher is the model itself: dense attention with a
layer's own queries, keys and values is what the dense model computed that its weights come from. In
the place of the sparse output it is handed on, so that each layer sees the dense model's states,
and no gradient leaves a layer. DeepSeek-V3.2 (arXiv 2512.02556, section 2.1.1) warms its indexer up
in the same way: by the divergence from dense attention summed over heads, everything else frozen.

Nothing quadratic is kept: chunks of queries are computed one after another, and the gradient of the
compressed keys is made with the loss. Letters as in ``dense``, and N tokens of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa_dist.attention.call import Call
from nsa_dist.attention.extended import Extended
from nsa_dist.attention.selectors import CompressedSelector, Selector, cos_sin
from nsa_dist.attention.watching import Inputs, watched
from nsa_dist.distillation.dense import (
    block_kinds,
    captured,
    choice_loss,
    dense_chunk,
    log_scores,
)
from nsa_dist.distillation.wrapped import keep, through_wrappers
from nsa_dist.nn.rotary import apply_rotary
from nsa_dist.plan.grid import num_blocks
from nsa_kernels.autograd import first_order

MOST = 1 << 25
"""Dense probabilities that exist at one time."""


@dataclass(frozen=True, eq=False)
class LayerDistillation:
    """How far one call of a sparse layer was from dense attention; scalars, not waited for.

    Attributes:
        choice: mean over queries and KV heads of the divergence of the scores of blocks from the
            dense attention's mass (``nsa_dist.distillation.dense``), nats. It trains the compressor
            of keys.
        output: squared distance of the layer's output, before its last projection, from the dense
            one's, divided by the square of that. It trains gates and compressors.
        captured: share of dense attention in the chosen blocks, the mean over queries that have
            more blocks than they choose; NaN without such queries. No gradient.
        best: the same of the best choice of as many blocks, the forced ones included.
    """

    choice: Tensor
    output: Tensor
    captured: Tensor
    best: Tensor


class DenseDistillation:
    """What ``distill_dense`` found.

    Attributes:
        layers: a call of a sparse layer each, in the order of the calls.
    """

    def __init__(self, has_model: bool) -> None:
        self.layers: list[LayerDistillation] = []
        self._has_model = has_model
        self._whole: list[nn.Module] = []  # Compressors that backward needs so again.
        self._call: tuple[Call, Inputs, CompressedSelector] | None = None

    @property
    def loss(self) -> Tensor:
        """Mean over the calls of ``choice`` + ``output``, a scalar for ``backward``.

        Raises:
            ValueError: if no sparse layer was called, or if FSDP2 has sharded the weights of a
                layer since, and ``distill_dense`` was not given the model.
        """
        if any(map(_is_sharded, self._whole)):
            raise ValueError(
                "model must be passed to distill_dense where FSDP2 shards it, got None "
                "(distill_dense(model): backward needs the weights whole)"
            )
        if not self.layers:
            raise ValueError(
                "distill_dense must see a call of a sparse layer, got none (layers with a cache "
                "are not seen: use_cache=False)"
            )
        return torch.stack([layer.choice + layer.output for layer in self.layers]).mean()

    def begin(self, call: Call, inputs: Inputs, selector: Selector) -> Inputs:
        """See ``Watcher``. Cuts the graph before a layer's queries, keys and values.

        Raises:
            ValueError: for a call that cannot be distilled.
        """
        problem = _problem(call, selector)
        if problem is not None:
            raise ValueError(problem)
        assert isinstance(selector, CompressedSelector)
        assert selector.k_compressor is not None
        learns = torch.is_grad_enabled() and not self._has_model
        if learns and not _is_sharded(selector.k_compressor):
            self._whole.append(selector.k_compressor)
        inputs = Inputs(inputs.q.detach(), _detached(inputs.k), _detached(inputs.v), inputs.gates)
        self._call = call, inputs, selector
        return inputs

    def end(self, out_NHD: Tensor, blocks_NGn: Tensor | None) -> Tensor:
        """See ``Watcher``. Returns the dense output, without a graph."""
        assert self._call is not None and blocks_NGn is not None
        (call, inputs, selector), self._call = self._call, None
        k_CGD = _compressed_keys(call, inputs, selector)
        with torch.autocast(out_NHD.device.type, enabled=False):
            found, dense_NHD = _distilled(call, inputs, k_CGD, out_NHD, blocks_NGn)
        self.layers.append(found)
        return dense_NHD.to(out_NHD.dtype)


@contextmanager
def distill_dense(model: nn.Module | None = None) -> Iterator[DenseDistillation]:
    """Within it, each call of a sparse layer is compared with dense attention, and returns that.

        with distill_dense(model) as distilled:
            model(tokens)
        distilled.loss.backward()

    A layer's dense attention is that of its own queries, and of the keys and values of its selected
    branch. No gradient passes through these or the layer's output; gates read its input. So freeze
    all other weights: gates and compressors learn, each layer by itself. Without gradients it
    measures.

    Calls must be on one rank for a sequence, with the ``selected`` branch and NSA's own selector,
    without ``exact_gradients`` and caches.

    Args:
        model: what is called, with what wraps it: needed to train by DDP or FSDP2, or a model with
            activation checkpointing, which within it does nothing (little is kept without).

    Raises:
        ValueError: from the call of a layer for which that does not hold, or if FSDP1 wraps
            ``model``.
        RuntimeError: if calls are watched already.
    """
    distillation = DenseDistillation(has_model=model is not None)
    wrapped: AbstractContextManager[None] = nullcontext()
    if model is not None and torch.is_grad_enabled():
        wrapped = through_wrappers(model, distillation.layers)
    with watched(distillation), wrapped:
        yield distillation


def _problem(call: Call, selector: Selector) -> str | None:
    """Why a call cannot be distilled, or None."""
    ranks = call.channel.group.size
    if ranks > 1:
        return f"group must have one rank in distill_dense (its dense attention has), got {ranks}"
    if call.plan.parts is not None:
        return f"exact_gradients must be 0 in distill_dense, got {call.plan.parts.most_ranks}"
    if "selected" not in call.config.branches:
        return f"branches must have 'selected' in distill_dense, got {call.config.branches}"
    if type(selector) is not CompressedSelector:
        return f"selector must be NSA's own in distill_dense, got {selector.name!r}"
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0] is not keep and torch.is_grad_enabled():
        return (
            "activation checkpointing must be off in distill_dense() (it is not watched in "
            "backward; little is kept without it), or the model be passed, which keeps that: "
            f"distill_dense(model); got hooks of {hooks[0].__module__}"
        )
    return None


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def _detached(x: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return x.detach()
    return {name: each.detach() for name, each in x.items()}


def _rows(x: Tensor | Mapping[str, Tensor], name: str) -> Tensor:
    """Rows [N, G, D] of a set."""
    return (x if isinstance(x, Tensor) else x[name]).flatten(0, 1)


def _compressed_keys(call: Call, inputs: Inputs, selector: CompressedSelector) -> Tensor:
    """Compressed keys [blocks of all documents, G, Dk], with the graph of their compressor."""
    keys = {"compressed": _rows(inputs.k, "compressed")}
    only_keys = CompressedSelector(selector.k_compressor)
    k_CGD: Tensor = only_keys.begin(call, Extended(call, keys, {})).finish()[0]
    return k_CGD


def _distilled(
    call: Call, inputs: Inputs, k_CGD: Tensor, out_NHD: Tensor, blocks_NGn: Tensor
) -> tuple[LayerDistillation, Tensor]:
    """What a layer is compared by, and the dense output [N, H, Dv]."""
    config, plan = call.config, call.plan
    q_NHD, k_NGD = inputs.q.flatten(0, 1), _rows(inputs.k, "selected")
    v_NGD = _rows(inputs.v, "selected")
    if call.rotary is not None:
        k_NGD = apply_rotary(k_NGD, *cos_sin(call, plan.positions))
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    dense_NHD = torch.empty(out_NHD.shape, dtype=wide, device=out_NHD.device)
    compressed = k_CGD.detach().to(wide)
    learns = k_CGD.requires_grad and torch.is_grad_enabled()
    grad_CGD = torch.zeros_like(compressed)
    sums = torch.zeros(4, dtype=wide, device=out_NHD.device)
    for start, length, base in _documents(call):
        k_SGD, v_SGD = (x[start : start + length].to(wide) for x in (k_NGD, v_NGD))
        rows = max(1, MOST // (config.num_heads * length))
        for first in range(0, length, rows):
            end = min(first + rows, length)
            here = slice(start + first, start + end)
            q_cHD = q_NHD[here].to(wide)
            with torch.no_grad():
                chunk = dense_chunk(config, first, q_cHD, k_SGD[:end], v_SGD[:end])
                dense_NHD[here] = chunk.out
                may, free = block_kinds(config, chunk)
                share = captured(config, chunk, blocks_NGn[here], may, free)
            seen = slice(base, base + num_blocks(end, config))
            k_seen = compressed[seen].requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                score = log_scores(config, chunk, q_cHD, k_seen, free)
                loss = choice_loss(chunk.mass, score, free)
            if learns:
                grad_CGD[seen] += torch.autograd.grad(loss, k_seen)[0]
            sums += torch.stack((loss.detach(), share.chosen, share.best, share.count.to(wide)))
    terms = max(1, len(q_NHD) * config.num_kv_heads)
    choice: Tensor = _WithGradient.apply(k_CGD, sums[0] / terms, grad_CGD / terms)
    least = torch.finfo(wide).tiny
    output = (out_NHD.to(wide) - dense_NHD).square().sum()
    output = output / dense_NHD.square().sum().clamp(min=least)
    found = LayerDistillation(choice, output, sums[1] / sums[3], sums[2] / sums[3])
    return found, dense_NHD


def _documents(call: Call) -> Iterator[tuple[int, int, int]]:
    """The first row of each document, its tokens, and its first compressed key; on one rank."""
    rows = call.plan.segments.rows
    starts = [i for i, row in enumerate(rows) if row.position == 0 and row.length]
    for i, after in zip(starts, [*starts[1:], len(rows)], strict=True):
        of_document = [row for row in rows[i:after] if row.length]
        length = sum(row.length for row in of_document)
        last = of_document[-1]
        assert last.position + last.length == length, "documents of one rank are whole"
        yield of_document[0].start, length, of_document[0].compressed_base


class _WithGradient(torch.autograd.Function):
    """A value whose gradient was computed with it.

    x [...], value [], grad like x: forward value, backward (upstream) * grad
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return (upstream * grad).to(ctx.dtype), None, None
