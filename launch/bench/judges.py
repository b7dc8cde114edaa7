"""Checks of results before they are timed.

Results are compared with float64 on sampled rows: outputs, and all gradients of what these rows
give, so that a stream of any length is checked in bounded memory. Rows that were not sampled must
get gradients of exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.bench.stream import Stream
from nsa_kernels.reference import masked_softmax

SAMPLED = 192
"""Rows of a result that are compared with float64."""
ROUNDINGS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 64.0}
"""Largest error of an operator in eps of the dtype: 16-bit results are rounded once after products
whose operands were rounded once, each by at most eps / 2; float32 sums add up to 64 tiles in a row
before they are added as a tree."""


@dataclass(frozen=True)
class Verdict:
    """The largest error found and the largest one allowed. NaN is wrong."""

    error: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit


Run = Callable[..., Tensor]
"""Inputs -> one tensor."""
Judge = Callable[[Run, list[Tensor]], Verdict]


def sampled_rows(count: int) -> Tensor:
    """int64, ascending: the first and the last row, and others at random."""
    others = torch.randperm(count)[: max(0, SAMPLED - 2)]
    return torch.cat((others, torch.tensor([0, count - 1]))).unique()


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest norm of a difference over the norm of the expected tensor, in float64."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    errors = [(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]
    return float(torch.stack(errors).max())


def compare_sampled(reference: Callable[..., Tensor], *, by_row: int, operators: int = 1) -> Judge:
    """A judge by relative error: the norm of the difference over that of the float64 result.

    Args:
        reference: sampled rows and float64 inputs -> output of these rows. Of the first ``by_row``
            inputs it gets those rows only.
        operators: number of operators that round one after another.
    """

    def judge(run: Run, inputs: list[Tensor]) -> Verdict:
        out = run(*inputs)
        rows = sampled_rows(out.shape[0]).to(out.device)
        exact_inputs = [
            (x.detach()[rows] if i < by_row else x.detach()).double().requires_grad_()
            for i, x in enumerate(inputs)
        ]
        exact = reference(rows, *exact_inputs)
        weight = torch.randn_like(exact).to(out.dtype)
        grad = torch.zeros_like(out)
        grad[rows] = weight
        grads = list(torch.autograd.grad(out, inputs, grad))
        for i in range(by_row):
            sampled = grads[i][rows]
            if grads[i].index_fill_(0, rows, 0).any():
                return Verdict(float("inf"), 0.0)
            grads[i] = sampled
        found = [out.detach()[rows], *grads]
        expected = [exact.detach(), *torch.autograd.grad(exact, exact_inputs, weight.double())]
        limit = operators * ROUNDINGS[out.dtype] * torch.finfo(out.dtype).eps
        return Verdict(relative_error(found, expected), limit)

    return judge


def compare_choice(stream: Stream, q: Tensor, k: Tensor) -> Judge:
    """A judge of chosen blocks: no block left out may score higher in float64 than a chosen one.

    Allowed is 4 times the largest error of scores that plain code in the run's dtype makes.
    """

    def judge(run: Run, inputs: list[Tensor]) -> Verdict:
        selected = run(*inputs)
        rows = sampled_rows(stream.length).to(selected.device)
        return choice_verdict(stream, rows, q.detach()[rows], selected[rows], k.detach())

    return judge


def choice_verdict(stream: Stream, rows: Tensor, q: Tensor, chosen: Tensor, k: Tensor) -> Verdict:
    """The verdict of ``compare_choice``.

    Args:
        rows: int64 [m] of the stream, ascending.
        q: [m, H, Dk], of these rows.
        chosen: int [m, G, n], the same.
        k: [C, G, Dk], compressed keys of all documents.
    """
    shortfall = deviation = 0.0
    of_rows = rows // stream.size
    for document in of_rows.unique().tolist():
        own = slice(document * stream.blocks, (document + 1) * stream.blocks)
        keys = k[own]
        # Few at a time: a row has a probability for each head and key.
        for part in (of_rows == document).nonzero().squeeze(1).split(16):
            t = rows[part] - document * stream.size
            exact = scores(q[part].double(), keys.double(), t, stream)
            plain = scores(q[part], keys, t, stream)
            deviation = max(deviation, float((plain - exact).abs().max()))
            worst = worst_choice(chosen[part], exact, t, stream)
            if worst is None:
                return Verdict(float("inf"), 4 * deviation)
            shortfall = max(shortfall, worst)
    return Verdict(shortfall, 4 * deviation)


def scores(q: Tensor, k: Tensor, t: Tensor, stream: Stream) -> Tensor:
    """Eq. 9 and 10 for queries [m, H, Dk] at positions t of one document, k [C, G, Dk] its keys.

    Returns [m, G, B], float32 or float64. Weights of the compression blocks are the strides that
    they share with a selection block.
    """
    config, blocks = stream.config, stream.select_blocks
    last = torch.arange(len(k), device=k.device) * config.compress_stride + config.compress_block
    mask = last - 1 <= t[:, None]
    probs = masked_softmax(q, k, mask, config.softmax_scale)[0].sum(2)  # [m, G, C]
    per_block = config.select_block // config.compress_stride
    overlap = config.compress_block // config.compress_stride
    # Block j is touched by compression blocks per_block * j - overlap + 1 and on.
    width = per_block + overlap - 1
    behind = per_block * (blocks - 1) + width - (overlap - 1) - len(k)
    padded = torch.nn.functional.pad(probs, (overlap - 1, max(0, behind)))
    stride = torch.arange(width, device=k.device)
    shared = torch.minimum((stride + 1).clamp(max=overlap), (width - stride).clamp(max=per_block))
    return padded.unfold(-1, width, per_block)[..., :blocks, :] @ shared.to(padded)


def worst_choice(chosen: Tensor, exact: Tensor, t: Tensor, stream: Stream) -> float | None:
    """By how much a block left out exceeds a chosen one, at most; None for an invalid choice.

    ``exact`` [m, G, B] has the scores. A valid choice is ascending, then -1, with all forced blocks
    and as many blocks as there must be.
    """
    config = stream.config
    blocks, device = exact.shape[-1], exact.device
    own = (t // config.select_block)[:, None]
    index = torch.arange(blocks, device=device)
    eligible = (index <= own)[:, None].expand(exact.shape)
    forced = (index < config.num_init_blocks) | (index > own - config.num_local_blocks)
    forced = forced[:, None] & eligible
    slots = torch.where(chosen < 0, blocks, chosen).long()
    if slots.max() > blocks:
        return None
    taken = torch.zeros(*exact.shape[:2], blocks + 1, dtype=torch.bool, device=device)
    taken = taken.scatter(-1, slots, True)[..., :blocks]
    count = (own + 1).clamp(max=config.num_selected)  # [m, 1]
    ordered = (slots.diff(dim=-1) > 0) | (slots[..., 1:] == blocks)
    valid = (taken & eligible).sum(-1) == count
    valid &= (taken.sum(-1) == count) & ordered.all(-1) & (taken | ~forced).all(-1)
    if not valid.all():
        return None
    least = exact.masked_fill(~taken | forced, float("inf")).amin(-1)
    most = exact.masked_fill(taken | ~eligible, float("-inf")).amax(-1)
    return float((most - least).clamp(min=0).max())
