"""What torchtitan 0.3.0 needs to train on CPUs over gloo: import it before torchtitan.

It asks torch for the GPU and its memory, and divides gradients where gloo can only add them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
from torch.distributed.fsdp import FSDPModule

torch.set_num_threads(1)
for name, answer in {
    "get_device_name": "cpu",
    "get_device_properties": SimpleNamespace(total_memory=2**34),
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "memory_stats": {},
    "current_device": 0,
}.items():
    setattr(torch.cpu, name, lambda *_args, answer=answer: answer)
torch._utils._get_available_device_type = lambda: "cpu"

_set_factor = FSDPModule.set_gradient_divide_factor


def _set_factor_and_sum(self: Any, factor: float) -> None:
    _set_factor(self, factor)
    self.set_force_sum_reduction_for_comms(True)


FSDPModule.set_gradient_divide_factor = _set_factor_and_sum


def compute_in_float64() -> None:
    """From here on this process trains in float64 what its config trains in float32."""
    from torchtitan.components.loss import GradAccumulator
    from torchtitan.config import TORCH_DTYPE_MAP

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    TORCH_DTYPE_MAP["float32"] = torch.float64
    begin = GradAccumulator.__init__

    def begin_in_float64(self: Any, *args: Any, dtype: torch.dtype, **rest: Any) -> None:
        assert dtype == torch.float32, dtype
        begin(self, *args, dtype=torch.float64, **rest)

    GradAccumulator.__init__ = begin_in_float64
