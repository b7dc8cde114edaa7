"""One case of the layer, run on any number of ranks, with everything that comes out of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import NativeSparseAttention, NSAConfig, RotaryConfig, make_sharding
from nsa_dist.plan.layout import chunk_starts, make_layout
from nsa_dist.sharding import Sharding

HIDDEN = 24
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=4,
    window=9,
)


@dataclass(frozen=True)
class LayerCase:
    """What varies between cases. ``lengths`` are documents of one packed stream, or None for
    ``batch`` rows of ``length`` tokens."""

    config: NSAConfig = SMALL
    layout: str = "zigzag"
    lengths: tuple[int, ...] | None = None
    batch: int = 1
    length: int = 149
    dtype: torch.dtype = torch.float64
    bias: bool = False
    qk_norm: bool = False
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    checkpoint: bool = False
    device: str = "cpu"
    backend: str = "pytorch"
    seed: int = 0

    @property
    def cu_seqlens(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def whole_shape(self) -> tuple[int, int]:
        return (self.batch, self.length) if self.lengths is None else (1, sum(self.lengths))

    def layer(self, group: Any = None, **options: Any) -> NativeSparseAttention:
        torch.manual_seed(self.seed)
        layer = NativeSparseAttention(
            HIDDEN,
            self.config,
            bias=self.bias,
            qk_norm=self.qk_norm,
            rotary=self.rotary,
            layout=self.layout,
            group=group,
            dtype=torch.float64,
            **{"backend": self.backend} | options,
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "compressor" in name or "norm" in name or "bias" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif name.startswith(("q_proj", "k_proj")):
                    parameter.mul_(2.5)  # Softmaxes with something to choose.
        return layer.to(self.device, self.dtype)

    def sharding(self, group: Any) -> Sharding:
        return make_sharding(
            self.whole_shape[1], cu_seqlens=self.cu_seqlens, layout=self.layout, group=group
        )

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Hidden states and the gradient of the output, [B, T, hidden]."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (*self.whole_shape, HIDDEN)
        x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return x.to(self.device, self.dtype), grad.to(self.device, self.dtype)


@dataclass
class LayerResult:
    """Whole, unsharded tensors, the same on every rank."""

    output: Tensor
    grad_input: Tensor
    grads: dict[str, Tensor]
    selected: Tensor | None
    received: dict[str, int]
    fetched_per_head: dict[int, int]

    def cpu(self) -> LayerResult:
        """The same with its tensors in host memory."""
        return replace(
            self,
            output=self.output.cpu(),
            grad_input=self.grad_input.cpu(),
            grads={name: grad.cpu() for name, grad in self.grads.items()},
            selected=None if self.selected is None else self.selected.cpu(),
        )


def run_layer(case: LayerCase, group: Any = None, **options: Any) -> LayerResult:
    """Forward and backward of the case on this rank of ``group`` (one rank for None)."""
    layer = case.layer(group, **options)
    return run_built_layer(layer, case, group)


def run_built_layer(layer: NativeSparseAttention, case: LayerCase, group: Any) -> LayerResult:
    x, grad = case.inputs()
    sharding = case.sharding(group)
    local = sharding.shard(x).requires_grad_()

    def forward(local: Tensor) -> Any:
        return layer(local, cu_seqlens=sharding.cu_seqlens, return_details=True)

    if case.checkpoint:
        out = torch.utils.checkpoint.checkpoint(lambda x: forward(x)[0], local, use_reentrant=False)
        details = None
    else:
        out, details = forward(local)
    out.backward(sharding.shard(grad))
    assert local.grad is not None
    grads = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        total = parameter.grad.clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        grads[name] = total
    selected = None
    if details is not None and details.selected is not None:
        selected = sharding.unshard(details.selected)
    return LayerResult(
        output=sharding.unshard(out),
        grad_input=sharding.unshard(local.grad),
        grads=grads,
        selected=selected,
        received=dict(layer.communication.received),
        fetched_per_head=dict(layer.communication.fetched_per_head),
    )


def run_on_rank(case: LayerCase) -> LayerResult | None:
    """``run_layer`` over the default group; the result on rank 0 alone, to spare the pipes."""
    result = run_layer(case, dist.group.WORLD)
    return result.cpu() if dist.get_rank() == 0 else None


def assert_sparse_and_remote(case: LayerCase, result: LayerResult, size: int) -> None:
    """The case is worth its name: choices leave at least half of the eligible blocks of the last
    query of some document unchosen, and some chosen, unforced block lies on another rank."""
    config = case.config
    assert result.selected is not None
    bounds = case.cu_seqlens
    length = case.whole_shape[1]
    starts = [0] if bounds is None else bounds[:-1].tolist()
    ends = [length] if bounds is None else bounds[1:].tolist()
    last = max(range(len(starts)), key=lambda d: ends[d] - starts[d])
    eligible = (ends[last] - starts[last] - 1) // config.select_block + 1
    chosen = result.selected[:, ends[last] - 1]
    assert int((chosen >= 0).sum(-1).max()) * 2 <= eligible
    if size == 1:
        return
    owner = token_owners(case, size)
    remote = 0
    for d, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for t in range(start, end):
            own_block = (t - start) // config.select_block
            for j in set(result.selected[0, t].flatten().tolist()) - {-1}:
                forced = j < config.num_init_blocks or j > own_block - config.num_local_blocks
                if not forced and owner[d][j * config.select_block] != owner[d][t - start]:
                    remote += 1
    assert remote > 0


def token_owners(case: LayerCase, size: int) -> list[list[int]]:
    """The rank that holds each token, by document and position (first row of a batch)."""
    length = case.whole_shape[1]
    layout = make_layout(case.layout, size)
    bounds = [0, length] if case.cu_seqlens is None else case.cu_seqlens.tolist()
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    multiple = layout.multiple
    if layout.per_document and case.cu_seqlens is not None:
        padded = [-(-n // multiple) * multiple for n in sizes]
    else:
        padded = [*sizes, -length % multiple]
    cu_seqlens = torch.tensor([0, *padded]).cumsum(0).int()
    total = int(cu_seqlens[-1])
    starts, owners = chunk_starts(
        layout, 1, total, cu_seqlens if case.cu_seqlens is not None else None
    )
    at = torch.searchsorted(starts, torch.arange(total), right=True) - 1
    by_token = owners[at].tolist()
    begins = cu_seqlens.tolist()
    return [by_token[begins[d] : begins[d] + n] for d, n in enumerate(sizes)]


def assert_results_close(found: LayerResult, expected: LayerResult, tolerance: float) -> None:
    """Every tensor of two results agrees to ``tolerance`` of its largest element.

    A gradient that is zero in exact arithmetic (a linear compressor's position embedding adds a
    constant to every key, which cancels in the softmax) is rounding noise on both sides: it is held
    to ``tolerance`` of the largest gradient of the module it belongs to.
    """
    assert found.grads.keys() == expected.grads.keys()
    pairs = {"output": (found.output, expected.output)}
    pairs["grad of input"] = (found.grad_input, expected.grad_input)
    pairs |= {name: (found.grads[name], expected.grads[name]) for name in found.grads}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), f"{name} is not finite"
        siblings = [g for n, g in expected.grads.items() if n.split(".")[0] == name.split(".")[0]]
        scale, of_module = largest(b), max(map(largest, siblings), default=0.0)
        allowed = tolerance * (of_module if scale <= tolerance * of_module else scale)
        error = largest(a.double() - b.double())
        assert error <= allowed, f"{name}: error {error:.2e} passes {tolerance:.0e} of {scale:.2e}"


def largest(x: Tensor) -> float:
    """Largest magnitude."""
    return float(x.abs().max()) if x.numel() else 0.0


def variants(case: LayerCase, **changes: Any) -> LayerCase:
    """The case with changed fields of its own or of its config."""
    own = {k: v for k, v in changes.items() if k in LayerCase.__dataclass_fields__}
    inner = {k: v for k, v in changes.items() if k not in own}
    return replace(case, config=replace(own.pop("config", case.config), **inner), **own)
