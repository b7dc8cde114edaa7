"""Launches that go past Triton's Python layer from their second time on.

Triton binds, specialises and looks up a kernel anew at each launch, which takes the host longer
than short kernels take the GPU. What it finds depends on little: constants, dtypes, whether
addresses and numbers are multiples of 16. So a launch is known by these, and once Triton has made
one, the next of its kind hands the driver the same code with its own addresses and numbers.

Descriptors for the tensor memory accelerator (TMA) follow from an address, a shape and strides.
They are checked and encoded once for each and found again, when memory comes back to the same place
as well: in training nearly always. What is kept for that has an address and no memory; each
descriptor that is handed out has its tensor, which therefore lives until the launch.

Whatever is unusual takes Triton's own way: its interpreter, hooks of a profiler, an argument of
another kind, a version of Triton whose launcher looks otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Descriptors that are kept; beyond, all are made again.
MOST_DESCRIPTORS = 4096


class Known(NamedTuple):
    """A kernel as Triton launched it.

    run: its launcher without the part that encodes descriptors; function: for the driver; packed:
    what the launcher wants beside it. encodings: how each descriptor is encoded, in order. rest: in
    the place of constants that were given by name.
    """

    run: Callable[..., None]
    function: int
    packed: Any
    encodings: tuple[Any, ...]
    rest: tuple[None, ...]


# By kernel, types of arguments, constants and options: a reader, and what was launched by its name.
# And the kernel, which is known by its identity: no other one may take its place in memory.
_read: dict[Hashable, tuple[Callable[..., Any], dict[Hashable, Known], Any]] = {}
# By address, dtype and tiles: the class of a descriptor, and its attributes but for the tensor.
_descriptors: dict[Hashable, tuple[type, dict[str, Any]]] = {}


def launcher(kernel: Any, grid: Sequence[int]) -> Callable[..., None]:
    """As `kernel[grid]`. Arguments by name must be constants and options, after all others.

    A tuple with a name has the same types of fields in each launch of a kernel with its constants.
    """
    return partial(_launch, kernel, grid)


def _launch(kernel: Any, grid: Sequence[int], *args: Any, **named: Any) -> None:
    site = (id(kernel), *map(type, args), *named, *named.values())
    found = _read.get(site)
    runtime = knobs.runtime
    if found is not None and not (
        runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    ):
        reader, by_name, _ = found
        device = _current_device()
        known, values = reader(by_name, device, *args)
        if known is not None:
            width, height, depth = (*grid, 1, 1)[:3]
            known.run(
                width, height, depth, _current_stream(device), known.function, known.packed, None,
                None, None, *values, *known.rest,
            )  # fmt: skip
            return
    made = kernel[grid](*args, **named)
    if isinstance(made, CompiledKernel):
        _keep(made, kernel, site, args, named)


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run on the GPU of its first argument, which is a tensor or a list of some.

    Triton launches on the current device and its stream, whatever memory it is given: kernels for
    another GPU's tensors would not wait for what is queued there.
    """

    @wraps(function)
    def run(first: Any, *others: Any, **options: Any) -> Any:
        device = (first[0] if isinstance(first, (list, tuple)) else first).device
        if device.type != "cuda" or device.index == _current_device():
            return function(first, *others, **options)
        with torch.cuda.device(device):
            return function(first, *others, **options)

    return run


def _current_device() -> int:
    return torch._C._cuda_getDevice()


def _current_stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def _keep(
    made: CompiledKernel,
    kernel: JITFunction,
    site: Hashable,
    args: Sequence[Any],
    named: dict[str, Any],
) -> None:
    """Remember a launch, unless it takes more than is known here."""
    run: Any = made.run
    more = kernel.params[len(args) :]
    if run.global_scratch_size or run.profile_scratch_size or kernel.pre_run_hooks:
        return
    if not all(p.is_constexpr and p.name in named for p in more):
        return
    metas: tuple[Any, ...] = ()
    if any(hasattr(x, "kind") for x in args):
        wrapper = run.launch  # Encodes descriptors, and calls the launcher that was compiled.
        names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
        around = getattr(wrapper, "__closure__", None) or ()
        inside = {name: cell.cell_contents for name, cell in zip(names, around, strict=True)}
        if not inside.keys() >= {"launcher", "tensordesc_meta"}:
            return
        metas = tuple(inside["tensordesc_meta"])
        run = copy.copy(run)
        run.launch = inside["launcher"]
    if site not in _read:
        reader = _reader(kernel, args)
        if reader is None:
            return
        _read[site] = reader, {}, kernel
    reader, by_name, _ = _read[site]
    name = reader(None, _current_device(), *args)
    by_name[name] = Known(run, made.function, made.packed_metadata, metas, (None,) * len(more))


