"""Calls in which the last rank errs, or does something else than the others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist import NativeSparseAttention, NSAConfig, get_plan, native_sparse_attention, unshard
from nsa_dist.attention import plan_cache
from nsa_dist.attention.call import Call as AttentionCall
from nsa_dist.attention.selectors import Selection
from nsa_dist.comm import Work, fetch, gather, halo
from nsa_dist.plan import Grid
from tests.distributed.bad_call import (
    END,
    LOCAL,
    call_functional,
    call_layer,
    cu_seqlens,
    is_bad_rank,
)
from tests.distributed.layer_case import HIDDEN, SMALL

TIMEOUT = timedelta(seconds=6)

# Two streams whose every message has one size: documents change inside the first rank's tokens.
FIRST = (0, 8, 24, END)
SECOND = (0, 16, 24, END)
Call = Callable[[], Any]


def built(group: Any, **changes: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(
        HIDDEN, replace(SMALL, **changes), layout="contiguous", group=group
    )


def with_plans(group: Any, *boundaries: tuple[int, ...], **changes: Any) -> Callable[..., Tensor]:
    """A layer of which every rank has the plans for these boundaries."""
    layer = built(group, **changes)

    def call(given: tuple[int, ...], width: int = HIDDEN) -> Tensor:
        out = layer(torch.ones(1, LOCAL, width), cu_seqlens=cu_seqlens(group, given))
        assert isinstance(out, Tensor)
        return out

    for given in boundaries:
        call(given)
    return call


def stale(group: Any, **changes: Any) -> Call:
    """Both plans are known to all; the last rank uses the older one."""
    call = with_plans(group, FIRST, SECOND, **changes)
    return lambda: call(FIRST if is_bad_rank() else SECOND)


def stale_config(group: Any) -> Call:
    """As ``stale``, for configs that differ in nothing but the values computed."""
    calls = [with_plans(group, FIRST, scale=scale) for scale in (0.5, 0.6)]
    return lambda: calls[is_bad_rank()](FIRST)


def stale_cache(group: Any) -> Call:
    """The last rank's cache holds another batch's plan under this one's values."""
    call = with_plans(group, FIRST, SECOND)
    if is_bad_rank():
        plans = plan_cache._plans_of_groups[group]
        plans[1] = replace(plans[1], plan=plans[0].plan)
    return lambda: call(SECOND)


def unlike_windows(group: Any, mine: int, others: int) -> Call:
    """Halos of other sizes: what more or less than is expected comes, ends a process under gloo."""
    calls = {window: with_plans(group, FIRST, window=window) for window in (mine, others)}
    return lambda: calls[mine if is_bad_rank() else others](FIRST)


def unlike_lengths(group: Any) -> Call:
    """All messages have other sizes."""
    layer = built(group)
    inputs = [torch.ones(1, length, HIDDEN) for length in (LOCAL, 2 * LOCAL)]
    for x in inputs:
        layer(x)
    return lambda: layer(inputs[is_bad_rank()])


def unlike_dtypes(group: Any) -> Call:
    """The same plan but for the width of numbers."""
    layers = [built(group).to(dtype) for dtype in (torch.float32, torch.float64)]
    inputs = [torch.ones(1, LOCAL, HIDDEN, dtype=d) for d in (torch.float32, torch.float64)]
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    return lambda: layers[is_bad_rank()](inputs[is_bad_rank()])


def unlike_backwards(group: Any) -> Call:
    """Two forwards of all, of which the last rank goes back through the other one first."""
    call = with_plans(group, FIRST, SECOND)
    outputs = [call(FIRST), call(SECOND)]
    return lambda: outputs[is_bad_rank()].sum().backward()


def forward_and_backward(group: Any) -> Call:
    """The last rank goes on to the next batch while the others go back."""
    call = with_plans(group, FIRST)
    out = call(FIRST)
    return lambda: call(FIRST) if is_bad_rank() else out.sum().backward()


def given_plans(group: Any) -> Call:
    """The functional form with plans that all have, made for q of another dtype on the last."""
    return lambda: call_functional(
        group,
        plan=get_plan(
            SMALL,
            "contiguous",
            group,
            batch=1,
            local_length=LOCAL,
            cu_seqlens=None,
            dtype=torch.float32,
            device=torch.device("cpu"),
        ),
        gates_dtype=torch.float64 if is_bad_rank() else torch.float32,
    )


