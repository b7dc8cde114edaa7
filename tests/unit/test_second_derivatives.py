"""A second derivative is refused, also where only what was saved would need it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nsa_dist import NativeSparseAttention, NSAConfig
from nsa_kernels import get_backend

BACKEND = get_backend("pytorch")
SAID = "create_graph must be False .* first derivatives only, got True"


def make(**options: object) -> tuple[nn.Module, Tensor]:
    config = NSAConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        compress_block=4,
        compress_stride=2,
        select_block=4,
        num_selected=4,
        window=9,
        **options,  # type: ignore[arg-type]
    )
    return NativeSparseAttention(16, config, backend="pytorch"), torch.randn(1, 40, 16)


@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
@pytest.mark.parametrize("of", ["x", "weights"])
def test_of_a_layer(branch: str, of: str) -> None:
    """The gradient that comes in is a constant: nothing in it tells of a second derivative."""
    layer, x = make(branches=(branch,))
    x.requires_grad_()
    out = layer(x).sum()
    wanted = [x] if of == "x" else list(layer.parameters())
    with pytest.raises(ValueError, match=SAID):
        torch.autograd.grad(out, wanted, create_graph=True)


def test_of_a_hessian() -> None:
    layer, x = make()
    with pytest.raises(ValueError, match=SAID):
        torch.autograd.functional.hvp(lambda x: layer(x).sum(), x, torch.ones_like(x))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_functions_are_refused_by_name(name: str) -> None:
    """And nothing of theirs is kept in a plan."""
    layer, x = make()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^the attention must not .*torch.func.*backward\(\).*, got one"
        ):
            TRANSFORMS[name](lambda x: layer(x).sum(), x)
    weights = dict(layer.named_parameters())
    assert torch.equal(torch.func.functional_call(layer, weights, (x,)), layer(x))


def test_first_derivatives_stay() -> None:
    layer, x = make()
    x.requires_grad_()
    first = torch.autograd.grad(layer(x).sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(layer(x).sum(), x, create_graph=False)[0])


def combined(x: Tensor) -> Tensor:
    return BACKEND.combine([x, 2 * x], torch.full((*x.shape[:2], 2), 0.5, dtype=x.dtype))


def compressed(x: Tensor) -> Tensor:
    rows = torch.tensor([0, 2])
    return BACKEND.compress(x, rows, 4, "conv1d", {"position": x[:4, 0], "weight": x[:4, 0].T})


def gathered(x: Tensor) -> Tensor:
    return BACKEND.gather_blocks(x, torch.tensor([0, 2]), 4)


@pytest.mark.parametrize("function", [combined, compressed, gathered])
def test_of_an_operator(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 2, 4, requires_grad=True)
    with pytest.raises(ValueError, match=SAID):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


def test_every_backward_written_by_hand_is_of_first_order() -> None:
    """Those of the backend, and of what moves between ranks."""
    from nsa_dist.comm import fetch, gather, halo
    from nsa_kernels.pytorch._tiled_attention import TiledAttention
    from nsa_kernels.pytorch.combine import _Combine
    from nsa_kernels.pytorch.compression import _Compress, _GatherBlocks
    from nsa_kernels.pytorch.selected_attention import _SelectedAttention

    of_backend = (TiledAttention, _Combine, _Compress, _GatherBlocks, _SelectedAttention)
    moving = [half for module in (halo, gather) for half in (module._Send, module._Receive)]
    moving += [fetch._Home, fetch._Receive, fetch._Arrived, fetch._Again]
    for function in (*of_backend, *moving):
        with torch.enable_grad(), pytest.raises(ValueError, match=SAID):
            function.backward(None)
