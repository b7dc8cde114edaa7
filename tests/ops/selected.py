"""What the tests of the selected branch share: calls over own and fetched blocks, or all own."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from tests.ops.backends import BackendOnDevice
from tests.ops.op_cases import (
    BlockTable,
    Case,
    Layout,
    assert_attention,
    masks,
    random,
    random_choice,
)


def attend(
    backend: BackendOnDevice,
    case: Case,
    segments: QuerySegments,
    table: BlockTable,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    fetched: tuple[Tensor, Tensor],
    selected: Tensor,
) -> tuple[Tensor, Tensor]:
    tensors = (q, *own, *fetched, selected, table.block_rows, table.block_lengths)
    o, lse = backend.ops.selected_attention(
        *(x.to(backend.device) for x in tensors),
        segments.to(backend.device),
        select_block=case.select_block,
        scale=case.scale,
    )
    return o.cpu(), lse.cpu()


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v of the whole stream and the gradient of the local outputs."""
    tokens = sum(case.documents)
    q = random(tokens, case.heads, case.key_width, dtype=dtype)
    k = random(tokens, case.groups, case.key_width, dtype=dtype)
    v = random(tokens, case.groups, case.value_width, dtype=dtype)
    return (q, k, v), random(case.run_bounds[-1], case.heads, case.value_width, dtype=dtype)


def pool(
    table: BlockTable, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(k_own, v_own), (k_fetched, v_fetched)."""
    (k_own, k_fetched), (v_own, v_fetched) = (table.fill(x) for x in inputs[1:])
    return (k_own, v_own), (k_fetched, v_fetched)


def plain_table(length: int, case: Case) -> tuple[Tensor, Tensor]:
    """block_rows, block_lengths of one document that is all own."""
    rows = torch.arange(0, length, case.select_block)
    return rows.repeat(case.groups, 1), (length - rows).clamp(max=case.select_block)


def attend_plain(
    backend: BackendOnDevice,
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    **options: Tensor,
) -> tuple[Tensor, ...]:
    """One document, all own, on the backend's device; its first tokens are the queries."""
    rows, lengths = (x.to(backend.device) for x in plain_table(k.shape[0], case))
    return backend.ops.selected_attention(
        q, k, v, k[:0], v[:0], selected.to(backend.device), rows, lengths,
        QuerySegments.from_rows([(0, q.shape[0], 0, 0, 0, 0)], backend.device),
        select_block=case.select_block, scale=case.scale, **options,
    )  # fmt: skip


def attention_results(
    backend: BackendOnDevice,
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_o: Tensor,
    choice: Tensor,
) -> list[Tensor]:
    """o, lse, dq of the local queries, dk and dv of the stream, blocks own and fetched."""
    layout = Layout(case)
    selected = choice[case.local_rows]
    table = layout.block_table(selected)
    q, (own, fetched) = inputs[0][case.local_rows], pool(table, inputs)
    leaves = [x.requires_grad_() for x in (q, *own, *fetched)]
    o, lse = attend(backend, case, layout.segments, table, q, own, fetched, selected)
    dq, *grads = torch.autograd.grad(o, leaves, grad_o)
    assert all(x.dtype == q.dtype for x in (dq, *grads))
    tokens = inputs[1].shape[0]
    dk = table.collect(grads[0], grads[2], tokens)
    dv = table.collect(grads[1], grads[3], tokens)
    return [o, lse, dq, dk, dv]


def check_against_the_oracle(backend: BackendOnDevice, case: Case, dtype: torch.dtype) -> None:
    choice = random_choice(case)
    inputs, grad_o = make_inputs(case, dtype)
    found = attention_results(backend, case, inputs, grad_o, choice)
    ours = dict(zip(("o", "lse", "dq", "dk", "dv"), found, strict=True))
    assert_attention(case, ours, masks(case, "selected", choice), case.bounds, inputs, grad_o)