def unlike_parameters(group: Any) -> Call:
    """The last rank trains other parameters: its gradients' first message has another size."""
    layer = built(group).requires_grad_(False)
    trained = layer.k_proj if is_bad_rank() else layer.k_compressor
    assert isinstance(trained, nn.Module)
    trained.requires_grad_(True)
    out = layer(torch.ones(1, LOCAL, HIDDEN))
    return lambda: out.sum().backward()


# Every case with the option that is told, as the last rank and the others have it.
STALE = {
    "documents": (stale, "cu_seqlens", "[0, 8, 24, ", "[0, 16, 24, "),
    "documents-compressed-only": (
        lambda group: stale(group, branches=("compressed",)),
        *("cu_seqlens", "[0, 8, 24, ", "[0, 16, 24, "),
    ),
    "documents-window-only": (
        lambda group: stale(group, branches=("window",)),
        *("cu_seqlens", "[0, 8, 24, ", "[0, 16, 24, "),
    ),
    "documents-shared": (
        lambda group: stale(group, independent_kv=False),
        *("cu_seqlens", "[0, 8, 24, ", "[0, 16, 24, "),
    ),
    "config": (stale_config, "scale", "0.6", "0.5"),
    "cache": (stale_cache, "cu_seqlens", "[0, 8, 24, ", "[0, 16, 24, "),
    "shorter-halo": (lambda group: unlike_windows(group, 9, 5), "window", "9", "5"),
    "longer-halo": (lambda group: unlike_windows(group, 5, 9), "window", "5", "9"),
    "lengths": (unlike_lengths, "local sequence length", "64", "32"),
    "dtypes": (unlike_dtypes, "dtype", "torch.float64", "torch.float32"),
    "backwards": (unlike_backwards, "cu_seqlens", "[0, 16, 24, ", "[0, 8, 24, "),
    "forward-and-backward": (forward_and_backward, "call", "forward", "backward"),
    "parameters": (
        unlike_parameters,
        *("requires_grad", "('compressed', 'selected', ", "('compressed blocks',)"),
    ),
    "given-plans": (given_plans, "gates", "torch.float64", "torch.float32"),
}


def new_values(group: Any) -> Call:
    """All others find their plan; the last rank has to make one."""
    call = with_plans(group, FIRST)
    return lambda: call(SECOND if is_bad_rank() else FIRST)


def bad_input(group: Any) -> Call:
    """All others find their plan; the last rank's input is refused."""
    call = with_plans(group, FIRST)
    return lambda: call(FIRST, HIDDEN - is_bad_rank())


def no_tensor(group: Any) -> Call:
    """As ``bad_input``, with what has neither shape nor dtype."""
    layer = built(group)
    x = torch.ones(1, LOCAL, HIDDEN)
    layer(x)
    return lambda: layer(None if is_bad_rank() else x)


def no_plain_tensor(group: Any) -> Call:
    """As ``no_tensor``, with a tensor of which no one can ask all that one can of others."""
    layer = built(group)
    x = torch.ones(1, LOCAL, HIDDEN)
    layer(x)
    return lambda: layer(x.to_sparse() if is_bad_rank() else x)


def nested_tensor(group: Any) -> Call:
    """As ``no_plain_tensor``, with one that has no shape."""
    layer = built(group)
    x = torch.ones(1, LOCAL, HIDDEN)
    return lambda: layer(torch.nested.nested_tensor([x[0]]) if is_bad_rank() else x)


def sparse_boundaries(group: Any) -> Call:
    """Boundaries without the storage that comparing them needs."""
    layer, bounds = built(group), cu_seqlens(group, FIRST)
    x = torch.ones(1, LOCAL, HIDDEN)
    return lambda: layer(x, cu_seqlens=bounds.to_sparse() if is_bad_rank() else bounds)


def one_evaluates(group: Any) -> Call:
    """The last rank drops none of its tokens' outputs, and draws no seed."""
    torch.manual_seed(0)
    layer = NativeSparseAttention(HIDDEN, SMALL, layout="contiguous", group=group, dropout=0.25)
    layer.train(not is_bad_rank())
    return lambda: layer(torch.ones(1, LOCAL, HIDDEN))


