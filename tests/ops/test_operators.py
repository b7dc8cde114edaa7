"""What holds for all operators alike: precision, repeatable bits, strides, graphs, the seam."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_kernels import QuerySegments, Segment, get_backend
from tests.ops.backends import PYTORCH, BackendOnDevice, over, over_all
from tests.ops.op_cases import CASES, Layout, same_bits

T, H, G, D, BLOCK, STRIDE, SELECT = 200, 4, 2, 16, 8, 4, 16


@dataclass(frozen=True)
class Operator:
    """run(*inputs) -> its differentiable result first; shapes: those of the inputs."""

    run: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]


def _layout(device: str) -> dict[str, Any]:
    segments = QuerySegments.from_rows([(0, 150, 0, 0, 0, 0), (150, 50, 0, 36, 10, 150)])
    rows = torch.cat([torch.arange(0, 143, STRIDE), torch.arange(150, 193, STRIDE)])
    blocks = torch.cat([torch.arange(0, 150, SELECT), torch.arange(150, 200, SELECT)])
    lengths = torch.tensor([16] * 9 + [6] + [16] * 3 + [2])
    eligible = segments.positions[:, None] // SELECT
    choice = torch.stack([eligible * 0, eligible - 1, eligible], dim=-1)
    choice[eligible[:, 0] == 0] = torch.tensor([0, -1, -1])
    choice[eligible[:, 0] == 1] = torch.tensor([0, 1, -1])
    return {
        "segments": segments.to(device),
        "rows": rows.to(device),
        "table": (blocks.expand(G, -1).to(device), lengths.to(device)),
        "choice": choice.expand(-1, G, -1).int().to(device),
    }


@functools.cache
def operators(backend: BackendOnDevice) -> dict[str, Operator]:
    at, ops = _layout(backend.device), backend.ops
    count = at["rows"].shape[0]
    tail = {"block": BLOCK, "stride": STRIDE, "scale": 0.3}

    def compress(x: Tensor, position: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        params = {"position": position, "up": up, "down": down}
        return (ops.compress(x, at["rows"], BLOCK, "mlp", params),)

    def gather(x: Tensor) -> tuple[Tensor, ...]:
        return (ops.gather_blocks(x, at["rows"], BLOCK),)

    def compressed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return ops.compressed_attention(q, k, v, at["segments"], **tail)

    def selected(q: Tensor, k: Tensor, v: Tensor, **gate: Tensor) -> tuple[Tensor, ...]:
        return ops.selected_attention(
            q, k, v, k[:0], v[:0], at["choice"], *at["table"], at["segments"],
            select_block=SELECT, scale=0.3, **gate,
        )  # fmt: skip

    def window(q: Tensor, k: Tensor, v: Tensor, **gate: Tensor) -> tuple[Tensor, ...]:
        return ops.window_attention(q, k, v, at["segments"], window=30, scale=0.3, **gate)

    def combine(a: Tensor, b: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        return (ops.combine([a, b], gates),)

    def gated(attend: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
            o, lse, summand = attend(q, k, v, gate=gates[..., 0])
            return summand, o, lse

        return run

    attention = ((T, H, D), (T, G, D), (T, G, D))
    gates = (T, H, 1)
    return {
        "compress": Operator(compress, ((T, G, D), (BLOCK, D), (2 * D, BLOCK * D), (D, 2 * D))),
        "gather_blocks": Operator(gather, ((T, G, D),)),
        "compressed_attention": Operator(compressed, ((T, H, D), (count, G, D), (count, G, D))),
        "selected_attention": Operator(selected, attention),
        "window_attention": Operator(window, attention),
        "combine": Operator(combine, ((T, H, D), (T, H, D), (T, H, 2))),
        "gated_selected": Operator(gated(selected), (*attention, gates)),
        "gated_window": Operator(gated(window), (*attention, gates)),
    }


every_operator = pytest.mark.parametrize("name", operators(PYTORCH))


def inputs(
    backend: BackendOnDevice, name: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    draws = torch.Generator(backend.device).manual_seed(seed)
    device = backend.device
    return [
        torch.randn(shape, generator=draws, dtype=dtype, device=device).requires_grad_()
        for shape in operators(backend)[name].shapes
    ]


def some_gradient(out: Tensor) -> Tensor:
    return torch.arange(out.numel(), device=out.device, dtype=out.dtype).cos().view_as(out)


def results(
    backend: BackendOnDevice, name: str, leaves: list[Tensor], grad: Tensor | None = None
) -> list[Tensor]:
    """Everything the operator returns, and the gradients of all inputs."""
    out = operators(backend)[name].run(*leaves)
    grad = some_gradient(out[0]) if grad is None else grad
    return [*out, *torch.autograd.grad(out[0], leaves, grad)]


@functools.cache
def first_results(
    backend: BackendOnDevice, name: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Those of ``inputs``, which many tests compare with: computed by the first of them."""
    return [x.detach() for x in results(backend, name, inputs(backend, name, dtype, seed))]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert [same_bits(x, y) for x, y in zip(a, b, strict=True)] == [True] * len(a)


