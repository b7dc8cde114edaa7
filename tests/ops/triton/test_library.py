"""The operators as torch sees them: schemas, fake tensors, autograd, graphs without breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nsa_dist import BlockCompressor, NSABlock, NSAConfig, RotaryConfig, native_sparse_attention
from nsa_dist.attention.plan_cache import get_plan
from nsa_kernels import QuerySegments
from nsa_kernels import triton as backend
from tests.ops.backends import DEVICE
from tests.ops.op_cases import same_bits

H, G, D, BLOCK, STRIDE, SELECT, NUM = 4, 2, 16, 4, 2, 16, 2
OPS = torch.ops.nsa_kernels
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
Run = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Packing:
    """Documents of a stream, and where their blocks are."""

    def __init__(self, *lengths: int) -> None:
        rows, firsts, blocks, sizes = [], [], [], []
        start = 0
        for length in lengths:
            rows.append((start, length, 0, len(firsts), len(blocks), start))
            firsts += range(start, start + length - BLOCK + 1, STRIDE)
            blocks += range(start, start + length, SELECT)
            sizes += [min(SELECT, length - at) for at in range(0, length, SELECT)]
            start += length
        self.segments = QuerySegments.from_rows(rows, DEVICE)
        self.firsts = torch.tensor(firsts, device=DEVICE, dtype=torch.int64)
        self.blocks = torch.tensor(blocks, device=DEVICE, dtype=torch.int64).expand(G, -1)
        self.sizes = torch.tensor(sizes, device=DEVICE, dtype=torch.int64)
        own = self.segments.positions // SELECT
        choice = torch.stack([own * 0, torch.where(own > 0, own, -1)], dim=-1)
        self.choice = choice[:, None].expand(-1, G, -1).int()
        self.tokens, self.compressed = start, len(firsts)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        q, x = (self.tokens, H, D), (self.tokens, G, D)
        compressed = (self.compressed, G, D)
        return {
            "compress": [x, (BLOCK, D), (2 * D, BLOCK * D), (D, 2 * D)],
            "gather_blocks": [x],
            "compressed_attention": [q, compressed, compressed],
            "window_attention": [q, x, x],
            "selected_attention": [q, x, x, (0, G, D), (0, G, D)],
            "combine": [q, q, (self.tokens, H, 2)],
        }[name]

    def leaves(self, name: str) -> list[Tensor]:
        return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in self.shapes(name)]


# What torch.compile is given: each public function, its packing an argument.
def _compress(at: Packing, x: Tensor, position: Tensor, up: Tensor, down: Tensor) -> Any:
    params = {"position": position, "up": up, "down": down}
    return (backend.compress(x, at.firsts, BLOCK, "mlp", params),)


def _gather_blocks(at: Packing, x: Tensor) -> Any:
    return (backend.gather_blocks(x, at.firsts, BLOCK),)


def _compressed_attention(at: Packing, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return backend.compressed_attention(q, k, v, at.segments, block=BLOCK, stride=STRIDE, scale=0.3)


def _window_attention(at: Packing, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return backend.window_attention(q, k, v, at.segments, window=7, scale=0.3)


def _selected_attention(at: Packing, *tensors: Tensor) -> Any:
    return backend.selected_attention(
        *tensors, at.choice, at.blocks, at.sizes, at.segments, select_block=SELECT, scale=0.3
    )


def _combine(at: Packing, a: Tensor, b: Tensor, gates: Tensor) -> Any:
    return (backend.combine([a, b], gates),)


PUBLIC: dict[str, Run] = {
    "compress": _compress,
    "gather_blocks": _gather_blocks,
    "compressed_attention": _compressed_attention,
    "window_attention": _window_attention,
    "selected_attention": _selected_attention,
    "combine": _combine,
}
# The compressed branch runs the operator of the window branch.
WITH_SEGMENTS = [
    "selected_attention",
    pytest.param("window_attention", marks=pytest.mark.slow),
    pytest.param("compressed_attention", marks=pytest.mark.slow),
]


def _select_blocks(at: Packing, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    return backend.select_blocks(
        q, k, lse, at.segments, block=BLOCK, stride=STRIDE, select_block=SELECT, num_selected=NUM,
        num_init_blocks=1, num_local_blocks=1, scale=0.3,
    )  # fmt: skip


def results(run: Run, at: Packing, leaves: list[Tensor]) -> list[Tensor]:
    """What it returns and all gradients of its first result."""
    out = run(at, *leaves)
    grad = torch.arange(out[0].numel(), device=DEVICE, dtype=out[0].dtype).cos()
    return [*out, *torch.autograd.grad(out[0], leaves, grad.view_as(out[0]))]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert [same_bits(x, y) for x, y in zip(a, b, strict=True)] == [True] * len(a)


def _calls(at: Packing) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each operator's name and arguments, forward with leaves and backward with tensors."""
    host, scale = at.segments.host, 0.3
    for name, kind in (("compress", "mlp"), ("compress", "mean")):
        x, *params = at.leaves(name)
        params = params if kind == "mlp" else []
        yield name, (x, at.firsts, BLOCK, kind, params)
        do, x, *params = (torch.randn_like(y) for y in (x[: at.compressed], x, *params))
        yield "compress_backward", (do, x, at.firsts, BLOCK, kind, params)
    (x,) = at.leaves("gather_blocks")
    yield "gather_blocks", (x, at.firsts, BLOCK)
    do = torch.randn(at.compressed, G, BLOCK, D, device=DEVICE)
    yield "gather_blocks_backward", (do, at.firsts, at.tokens)
    for name, band in (
        ("window_attention", (0, 1, 7, "window_base")),
        ("compressed_attention", (BLOCK - 1, STRIDE, 0, "compressed_base")),
    ):
        leaves = at.leaves(name)
        for gate in (None, torch.randn(at.tokens, H, device=DEVICE)):
            gate_leaf = gate if gate is None else gate.clone().requires_grad_()
            yield "banded_attention", (*leaves, gate_leaf, host, *band, scale)
            q, k, v = (x.detach() for x in leaves)
            o, lse, _ = OPS.banded_attention(q, k, v, gate, host, *band, scale)
            grad = torch.randn_like(o)
            yield "banded_attention_backward", (q, k, v, o, lse, gate, grad, host, *band, scale)
    q, k, _ = (x.detach() for x in leaves)
    yield "select_blocks", (q, k, lse, host, BLOCK, STRIDE, SELECT, NUM, 1, 1, scale)
    leaves = at.leaves("selected_attention")
    tables = (at.choice, at.blocks, at.sizes, host)
    yield "selected_attention", (*leaves, *tables, SELECT, scale, None)
    tensors = [x.detach() for x in leaves]
    o, _, log_sum, _ = OPS.selected_attention(*tensors, *tables, SELECT, scale, None)
    for gate in (None, torch.randn(at.tokens, H, device=DEVICE)):
        arguments = (*tensors, o, log_sum, torch.randn_like(o), *tables, SELECT, scale, gate)
        yield "selected_attention_backward", arguments
    a, b, gates = at.leaves("combine")
    yield "combine", ([a, b], gates, [], [0, 0])
    summand = torch.empty_like(a).requires_grad_()
    yield "combine", ([a.detach(), b], gates, [summand], [1, 0])
    a, b, gates = (x.detach() for x in (a, b, gates))
    yield "combine_backward", (torch.randn_like(a), [a, b], gates)
    yield "add_gradients", ([a, b], list(gates.unbind(-1)))