def second_derivative(group: Any) -> Call:
    """The last rank asks for a graph of its gradients; the others' messages would wait for it."""
    call = with_plans(group, FIRST)
    out = call(FIRST)
    return lambda: out.sum().backward(create_graph=is_bad_rank())


def bad_positions(group: Any) -> Call:
    """As ``bad_input``, of what is no part of a plan."""
    layer = built(group)
    x = torch.ones(1, LOCAL, HIDDEN)
    layer(x)
    return lambda: layer(x, position_ids=x if is_bad_rank() else None)


def bad_plan(group: Any) -> Call:
    """The last rank gives the functional form a plan that is none."""
    return lambda: call_functional(group, plan="plan" if is_bad_rank() else None)


def bad_config(group: Any) -> Call:
    """The last rank gives the functional form a config that is none."""

    def call() -> Any:
        call_functional(group)
        q = torch.ones(1, LOCAL, 4, 8)
        if is_bad_rank():
            return native_sparse_attention(q, q, q, q, config=None, group=group)  # type: ignore[arg-type]
        return call_functional(group)

    return call


def bad_rotary(group: Any) -> Call:
    """The last rank's tables of cos and sin are too short; the others' are not."""
    return lambda: call_functional(group, table=20 if is_bad_rank() else 200)


def bad_unshard(group: Any) -> Call:
    """The last rank unshards to a length that is none."""
    x = torch.ones(1, LOCAL, 3)
    length = LOCAL * dist.get_world_size()
    return lambda: unshard(x, -1 if is_bad_rank() else length, group=group, layout="contiguous")


def no_halo(group: Any) -> Call:
    """As ``new_values``, where the others' first message is a gather."""
    call = with_plans(group, (0, LOCAL, END), branches=("compressed",), compress_block=2)
    return lambda: call(FIRST if is_bad_rank() else (0, LOCAL, END))


def users_error(group: Any) -> Call:
    """The last rank never makes the call that the others make a plan for."""
    layer = built(group)

    def call() -> Tensor:
        if is_bad_rank():
            raise RuntimeError("a user's own error")
        return layer(torch.ones(1, LOCAL, HIDDEN))

    return call


def users_error_later(group: Any) -> Call:
    """As ``users_error``, with plans that all have."""
    call = with_plans(group, FIRST)

    def step() -> Tensor:
        if is_bad_rank():
            raise RuntimeError("a user's own error")
        return call(FIRST)

    return step


def no_backward(group: Any) -> Call:
    """The last rank fails between forward and backward."""
    call = with_plans(group, FIRST)

    def step() -> None:
        out = call(FIRST)
        if is_bad_rank():
            raise RuntimeError("a user's own error")
        out.sum().backward()

    return step


def bad_option(group: Any) -> Call:
    """The last rank's layer is refused when it is built."""
    return lambda: call_layer(group, layer={"dropout": 2.0} if is_bad_rank() else {})


def other_group(group: Any) -> Call:
    """The last rank passes another group of the same ranks."""
    other = dist.new_group(timeout=TIMEOUT)
    return lambda: call_layer(other if is_bad_rank() else group)


class Mean(nn.Module):
    """A custom compressor that keeps a dimension too many on the last rank, or raises there."""

    def __init__(self, error: str | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, blocks: Tensor) -> Tensor:
        if self.error is not None and is_bad_rank():
            raise LookupError(self.error)
        return blocks.mean(2, keepdim=is_bad_rank())


def bad_compressor(group: Any) -> Call:
    """The last rank's custom compressor fails in the middle of a forward."""
    options = {"k_compressor": Mean(), "v_compressor": Mean()}
    return lambda: call_layer(group, compress="custom", layer=options)


def raising_compressor(group: Any) -> Call:
    """The last rank's custom compressor raises in the middle of a forward."""
    options = {"k_compressor": Mean("no such head"), "v_compressor": Mean()}
    return lambda: call_layer(group, compress="custom", layer=options)


