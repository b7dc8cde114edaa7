"""Recording: inputs, output and gradients of each attention of a model, during one run of it.

Letters: B rows, L local tokens, N = B * L, H query heads, G KV heads, D widths, n selected blocks.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.attention.call import Call
from nsa_dist.attention.selectors import CompressedSelector, Selector
from nsa_dist.attention.watching import Inputs, watched
from nsa_dist.layer import autocast_dtype

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_SPREAD = 2654435761  # Knuth's multiplier: spreads consecutive numbers over 32 bits.


@dataclass(eq=False)
class Record:
    """One attention of the model on this rank; its tensors are copies in host memory.

    Attributes:
        layer: name of the module that runs it.
        call: as it was made for the layer.
        device: of its tensors in the model.
        inputs: q [N, H, Dk], gates [N, H, nb], and k and v [N, G, D], or "k, window" and so on for
            keys and values of each set.
        sampled: bool [N], the queries that are compared; None for all.
        out: [N, H, Dv].
        blocks: int32 [N, G, n]; None without the selected branch.
        grads: of ``out``, of inputs and, as this rank's share, of the selector's weights.
        autocast: dtype of linear layers in the call; None without autocast.
        modules: the selector's modules, by name, with ``weights``.
        selector: of the call.
    """

    layer: str
    call: Call
    device: torch.device
    inputs: dict[str, Tensor]
    sampled: Tensor | None
    autocast: torch.dtype | None
    selector: Selector
    modules: dict[str, nn.Module]
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    blocks: Tensor | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)

    def whole_selector(self) -> Selector:
        """A copy of the selector on one rank, with weights of its own."""
        copies = {
            name: _with_weights(module, self.weights[name], self.device)
            for name, module in self.modules.items()
        }
        if isinstance(self.selector, CompressedSelector):
            return replace(self.selector, **copies)
        return copies.get("selector", self.selector)  # type: ignore[return-value]


def _with_weights(
    module: nn.Module, weights: Mapping[str, Tensor], device: torch.device, prefix: str = ""
) -> nn.Module:
    """The module with other weights, and without hooks. Not a deep copy: engines put more than
    weights on parameters and modules, such as process groups."""
    made = copy.copy(module)
    made.__dict__["_parameters"] = {
        name: None
        if parameter is None
        else nn.Parameter(weights[prefix + name].to(device), requires_grad=parameter.requires_grad)
        for name, parameter in module._parameters.items()
    }
    made.__dict__["_modules"] = {
        name: None if child is None else _with_weights(child, weights, device, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        made.__dict__[hooks] = OrderedDict()
    return made


class Recorder:
    """The watcher that records the first call of every layer of ``model``.

    Args:
        rows: about how many queries of the whole stream to compare; None for all.
    """

    def __init__(self, model: nn.Module, rows: int | None) -> None:
        self.model, self.rows = model, rows
        self.records: dict[str, Record] = {}
        self._running: list[str] = []
        self._at: Record | None = None
        self._handles: list[Any] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, calls of the model are recorded."""
        running = self._running

        def enter(name: str, *_: Any) -> None:
            running.append(name)

        def leave(*_: Any) -> None:
            running.pop()

        for name, module in self.model.named_modules():
            parts = [part for part in name.split(".") if part not in _WRAPPERS]
            name = ".".join(parts) or type(module).__name__
            self._handles.append(module.register_forward_pre_hook(partial(enter, name)))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with watched(self):
                yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            running.clear()

    def begin(self, call: Call, inputs: Inputs, selector: Selector) -> Inputs:
        """See ``Watcher``. A recomputation in backward adds gradients to its layer's record."""
        named = _named(inputs)
        recomputed = torch._C._current_graph_task_id() >= 0
        layer = self._running[-1] if self._running else "(outside of the model)"
        record = self.records.get(layer)
        if record is None:
            record = self.records[layer] = Record(
                layer=layer,
                call=call,
                device=inputs.q.device,
                inputs={name: _on_host(x.flatten(0, 1)) for name, x in named.items()},
                sampled=_sample(call, self.rows),
                autocast=autocast_dtype(inputs.q.device.type),
                selector=selector,
                modules=_modules(selector),
            )
        elif not recomputed:
            raise ValueError(
                f"run must call each attention layer once, got a second call of {layer!r}"
            )
        self._at = record
        for name, module in record.modules.items():
            read = self._reader(record, name)
            if name == "selector":  # Its methods are called, and not the module.
                read(module)
            else:
                self._handles.append(module.register_forward_pre_hook(read))
        if not torch.is_grad_enabled():
            return inputs
        seen: dict[int, Tensor] = {}
        for name, x in named.items():
            if x.requires_grad and id(x) not in seen:
                seen[id(x)] = view = x.view_as(x)
                view.register_hook(partial(_take_rows, record, name))

        def shown(x: Any) -> Any:
            if isinstance(x, Mapping):
                return {name: shown(one) for name, one in x.items()}
            return seen.get(id(x), x)

        return Inputs(shown(inputs.q), shown(inputs.k), shown(inputs.v), shown(inputs.gates))

    def end(self, out_NHD: Tensor, blocks_NGn: Tensor | None) -> Tensor:
        """See ``Watcher``. The gradient of queries that are not compared is set to zero."""
        record, self._at = self._at, None
        assert record is not None
        if not len(record.out):
            record.out = _on_host(out_NHD)
            record.blocks = None if blocks_NGn is None else _on_host(blocks_NGn)
        if not out_NHD.requires_grad:
            return out_NHD
        view = out_NHD.view_as(out_NHD)

        def take(grad: Tensor) -> Tensor:
            if record.sampled is not None:
                grad = grad * record.sampled.to(grad.device)[:, None, None]
            _take(record, "out", grad)
            return grad

        view.register_hook(take)
        return view

    def _reader(self, record: Record, name: str) -> Callable[..., None]:
        """Reads the weights of a module when it runs: engines may cut them between its calls."""

        def read(module: nn.Module, *_: Any) -> None:
            weights = record.weights.setdefault(name, {})
            for key, weight in module.named_parameters():
                weights.setdefault(key, _on_host(weight))
                if weight.requires_grad and f"{name}.{key}" not in record.hooked:
                    record.hooked.add(f"{name}.{key}")
                    take = partial(_take, record, f"{name}.{key}")
                    self._handles.append(weight.register_hook(take))

        return read


