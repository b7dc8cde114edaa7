"""Converted models of transformers under DeepSpeed: ZeRO-3's cut weights, Ulysses' groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.adapters.deepspeed.small_model import prepare
from tests.adapters.huggingface.small_models import (
    FAMILIES,
    INDEPENDENT,
    dense_model,
    some_tokens,
    sparse_model,
)

BIASED: dict[str, Any] = {"attention_bias": True}


def write_models(folder: Path) -> None:
    """A dense and a converted model's checkpoints."""
    dense_model("qwen3", **BIASED).save_pretrained(folder / "dense")
    sparse_model("qwen3", INDEPENDENT, **BIASED).save_pretrained(folder / "sparse")


def _step(model: Any, replicas: int, engine: Any = None) -> dict[str, Tensor]:
    """Weights after one step of SGD on a row a replica."""
    rows = some_tokens(2, 60)
    if engine is not None:
        row = rows[dist.get_rank() :][:1]
        engine.backward(engine(row, labels=row).loss)
        engine.step()
        return {}
    loss = sum(model(row[None], labels=row[None]).loss for row in rows) / replicas
    loss.backward()
    with torch.no_grad():
        return {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters()}


def zero3_differences(folder: str, case: str) -> dict[str, float]:
    """How far off a model under ZeRO-3 is, by parameter, when made and after a step, from one
    process; cut by ``from_pretrained`` ("convert", "load") or by DeepSpeed's own context."""
    deepspeed = prepare()
    from transformers.integrations import HfDeepSpeedConfig

    from nsa_dist.adapters.huggingface import convert_to_nsa, from_pretrained

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,  # It is 1.0 by default.
    }
    where, dense = Path(folder), FAMILIES["qwen3"][0]
    if case == "load":
        expected = from_pretrained(where / "sparse")
    else:
        expected = convert_to_nsa(dense.from_pretrained(where / "dense"), INDEPENDENT)
    kept = HfDeepSpeedConfig(settings)
    if case == "load":
        model = from_pretrained(where / "sparse")
    elif case == "convert":
        model = convert_to_nsa(dense.from_pretrained(where / "dense"), INDEPENDENT)
    else:
        model = dense.from_pretrained(where / "dense")
        with deepspeed.zero.Init(config_dict_or_path=settings):  # New modules are cut at once.
            model = convert_to_nsa(model, INDEPENDENT)
    del kept  # Else every model of this process would be cut.

    def differences(weights: dict[str, Tensor]) -> dict[str, float]:
        found = {}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
                assert parameter.shape == weights[name].shape, name
                found[name] = float((parameter - weights[name]).abs().max())
        return found

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)
    found = differences(dict(expected.named_parameters()))
    assert max(found.values()) == 0.0, found
    _step(model, 2, engine)
    found = differences(_step(expected, 2))
    engine.destroy()
    return found


def ulysses_on_rank() -> dict[str, Any]:
    """What a model does while DeepSpeed states that sequences are split; two ranks.

    Errors or "", and the largest difference of logits from those of whole sequences.
    """
    prepare()
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = sparse_model("llama", dtype=torch.float64)
    tokens, rank = some_tokens(2, 64), dist.get_rank()
    part = tokens.chunk(2, dim=1)[rank].contiguous()
    with torch.no_grad():
        whole = model.eval()(tokens).logits
    expected = whole.chunk(2, dim=1)[rank]

    def refusal(training: bool, **options: Any) -> str:
        try:
            with torch.no_grad():
                model.train(training)(part, **options)
        except ValueError as error:
            return str(error)
        return ""

    def difference(training: bool, tokens: Tensor, expected: Tensor) -> float:
        with torch.no_grad():
            return float((model.train(training)(tokens).logits - expected).abs().max())

    found: dict[str, Any] = {"before": refusal(True)}
    dense = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def register(**options: Any) -> Any:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = dense
        parallel_state_sp._release_sequence_parallel_groups()
        return UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", 2, 2, **options)

    try:
        register()
        found["training"] = difference(True, part, expected)
        found["evaluation"] = difference(False, part, expected)
        register(disable_in_eval=True)
        found["training, evaluation whole"] = difference(True, part, expected)
        found["evaluation whole"] = difference(False, tokens, whole)
        found["evaluation of labels that were cut"] = refusal(False, shift_labels=part)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = dense
        found["a group alone"] = refusal(True)
        parallel_state_sp._release_sequence_parallel_groups()
        groups.mpu = _Sizes()
        found["an mpu alone"] = refusal(True)
        model.use_group(None)
        found["use_group(None)"] = refusal(True)
    finally:
        groups.mpu = None
        ALL_ATTENTION_FUNCTIONS["sdpa"] = dense
        parallel_state_sp._release_sequence_parallel_groups()
    return found


class _Sizes:
    """What ``deepspeed.initialize`` keeps of an mpu."""

    def get_sequence_parallel_world_size(self) -> int:
        return 2
