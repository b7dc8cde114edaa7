"""Linear layers and norms whose bits for a token do not depend on the tokens beside it.

A library's matrix product adds up in an order that depends on the number of rows, and its mean over
channels may too. So a token that is generated has other bits than in a forward over the whole
sequence, and log-probabilities of generation and of training differ by rounding. Here both are
products of rows of the backend (``nsa_kernels.backend.MultiplyRows``). What is computed element by
element, and this attention, do not depend on other documents in any case.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nsa_dist.adapters.huggingface.decoder import SparseDecoder
from nsa_dist.checks import check
from nsa_dist.nn.compressor import BlockCompressor
from nsa_dist.nn.gates import StaticGate
from nsa_dist.nn.norm import SetNorm
from nsa_kernels import get_backend
from nsa_kernels.autograd import first_order
from nsa_kernels.backend import multiply_rows

OTHERS = (nn.Embedding, BlockCompressor, StaticGate)
"""Modules with parameters whose results for a token depend on its document alone."""


class _Products(torch.autograd.Function):
    """x W^T + bias by rows; its gradients are ordinary products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        product = multiply_rows(get_backend(backend, x.device))
        assert product is not None
        return product(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return dout @ weight, dout.T @ x, dout.sum(0) if ctx.has_bias else None, None


def products(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x [..., I], weight [O, I] and bias [O] -> [..., O], each row for itself."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Products.apply(rows, weight, bias, backend)
    return out.view(*x.shape[:-1], len(weight))


def means(x: Tensor, backend: str) -> Tensor:
    """The mean over the last dimension, which stays with size 1; each row for itself."""
    size = x.shape[-1]
    return products(x, x.new_ones(1, size), None, backend) / size


class _Means(TorchFunctionMode):
    """Computes means over channels, and norms of torch's own, by rows; counts them."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend, self.count = backend, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.mean, Tensor.mean):
            return self._mean(*args, **kwargs)
        if function is F.rms_norm:
            return self._rms_norm(*args, **kwargs)
        return function(*args, **kwargs)

    def _mean(self, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        of_channels = dim in (-1, (-1,), [-1])
        check(of_channels, "use_batch_invariant", f"a mean over {dim}", "used with means over -1")
        self.count += 1
        found = means(x, self.backend)
        return found if keepdim else found.squeeze(-1)

    def _rms_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        wide = wide * torch.rsqrt(self._mean(wide.square(), -1, True) + eps)
        return (wide if weight is None else wide * weight.to(dtype)).to(x.dtype)


class _ByRows:
    """What the class of a module gets that computes each row for itself."""

    nsa_backend: str


class _Linear(_ByRows):
    """``forward`` of linear layers."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return products(x, self.weight, self.bias, self.nsa_backend)


class _Norm(_ByRows):
    """``forward`` of norms over channels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Means(self.nsa_backend) as mode:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        check(mode.count > 0, "model", _class_before(self).__name__, "one whose norms take means")
        return out


_made: dict[Any, type] = {}


def _class_by_rows(kind: type) -> type | None:
    """A module's class with ``forward`` by rows; None where the class has nothing to change."""
    if issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward:
        mixin: type = _Linear
    elif issubclass(kind, (SetNorm, nn.RMSNorm)) or kind.__name__.endswith("RMSNorm"):
        mixin = _Norm
    else:
        return None
    if kind not in _made:
        _made[kind] = type(f"{kind.__name__}ByRows", (mixin, kind), {})
    return _made[kind]


def _class_before(module: _ByRows) -> type:
    """The module's class before ``_class_by_rows``."""
    return type(module).__mro__[type(module).__mro__.index(_ByRows) + 1]


def set_batch_invariant(model: Any, decoder: SparseDecoder, on: bool) -> None:
    """As ``use_batch_invariant`` of the model.

    Args:
        decoder: of the model.
    """
    modules: list[nn.Module] = list(model.modules())
    runtime = decoder.nsa_runtime
    if on:
        device = next(model.parameters()).device
        has_products = multiply_rows(get_backend(runtime.backend, device)) is not None
        must = "'triton', on a GPU, with use_batch_invariant (a BLAS adds up as rows stand)"
        check(has_products, "backend", runtime.backend, must)
        layers, sparse = model.config.num_hidden_layers, len(decoder.nsa_layers)
        must = f"all {layers} with use_batch_invariant (dense attention depends on the batch)"
        check(sparse == layers, "layers", sparse, must)
        for module in modules:
            _check(module)
    for module in modules:
        if on:
            kind = None if isinstance(module, _ByRows) else _class_by_rows(type(module))
            if kind is not None:
                module.__class__ = kind
            if isinstance(module, _ByRows):
                module.nsa_backend = runtime.backend
        elif isinstance(module, _ByRows):
            del module.nsa_backend
            module.__class__ = _class_before(module)
    decoder.nsa_runtime = replace(runtime, batch_invariant=on)


def _check(module: nn.Module) -> None:
    """Raise ValueError for a module that may compute a token's bits from other tokens."""
    kind = type(module)
    has_own = next(module.parameters(recurse=False), None) is not None
    known = isinstance(module, (_ByRows, *OTHERS)) or _class_by_rows(kind) is not None
    must = "one of linear layers, RMSNorms and Native Sparse Attention with use_batch_invariant"
    check(known or not has_own, "model", f"one with {kind.__name__}", must)
