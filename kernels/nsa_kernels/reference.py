"""The oracle: Native Sparse Attention (arXiv 2502.11089) as dense, masked, differentiable PyTorch.

It exists to be read beside docs/algorithm.md and to judge everything else: run in float64 it gives
the true values, run in a narrower dtype it is the plain PyTorch code whose error sets the tolerance
of that dtype (matrix products in the dtype of the inputs, softmax in float32). It imports torch
alone and shares nothing with a backend. Memory is quadratic in the length of a document, and
options are taken as checked: the layer checks them when it is built.

Dimension letters: T tokens of the stream, S tokens of one document, K keys, H query heads, G KV
heads, R = H/G heads of a group (query head h reads KV head h // R), D width (Dk of queries and
keys, Dv of values), C compression blocks, B selection blocks, n chosen blocks, l compress_block,
d compress_stride, l' select_block, w window, r rotated channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BRANCHES = ("compressed", "selected", "window")


class _Options:
    @classmethod
    def from_config(cls, config: Any) -> Any:
        """Takes the fields of the same names from any object that has them."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class RotaryOptions(_Options):
    """Rotary embedding: base, rotated channels (None: the whole head), the numbers of scalings."""

    theta: float = 10000.0
    dim: int | None = None
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ReferenceOptions(_Options):
    """What the attention is told, under the names of the layer's config; lengths in tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window: int = 512
    branches: tuple[str, ...] = BRANCHES
    compress: str = "mlp"
    compress_pre_rope: bool = False
    independent_kv: bool = True
    scale: float | None = None
    gate: str = "linear"

    @property
    def value_branches(self) -> tuple[str, ...]:
        """The branches in use, always in the order compressed, selected, window."""
        return tuple(b for b in BRANCHES if b in self.branches)

    @property
    def key_branches(self) -> tuple[str, ...]:
        """The same, with `compressed` also where only the scores of `selected` need its keys."""
        scored = ("compressed",) if "selected" in self.branches else ()
        return tuple(b for b in BRANCHES if b in (*self.branches, *scored))


@dataclass(frozen=True)
class ReferenceResult:
    """What the oracle computed over the whole stream; the dicts have a key a branch in use."""

    output: Tensor  # [T, H, Dv]; of the layer [T, hidden]
    gates: Tensor  # [T, H, branches]
    outputs: dict[str, Tensor]  # [T, H, Dv] before the gate
    lse: dict[str, Tensor]  # [T, H], natural; -inf where a query sees no key
    scores: tuple[Tensor, ...]  # [S, G, B] of each document; none without `selected`
    selected: Tensor | None  # int32 [T, G, n], blocks counted from their document's start


def rotary_frequencies(dim: int, rotary: RotaryOptions) -> tuple[Tensor, float]:
    """Angle a position of each of dim/2 channel pairs, float64, and the factor on cos and sin.

    theta^(-2i/dim), which `linear` divides by the factor; `llama3` divides it for pairs that turn
    at most low_freq_factor times in the original length, keeps it for those that turn at least
    high_freq_factor times and blends by turns between; `yarn` (arXiv 2309.00071) blends by pair
    index between the pairs that turn beta_fast (kept) and beta_slow (divided) times, and scales
    cos and sin by 0.1 ln(factor) + 1 unless told otherwise.
    """
    kept = rotary.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    divided = kept / rotary.factor
    if rotary.scaling == "none":
        return kept, 1.0
    if rotary.scaling == "linear":
        return divided, 1.0
    if rotary.scaling == "llama3":
        turns = rotary.original_max_positions * kept / (2 * math.pi)
        low, high = rotary.low_freq_factor, rotary.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return share * kept + (1 - share) * divided, 1.0
    assert rotary.scaling == "yarn", rotary.scaling

    def pair_turning(times: float) -> float:
        wavelength = rotary.original_max_positions / times
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rotary.theta))

    first = max(math.floor(pair_turning(rotary.beta_fast)), 0)
    last = min(math.ceil(pair_turning(rotary.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    share = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    default = 0.1 * math.log(rotary.factor) + 1
    factor = default if rotary.attention_factor is None else rotary.attention_factor
    return share * kept + (1 - share) * divided, factor


def rotary_tables(positions: Tensor, head_dim: int, rotary: RotaryOptions) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [T, r/2] at integer positions [T]; angles in float64, one rounding."""
    dim = head_dim if rotary.dim is None else rotary.dim
    frequencies, factor = rotary_frequencies(dim, rotary)
    angles = positions.double()[:, None] * frequencies.to(positions.device)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+r/2}) of the first r channels of x [T, G, D]; cos, sin [T, r/2].

    Computed in float32 (float64 for float64) and rounded once to the dtype of x.
    """
    half = cos.shape[-1]
    wide = x.to(_softmax_dtype(x))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def num_compressed(length: int, block: int, stride: int) -> int:
    """Compression blocks of a document of `length` tokens; a tail shorter than a block has none."""
    return max(0, (length - block) // stride + 1)


def compress_blocks(
    x: Tensor,
    block: int,
    stride: int,
    kind: str,
    params: Mapping[str, Tensor],
    module: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Eq. 7, phi of the blocks [i*d, i*d + l) of one document: x [S, G, D] -> [C, G, D].

    params: `position` [l, D], added to each block by every kind that has parameters; of mlp `up`
    [hidden, l*D] and `down` [D, hidden], silu between; of linear `weight` [D, l*D]; of conv1d
    `weight` [D, l], depthwise; of attention_pool `query` [D], which weighs the rows with their
    position and adds them without. A leading [G] on all: one set a KV head. `mean` has none,
    `custom` is module([C, G, l, D]) -> [C, G, D].
    """
    num_groups = x.shape[1]
    starts = torch.arange(num_compressed(x.shape[0], block, stride), device=x.device) * stride
    blocks = x[starts[:, None] + torch.arange(block, device=x.device)].transpose(1, 2)
    if kind == "custom":
        assert module is not None
        return module(blocks)
    if kind == "mean":
        return blocks.mean(dim=2)
    per_head = params["position"].dim() == 3
    weights = {k: w if per_head else w.expand(num_groups, *w.shape) for k, w in params.items()}
    placed = blocks + weights["position"]  # [C, G, l, D]
    if kind == "mlp":
        hidden = F.silu(torch.einsum("cgi,ghi->cgh", placed.flatten(2), weights["up"]))
        return torch.einsum("cgh,gdh->cgd", hidden, weights["down"])
    if kind == "linear":
        return torch.einsum("cgi,gdi->cgd", placed.flatten(2), weights["weight"])
    if kind == "conv1d":
        return torch.einsum("cgrd,gdr->cgd", placed, weights["weight"])
    assert kind == "attention_pool", kind
    logits = torch.einsum("cgrd,gd->cgr", placed, weights["query"])
    shares = logits.to(_softmax_dtype(x)).softmax(dim=-1).to(x.dtype)
    return torch.einsum("cgr,cgrd->cgd", shares, blocks)


