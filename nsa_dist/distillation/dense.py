"""The dense attention of a chunk of queries, pooled by blocks, and how far the choice is from it.

Selection block j of a document holds its tokens [j l', (j+1) l'). For query t and a group of R
heads, with P_h the dense causal probabilities and p_h those over the visible compressed keys:

    mass[j]  = 1/R sum over h, tokens s of block j of P_h[s]
    score[j] = sum over h, m in [0, l'/d), k in [0, l/d) of p_h[(l'/d) j + m - k]    (Eq. 9, 10)

The best choice of blocks for a group is by mass, NSA's is by score. Forced blocks are chosen in any
case, so only the others, F, have something to learn. All of these lie before the query's own block
and are covered by visible compressed keys. With M = mass / sum over F and S likewise of score,

    loss = (sum over F of mass) * KL(M || S)

is what the blocks F contribute to the divergence of the two distributions over all blocks, by its
chain rule. It is 0 where scores are proportional to mass on F. A query without such blocks has 0.

Letters: c queries of a chunk, S tokens of the document up to the last of them, H query heads, G KV
heads, R = H/G, D widths, C compressed keys that the last query sees, J selection blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_dist.config import NSAConfig

NEVER = -1e30
"""Stands for the logarithm of 0. It is finite, so that its gradient is 0 and not NaN."""


@dataclass(frozen=True, eq=False)
class DenseChunk:
    """The dense attention of c queries at consecutive positions of a document.

    Attributes:
        first: position of the first of them.
        out: [c, H, Dv].
        mass: [G, c, J], the share of a group's attention that each selection block has.
    """

    first: int
    out: Tensor
    mass: Tensor


def dense_chunk(
    config: NSAConfig, first: int, q_cHD: Tensor, k_SGD: Tensor, v_SGD: Tensor
) -> DenseChunk:
    """Dense causal attention of queries at ``first`` and after, to the S keys up to the last one.

    All tensors are float32 or float64.
    """
    groups, block = k_SGD.shape[1], config.select_block
    q_GRcD = q_cHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    k_GDS, v_GSD = k_SGD.permute(1, 2, 0), v_SGD.transpose(0, 1)
    logits = (q_GRcD @ k_GDS[:, None]).mul_(config.softmax_scale)
    place = torch.arange(len(k_SGD), device=q_cHD.device)
    query = first + torch.arange(len(q_cHD), device=q_cHD.device)
    logits.masked_fill_(place > query[:, None], -torch.inf)
    probs_GRcS = logits.softmax(-1)
    out = (probs_GRcS @ v_GSD[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    pooled = F.pad(probs_GRcS.mean(1), (0, -len(k_SGD) % block))
    return DenseChunk(first, out, pooled.unflatten(-1, (-1, block)).sum(-1))


def block_kinds(config: NSAConfig, chunk: DenseChunk) -> tuple[Tensor, Tensor]:
    """Which blocks each query may choose, and which of these are not forced: bool [c, J] each."""
    _, queries, blocks = chunk.mass.shape
    device = chunk.mass.device
    block = torch.arange(blocks, device=device)
    query = chunk.first + torch.arange(queries, device=device)[:, None]
    own = query // config.select_block
    free = (block >= config.num_init_blocks) & (block <= own - config.num_local_blocks)
    return block <= own, free


def log_scores(
    config: NSAConfig, chunk: DenseChunk, q_cHD: Tensor, k_CGD: Tensor, free: Tensor
) -> Tensor:
    """Logarithms of ``score`` [G, c, J] from the C compressed keys that the last query sees.

    They are finite where blocks are ``free``, also where a score is less than the least number of
    its dtype, and ``NEVER`` elsewhere.
    """
    groups, blocks = chunk.mass.shape[0], chunk.mass.shape[2]
    l, d = config.compress_block, config.compress_stride
    device = q_cHD.device
    q_GRcD = q_cHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    logits = (q_GRcD @ k_CGD.permute(1, 2, 0)[:, None]) * config.softmax_scale
    last = torch.arange(len(k_CGD), device=device) * d + l - 1
    query = chunk.first + torch.arange(len(q_cHD), device=device)
    log_p = logits.masked_fill(last > query[:, None], NEVER).log_softmax(-1)
    # Block j is touched by the keys from (l'/d) j - (l/d - 1) on, each by so many strides.
    strides, overlap = config.select_block // d, l // d
    ones = torch.ones(1, 1, strides, dtype=log_p.dtype, device=device)
    shared = F.conv1d(ones, ones.new_ones(1, 1, overlap), padding=overlap - 1).flatten()
    room = (overlap - 1, strides * blocks - len(k_CGD))
    touching = F.pad(log_p, room, value=NEVER).unfold(-1, strides + overlap - 1, strides)
    by_block = (touching + shared.log()).permute(0, 2, 3, 1, 4).flatten(3)  # [G, c, J, R * keys]
    return by_block.masked_fill(~free[..., None], NEVER).logsumexp(-1)


def choice_loss(mass: Tensor, log_score: Tensor, free: Tensor) -> Tensor:
    """The sum over queries and groups of ``loss`` (above), nats.

    Args:
        mass, log_score: [G, c, J].
        free: bool [c, J], the blocks F of each query.
    """
    mass = mass.masked_fill(~free, 0.0)
    log_score = log_score.masked_fill(~free, NEVER)
    total = mass.sum(-1)
    entropy = torch.xlogy(mass, mass).sum(-1) - torch.xlogy(total, total)
    return (entropy - (mass * log_score).sum(-1) + total * log_score.logsumexp(-1)).sum()


@dataclass(frozen=True, eq=False)
class Captured:
    """Dense attention in chosen blocks, over queries with more blocks than they choose.

    Attributes:
        chosen, best: scalars, sums over queries and groups of the mass of the blocks that were
            chosen, and of those with most mass beside the forced ones.
        count: scalar, number of these queries, times groups.
    """

    chosen: Tensor
    best: Tensor
    count: Tensor


def captured(
    config: NSAConfig, chunk: DenseChunk, blocks_cGn: Tensor, may: Tensor, free: Tensor
) -> Captured:
    """What a choice of blocks, padded with -1, captures of a chunk's mass.

    Args:
        may, free: as of ``block_kinds``.
    """
    blocks = blocks_cGn.transpose(0, 1).long()
    of_chosen = chunk.mass.gather(-1, blocks.clamp(min=0)).masked_fill(blocks < 0, 0.0).sum(-1)
    worth = chunk.mass.masked_fill(~free, torch.inf).masked_fill(~may, -torch.inf)
    best = worth.topk(min(config.num_selected, worth.shape[-1]), dim=-1).indices
    of_best = chunk.mass.gather(-1, best).sum(-1)  # Blocks that may not be chosen have none.
    asked = may.sum(-1) > config.num_selected
    count = asked.sum() * len(chunk.mass)
    return Captured((of_chosen * asked).sum(), (of_best * asked).sum(), count)
