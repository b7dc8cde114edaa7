"""What the public functions of nsa_kernels.triton launch, recorded in the place of being launched.

Nothing runs: a launch is bound and specialised as Triton itself does it for a GPU, with the
alignment of pointers and strides that the tensors have, and kept. So inputs may be memory that was
never written, and large where that takes another path through a launcher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from nsa_kernels.triton.shared import shapes

TARGETS = (80, 90, 100)
# Of a GPU that a persistent kernel asks for how many multiprocessors it has.
PROPERTIES = SimpleNamespace(multi_processor_count=132)


def kernel_name(operator: str, function: str) -> str:
    """Of the kernel `function` in nsa_kernels/triton/<operator>, a file or a folder."""
    return f"{operator}.{function.strip('_').removesuffix('_kernel')}"


@dataclass(frozen=True)
class Launch:
    """One compile: equal ones are the same kernel with the same specialisation and options."""

    kernel: JITFunction = field(compare=False, repr=False)
    capability: int
    key: str

    signature: dict[str, str] = field(compare=False, repr=False)
    constants: dict[tuple[int, ...], Any] = field(compare=False, repr=False)
    attributes: dict[tuple[int, ...], Any] = field(compare=False, repr=False)
    options: dict[str, Any] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Operator and function, as in `combine.forward`: see `kernel_name`."""
        path = self.kernel.module.removeprefix("nsa_kernels.triton.")
        return kernel_name(path.split(".")[0], self.kernel.fn.__name__)

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    @property
    def source(self) -> ASTSource:
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return kind(self.kernel, self.signature, self.constants, self.attributes)


def _launch(capability: int, kernel: JITFunction, args: Any, kwargs: dict[str, Any]) -> Launch:
    """As JITFunction.run does up to where it compiles."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, excess = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, excess
    )
    key = f"{kernel.module}.{kernel.fn.__name__} {specialization} {sorted(excess.items())}"
    return Launch(kernel, capability, key, signature, constants, attributes, dict(vars(options)))


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """The launches inside, for a GPU of this compute capability, on tensors in host memory."""
    found: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert grid is not None and not warmup
        found.append(_launch(capability, kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(shapes, "capability", return_value=divmod(capability, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=PROPERTIES),
    ):
        yield found