def masked_softmax(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities [S, G, R, K] and natural log-sum-exp [S, H] of scale * q.k over masked-in keys.

    q [S, H, Dk], k [K, G, Dk], mask bool [S, K] or [S, G, K]. A query that sees no key gets
    probabilities 0, lse -inf and gradients 0; its logits are replaced before the softmax, which
    over nothing but -inf is NaN, forward and backward.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    logits = (torch.einsum("sgrd,kgd->sgrk", grouped, k) * scale).to(_softmax_dtype(q))
    mask = (mask if mask.dim() == 3 else mask[:, None])[:, :, None]  # [S, G or 1, 1, K]
    sees = mask.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~mask, -math.inf).masked_fill(~sees, 0.0)
    probs = logits.softmax(dim=-1).masked_fill(~mask, 0.0)
    lse = logits.logsumexp(dim=-1).masked_fill(~sees[..., 0], -math.inf)
    return probs, lse.flatten(1)


def weighted_values(probs: Tensor, v: Tensor) -> Tensor:
    """sum_k p_k v_k: probs [S, G, R, K], v [K, G, Dv] -> [S, H, Dv] in v's dtype."""
    return torch.einsum("sgrk,kgd->sgrd", probs.to(v.dtype), v).flatten(1, 2)


def compressed_mask(length: int, block: int, stride: int, device: torch.device) -> Tensor:
    """bool [S, C]: query t sees compression block i once its last token is there, i*d+l-1 <= t."""
    last = torch.arange(num_compressed(length, block, stride), device=device) * stride + block - 1
    return last <= torch.arange(length, device=device)[:, None]


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [S, S]: query t sees keys t-w+1..t."""
    t = torch.arange(length, device=device)
    return (t <= t[:, None]) & (t > t[:, None] - window)


def selected_mask(selected: Tensor, select_block: int) -> Tensor:
    """bool [S, G, S]: query t sees the tokens <= t of its chosen blocks [S, G, n] (Eq. 12)."""
    length, num_groups, _ = selected.shape
    t = torch.arange(length, device=selected.device)
    num_blocks = -(-length // select_block)
    slots = torch.where(selected < 0, num_blocks, selected).long()  # one more block for the -1
    chosen = torch.zeros(
        length, num_groups, num_blocks + 1, dtype=torch.bool, device=selected.device
    ).scatter(-1, slots, True)
    return chosen[..., t // select_block] & (t <= t[:, None])[:, None]


def block_scores(probs: Tensor, options: ReferenceOptions) -> Tensor:
    """Eq. 9 and 10, the score of each selection block: probs [S, G, R, C] -> [S, G, B].

    score[j] = sum over the group's heads, m in [0, l'/d) and k in [0, l/d) of p[(l'/d)j + m - k],
    0 out of range. The paper has -m-k; +m-k weights each compression block by the strides that it
    shares with block j. Not differentiated.
    """
    per_block = options.select_block // options.compress_stride
    overlap = options.compress_block // options.compress_stride
    length, num_groups, _, num_keys = probs.shape
    first = torch.arange(-(-length // options.select_block), device=probs.device) * per_block
    group_probs = probs.detach().sum(dim=2)
    scores = group_probs.new_zeros((length, num_groups, first.shape[0]))
    # One order of addition for every j, so that equal probabilities give equal bits.
    for m in range(per_block if num_keys else 0):
        for k in range(overlap):
            i = first + m - k
            term = group_probs[..., i.clamp(0, num_keys - 1)]
            scores = scores + term.masked_fill((i < 0) | (i >= num_keys), 0.0)
    return scores


def select_blocks(scores: Tensor, options: ReferenceOptions) -> Tensor:
    """The blocks of each query and group: scores [S, G, B] -> int32 [S, G, n], ascending, then -1.

    Eligible are the blocks up to the query's own; forced the first num_init_blocks and the newest
    num_local_blocks of them. The highest scores take the rest of the n places, compared as float32,
    equal ones by the lower index.
    """
    length, _, num_blocks = scores.shape
    block = torch.arange(num_blocks, device=scores.device)
    own = (torch.arange(length, device=scores.device) // options.select_block)[:, None, None]
    eligible = (block <= own).expand(scores.shape)
    forced = (block < options.num_init_blocks) | (block > own - options.num_local_blocks)
    rank = scores.float().masked_fill(forced, math.inf).masked_fill(~eligible, -math.inf)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : options.num_selected]
    best = best.masked_fill(~eligible.gather(-1, best), num_blocks).sort(dim=-1).values
    best = best.masked_fill(best == num_blocks, -1)
    return F.pad(best, (0, options.num_selected - best.shape[-1]), value=-1).int()


def nsa_reference(
    q: Tensor,
    k: Tensor | Mapping[str, Tensor],
    v: Tensor | Mapping[str, Tensor],
    gates: Tensor,
    options: ReferenceOptions,
    *,
    k_params: Mapping[str, Tensor] | None = None,
    v_params: Mapping[str, Tensor] | None = None,
    k_module: Callable[[Tensor], Tensor] | None = None,
    v_module: Callable[[Tensor], Tensor] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    selected: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> ReferenceResult:
    """Eq. 5 over a packed stream: the sum over branches of gate * causal softmax attention.

    q [T, H, Dk]; k [T, G, Dk], v [T, G, Dv], each one tensor for all branches or branch -> tensor
    (k: options.key_branches, v: options.value_branches); gates [T, H, branches], after the sigmoid.
    k_params, k_module and v_params, v_module: see `compress_blocks`. cu_seqlens [documents + 1]:
    where documents start and end; None: one document. selected [T, G, n]: use these blocks and
    choose none. q and k are rotated already, except that compress_pre_rope wants every k unrotated
    and cos, sin [T, r/2] of the tokens (None: no rotary); compressed key i of a document is then
    rotated like its token i*d + (l-1)//2.
    """
    keys = k if isinstance(k, Mapping) else dict.fromkeys(BRANCHES, k)
    values = v if isinstance(v, Mapping) else dict.fromkeys(BRANCHES, v)
    block, stride = options.compress_block, options.compress_stride
    scale = options.head_dim**-0.5 if options.scale is None else options.scale
    outputs: dict[str, list[Tensor]] = {branch: [] for branch in options.value_branches}
    lse: dict[str, list[Tensor]] = {branch: [] for branch in options.value_branches}
    scores: list[Tensor] = []
    chosen: list[Tensor] = []

    def rotated(key: Tensor, tokens: slice) -> Tensor:
        if not options.compress_pre_rope or cos is None or sin is None:
            return key
        return apply_rotary(key, cos[tokens], sin[tokens])

    def compress(x: Tensor, params: Mapping[str, Tensor] | None, module: Any) -> Tensor:
        return compress_blocks(x, block, stride, options.compress, params or {}, module)

    def attend(branch: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
        probs, branch_lse = masked_softmax(query, key, mask, scale)
        outputs[branch].append(weighted_values(probs, value))
        lse[branch].append(branch_lse)

    for start, end in _documents(q.shape[0], cu_seqlens):
        tokens, size, query = slice(start, end), end - start, q[start:end]
        if "compressed" in options.key_branches:
            key = compress(keys["compressed"][tokens], k_params, k_module)
            middle = start + (block - 1) // 2
            key = rotated(key, slice(middle, middle + key.shape[0] * stride, stride))
            mask = compressed_mask(size, block, stride, q.device)
            if "compressed" in options.branches:
                value = compress(values["compressed"][tokens], v_params, v_module)
                attend("compressed", query, key, value, mask)
        if "selected" in options.branches:
            scores.append(block_scores(masked_softmax(query, key, mask, scale)[0], options))
            own = select_blocks(scores[-1], options) if selected is None else selected[tokens]
            chosen.append(own)
            key = rotated(keys["selected"][tokens], tokens)
            mask = selected_mask(own, options.select_block)
            attend("selected", query, key, values["selected"][tokens], mask)
        if "window" in options.branches:
            key = rotated(keys["window"][tokens], tokens)
            mask = window_mask(size, options.window, q.device)
            attend("window", query, key, values["window"][tokens], mask)

    joined = {branch: torch.cat(parts) for branch, parts in outputs.items()}
    return ReferenceResult(
        output=torch.stack([gates[..., b, None] * o for b, o in enumerate(joined.values())]).sum(0),
        gates=gates,
        outputs=joined,
        lse={branch: torch.cat(parts) for branch, parts in lse.items()},
        scores=tuple(scores),
        selected=torch.cat(chosen) if chosen else None,
    )


def gate_values(x: Tensor, params: Mapping[str, Tensor], options: ReferenceOptions) -> Tensor:
    """Gates in (0, 1), [T, H, branches]: sigmoid of a linear map, an MLP or learned logits."""
    if options.gate == "static":
        return params["gate.logits"].sigmoid().expand(x.shape[0], -1, -1)
    name = "gate.proj"
    if options.gate == "mlp":
        x, name = F.silu(F.linear(x, params["gate.up.weight"], params["gate.up.bias"])), "gate.down"
    logits = F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])
    return logits.unflatten(1, (options.num_heads, -1)).sigmoid()


def layer_reference(
    x: Tensor,
    params: Mapping[str, Tensor],
    options: ReferenceOptions,
    *,
    rotary: RotaryOptions | None = None,
    norm_eps: float = 1e-6,
    k_module: Callable[[Tensor], Tensor] | None = None,
    v_module: Callable[[Tensor], Tensor] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    position_ids: Tensor | None = None,
    selected: Tensor | None = None,
) -> ReferenceResult:
    """The layer over x [T, hidden]: projections, norm, rotary, gates, attention, projection.

    params is the layer's state_dict; biases and q_norm, k_norm are used where it has them. Rows of
    k_proj and v_proj are (set, head, channel), a set for each of options.key_branches and
    value_branches, or one when K, V are shared. rotary None: no rotation. position_ids [T]: by
    default the position in the document. Dropout is no part of the definition.
    """

    def heads(name: str, width: int) -> Tensor:
        y = F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))
        return y.unflatten(1, (-1, width))

    def norm(y: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return y
        wide = y.to(_softmax_dtype(y))
        unit = wide * (wide.square().mean(dim=-1, keepdim=True) + norm_eps).rsqrt()
        return unit.to(y.dtype) * weight

    q = norm(heads("q_proj", options.head_dim), params.get("q_norm.weight"))
    k_sets = list(heads("k_proj", options.head_dim).split(options.num_kv_heads, dim=1))
    if "k_norm.weight" in params:
        k_sets = [norm(k, params["k_norm.weight"][row]) for row, k in enumerate(k_sets)]
    v_sets = heads("v_proj", options.v_head_dim or options.head_dim)
    v_sets = v_sets.split(options.num_kv_heads, dim=1)

    cos = sin = None
    if rotary is not None:
        if position_ids is None:
            documents = _documents(x.shape[0], cu_seqlens)
            position_ids = torch.cat([torch.arange(e - s, device=x.device) for s, e in documents])
        cos, sin = rotary_tables(position_ids, options.head_dim, rotary)
        q = apply_rotary(q, cos, sin)
        if not options.compress_pre_rope:
            k_sets = [apply_rotary(k, cos, sin) for k in k_sets]

    shared = not options.independent_kv
    result = nsa_reference(
        q,
        k_sets[0] if shared else dict(zip(options.key_branches, k_sets, strict=True)),
        v_sets[0] if shared else dict(zip(options.value_branches, v_sets, strict=True)),
        gate_values(x, params, options),
        options,
        k_params=_under("k_compressor.", params),
        v_params=_under("v_compressor.", params),
        k_module=k_module,
        v_module=v_module,
        cu_seqlens=cu_seqlens,
        selected=selected,
        cos=cos,
        sin=sin,
    )
    output = F.linear(result.output.flatten(1), params["o_proj.weight"], params.get("o_proj.bias"))
    return replace(result, output=output)


def _documents(length: int, cu_seqlens: Tensor | Sequence[int] | None) -> list[tuple[int, int]]:
    ends = [0, length] if cu_seqlens is None else [int(end) for end in cu_seqlens]
    if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise ValueError(f"cu_seqlens must ascend from 0 to {length} tokens, got {ends}")
    return list(pairwise(ends))


def _under(prefix: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