OPERATORS = "banded_attention combine compress gather_blocks selected_attention".split()
OPERATORS = [
    *OPERATORS,
    *(f"{name}_backward" for name in OPERATORS),
    "select_blocks",
    "add_gradients",
]


def test_every_operator_is_checked() -> None:
    registered = {
        name.removeprefix("nsa_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_kernels::")
    }
    assert registered == set(OPERATORS) == {name for name, _ in _calls(Packing(9))}


@pytest.mark.parametrize("lengths", [(13, 6), ()], ids=["two_documents", "no_token"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, lengths: tuple[int, ...]) -> None:
    """Schema, fake tensors and strides, autograd, dispatch with dynamic shapes; no alias."""
    torch.manual_seed(0)
    for found, arguments in _calls(Packing(*lengths)):
        if found == name:
            operator = getattr(OPS, name).default
            torch.library.opcheck(operator, arguments)
            # Which opcheck leaves out, and code that is compiled relies on.
            with FakeTensorMode() as mode:
                as_fake = tree_map_only(Tensor, mode.from_tensor, arguments)
                fake = tree_leaves(operator(*as_fake))
            real = tree_leaves(operator(*arguments))
            assert [x.stride() for x in fake] == [x.stride() for x in real]
            assert [x.requires_grad for x in fake] == [x.requires_grad for x in real]
            assert sum(x.requires_grad for x in real) <= 1 or name.endswith("_backward")


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_in_one_graph(name: str, compiler: str) -> None:
    """The same bits of results and gradients as in eager mode, also where nothing is there."""
    run = PUBLIC[name]
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for lengths in ((13, 6), ()):
        at = Packing(*lengths)
        leaves = at.leaves(name)
        assert_same(results(compiled, at, leaves), results(run, at, leaves))


@pytest.mark.parametrize("compiler", BACKENDS)
def test_the_choice_compiles_in_one_graph(compiler: str) -> None:
    compiled = torch.compile(_select_blocks, fullgraph=True, backend=compiler)
    for lengths in ((13, 26), ()):
        at = Packing(*lengths)
        q, k, v = at.leaves("compressed_attention")
        lse = _compressed_attention(at, q, k, v)[1]
        selected = compiled(at, q, k, lse)
        assert torch.equal(selected, _select_blocks(at, q, k, lse))
        assert not selected.requires_grad


@pytest.mark.parametrize("name", WITH_SEGMENTS)
def test_a_new_packing_runs_the_graph_that_is_there(name: str) -> None:
    """One graph for all packings of one shape, one more for all numbers of documents from 2."""
    run, counter = PUBLIC[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    # As many compression and selection blocks in each of a row.
    of_two = [(12, 10), (8, 14), (10, 12)]
    for lengths in of_two:
        at = Packing(*lengths)
        leaves = at.leaves(name)
        assert_same(results(compiled, at, leaves), results(run, at, leaves))
    assert counter.frame_count == 1
    for lengths in ((8, 6, 8), (6, 8, 4, 4), (4, 4, 4, 4, 6)):
        at = Packing(*lengths)
        leaves = at.leaves(name)
        assert_same(results(compiled, at, leaves), results(run, at, leaves))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", WITH_SEGMENTS)
def test_tables_are_those_of_the_segments(name: str) -> None:
    """Not of other segments, not of what stood in a table before, and for any copy of it."""
    run, first, second = PUBLIC[name], Packing(12, 10), Packing(10, 12)
    leaves = first.leaves(name)
    expected = [results(run, at, leaves) for at in (first, second)]
    assert not same_bits(expected[0][0], expected[1][0])
    assert_same(results(run, first, leaves), expected[0])
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        assert_same(results(run, second, leaves), expected[1])
    changed = Packing(12, 10)
    run(changed, *leaves)
    changed.segments.host.copy_(second.segments.host)
    changed.choice, changed.blocks, changed.sizes = second.choice, second.blocks, second.sizes
    assert_same(results(run, changed, leaves), expected[1])
    with torch.inference_mode():
        assert_same(
            list(run(Packing(12, 10), *leaves)), expected[0][: len(expected[0]) - len(leaves)]
        )


@pytest.mark.parametrize("name", PUBLIC)
def test_a_second_derivative_is_refused(name: str) -> None:
    at = Packing(9)
    leaves = at.leaves(name)
    out = PUBLIC[name](at, *leaves)[0]
    grad = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"_backward.* but no autograd formula was registered"):
        grad.sum().backward()


CONFIG = NSAConfig(
    H, G, D, compress_block=BLOCK, compress_stride=STRIDE, select_block=SELECT, num_selected=3,
    window=7,
)  # fmt: skip


@pytest.mark.parametrize("compiler", BACKENDS)
def test_the_whole_attention_in_one_graph(compiler: str) -> None:
    compressors = [BlockCompressor(CONFIG, D).to(DEVICE) for _ in range(2)]

    def attend(plan: Any, q: Tensor, gates: Tensor, *kv: Tensor) -> tuple[Tensor]:
        k = dict(zip(CONFIG.key_branches, kv[:3], strict=True))
        v = dict(zip(CONFIG.branches, kv[3:], strict=True))
        out = native_sparse_attention(
            q, k, v, gates, *compressors, config=CONFIG, backend="triton", plan=plan
        )
        assert isinstance(out, Tensor)
        return (out,)

    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    shapes = [(1, 40, H, D), (1, 40, H, 3), *[(1, 40, G, D)] * 6]
    leaves = [torch.rand(shape, device=DEVICE).requires_grad_() for shape in shapes]
    weights = [p for compressor in compressors for p in compressor.parameters()]
    for lengths in ((18, 22), (22, 18)):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        plan = get_plan(
            CONFIG, "zigzag", None, batch=1, local_length=40, cu_seqlens=bounds,
            dtype=torch.float32, device=leaves[0].device,
        )  # fmt: skip
        first = lengths == (18, 22)
        with torch._dynamo.config.patch(error_on_recompile=not first):
            found, expected = (
                [out, *torch.autograd.grad(out.square().sum(), [*leaves, *weights])]
                for (out,) in (run(plan, *leaves) for run in (compiled, attend))
            )
        assert_same(found, expected)


def test_a_model_breaks_where_plans_are_made() -> None:
    layers = [
        NSABlock(32, CONFIG, mlp_hidden=16, backend="triton", rotary=RotaryConfig())
        for _ in range(2)
    ]
    model = torch.nn.Sequential(*layers).to(DEVICE)
    x = torch.randn(1, 20, 32, device=DEVICE)
    counters.clear()
    out = torch.compile(model, backend="aot_eager")(x)
    assert same_bits(out, model(x))
    breaks = counters["graph_break"]
    assert breaks and all("NativeSparseAttention._call" in reason for reason in breaks)
    gradients = torch.autograd.grad(out.sum(), model.parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)