@every_operator
def test_the_same_bits_in_every_run(name: str) -> None:
    assert_same_bits(results(PYTORCH, name, inputs(PYTORCH, name)), first_results(PYTORCH, name))


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bits_are_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    narrow = inputs(PYTORCH, name, dtype)
    wide = [x.detach().float().requires_grad_() for x in narrow]
    grad = some_gradient(operators(PYTORCH)[name].run(*narrow)[0])
    found, expected = (
        results(PYTORCH, name, narrow, grad),
        results(PYTORCH, name, wide, grad.float()),
    )
    assert found[0].dtype == dtype
    assert_same_bits(found, [y.to(x.dtype) for x, y in zip(found, expected, strict=True)])


@every_operator
@over("dtype", pytorch=[torch.float32, torch.float64], triton=[torch.float32])
def test_autocast_changes_nothing(backend: BackendOnDevice, name: str, dtype: torch.dtype) -> None:
    leaves = inputs(backend, name, dtype)
    expected = first_results(backend, name, dtype)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        found = results(backend, name, leaves)
    assert_same_bits(found, expected)


@contextmanager
def reduced_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@every_operator
def test_float32_products_stay_ieee(name: str) -> None:
    """TF32 on a GPU, bfloat16 products on some CPUs; and the setting is left as it was."""
    leaves = inputs(PYTORCH, name)
    expected = first_results(PYTORCH, name)
    with reduced_precision():
        found = results(PYTORCH, name, leaves)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    assert_same_bits(found, expected)


@over_all
@every_operator
def test_forward_bits_do_not_depend_on_grad_mode(backend: BackendOnDevice, name: str) -> None:
    leaves = inputs(backend, name)
    with_graph = first_results(backend, name)[: -len(leaves)]
    with torch.no_grad():
        without = operators(backend)[name].run(*leaves)
    detached = operators(backend)[name].run(*(x.detach() for x in leaves))
    for found in (without, detached):
        assert_same_bits(list(found), with_graph)
        assert not any(x.requires_grad for x in found)


@over_all
@every_operator
def test_several_forwards_before_their_backwards(backend: BackendOnDevice, name: str) -> None:
    first, second = inputs(backend, name), inputs(backend, name, seed=1)
    expected = [first_results(backend, name), first_results(backend, name, seed=1)]
    outs = [operators(backend)[name].run(*leaves)[0] for leaves in (first, second)]
    for number in (0, 1):
        out, leaves = outs[number], (first, second)[number]
        found = torch.autograd.grad(out, leaves, some_gradient(out))
        assert_same_bits(list(found), expected[number][-len(leaves) :])


@over_all
@every_operator
def test_recomputation_gives_the_same_bits(backend: BackendOnDevice, name: str) -> None:
    leaves = inputs(backend, name)
    expected = first_results(backend, name)

    def first(*leaves: Tensor) -> Tensor:
        return operators(backend)[name].run(*leaves)[0]

    out = checkpoint(first, *leaves, use_reentrant=False)
    found = [out, *torch.autograd.grad(out, leaves, some_gradient(out))]
    assert_same_bits(found, [expected[0], *expected[-len(leaves) :]])


@every_operator
def test_views_of_any_strides(name: str) -> None:
    """Heads of a fused projection, transposed storage, an expanded gradient."""
    leaves = inputs(PYTORCH, name)
    views = []
    for x in leaves:
        fused = torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan, device=PYTORCH.device)
        view = fused[..., 1 : 1 + x.shape[-1]]
        views.append(view.copy_(x.detach()).requires_grad_())
    swapped = [
        x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in leaves
    ]
    shape = operators(PYTORCH)[name].run(*leaves)[0].shape
    grad = torch.randn(shape[1:], device=PYTORCH.device).expand(shape)
    expected = results(PYTORCH, name, leaves, grad.contiguous())
    for found in (results(PYTORCH, name, views, grad), results(PYTORCH, name, swapped, grad)):
        assert_same_bits(found, expected)


