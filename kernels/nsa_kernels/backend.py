"""The seam between the attention and the code that computes it on one device.

A backend is a module (or any object) with the functions of `Backend`. They get tensors, positions
and tables, never ranks or process groups, so that one rank of many and a single device run the same
code. Dimension letters: N local query rows, H query heads, G KV heads, R = H/G heads of a group, Dk
and Dv widths, E rows of a local buffer with its halo, F fetched rows, C compressed tokens, B
selection blocks, n chosen blocks, l compress_block, d compress_stride, l' select_block, w window.

What holds for all functions. Softmax and accumulation run in float32 (float64 for float64 inputs),
whatever autocast or the float32 matmul precision say, and results are rounded once. A query that
sees no key gets o = 0, lse = -inf and gradient zero. lse is the natural log-sum-exp of the scaled
logits and carries no gradient. Every length may be 0, also N, and then backward gives zeros. Inputs
may have any strides. Rows that no query of the call may see may hold NaN. Given the positions of
all, an output row depends bit for bit on nothing but what its query sees. Gradients are the same
bits in each run. H and G may be a slice: one KV head and its R query heads.

Gates. A branch's function may be given its gate [N, H], of any floating dtype and strides. It then
returns `summand` beside o and lse, the node of the graph that stands for g o: of the shape and
dtype of o, with no memory and no values. `combine` takes it, and hands the gradient of the gated
sum to every summand uncopied. From that, the branch's backward makes the gradients of q, k, v and
of the gate; o carries none. So nobody writes g do or reads o again for the gate. `gated_branches`
names the branches whose functions take a gate; the others are weighed by `combine`, backward too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nsa_kernels import pytorch
from nsa_kernels.autograd import BranchPasses
from nsa_kernels.segments import QuerySegments

BACKENDS = ("auto", "pytorch", "triton")
LEAST_CAPABILITY = (8, 0)


class Backend(Protocol):
    """The functions a backend implements; all but `select_blocks` are differentiable.

    A backend may also have `gated_branches`, `branch_passes`, `attend_few`, `add_gradients` and
    `multiply_rows`, see the functions of these names below.
    """

    @property
    def name(self) -> str:
        """How `get_backend` calls it."""

    def refuses(self, dtype: torch.dtype | None, options: dict[str, int]) -> str | None:
        """The error for a call that this backend does not compute; None if it computes it.

        dtype of the inputs, None where not known yet; options: head_dim, v_head_dim,
        compress_block, compress_stride, select_block, num_selected, window.
        """

    def gather_blocks(self, x: Tensor, block_rows: Tensor, block: int) -> Tensor:
        """Copies blocks of rows out, for compressors that are any module.

        x [E, G, D], block_rows int64 [C], the first row of each block of `block` rows
        -> [C, G, block, D] in x.dtype.
        """

    def compress(
        self,
        x: Tensor,
        block_rows: Tensor,
        block: int,
        kind: str,
        params: Mapping[str, Tensor],
    ) -> Tensor:
        """Eq. 7, one token for each block: x [E, G, D], block_rows int64 [C] -> [C, G, D].

        kind and params: as in compressors.py, so `mlp` up [hidden, l*D], down [D, hidden]; `linear`
        weight [D, l*D]; `conv1d` weight [D, l]; `attention_pool` query [D]; each with position
        [l, D]; `mean` none. A leading [G] on all params means one set for each KV head. params may
        have another dtype than x; the result has x.dtype. Raises ValueError for another kind.
        """

    def compressed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: QuerySegments,
        *,
        block: int,
        stride: int,
        scale: float,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Attention to the compressed tokens i of the own document with i*d + l - 1 <= t.

        q [N, H, Dk], k [C, G, Dk], v [C, G, Dv] -> o [N, H, Dv] in q.dtype, lse [N, H] float32
        (float64 for float64); with a gate [N, H] also the summand, and o carries no gradient.
        """

    def select_blocks(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        segments: QuerySegments,
        *,
        block: int,
        stride: int,
        select_block: int,
        num_selected: int,
        num_init_blocks: int,
        num_local_blocks: int,
        scale: float,
    ) -> Tensor:
        """Eq. 9 to 11, the blocks that each query and group attends to; not differentiated.

        q [N, H, Dk], k [C, G, Dk] compressed, lse [N, H] of compressed_attention -> int32 [N, G, n]
        block indices counted from the document's start, ascending, then -1. Forced are the first
        num_init_blocks and the newest num_local_blocks of the blocks up to the query's own; the
        highest scores take the other places, equal float32 scores by the lower index.
        """

    def selected_attention(
        self,
        q: Tensor,
        k_own: Tensor,
        v_own: Tensor,
        k_fetched: Tensor,
        v_fetched: Tensor,
        selected: Tensor,
        block_rows: Tensor,
        block_lengths: Tensor,
        segments: QuerySegments,
        *,
        select_block: int,
        scale: float,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Attention to the tokens <= t of the chosen blocks.

        q [N, H, Dk]; k_own [E, G, Dk], v_own [E, G, Dv]; k_fetched [F, G, Dk], v_fetched
        [F, G, Dv]; selected int [N, G, n] as `select_blocks` returns it; block_rows int64 [G, B]:
        where block id b = selected_base + j starts, counted through the own rows and then the
        fetched ones, -1 for a block that is not here and must not be chosen; block_lengths int64
        [B]: its tokens, l' or less for a document's last. No two blocks share a row.
        -> o [N, H, Dv] in q.dtype, lse [N, H]; with a gate [N, H] also the summand.
        """

    def window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: QuerySegments,
        *,
        window: int,
        scale: float,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Attention to positions t-w+1..t: q [N, H, Dk], k [E, G, Dk], v [E, G, Dv] -> o, lse.

        With a gate [N, H] also the summand.
        """

    def combine(
        self,
        outputs: Sequence[Tensor],
        gates: Tensor,
        summands: Sequence[Sequence[Tensor]] = (),
    ) -> Tensor:
        """Eq. 5, the gated sum: one [N, H, Dv] a branch, gates [N, H, branches] -> [N, H, Dv].

        summands: for each branch those of its function, of consecutive heads, and none for a branch
        that was given no gate; () says none for all. A branch with summands gets its gradient
        through these alone: none goes to its output and its column of gates. A backend without
        `gated_branches` is never given any.
        """


def gated_branches(backend: Backend) -> Sequence[str]:
    """The branches whose functions take a gate and return a summand; others know no `gate`."""
    return getattr(backend, "gated_branches", ())


def branch_passes(backend: Backend) -> Mapping[str, BranchPasses]:
    """By branch, of a backend that has them; then a query's bits in forward depend on its keys
    alone, in every dtype. {} for others."""
    return getattr(backend, "branch_passes", {})


class AddGradients(Protocol):
    """What several branches give to q and to their gates, in one pass."""

    def __call__(
        self, grads: Sequence[Tensor], of_gates: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """grads: up to three [N, H, D] -> their sum, added in their order and rounded once.

        of_gates: up to three [N, H], any strides -> [N, H, b], one beside the other.
        """


def add_gradients(backend: Backend) -> AddGradients | None:
    """The function of a backend that has a kernel for it, or None."""
    return getattr(backend, "add_gradients", None)


class AttendFew(Protocol):
    """All branches for few queries of each document, over caches, and their gated sum."""

    def __call__(
        self,
        q: Tensor,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        gates: Tensor,
        segments: QuerySegments,
        block_rows: Tensor,
        *,
        compressed_rows: Tensor | None = None,
        compressed_page: int = 0,
        branches: tuple[str, ...],
        block: int,
        stride: int,
        select_block: int,
        num_selected: int,
        num_init_blocks: int,
        num_local_blocks: int,
        window: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """What `compressed_attention`, `select_blocks`, `selected_attention`, `window_attention`
        and `combine` give one after another, without gradients.

        q [N, H, Dk]; keys, values: rows [E, G, D] of the branches "compressed", "selected" and
        "window", the first of compressed tokens; gates [N, H, b] in the order of `branches`, which
        has "selected" and "window" and may have "compressed", whose values else need not be given.

        Caches may be paged. block_rows int64 [B]: where block id b = selected_base + j of l' tokens
        starts, for the selected and the window branch alike, anything for blocks after a query's
        own; window_base is not read. compressed_rows int64 [pages]: where page c = compressed_base
        + j of `compressed_page` compressed tokens starts, a power of two; without it those of a
        document follow one another from row compressed_base on.
        -> out [N, H, Dv] in q.dtype, and the chosen blocks int32 [N, G, n].

        The bits of a query depend on what it sees and on nothing else of the call: not on the other
        queries, nor on how many there are of its document. They are not those of the operators.

        With `QueriesOnDevice` no shape, grid or address follows from where the queries stand, and
        the host reads nothing: a CUDA graph of the call is one for every position up to `newest`.
        """


def attend_few(backend: Backend) -> AttendFew | None:
    """The function of a backend that has kernels for few queries, or None."""
    return getattr(backend, "attend_few", None)


class MultiplyRows(Protocol):
    """Products of rows with a matrix whose bits depend on nothing but the row and the matrix."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [N, I], weight [O, I] and bias [O], of one dtype -> x W^T + bias, [N, O] in x.dtype.

        Without gradients.
        """


def multiply_rows(backend: Backend) -> MultiplyRows | None:
    """The function of a backend that has such products, or None."""
    return getattr(backend, "multiply_rows", None)


def as_gate(gate: Tensor | None) -> dict[str, Any]:
    """How a branch's function is given a gate: not at all if there is none, as some know none."""
    return {} if gate is None else {"gate": gate}


def get_backend(name: str = "auto", device: torch.device | str | None = None) -> Backend:
    """The backend called `name`, for tensors on `device` (None where that is not known yet).

    `auto` takes `triton` for an NVIDIA GPU of compute capability 8.0 or more, where Triton is
    installed, and `pytorch` for everything else.

    Raises ValueError for any other name, and for `triton` where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    device = None if device is None else torch.device(device)
    if name == "pytorch" or (name == "auto" and (device is None or device.type != "cuda")):
        return pytorch
    missing = _missing_for_triton(device)
    if missing is not None:
        if name == "auto":
            return pytorch
        raise ValueError(f"backend must be 'pytorch' {missing}, got 'triton'")
    # Not before it is asked for: machines without Triton import the rest.
    import nsa_kernels.triton

    return nsa_kernels.triton


def _missing_for_triton(device: torch.device | None) -> str | None:
    """Why the Triton backend cannot run on `device` (None: on any of this machine), or None."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return "without the package triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "without an NVIDIA GPU"
    if device is not None and device.type != "cuda":
        return f"for tensors on {device}"
    gpu = torch.cuda.get_device_properties(device)  # which torch.compile can call
    if (gpu.major, gpu.minor) < LEAST_CAPABILITY:
        return f"on {gpu.name}, of a compute capability below 8.0"
    return None