class OwnBlock:
    """A selector of each query's own block, which goes wrong on the last rank."""

    name, branch = "own block", None

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def grids(self, config: NSAConfig) -> dict[str, Grid]:
        return {}

    def stated(self) -> dict[str, str]:
        return {}

    def problem(self, call: AttentionCall) -> str | None:
        return None

    def begin(self, call: AttentionCall, extended: Any) -> Work[None]:
        return Work.done(None)

    def select(self, call: AttentionCall, q_NHD: Tensor, gathered: None) -> Selection:
        if self.raises and is_bad_rank():
            raise LookupError("no such block")
        own_N = call.plan.positions // call.config.select_block
        blocks_NGn = own_N[:, None, None].expand(-1, call.config.num_kv_heads, 1)
        return Selection(blocks_NGn if is_bad_rank() else blocks_NGn.int())


def bad_selector(group: Any, raises: bool = False) -> Call:
    """The last rank's selector gives blocks of another dtype, or raises, in a forward."""
    options = {"selector": OwnBlock(raises)}
    return lambda: call_layer(group, branches=("selected", "window"), layer=options)


# With what the last rank found, which every rank tells.
TOLD: dict[str, tuple[Callable[[Any], Call], str]] = {
    "new-values": (new_values, "[0, 16, 24, "),
    "bad-input": (
        bad_input,
        f"x must have shape [batch, local tokens, hidden_size={HIDDEN}], got ",
    ),
    "no-tensor": (no_tensor, "x must be a plain tensor, got None"),
    "sparse-tensor": (
        no_plain_tensor,
        "x must be a plain tensor, got a tensor of layout torch.sparse_coo",
    ),
    "nested-tensor": (nested_tensor, "x must be a plain tensor, got a nested tensor"),
    "sparse-boundaries": (
        sparse_boundaries,
        "cu_seqlens must be None or an int32 tensor that is not on meta, got a tensor of layout",
    ),
    "one-evaluates": (one_evaluates, "dropout must be equal on all ranks, got rank 0: 0.25, "),
    "second-derivative": (second_derivative, "create_graph must be False in a backward"),
    "bad-positions": (bad_positions, "position_ids must be integers of shape"),
    "bad-plan": (bad_plan, "plan must be None or come from get_plan, got a str"),
    "bad-config": (bad_config, "config must be an NSAConfig, got None"),
    "bad-rotary": (bad_rotary, "rotary must have cos and sin of at least "),
    "bad-unshard": (bad_unshard, "length must be an integer of at least 0, got -1"),
    "no-halo": (no_halo, "[0, 8, 24, "),
    "bad-compressor": (bad_compressor, "custom compressor must map"),
    "raising-compressor": (
        raising_compressor,
        "custom compressor raised LookupError: no such head",
    ),
    "bad-selector": (bad_selector, "blocks of selector 'own block' must be torch.int32 of shape"),
    "raising-selector": (
        partial(bad_selector, raises=True),
        "selector 'own block' raised LookupError: no such block",
    ),
}
# With what the last rank raises itself, if not what the others do.
WAITING: dict[str, tuple[Callable[[Any], Call], str | None]] = {
    "users-error": (users_error, "a user's own error"),
    "users-error-later": (users_error_later, "a user's own error"),
    "no-backward": (no_backward, "a user's own error"),
    "bad-option": (bad_option, "dropout must be a probability in [0, 1), got 2.0"),
    "other-group": (other_group, None),
}
KINDS = ("halo", "gather", "request", "fetch", "halo_grad", "gather_grad", "fetch_grad")


def stopped(group: Any, kind: str) -> Call:
    """The last rank fails just before its message of this kind."""
    layer = built(group)

    def step() -> None:
        STOPS[group] = kind
        out = layer(torch.ones(1, LOCAL, HIDDEN, requires_grad=True))
        out.sum().backward()

    return step


STOPS: dict[Any, str] = {}


@contextmanager
def stops() -> Iterator[None]:
    """Raise on the last rank where ``STOPS`` says."""
    places = [(module, "begin_all_to_all") for module in (halo, gather, fetch)]
    places.append((gather, "begin_all_gather"))
    originals = [getattr(module, name) for module, name in places]

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            group, kind = args[-2].group.process_group, args[-1]
            if is_bad_rank() and STOPS.get(group) == kind:
                raise LookupError("a kernel's error")
            return original(*args, **options)

        return call

    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, stopping(original))
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)
        STOPS.clear()
