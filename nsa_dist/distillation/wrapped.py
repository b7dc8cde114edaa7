"""Distillation in a model whose modules are wrapped: sharded, replicated, or computed again.

What wraps a module looks at its arguments and results. FSDP2 gathers its weights for backward by
the gradients of results, and frees them by those of arguments; DDP looks for the weights in use in
the graph of results; activation checkpointing computes results again. A distilled model has no
gradients there: a loss leaves each layer on the side.

So a zero goes through the wrapped modules, and losses of a module wait in backward for the zero
that came out of it. Its gradient is zero, of any dtype and scale. And what layers keep for backward
is kept as without checkpointing, which so does nothing: it is little.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from nsa_dist.distillation.distill import LayerDistillation

ZERO = "nsa_zero"
"""The keyword by which modules are handed the zero."""


@contextmanager
def through_wrappers(model: nn.Module, layers: list[LayerDistillation]) -> Iterator[None]:
    """Within it, losses that calls of ``model`` add to ``layers`` can be trained by.

    Args:
        model: as it is called, with what wraps it.
        layers: losses of the calls; those of wrapped modules are replaced.

    Raises:
        ValueError: if FSDP1 wraps ``model``.
    """
    wrapped = list(_wrapped(model))
    with ExitStack() as stack:
        for module in filter(_is_sparse, model.modules()):
            stack.enter_context(_alone(module))
        zero = _Zero(model, layers)
        for outer, inner in wrapped:
            for handle in (
                outer.register_forward_pre_hook(zero.give, prepend=True, with_kwargs=True),
                inner.register_forward_pre_hook(zero.take, with_kwargs=True),
                inner.register_forward_hook(zero.hand_out, prepend=True),
                outer.register_forward_hook(zero.take_back),
            ):
                stack.callback(handle.remove)
        yield


def keep(x: Tensor) -> Tensor:
    """What is kept of a tensor for backward: itself."""
    return x


def _is_sparse(module: nn.Module) -> bool:
    """Whether it is a layer of sparse attention, of whichever adapter."""
    return isinstance(getattr(module, "k_compressor", None), nn.Module)


def _wrapped(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules that wrap sparse layers, and what is within them: for FSDP2 the same."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for module in model.modules():
        if not any(map(_is_sparse, module.modules())):
            continue
        if isinstance(module, FSDPModule):
            yield module, module
        elif isinstance(module, DistributedDataParallel):
            yield module, module.module
        elif isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "model must be sharded by FSDP2 in distill_dense (fully_shard; the Trainer's "
                "fsdp_config={'version': 2}), got FullyShardedDataParallel"
            )


@contextmanager
def _alone(module: Any) -> Iterator[None]:
    """Within it, no gradient leaves ``module`` by its arguments, and activation checkpointing
    around it keeps all that it would."""
    own = module.__dict__.get("forward")
    module.forward = functools.partial(_call_alone, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _call_alone(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _detached((args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        return forward(*args, **kwargs)


def _detached(nested: Any) -> Any:
    """Tensors without their graph: with checkpointing the Trainer lets embeddings begin one, of
    which a wrapper's own functions would pass zeros or nothing on, through every layer."""

    def detached(x: Any) -> Any:  # Others stay the objects that they are: plans go by them.
        return x.detach() if isinstance(x, Tensor) and x.requires_grad else x

    return tree_map(detached, nested)


class _Zero:
    """The zero on its way through modules; its methods are hooks of these, in their order."""

    def __init__(self, model: nn.Module, layers: list[LayerDistillation]) -> None:
        self.layers = layers
        self.now = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
        self.starts: list[int] = []  # Of the modules that are in their forward.

    def give(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before the wrapper sees the arguments."""
        args, kwargs = _detached((args, kwargs))
        return args, {**kwargs, ZERO: self.now}

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """After that, before the forward."""
        self.now = kwargs.pop(ZERO)
        self.starts.append(len(self.layers))
        return args, kwargs

    def hand_out(self, module: nn.Module, args: Any, output: Any) -> tuple[Any, Tensor]:
        """After the forward, before the wrapper sees the result."""
        found = self.layers[self.starts[-1] :]
        losses = (loss for layer in found for loss in (layer.choice, layer.output))
        return _detached(output), _after(self.now, *losses)

    def take_back(self, module: nn.Module, args: Any, output: tuple[Any, Tensor]) -> Any:
        """After that."""
        result, self.now = output
        start = self.starts.pop()
        self.layers[start:] = [
            replace(
                layer,
                choice=_after(layer.choice, self.now),
                output=_after(layer.output, self.now),
            )
            for layer in self.layers[start:]
        ]
        return result


class _After(torch.autograd.Function):
    """x [], others []: forward x, backward its gradient, and zeros for the others, which so come
    after x in backward. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.dtype, other.device) for other in others]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device) for dtype, device in ctx.others)
        return upstream, *zeros


def _after(x: Tensor, *others: Tensor) -> Tensor:
    found: Tensor = _After.apply(x, *others)
    return found
