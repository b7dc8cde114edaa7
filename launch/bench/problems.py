"""What operators.py times: each operator and the whole attention on one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from launch.bench.judges import Judge, Run, Verdict, compare_choice, compare_sampled
from launch.bench.options import OPERATORS
from launch.bench.stream import Stream
from launch.bench.work import Flops
from nsa_dist import BRANCHES, CommunicationCounter, get_plan
from nsa_dist import native_sparse_attention as attention
from nsa_dist.attention.call import Call
from nsa_dist.attention.flow import attend_branches
from nsa_dist.attention.selectors import CompressedSelector
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.group import context_group
from nsa_kernels import Backend, get_backend

ByName = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One operator on one stream.

    Args:
        name: of ``OPERATORS``.
        choices: the source of the chosen blocks, or "" where it does not matter.
        inputs: what gradients are taken of, in the order of ``run``'s arguments.
        run: inputs -> one tensor.
        judge: compares with float64 what ``run`` gives of ``inputs``.
        flops: useful operations.
    """

    name: str
    choices: str
    inputs: list[Tensor]
    run: Run
    judge: Judge
    flops: Flops

    @property
    def differentiable(self) -> bool:
        return self.name != "block_selection"

    def verdict(self) -> Verdict:
        return self.judge(self.run, self.inputs)


