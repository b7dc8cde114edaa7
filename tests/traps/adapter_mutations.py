"""Bugs of adapters to other people's systems; tests are of ``adapters``, each of its package."""

from __future__ import annotations

from importlib.util import find_spec

from tests.traps.mutations import Mutation

PACKAGES = {"deepspeed": "deepspeed", "ring": "ring_flash_attn", "huggingface": "transformers"}


def _of_adapter(trap: str, bug: str, file: str, old: str, new: str, test: str) -> Mutation:
    source = f"nsa_dist/adapters/{file}"
    return Mutation(trap, bug, source, old, new, test, folder="adapters")


def is_installed(mutation: Mutation) -> bool:
    """Whether the package that a mutation's test needs is here."""
    return find_spec(PACKAGES[mutation.test.split("/")[0]]) is not None


ADAPTER_MUTATIONS = (
    _of_adapter(
        "gradients divided by ranks that share a sequence",
        "ZeRO 3 is taken to divide by the replicas alone, as the other stages do",
        "deepspeed/loss.py",
        "replicas = dist.get_world_size(mpu.get_sequence_data_parallel_group())",
        "replicas = mpu.get_data_parallel_world_size()",
        "deepspeed/test_training.py::test_one_step_is_that_of_one_process[ZeRO3-dp1-cp2-bfloat16]",
    ),
    _of_adapter(
        "targets counted once for each rank that shares them",
        "the sum over ranks is not divided by those of a sequence",
        "deepspeed/loss.py",
        "return int(local) // mpu.get_sequence_parallel_world_size()",
        "return int(local)",
        "deepspeed/test_training.py::test_one_step_is_that_of_one_process[ZeRO1-dp1-cp2-float32]",
    ),
    _of_adapter(
        "a gradient norm added over ranks that hold the same",
        "DeepSpeed is told of no model parallel group, and takes all ranks",
        "deepspeed/mpu.py",
        "return self._own_group",
        "return None",
        "deepspeed/test_training.py::test_clipping_takes_the_norm_of_one_process[0]",
    ),
    _of_adapter(
        "a ring's gradients in float32",
        "the zigzag rings take every dtype",
        "ring/attention.py",
        "if dtype not in FLASH_DTYPES:",
        "if dtype is None:",
        "ring/test_layer.py::test_a_layout_without_algorithm_is_refused_on_every_rank"
        "[zigzag-float32]",
    ),
    _of_adapter(
        "a ring over ranks with unlike documents",
        "ranks agree on new plans alone",
        "ring/attention.py",
        "    if context.size > 1 or problem is not None:\n",
        "    if problem is not None:\n",
        "ring/test_layer.py::test_a_rank_with_another_batch_is_an_error_on_every_rank",
    ),
    _of_adapter(
        "compressed keys not kept up to date",
        "those of earlier steps are forgotten",
        "huggingface/attention.py",
        "whole[:, : old.shape[1]] = old",
        "pass",
        "huggingface/test_generation.py::test_greedy_over_the_cache_is_full_recomputation"
        "[qwen3-shared-9]",
    ),
    _of_adapter(
        "left padding counted as tokens",
        "a row's blocks start at its first column, not at its first token",
        "huggingface/batch.py",
        "starts = tuple(start for start, _ in ranges)",
        "starts = tuple(0 for _ in ranges)",
        "huggingface/test_generation.py::test_left_padded_batch_is_its_rows[qwen3-shared]",
    ),
    _of_adapter(
        "a conversion that does not start as the dense model",
        "the compressed branch's gate starts open",
        "huggingface/convert.py",
        "GATE_INIT = (-10.0, 0.0, 0.0)",
        "GATE_INIT = (0.0, 0.0, 0.0)",
        "huggingface/test_conversion.py::test_starts_as_the_dense_model[qwen3-yarn-tied]",
    ),
    _of_adapter(
        "a checkpoint that runs code when it is loaded",
        "files are left to DeepSpeed, unchecked",
        "deepspeed/checkpoint.py",
        "    with contextlib.nullcontext() if trusted else weights_only(_classes()):\n"
        "        if not trusted:\n",
        "    with contextlib.nullcontext():\n        if trusted:\n",
        "deepspeed/test_untrusted_checkpoints.py::test_trap_a_file_of_deepspeed_that_calls_a_function"
        "[mp_rank_00_model_states.pt]",
    ),
    _of_adapter(
        "a part of a sequence taken for a whole one",
        "sizes that accelerate states are not looked at",
        "huggingface/parallelism.py",
        "for stated in (_accelerate, _deepspeed, _torch):",
        "for stated in (_deepspeed, _torch):",
        "huggingface/test_parallelism.py::test_sizes_that_others_state",
    ),
    _of_adapter(
        "smoothed labels that are not shifted",
        "the Trainer does not know the model's class by name",
        "huggingface/auto.py",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = model.__name__",
        "pass",
        "huggingface/test_trainer.py::test_smoothed_labels_are_shifted",
    ),
)