def _take(record: Record, name: str, grad: Tensor) -> None:
    record.grads[name] = _on_host(grad)


def _take_rows(record: Record, name: str, grad: Tensor) -> None:
    _take(record, name, grad.flatten(0, 1))


def _on_host(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def _named(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by the names that a report gives them."""
    named = {"q": inputs.q, "gates": inputs.gates}
    for name, given in (("k", inputs.k), ("v", inputs.v)):
        if isinstance(given, Tensor):
            named[name] = given
        else:
            named |= {f"{name}, {of}": x for of, x in given.items()}
    return named


def _modules(selector: Selector) -> dict[str, nn.Module]:
    if isinstance(selector, CompressedSelector):
        given = {"k_compressor": selector.k_compressor, "v_compressor": selector.v_compressor}
        return {name: module for name, module in given.items() if module is not None}
    return {"selector": selector} if isinstance(selector, nn.Module) else {}


def _sample(call: Call, rows: int | None) -> Tensor | None:
    """Queries of about ``rows`` tokens of the whole stream, by their documents and positions alone,
    so that any split has the same ones."""
    plan = call.plan
    total = plan.batch * plan.local_length * plan.size
    if rows is None or rows >= total:
        return None
    place = (plan.documents * 1000003 + plan.positions + 1).cpu()
    return (place * _SPREAD) % (1 << 32) < (rows << 32) // total
