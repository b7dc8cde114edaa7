"""What launchers make of a packing of documents, made once and found again by every layer.

Tables follow from the segments and are kept with the host's table of them, for the same tensor and
for another one with the same values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_kernels.segments import QueriesOnDevice, QuerySegments

# How many packings are found again by the values of their segments.
RECENT_PACKINGS = 8


class Cached(NamedTuple):
    """A cached value; on a GPU, the stream that made it and the event after that."""

    value: Any
    stream: int = 0
    made: Any = None


_Cache = dict[Any, Cached]
# Caches by the values [M, 6] of the segments, the latest last.
_recent: list[tuple[Tensor, dict[Any, Cached]]] = []
_recent_lock = threading.Lock()
# What a CUDA graph reads, by identity. Nothing tells when a graph ends, so it stays.
_captured: dict[int, Any] = {}


def segments_of(host: Tensor, device: torch.device) -> QuerySegments:
    """The segments whose `host` it is, with their table on `device`: what an operator is given."""
    table, rows = _cached(host, device, "segments", lambda: _table_and_rows(host, device))
    return QuerySegments(host, host if table is None else table, rows)


def _table_and_rows(host: Tensor, device: torch.device) -> tuple[Tensor | None, int]:
    """None for the table on the CPU, which is `host` itself."""
    table = None if device.type == "cpu" else to_device(host, device)
    return table, int(host[:, 1].sum())


def cached(segments: QuerySegments, name: Any, make: Callable[[], Any]) -> Any:
    """What `make` made of these segments under that name, now or before.

    It must not refer to the segments' tensors, or these would keep themselves alive.
    """
    if isinstance(segments, QueriesOnDevice):  # Others have the same host's table.
        if name not in segments.kept:
            segments.kept[name] = make()
        return segments.kept[name]
    return _cached(segments.host, segments.table.device, name, make)


def _cached(host: Tensor, device: torch.device, name: Any, make: Callable[[], Any]) -> Any:
    return cached_in(_cache_of(host), (device, name), device, make)


def cached_in(
    cache: dict[Any, Cached], name: Any, device: torch.device, make: Callable[[], Any]
) -> Any:
    """What `make` made under that name, a tensor or a tuple with tensors, for any stream.

    What a CUDA graph finds while it is captured lives as long as the process. What is made then is
    the graph's: it has values after a replay alone, and is not found again.
    """
    found = cache.get(name)
    if device.type != "cuda":
        if found is None:
            found = cache[name] = Cached(make())
        return found.value
    if torch.cuda.is_current_stream_capturing():
        if found is None:
            return make()
        _captured[id(found.value)] = found.value
        return found.value
    # The number alone: a Stream takes the host longer than the rest of a hit.
    raw = torch._C._cuda_getCurrentRawStream(device.index)
    if found is not None and found.stream == raw:
        return found.value
    stream = torch.cuda.current_stream(device)
    if found is None:
        value, made = make(), torch.cuda.Event()
        made.record(stream)
        found = cache[name] = Cached(value, raw, made)
    else:
        stream.wait_event(found.made)
        for x in found.value if isinstance(found.value, tuple) else (found.value,):
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(stream)  # Its memory is not taken again before this stream is done.
    return found.value


def _cache_of(host: Tensor) -> dict[Any, Cached]:
    """Kept with the tensor as long as its values are the same."""
    if host.is_inference():  # whose changes are not counted
        return _cache_of_equal(host)
    return kept_with(host, "_tables", lambda: _cache_of_equal(host))


def kept_with(
    x: Tensor, attribute: str, make: Callable[[], dict[Any, Cached]]
) -> dict[Any, Cached]:
    """What `make` made, kept as an attribute of x until an operator of torch changes its values."""
    version, cache = x.__dict__.get(attribute, (None, None))
    if version != x._version:
        cache = make()
        x.__dict__[attribute] = (x._version, cache)
    return cache


def _cache_of_equal(host: Tensor) -> dict[Any, Cached]:
    """That of a recent packing with these values, or a new one: copies of a tensor share it."""
    with _recent_lock:
        for at, (values, cache) in enumerate(_recent):
            if torch.equal(values, host):
                _recent.append(_recent.pop(at))
                return cache
        cache = {}
        _recent.append((host.clone(), cache))
        del _recent[:-RECENT_PACKINGS]
        return cache


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, ordered in its stream: nothing waits for what is queued there.

    Raises:
        ValueError: while a CUDA graph is captured, which would read host memory that is given back.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "operators must have run with these segments before a CUDA graph captures them, got "
            "the first call with them"
        )
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
