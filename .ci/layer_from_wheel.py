"""Run one NativeSparseAttention layer, forward and backward, from the installed wheel.

Started with `python -I` in a folder outside the source tree, so that nothing but the environment's
own site-packages can provide the packages. Imports neither the test tools nor an extra.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path

import torch

import nsa_dist
import nsa_kernels
from nsa_dist import NativeSparseAttention, NSAConfig

site = Path(sysconfig.get_paths()["purelib"]).resolve()
for package in (nsa_dist, nsa_kernels):
    where = Path(package.__file__).resolve()
    if not where.is_relative_to(site):
        raise SystemExit(f"{package.__name__} came from {where}, not from the wheel in {site}")

files = importlib.metadata.files("nsa-dist") or []
tops = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")}
if tops != {"nsa_dist", "nsa_kernels"}:
    raise SystemExit(f"the wheel installs {sorted(tops)}: expected nsa_dist and nsa_kernels")
typed = {file.parts[0] for file in files if file.name == "py.typed"}
if typed != tops:
    raise SystemExit(f"py.typed is only in {sorted(typed)}")

torch.manual_seed(0)
config = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    compress_block=8,
    compress_stride=4,
    select_block=8,
    num_selected=4,
    window=16,
)
layer = NativeSparseAttention(64, config)
x = torch.randn(1, 192, 64, requires_grad=True)
out = layer(x)
out.square().mean().backward()

if out.shape != x.shape or not out.isfinite().all():
    raise SystemExit(f"the layer returned {tuple(out.shape)}, finite: {bool(out.isfinite().all())}")
for name, tensor in [("x", x), *layer.named_parameters()]:
    if tensor.grad is None or not tensor.grad.isfinite().all():
        raise SystemExit(f"no finite gradient for {name}")
version = importlib.metadata.version("nsa-dist")
print(f"nsa-dist {version} from {site}: forward and backward of {tuple(out.shape)} are finite")