@every_operator
def test_lse_has_no_gradient_and_results_are_not_inputs(name: str) -> None:
    out = operators(PYTORCH)[name].run(*inputs(PYTORCH, name))
    assert out[0].requires_grad
    assert not any(x.requires_grad for x in out[1:])


@over_all
@every_operator
def test_an_input_without_gradient_costs_nothing_else(backend: BackendOnDevice, name: str) -> None:
    leaves = inputs(backend, name)
    expected = first_results(backend, name)
    leaves[0].requires_grad_(False)
    if len(leaves) == 1:
        assert not operators(backend)[name].run(*leaves)[0].requires_grad
        return
    out = operators(backend)[name].run(*leaves)[0]
    found = torch.autograd.grad(out, leaves[1:], some_gradient(out))
    assert_same_bits(list(found), expected[-len(found) :])


@pytest.mark.gpu
@every_operator
def test_on_a_gpu(name: str) -> None:
    """float64 on both devices, and the same bits in every run."""
    leaves = inputs(PYTORCH, name, torch.float64)
    expected = results(PYTORCH, name, leaves)
    there = BackendOnDevice("pytorch", "cuda")
    on_gpu = [x.detach().cuda().requires_grad_() for x in leaves]
    found = results(there, name, on_gpu)
    assert_same_bits(found, results(there, name, on_gpu))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-10, atol=1e-10)


def test_backends() -> None:
    pytorch = get_backend("pytorch")
    assert get_backend() is get_backend("auto") is get_backend("auto", "cpu") is pytorch
    assert pytorch.name == "pytorch"
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .* got 'cuda'"):
        get_backend("cuda")


def _on_a_machine(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str | None = "13.0"
) -> None:
    """A machine with a GPU of that capability; None for no GPU."""
    pytest.importorskip("nsa_kernels.triton")  # Now, while kernels would be interpreted.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    major, minor = capability or (0, 0)
    gpu = SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


def test_triton_runs_on_nvidia_gpus_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_machine(monkeypatch, (9, 0))
    assert get_backend("auto", "cuda").name == get_backend("triton").name == "triton"
    assert get_backend("auto").name == get_backend("auto", "cpu").name == "pytorch"
    assert get_backend("pytorch", "cuda").name == "pytorch"
    with pytest.raises(ValueError, match="backend must be 'pytorch' for tensors on cpu, got 'tri"):
        get_backend("triton", "cpu")


@pytest.mark.parametrize(
    "capability, cuda, missing",
    [
        ((7, 5), "13.0", "on Some GPU, of a compute capability below 8.0"),
        ((9, 4), None, "without an NVIDIA GPU"),
        (None, "13.0", "without an NVIDIA GPU"),
    ],
    ids=["old", "not_nvidia", "no_gpu"],
)
def test_triton_is_refused_where_it_cannot_run(
    capability: tuple[int, int] | None,
    cuda: str | None,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _on_a_machine(monkeypatch, capability, cuda)
    assert get_backend("auto", "cuda").name == "pytorch"
    with pytest.raises(ValueError, match=f"backend must be 'pytorch' {missing}, got 'triton'"):
        get_backend("triton", "cuda")


def test_segments_describe_every_row_once() -> None:
    segments = Layout(CASES[2]).segments
    assert segments.num_queries == 114
    assert torch.equal(segments.table, torch.tensor(segments.rows))
    expected = [position + i for _, length, position, *_ in segments.rows for i in range(length)]
    assert segments.positions.tolist() == expected
    assert segments.selected_bases.tolist() == [
        row.selected_base for row in segments.rows for _ in range(row.length)
    ]
    parts = [part for row in segments.rows for part in row.split(7)]
    assert max(part.length for part in parts) == 7
    split = QuerySegments.from_rows(parts)
    assert torch.equal(split.positions, segments.positions)
    assert segments.to("cpu") is segments


def test_segments_of_nothing() -> None:
    segments = QuerySegments.from_rows([])
    assert segments.table.shape == (0, 6)
    assert segments.positions.shape == (0,)
    assert list(Segment(0, 0, 0, 0, 0, 0).split(4)) == []


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 5, 0, 0, 0, 0)],
        [(0, 5, 0, 0, 0, 0), (6, 2, 0, 0, 0, 0)],
        [(0, 5, 0, 0, 0, 0), (4, 2, 0, 0, 0, 0)],
        [(0, -1, 0, 0, 0, 0)],
        [(0, 5, -3, 0, 0, 0)],
    ],
    ids=["gap_at_start", "gap", "overlap", "negative_length", "negative_position"],
)
def test_segments_that_describe_no_rows(rows: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"segments\[\d\] must start at row"):
        QuerySegments.from_rows(rows)
