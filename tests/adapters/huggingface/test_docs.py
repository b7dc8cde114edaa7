"""The examples of docs/adapters/huggingface.md run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from tests.adapters.huggingface import small_models  # noqa: F401  (offline)
from tests.distributed.ranks import Ranks

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "adapters" / "huggingface.md"


def _examples() -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def loss_of_example(index: int) -> float:
    """What ``main`` of an example returns."""
    names: dict[str, Any] = {}
    exec(compile(_examples()[index], f"{DOCUMENT.name}, example {index}", "exec"), names)
    return names["main"](dist.group.WORLD)


def test_examples_on_one_rank() -> None:
    convert, _, _, save, _ = _examples()
    names: dict[str, Any] = {}
    exec(compile(convert, "converting", "exec"), names)
    exec(compile(save, "checkpoints", "exec"), names)
    tokens = torch.randint(512, (1, 20))
    assert torch.equal(names["again"](tokens).logits, names["model"].eval()(tokens).logits)


def test_example_of_distillation(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    convert, distill, *_ = _examples()
    names: dict[str, Any] = {}
    # The first example's model is converted by now.
    made, _ = convert.split("model = convert_to_nsa")
    exec(compile(convert, "converting", "exec"), names)
    exec(compile(made, "the dense model", "exec"), names)
    rows = torch.randint(512, (2, 300))
    names |= {"batches": rows[:, None], "folder": str(tmp_path)}
    names["rows"] = [{"input_ids": row} for row in rows]
    exec(compile(distill, "distillation", "exec"), names)
    trained = {name for name, p in names["model"].named_parameters() if p.requires_grad}
    assert any("gate.proj" in name for name in trained)


def test_example_of_peft() -> None:
    pytest.importorskip("peft")
    convert, _, _, _, recipe = _examples()
    names: dict[str, Any] = {}
    exec(compile(convert, "converting", "exec"), names)
    exec(compile(recipe, "PEFT", "exec"), names)
    trained = [name for name, x in names["model"].named_parameters() if x.requires_grad]
    for kind in ("lora_", "self_attn.gate", "k_compressor", "v_compressor"):
        assert any(kind in name for name in trained), kind


def test_example_on_two_ranks(ranks_of: Callable[[int], Ranks]) -> None:
    split = ranks_of(2).run(loss_of_example, 2)
    (alone,) = ranks_of(1).run(loss_of_example, 2)
    assert split[0] == split[1]
    # float32 sums of a thousand terms in another order.
    assert abs(alone - split[0]) <= 1000 * torch.finfo(torch.float32).eps * abs(alone)
