"""A trained model to a folder of Hugging Face transformers, and from one back.

    python launch/export.py CHECKPOINT FOLDER
    python launch/export.py FOLDER RUN --config CONFIG.toml

CHECKPOINT is a run's folder (its newest checkpoint) or one of its ``checkpoints/step_N``, of any
engine. FOLDER then has weights, tokenizer and generation config, which Auto classes load. The way
back writes a checkpoint of step 0 to train on from, with the folder's model and the rest of
CONFIG.toml.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import tyro

from launch.data.corpus import load_tokenizer
from launch.engines.base import MOMENTS, WholeState
from launch.loading import Dtype, alone, check_transformers, load
from launch.processes.mistakes import BAD_INPUT, end, read_once
from launch.settings import from_toml
from launch.storage.checkpoint import checkpoint_path, save_checkpoint
from launch.storage.manifest import CheckpointError
from nsa_dist.checks import check

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class ExportOptions:
    """A checkpoint to a folder of Hugging Face transformers, or such a folder to a run.

    Args:
        source: a run's folder or its checkpoints/step_N; on the way back the folder.
        target: the new folder; on the way back the run's, which gets checkpoints/step_00000000.
        dtype: of the weights in the folder; auto keeps the checkpoint's (float32 mostly).
        tokenizer: of the run, where it lies elsewhere now.
        config: on the way back, the settings of the run but for its model.
    """

    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]
    dtype: Dtype = "auto"
    tokenizer: str = ""
    config: Path | None = None


def export(options: ExportOptions) -> str:
    """Write a folder for transformers from a checkpoint, in a process group of one.

    Returns:
        What was written, in a line.

    Raises:
        ValueError: if transformers has no such model, the checkpoint or its tokenizer cannot be
            read, or the target exists.
    """
    check_transformers()
    from launch.hugging_face import make_tokenizer

    target = options.target
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    check(empty, "TARGET", str(target), "a folder that is empty or not there")
    check(options.config is None, "config", str(options.config), "left out for a checkpoint")
    trained = load(options.source)
    tokenizer = make_tokenizer(trained.tokenizer(options.tokenizer))
    dtype = options.dtype
    if dtype == "auto":
        is_double = trained.weights["embedding.weight"].dtype == torch.float64
        dtype = "float64" if is_double else "float32"
    model = trained.transformers("cpu", dtype)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(target)
    size = sum(value.numel() for value in trained.weights.values())
    return (
        f"{target}: {type(model).__name__} with {size:,} parameters in {dtype}, "
        f"from step {trained.step} of {trained.path}"
    )


def bring_back(options: ExportOptions) -> str:
    """Write a checkpoint of step 0 from a folder for transformers, in a process group of one.

    Returns:
        What was written, in a line.

    Raises:
        ValueError: if ``launch/train.py`` has no such model, or an option is wrong.
        CheckpointError: if the checkpoint cannot be written.
    """
    check_transformers()
    import transformers

    from launch.engines import fsdp2
    from launch.hugging_face import from_transformers, read_settings

    must = "a TOML file with the data and the run that go on from the folder"
    config = options.config
    if config is None:
        raise ValueError(f"config must be {must}, got None")
    check(options.dtype == "auto", "dtype", options.dtype, "left out on the way back (float32)")
    path = checkpoint_path(options.target, 0)
    check(not path.parent.exists(), "TARGET", str(options.target), "a run without checkpoints")
    base = from_toml(config)
    engine = base.parallel.engine
    must = f"{fsdp2.SPEC.name!r} (launch/convert.py makes Megatron's of its checkpoint)"
    check(engine == fsdp2.SPEC.name, "parallel.engine", engine, must)
    settings = read_settings(transformers.AutoConfig.from_pretrained(options.source), base)
    if options.tokenizer:
        settings = replace(settings, data=replace(settings.data, tokenizer=options.tokenizer))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        options.source, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not info[kind], f"{kind} of SOURCE", sorted(info[kind]), "empty")
    weights = from_transformers(model.state_dict(), settings)
    vocab_size = weights["embedding.weight"].shape[0]
    found = load_tokenizer(settings.data).vocab_size
    check(found == vocab_size, "data.tokenizer", found, f"one of the folder's {vocab_size} tokens")
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    state = WholeState(
        weights=weights,
        moments=dict.fromkeys(MOMENTS, zeros),
        step=0,
        updates=0,
        dtype=torch.float32,
    )

    def write(place: Path, _: int) -> None:
        fsdp2.write_whole(place, state, settings)

    save_checkpoint(write, options.target, 0, settings, data="")
    return (
        f"{path}: train on by its settings.toml with --run.folder {options.target} "
        "--run.resume True"
    )


def run(options: ExportOptions) -> str:
    """Export or bring back, by what the source is."""
    there = options.source.is_dir()
    must = "a run, its checkpoints/step_N, or a folder of transformers"
    check(there, "SOURCE", str(options.source), must)
    with alone():
        back = (options.source / CONFIG_NAME).is_file()
        return bring_back(options) if back else export(options)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_once(lambda: tyro.cli(ExportOptions, args=arguments))
    try:
        print(run(options))
    except (OSError, ValueError, CheckpointError) as error:
        end("export.py", error, BAD_INPUT)


if __name__ == "__main__":
    main()