def _reader(kernel: JITFunction, args: Sequence[Any]) -> Callable[..., Any] | None:
    """A function of what is known by name, the device, and arguments of these types.

    It returns the `Known` and the values that its launcher takes, or (None, None); without a table
    the name: the device and what Triton compiles for. Written out for the arguments, as a loop over
    them would take longer than what it saves. None for arguments of another kind.
    """
    lines: list[str] = []
    name = ["device"]
    descriptors = 0

    def visit(x: Any, at: str, specialised: bool) -> str | None:
        nonlocal descriptors
        of = type(x)
        if of is int:
            # 1 becomes a constant, multiples of 16 are known as such, large numbers have 64 bits.
            name.append(f"{at} >> 31")
            if specialised:
                name.append(f"2 if {at} == 1 else {at} & 15 == 0")
            return at
        if of is float or of is bool or x is None:
            return at
        if isinstance(x, Tensor):
            lines.append(f"p{at} = {at}.data_ptr()")
            name.extend((f"{at}.dtype", f"p{at} & 15 == 0"))
            return f"p{at}"
        if isinstance(x, tuple):
            inside = [f"{at}_{i}" for i in range(len(x))]
            lines.append(f"{', '.join(inside)}, = {at}" if inside else "")
            values = [visit(each, n, specialised) for each, n in zip(x, inside, strict=True)]
            return None if None in values else f"({''.join(f'{v}, ' for v in values)})"
        if hasattr(x, "kind"):
            name.append(f"{at}.kind")
            descriptors += 1
            return f"*encoded({at}, known, {descriptors - 1})"
        return None

    values = []
    for i, (x, param) in enumerate(zip(args, kernel.params, strict=False)):
        if param.is_constexpr:
            name.append(f"a{i}")
            values.append("None")
            continue
        value = visit(x, f"a{i}", not param.do_not_specialize)
        if value is None:
            return None
        values.append(value)
    arguments = ", ".join(f"a{i}" for i in range(len(args)))
    source = f"""
def reader(by_name, device, {arguments}):
    {"; ".join(filter(None, lines)) or "pass"}
    name = ({", ".join(name)},)
    if by_name is None:
        return name
    known = by_name.get(name)
    return (None, None) if known is None else (known, ({"".join(f"{v}, " for v in values)}))
"""
    scope: dict[str, Any] = {"encoded": _encoded}
    exec(source, scope)
    made: Callable[..., Any] = scope["reader"]
    return made


def _encoded(x: Any, known: Known, number: int) -> Any:
    """What the driver takes in the place of a descriptor, the kernel's `number`th.

    By the number too: a kernel may want the same tiles encoded in two ways, where one tensor is
    given to it twice.
    """
    found = x.encoded.get((known.function, number))
    if found is None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        found = make_tensordesc_arg(x, known.encodings[number])
        x.encoded[known.function, number] = found
    return found


def descriptor(
    x: Tensor,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    layout: Any = None,
    make: Callable[..., Any] = TensorDescriptor,
) -> Any:
    """A descriptor of tiles `block` of x for TMA, made by `make`, with a layout if one is given.

    The layout must be one object for equal layouts.
    """
    name = (x.data_ptr(), x.dtype, shape, strides, block, id(layout))
    kept = _descriptors.get(name)
    if kept is None:
        layouts = () if layout is None else (layout,)
        made = make(x, list(shape), list(strides), list(block), *layouts)
        if not x.is_cuda:  # Triton's interpreter reads the tensor itself.
            return made
        if len(_descriptors) >= MOST_DESCRIPTORS:
            _descriptors.clear()
        rest = {"kind": (x.dtype, block, id(layout)), "encoded": {}}
        kept = _descriptors[name] = type(made), {**vars(made), **rest, "base": None}
    of, attributes = kept
    found: Any = object.__new__(of)
    found.__dict__ = {**attributes, "base": x}
    return found
