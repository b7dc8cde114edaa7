"""Input that is bad on one rank only, where it shows when a plan is made.

Every rank raises at once, the same error, with each rank's value; and the group goes on working.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nsa_dist import RotaryConfig
from tests.distributed.bad_call import (
    END,
    LOCAL,
    Outcome,
    attempt,
    call_functional,
    call_layer,
    call_unshard,
    is_bad_rank,
)
from tests.distributed.layer_case import HIDDEN
from tests.distributed.ranks import Ranks

TIMEOUT = timedelta(seconds=30)
SOON = 5.0


@dataclass(frozen=True)
class OneRank:
    """A call that the last rank makes with other arguments.

    Attributes:
        bad: the arguments that differ there.
        option: what the error names.
        found: what it says of the last rank, with " ... " for any text.
        others: the value that it states for each other rank; None where there is none to state.
        good: arguments of all ranks.
        call: the function.
    """

    bad: dict[str, Any]
    option: str
    found: str
    others: str | None
    good: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] = call_layer


NO_BOUNDARIES: dict[str, Any] = {"boundaries": None}
ROTARY = repr(RotaryConfig())
LAYER_CASES = {
    "cu_seqlens-other-values": OneRank(
        {"boundaries": (0, 24, END)}, "cu_seqlens", "[0, 24, ", "[0, 20, "
    ),
    "cu_seqlens-other-values-far-in": OneRank(
        {"boundaries": (*range(12), 25, END)},
        "cu_seqlens",
        "[0, 1, 2, 3, 4, 5, 6, ..., ",
        "[0, 1, 2, 3, 4, 5, 6, ..., ",
        {"boundaries": (*range(12), 26, END)},
    ),
    "cu_seqlens-more-documents": OneRank(
        {"boundaries": (0, 20, 20, END)}, "cu_seqlens", "[0, 20, 20, ", "[0, 20, "
    ),
    "cu_seqlens-unsorted": OneRank(
        {"boundaries": (0, 20, 12, END)},
        "cu_seqlens",
        "cu_seqlens must be sorted, got 20 before 12",
        "[0, 20, ",
    ),
    "cu_seqlens-first": OneRank(
        {"boundaries": (1, END)},
        "cu_seqlens",
        "cu_seqlens must start at 0, got first boundary 1",
        "[0, 20, ",
    ),
    "cu_seqlens-slack-rows": OneRank(
        {"boundaries": (0, 20)},
        "cu_seqlens",
        "cu_seqlens must end at ... got last boundary 20",
        "[0, 20, ",
    ),
    "cu_seqlens-not-given": OneRank(NO_BOUNDARIES, "cu_seqlens", "None", "[0, 20, "),
    "cu_seqlens-given": OneRank(
        {"boundaries": (0, 20, END)}, "cu_seqlens", "[0, 20, ", "None", NO_BOUNDARIES
    ),
    "cu_seqlens-list": OneRank(
        {"boundaries": [0, 64]},
        "cu_seqlens",
        "cu_seqlens must be None or an int32 tensor ... got a list",
        "[0, 20, ",
    ),
    "cu_seqlens-int64": OneRank(
        {"boundaries": torch.tensor([0, 20, 64])},
        "cu_seqlens",
        "cu_seqlens must be an int32 vector ... got torch.int64",
        "[0, 20, ",
    ),
    "local-length": OneRank(
        {"shape": (1, 48, HIDDEN)}, "local sequence length", "48", "32", NO_BOUNDARIES
    ),
    "local-length-no-multiple": OneRank(
        {"shape": (1, 31, HIDDEN)},
        "sequence length",
        "sequence length must be a multiple of ... got ",
        "32",
        {"layer": {"layout": "zigzag"}, **NO_BOUNDARIES},
    ),
    "document-no-multiple": OneRank(
        {"boundaries": (0, 17, END)},
        "document length",
        "document length must be a multiple of ... got 17 (document 0)",
        "[0, 16, ",
        {"layer": {"layout": "zigzag_per_document"}, "boundaries": (0, 16, END)},
    ),
    "no-tokens": OneRank(
        {"shape": (1, 0, HIDDEN)}, "local sequence length", "0", "32", NO_BOUNDARIES
    ),
    "batch": OneRank({"shape": (2, LOCAL, HIDDEN)}, "batch size", "2", "1", NO_BOUNDARIES),
    "batch-with-cu_seqlens": OneRank(
        {"shape": (2, LOCAL, HIDDEN)},
        "cu_seqlens",
        "cu_seqlens must end at the whole stream's length ... got last boundary ",
        "1",
    ),
    "dtype": OneRank({"dtype": torch.float64}, "dtype", "torch.float64", "torch.float32"),
    "autocast": OneRank({"autocast": True}, "autocast", "torch.bfloat16", "None"),
    "x-integers": OneRank(
        {"x_dtype": torch.int64}, "x", "x must ... got torch.int64", "torch.float32"
    ),
    "x-other-dtype-than-weights": OneRank(
        {"x_dtype": torch.float64}, "x", "x must ... got torch.float64", "torch.float32"
    ),
    "x-hidden-size": OneRank(
        {"shape": (1, LOCAL, 23)}, "x", "x must ... got (1, 32, 23)", f"width {HIDDEN}"
    ),
    "x-no-batch": OneRank(
        {"shape": (LOCAL, HIDDEN)}, "x", "x must ... got (32, 24)", f"width {HIDDEN}"
    ),
    "position_ids-shape": OneRank(
        {"position_ids": torch.arange(LOCAL)}, "position_ids", "position_ids must be integers", None
    ),
    "layout": OneRank({"layer": {"layout": "zigzag"}}, "layout", "'zigzag'", "'contiguous'"),
    "rotary": OneRank({"layer": {"rotary": None}}, "rotary", "None", ROTARY),
    "dropout": OneRank({"layer": {"dropout": 0.1}}, "dropout", "0.1", "0.0"),
    "qk_norm": OneRank({"layer": {"qk_norm": True}}, "qk_norm", "True", "False"),
    "window": OneRank({"window": 8}, "window", "8", "9"),
    "num_selected": OneRank({"num_selected": 3}, "num_selected", "3", "4"),
    "scale": OneRank({"scale": 1.0}, "scale", "1.0", "None"),
    "branches": OneRank({"branches": ("window",)}, "branches", "('window',)", "('compressed', "),
    "compress": OneRank({"compress": "mean"}, "compress", "'mean'", "'mlp'"),
    "independent_kv": OneRank({"independent_kv": False}, "independent_kv", "False", "True"),
}
FUNCTIONAL_CASES = {
    "q-width": OneRank(
        {"q": (1, LOCAL, 4, 6)}, "q", "q must have shape ... got (1, 32, 4, 6)", "torch."
    ),
    "q-flat": OneRank(
        {"q": (LOCAL, 32)}, "q", "q must have shape ... got (32, 32)", "torch.float32"
    ),
    "k-length": OneRank(
        {"k": (1, 31, 2, 8)}, "k", "k['compressed'] must have shape ... got ", "compressed: torch"
    ),
    "k-branch-left-out": OneRank(
        {"left_out": "window"}, "k", "k must map ... got ", "compressed: "
    ),
    "v-dtype": OneRank(
        {"v_dtype": torch.float64}, "v", "v['compressed'] must be ... got ", "compressed: "
    ),
    "gates-branches": OneRank(
        {"gates": (1, LOCAL, 4, 2)}, "gates", "gates must have shape ... got ", "torch.float"
    ),
    "gates-heads": OneRank(
        {"gates": (1, LOCAL, 1, 3)}, "gates", "gates must have shape ... got ", "torch.float"
    ),
    "compressor-not-given": OneRank({"compressor": False}, "k_compressor", "k_compressor", None),
    "rotary-tables": OneRank({"table": 300}, "rotary", "torch.float32", "torch", {"table": 200}),
    "layout-unknown": OneRank(
        {"layout": "ring"}, "layout", "layout must be ... got 'ring'", "'contiguous'"
    ),
    "backend-unknown": OneRank(
        {"backend": "x"}, "backend", "backend must be ... got 'x'", "'pytorch'"
    ),
}
UNSHARD_CASES = {
    "dtype": OneRank({"dtype": torch.float64}, "x", "torch.float64", "torch.float32"),
    "width": OneRank({"width": 4}, "x", "torch.float32 of", "torch.float32 of"),
    "local-length": OneRank({"extra": 1}, "x", "x must be ... got torch.float32", "torch.float32"),
    "length": OneRank({"length": 51}, "length", "51", "50"),
    "layout": OneRank({"layout": "contiguous"}, "layout", "'contig", "'zig", {"length": 56}),
    "cu_seqlens": OneRank(
        {"boundaries": (0, 16, END)},
        "cu_seqlens",
        "[0, 16, ",
        "[0, 20, ",
        {"boundaries": (0, 20, END), "length": None},
    ),
}
CASES = (
    LAYER_CASES
    | {f"functional-{n}": replace(c, call=call_functional) for n, c in FUNCTIONAL_CASES.items()}
    | {f"unshard-{n}": replace(c, call=call_unshard) for n, c in UNSHARD_CASES.items()}
)


def bad_on_one_rank(case: OneRank) -> Outcome:
    """The bad call, and then a good one in the same group."""
    group = dist.new_group(timeout=TIMEOUT)
    arguments = case.good | (case.bad if is_bad_rank() else {})
    outcome = attempt(lambda: case.call(group, **arguments))
    assert torch.isfinite(case.call(group, **case.good)).all()
    dist.destroy_process_group(group)
    return outcome


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_raises_with_each_ranks_value(
    name: str, size: int, ranks_of: Callable[[int], Ranks]
) -> None:
    case = CASES[name]
    outcomes = ranks_of(size).run(bad_on_one_rank, case)
    for outcome in outcomes:
        assert outcome.error == "ValueError", outcome
        assert outcome.seconds < SOON
    (message,) = {outcome.message for outcome in outcomes}
    assert f"{case.option} must " in message and ", got " in message
    found = ".*".join(map(re.escape, case.found.split(" ... ")))
    assert re.search(f"rank {size - 1}: {found}", message), message
    if case.others is not None:
        for rank in range(size - 1):
            assert f"rank {rank}: {case.others}" in message