@dataclass(frozen=True)
class GivenChoices:
    """A backend that chooses blocks at the usual cost and then returns given ones instead."""

    inner: Backend
    selected: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def select_blocks(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Backend.select_blocks`."""
        self.inner.select_blocks(*args, **kwargs)
        return self.selected


def _compression(stream: Stream, _: str, __: Tensor | None) -> Problem:
    config, exact = stream.config, get_backend("pytorch")
    names = [name for name, _ in stream.compressors[0].named_parameters()]
    kind, block, rows = config.compress, config.compress_block, stream.block_rows

    def run(ops: Backend, rows: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        return ops.compress(k, rows, block, kind, dict(zip(names, weights, strict=True)))

    return Problem(
        "compression",
        "",
        [stream.k, *stream.compressors[0].parameters()],
        lambda *inputs: run(stream.ops, rows, *inputs),
        compare_sampled(lambda at, *inputs: run(exact, rows[at], *inputs), by_row=0),
        stream.flops["compression"],
    )


def _compressed_attention(stream: Stream, _: str, __: Tensor | None) -> Problem:
    exact, segments, band = get_backend("pytorch"), stream.segments, stream.band
    return Problem(
        "compressed_attention",
        "",
        [stream.q, *stream.compressed],
        lambda q, k, v: stream.ops.compressed_attention(q, k, v, segments, **band)[0],
        compare_sampled(
            lambda rows, q, k, v: exact.compressed_attention(
                q, k, v, stream.segments_of(rows), **band
            )[0],
            by_row=1,
        ),
        stream.flops["compressed_attention"],
    )


def _block_selection(stream: Stream, _: str, __: Tensor | None) -> Problem:
    config, (k, v) = stream.config, stream.compressed
    with torch.no_grad():
        lse = stream.ops.compressed_attention(stream.q, k, v, stream.segments, **stream.band)[1]
    return Problem(
        "block_selection",
        "",
        [stream.q, k],
        lambda q, k: stream.ops.select_blocks(
            *(q, k, lse, stream.segments),
            **stream.band,
            select_block=config.select_block,
            num_selected=config.num_selected,
            num_init_blocks=config.num_init_blocks,
            num_local_blocks=config.num_local_blocks,
        ),
        compare_choice(stream, stream.q, k),
        stream.flops["block_selection"],
    )


def _selected_attention(stream: Stream, label: str, choices: Tensor | None) -> Problem:
    exact = get_backend("pytorch")
    assert choices is not None
    return Problem(
        "selected_attention",
        label,
        [stream.q, stream.k, stream.v],
        lambda q, k, v: stream.select(stream.ops, q, k, v, choices, stream.segments),
        compare_sampled(
            lambda rows, q, k, v: stream.select(
                exact, q, k, v, choices[rows], stream.segments_of(rows)
            ),
            by_row=1,
        ),
        stream.flops["selected_attention"],
    )


def _window_attention(stream: Stream, _: str, __: Tensor | None) -> Problem:
    exact = get_backend("pytorch")
    return Problem(
        "window_attention",
        "",
        [stream.q, stream.k, stream.v],
        lambda q, k, v: stream.slide(stream.ops, q, k, v, stream.segments),
        compare_sampled(
            lambda rows, q, k, v: stream.slide(exact, q, k, v, stream.segments_of(rows)),
            by_row=1,
        ),
        stream.flops["window_attention"],
    )


def _combine(stream: Stream, _: str, __: Tensor | None) -> Problem:
    exact, config = get_backend("pytorch"), stream.config
    shape = (stream.length, config.num_heads, config.value_dim)
    return Problem(
        "combine",
        "",
        [stream.gates, *(stream.draw(*shape) for _ in BRANCHES)],
        lambda gates, *outputs: stream.ops.combine(outputs, gates),
        compare_sampled(lambda rows, gates, *outputs: exact.combine(outputs, gates), by_row=4),
        stream.flops["combine"],
    )


def _whole(stream: Stream, label: str, choices: Tensor | None) -> Problem:
    """The attention from queries, keys, values and gates on.

    Without recorded choices the public function runs, on blocks that it chooses from random data.
    With them the same steps run, selection included, whose result is then replaced.
    """
    config, device, ops = stream.config, stream.device, stream.ops
    bounds = torch.arange(stream.options.documents + 1, dtype=torch.int32) * stream.size
    # Made once for a batch and all layers.
    plan = get_plan(
        *(config, "zigzag", None),
        batch=1,
        local_length=stream.length,
        cu_seqlens=bounds,
        dtype=stream.dtype,
        device=device,
    )

    def run(q: Tensor, gates: Tensor, *rest: Tensor) -> Tensor:
        keys, values, _ = by_branch(rest)
        if choices is not None:
            given = cast(Backend, GivenChoices(ops, choices))
            channel = Channel(context_group(None), CommunicationCounter(), plan)
            call = Call(config, given, plan, channel)
            by = CompressedSelector(*stream.compressors)
            return attend_branches(call, q, keys, values, gates, by).out_NHD
        # Not [0], whose backward fills and copies a tensor like the output.
        out: Tensor = run_public(q, gates, keys, values)
        return out.squeeze(0)

    def run_public(
        q: Tensor, gates: Tensor, keys: dict[str, Tensor], values: dict[str, Tensor], **more: Any
    ) -> Any:
        def batch(given: dict[str, Tensor]) -> Any:
            named = {branch: x[None] for branch, x in given.items()}
            return named if config.independent_kv else named["selected"]

        return attention(
            q[None],
            batch(keys),
            batch(values),
            gates[None],
            *stream.compressors,
            config=config,
            backend=ops.name,
            plan=plan,
            **more,
        )

    def reference(rows: Tensor, q: Tensor, gates: Tensor, *rest: Tensor) -> Tensor:
        exact, at = get_backend("pytorch"), stream.segments_of(rows)
        keys, values, weights = by_branch(rest)
        half, blocks = len(names), stream.block_rows
        k_cmp, v_cmp = (
            exact.compress(
                x, blocks, config.compress_block, config.compress, dict(zip(names, w, strict=True))
            )
            for x, w in (
                (keys["compressed"], weights[:half]),
                (values["compressed"], weights[half:]),
            )
        )
        outputs = [
            exact.compressed_attention(q, k_cmp, v_cmp, at, **stream.band)[0],
            stream.select(exact, q, keys["selected"], values["selected"], chosen()[rows], at),
            stream.slide(exact, q, keys["window"], values["window"], at),
        ]
        return exact.combine(outputs, gates)

    def chosen() -> Tensor:
        """The blocks of this run. Whether they are right is checked by block_selection."""
        if choices is not None:
            return choices
        keys, values, _ = by_branch(inputs[2:])
        with torch.no_grad():
            q, gates = inputs[:2]
            details = run_public(q, gates, keys, values, return_details=True)[1]
        return details.selected[0]

    def by_branch(rest: Sequence[Tensor]) -> tuple[ByName, ByName, Sequence[Tensor]]:
        """Keys and values by branch, and the compressors' weights."""
        times = len(BRANCHES) // sets  # Branches share one set, or each has its own.
        keys = dict(zip(BRANCHES, [*rest[:sets]] * times, strict=True))
        values = dict(zip(BRANCHES, [*rest[sets : 2 * sets]] * times, strict=True))
        return keys, values, rest[2 * sets :]

    sets = len(BRANCHES) if config.independent_kv else 1
    names = [name for name, _ in stream.compressors[0].named_parameters()]
    inputs = [
        *(stream.q, stream.gates),
        *(stream.draw_keys() for _ in range(sets)),
        *(stream.draw(stream.length, config.num_kv_heads, config.value_dim) for _ in range(sets)),
        *(p for compressor in stream.compressors for p in compressor.parameters()),
    ]
    # Compression, attention and the gated sum round one after another.
    judge = compare_sampled(reference, by_row=2, operators=3)
    return Problem("whole", label, inputs, run, judge, stream.flops["whole"])


_BUILDERS: dict[str, Callable[[Stream, str, Tensor | None], Problem]] = {
    "compression": _compression,
    "compressed_attention": _compressed_attention,
    "block_selection": _block_selection,
    "selected_attention": _selected_attention,
    "window_attention": _window_attention,
    "combine": _combine,
    "whole": _whole,
}


def problems(
    stream: Stream, random: Tensor, recorded: dict[str, Tensor], only: tuple[str, ...] = ()
) -> Iterator[Problem]:
    """Every operator on the stream, one after another, each built when it is asked for.

    Args:
        random: choices of the selected branch; the whole attention chooses its own.
        recorded: more choices by label, of the selected branch and of the whole attention.
        only: names to build; all when empty.
    """
    for name in OPERATORS:
        if only and name not in only:
            continue
        if name not in ("selected_attention", "whole"):
            yield _BUILDERS[name](stream, "", None)
            continue
        yield _BUILDERS[name](stream, "random", random if name == "selected_attention" else None)
        for label, choices in recorded.items():
            yield _BUILDERS[name](stream, label, choices)
