"""ring-flash-attn is loaded beside what others import, on flash functions that it alone sees."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nsa_dist.adapters.ring import flash, loading
from nsa_dist.adapters.ring.flash import NAMES, flash_functions, flash_kind
from nsa_dist.adapters.ring.loading import ring_functions

OTHERS = ("flash_attn", "transformers", "ring_flash_attn")
ROOT = Path(__file__).resolve().parents[3]


def entries() -> dict[str, ModuleType]:
    """What stands in sys.modules of other packages."""
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] in OTHERS}


def test_no_other_module_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    utils = importlib.import_module("transformers.modeling_flash_attention_utils")
    # Somebody's own, which must stay and not be used.
    theirs = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", theirs)
    modules = entries()
    attributes = {m: dict(vars(m)) for m in (transformers, utils, theirs)}
    loaded = ring_functions.__wrapped__("plain")
    assert loaded.zigzag is not ring_functions("plain").zigzag
    assert entries() == modules
    for module, before in attributes.items():
        assert dict(vars(module)) == before
    names = loaded.zigzag.__globals__
    assert names["_flash_attn_forward"].__module__ == flash.__name__


def test_nothing_else_is_imported_in_a_fresh_process() -> None:
    code = (
        "import sys\n"
        "from nsa_dist.adapters.ring.loading import ring_functions\n"
        "ring_functions('plain')\n"
        f"print([m for m in sys.modules if m.split('.')[0] in {OTHERS}])\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.strip() == "[]", finished.stdout + finished.stderr


def test_an_installed_flash_attn_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flash_attn"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    text = "".join(f"def {name}(q, k, v):\n    raise NotImplementedError\n" for name in NAMES)
    (folder / "flash_attn_interface.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    try:
        assert flash_kind(gpu, torch.bfloat16) == "flash_attn"
        functions = ring_functions.__wrapped__("flash_attn")
        real = sys.modules["flash_attn.flash_attn_interface"]
        assert functions.zigzag.__globals__["_flash_attn_forward"] is real._flash_attn_forward
        varlen = functions.llama3.__globals__["Llama3FlashAttnVarlenFunc"].forward.__globals__
        assert varlen["_flash_attn_varlen_forward"] is real._flash_attn_varlen_forward
    finally:
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            sys.modules.pop(name, None)
    # It computes neither here nor in these dtypes.
    for device, dtype in ((cpu, torch.bfloat16), (gpu, torch.float32), (gpu, torch.float64)):
        assert flash_kind(device, dtype) == "plain"


def test_a_flash_attn_without_these_functions_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert flash_kind(torch.device("cuda", 0), torch.bfloat16) == "torch"
    assert "flash_attn" not in sys.modules


def test_without_it_gpus_use_the_flash_kernels_of_torch() -> None:
    gpu = torch.device("cuda", 0)
    expected = "torch" if importlib.util.find_spec("flash_attn") is None else "flash_attn"
    assert {flash_kind(gpu, dtype) for dtype in (torch.bfloat16, torch.float16)} == {expected}
    assert set(flash_functions("torch")) == set(NAMES)


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "PACKAGE", "ring_flash_attn_that_is_not_there")
    with pytest.raises(ImportError, match=r"pip install nsa-dist\[ring\]"):
        ring_functions.__wrapped__("plain")


def test_a_module_that_fails_to_load_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_ring"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('not to be run')\n")
    module = "from flash_attn.flash_attn_interface import _flash_attn_forward, nothing\n"
    (package / "zigzag_ring_flash_attn.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "PACKAGE", "broken_ring")
    ring_functions("plain")
    with pytest.raises(ImportError, match="nothing"):
        ring_functions.__wrapped__("torch")
    assert not any(name.endswith("_torch.zigzag_ring_flash_attn") for name in sys.modules)
