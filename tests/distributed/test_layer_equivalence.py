"""The layer on P ranks against one rank and against the oracle, every gradient included.

float64, so that agreement is to rounding: 1e-12 of each tensor's largest element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from nsa_dist import RotaryConfig
from nsa_kernels.reference import ReferenceOptions, RotaryOptions, layer_reference
from tests.distributed.layer_case import (
    LayerCase,
    LayerResult,
    assert_results_close,
    assert_sparse_and_remote,
    run_layer,
    run_on_rank,
    variants,
)
from tests.distributed.ranks import Ranks

PACKED = (1, 60, 3, 97, 0, 45, 11)
TOLERANCE = 1e-12

LAYOUT_CASES = {
    f"{layout}-{name}": LayerCase(layout=layout, lengths=lengths)
    for layout in ("contiguous", "zigzag", "zigzag_per_document")
    for name, lengths in (("one-document", None), ("packed", PACKED))
}
OPTION_CASES = {
    "shared-kv": variants(LayerCase(lengths=PACKED), independent_kv=False),
    "two-rows": LayerCase(batch=2, length=101, layout="contiguous"),
    "two-rows-zigzag": LayerCase(batch=2, length=101),
    "window-longer-than-chunks": variants(LayerCase(lengths=PACKED), window=60),
    "blocks-longer-than-chunks": variants(
        LayerCase(lengths=(150, 40), layout="contiguous"),
        compress_block=16,
        compress_stride=4,
        select_block=16,
        num_selected=4,
    ),
    "linear-per-head": variants(
        LayerCase(lengths=PACKED), compress="linear", compress_per_head=True
    ),
    "conv1d-pre-rope-yarn": variants(
        LayerCase(
            lengths=PACKED,
            rotary=RotaryConfig(scaling="yarn", factor=4.0, original_max_positions=64),
        ),
        compress="conv1d",
        compress_pre_rope=True,
    ),
    "shared-pre-rope": variants(
        LayerCase(lengths=PACKED, rotary=RotaryConfig(dim=4)),
        independent_kv=False,
        compress_pre_rope=True,
    ),
    "pool-qk-norm-bias": variants(
        LayerCase(lengths=PACKED, qk_norm=True, bias=True), compress="attention_pool"
    ),
    "mean-mlp-gate": variants(LayerCase(lengths=PACKED), compress="mean", gate="mlp"),
    "static-gate": variants(LayerCase(lengths=PACKED), gate="static", scale=0.7),
    "selected-only": variants(LayerCase(lengths=PACKED), branches=("selected",)),
    "selected-and-window-shared": variants(
        LayerCase(lengths=PACKED), branches=("selected", "window"), independent_kv=False
    ),
    "one-head-a-group": variants(LayerCase(lengths=PACKED), num_heads=2),
    "recomputation": LayerCase(lengths=PACKED, checkpoint=True),
}
# Nothing is chosen here, so that there is nothing to ask of the choice.
CHOICELESS_CASES = {
    "window-only": variants(LayerCase(lengths=PACKED), branches=("window",)),
    "compressed-only": variants(LayerCase(lengths=PACKED), branches=("compressed",)),
    "documents-shorter-than-a-block": LayerCase(lengths=(1, 2, 3, 2, 1, 3, 2, 1)),
    "one-token": LayerCase(lengths=(1,)),
    "a-document-per-rank": LayerCase(lengths=(2, 0, 40, 0, 1), layout="contiguous"),
}
CASES = LAYOUT_CASES | OPTION_CASES | CHOICELESS_CASES


@functools.cache
def single_rank(name: str) -> LayerResult:
    return run_layer(variants(CASES[name], checkpoint=False))


def oracle(case: LayerCase, found: LayerResult) -> LayerResult:
    """The oracle's result on the same weights and inputs, with gradients by autograd.

    It chooses by itself; the choices are compared, then shared, so that a tie broken by a last bit
    would show as such.
    """
    layer = case.layer()
    params = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}
    x, grad = case.inputs()
    x.requires_grad_()
    options = ReferenceOptions.from_config(case.config)
    rotary = RotaryOptions.from_config(case.rotary)
    outputs, choices = [], []
    for row in range(x.shape[0]):
        result = layer_reference(x[row], params, options, rotary=rotary, cu_seqlens=case.cu_seqlens)
        outputs.append(result.output)
        choices.append(result.selected)
    output = torch.stack(outputs)
    output.backward(grad)
    selected = None if choices[0] is None else torch.stack([c for c in choices if c is not None])
    assert x.grad is not None
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()}
    return LayerResult(output.detach(), x.grad, grads, selected, {}, {})


@pytest.mark.parametrize("name", CASES)
def test_one_rank_equals_oracle(name: str) -> None:
    case = CASES[name]
    found = single_rank(name)
    expected = oracle(case, found)
    if found.selected is not None:
        assert expected.selected is not None
        assert torch.equal(found.selected, expected.selected.to(found.selected.dtype))
    if name not in CHOICELESS_CASES:
        assert_sparse_and_remote(case, found, 1)
    assert_results_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_rank(name: str, size: int, ranks_of: Callable[[int], Ranks]) -> None:
    case, expected = CASES[name], single_rank(name)
    found = ranks_of(size).run(run_on_rank, case)[0]
    if found.selected is not None:
        assert torch.equal(found.selected, expected.selected)
        if name not in CHOICELESS_CASES:
            assert_sparse_and_remote(case, found, size)
    assert_results_close(found, expected, TOLERANCE)
