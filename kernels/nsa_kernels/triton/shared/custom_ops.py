"""How operators are registered with torch, so that compiled and eager code run the same ones.

A registered operator takes tensors and numbers only. Segments enter as their table on the host,
whose values no graph depends on: a new packing of documents runs the graph that there is. What a
launcher makes of them is cached with that table, see cache.py.

Eager calls on plain tensors, which nobody watches, go past torch's dispatcher: its way through a
Python operator takes the host longer than a launch. What is called is the same, so bits are too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.triton.shared.launch import on_its_device

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Operator:
    """nsa_kernels::<name>, which writes to no argument and returns none.

    Tensors and lists of tensors are its only differentiable arguments, and it returns tensors. It
    runs on the device of its first argument.
    """

    def __init__(self, function: Callable[..., Any], name: str, schema: str) -> None:
        self._function = function = on_its_device(function)
        self._definition = torch.library.custom_op(
            f"nsa_kernels::{name}", function, mutates_args=(), schema=schema
        )
        self._overload: Any = self._definition._opoverload
        self._eager: type[torch.autograd.Function] | None = None
        self._has_lists = "[]" in schema.partition("->")[0]

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As `CustomOpDef.register_fake` of torch.library."""
        return self._definition.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As `CustomOpDef.register_autograd` of torch.library."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        make = _eager_function_of_lists if self._has_lists else _eager_function
        self._eager = make(self._function, backward, setup_context)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched():
            return self._overload(*arguments)
        flat: Sequence[Any] = arguments
        if self._has_lists:
            flat, lists = _flatten(arguments)
        differentiates = False
        for x in flat:
            if type(x) in PLAIN_TYPES:
                differentiates = differentiates or x.requires_grad
            elif isinstance(x, Tensor):
                return self._overload(*arguments)
        if not differentiates or not torch.is_grad_enabled():
            return self._function(*arguments)
        if self._eager is None:  # torch says so when somebody asks for the derivative.
            return self._overload(*arguments)
        return self._eager.apply(lists, *flat) if self._has_lists else self._eager.apply(*flat)


def _is_watched() -> bool:
    """Whether calls are to be seen by a mode, or by a transform of torch.func."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _flatten(arguments: Sequence[Any]) -> tuple[list[Any], tuple[int, ...]]:
    """Lists as their elements, and for each argument how many these are; -1 for no list."""
    flat: list[Any] = []
    lists = []
    for x in arguments:
        if isinstance(x, list):
            flat += x
            lists.append(len(x))
        else:
            flat.append(x)
            lists.append(-1)
    return flat, tuple(lists)


def _unflatten(flat: Sequence[Any], lists: tuple[int, ...]) -> list[Any]:
    arguments, at = [], 0
    for count in lists:
        arguments.append(flat[at] if count < 0 else list(flat[at : at + count]))
        at += abs(count)
    return arguments


def _eager_function(
    function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """What is registered with torch.library, as a Function of the arguments."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx=ctx, inputs=arguments, output=output)
            return output

    # As it is: a method in between would take the host's time at each call.
    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    Eager.__name__ = Eager.__qualname__ = f"{function.__module__}.{function.__name__}"
    return Eager


def _eager_function_of_lists(
    function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """The same where arguments are lists, as a Function of their elements."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lists: tuple[int, ...], *flat: Any) -> Any:
            arguments = _unflatten(flat, lists)
            output = function(*arguments)
            setup_context(ctx=ctx, inputs=tuple(arguments), output=output)
            ctx.lists = lists
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = backward(ctx, *grads)
            flat: list[Any] = [None]
            for grad, count in zip(found, ctx.lists, strict=True):
                flat += [grad] if count < 0 else [None] * count if grad is None else grad
            return tuple(flat)

    Eager.__name__ = Eager.__qualname__ = f"{function.__module__}.{function.__name__}"
    return Eager


def register(schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as nsa_kernels::<name>.

    schema: "name(arguments) -> results" in torch's schema language.
    """
    name, _, rest = schema.partition("(")
    return lambda function: Operator(function, name, "(" + rest)


def empty_as(x: Tensor) -> Tensor:
    """A contiguous tensor of the shape, dtype and device of x: what gradients are written to."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
