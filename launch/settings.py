"""A run as frozen values: one dataclass a TOML section, checked once, on every rank alike.

``[attention]`` and ``[rotary]`` are nsa_dist's own ``NSAConfig`` and ``RotaryConfig``, so every
option of the layer is an option of a run. The comment beside a field is its help text.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from launch.engines.registry import ENGINES, all_specs, engine_spec
from launch.processes.mistakes import read_once
from nsa_dist import NSAConfig, RotaryConfig

FORMAT = 1
"""Of the files of a checkpoint and its settings; those from before formats have none."""

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def check(ok: bool, option: str, value: Any, works: str) -> None:
    """Refuse a setting: ValueError that names the option, the value found and what works."""
    if not ok:
        try:
            found = repr(value)
        except ValueError:  # Python prints no integer of thousands of digits.
            found = f"a {type(value).__name__} that is too long to print"
        raise ValueError(f"{option}: found {found}; {works}")


def _check_values(section: str, options: Any) -> None:
    """Refuse values of a section that its settings.toml could not hold, or that are no number."""
    for option in dataclasses.fields(options):
        name, value = f"{section}.{option.name}", getattr(options, option.name)
        if isinstance(value, str):
            works = "text in UTF-8 works"
            check(not any("\ud800" <= c <= "\udfff" for c in value), name, value, works)
            # In a prompt it is text; everything else names something.
            fits = "\0" not in value or name == "run.prompt"
            check(fits, name, value, "text without NUL works")
        elif isinstance(value, float):
            # No limit is a limit.
            fits = math.isfinite(value) or (name == "optimizer.clip" and value == math.inf)
            check(fits, name, value, "a finite number works")
        elif isinstance(value, int):
            fits = -(1 << 63) <= value < 1 << 63
            check(fits, name, value, "an integer of 64 bits works")


@dataclass(frozen=True)
class ModelSettings:
    """The decoder around the attention."""

    attention: Literal["nsa", "dense"] = "nsa"  # dense: causal softmax over the whole document
    dense_every: int = 0  # of nsa: every so-many-th layer is dense (4: the 4th, 8th, ...); 0: none
    layers: int = 4  # transformer blocks
    hidden_size: int = 128  # width of the residual stream
    mlp_hidden: int = 384  # hidden width of SwiGLU
    norm_eps: float = 1e-6  # RMSNorm's epsilon
    tie_embeddings: bool = False  # the output layer uses the embedding's weight
    bias: bool = False  # biases in the attention's projections
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    dropout: float = 0.0  # on the attention's output
    backend: str = "auto"  # of nsa: auto (triton on NVIDIA GPUs, else pytorch), pytorch, triton
    recompute: bool = False  # recompute activations in backward
    # what is recomputed: block (the whole block), or attention (between the projections; megatron)
    recompute_part: Literal["block", "attention"] = "block"

    def __post_init__(self) -> None:
        _check_values("model", self)
        for option in ("layers", "hidden_size", "mlp_hidden"):
            check(getattr(self, option) >= 1, f"model.{option}", getattr(self, option), "1 or more")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 <= dropout < 1 works")
        check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "a positive number works")
        works = f"0, or with attention 'nsa' 2 to layers = {self.layers}, works"
        some = self.attention == "nsa" and 2 <= self.dense_every <= self.layers
        check(some or self.dense_every == 0, "model.dense_every", self.dense_every, works)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has dense attention."""
        if self.dense_every:
            return (layer + 1) % self.dense_every == 0
        return self.attention == "dense"

    @property
    def has_dense(self) -> bool:
        """Whether any layer has dense attention."""
        return self.attention == "dense" or self.dense_every > 0


@dataclass(frozen=True)
class DataSettings:
    """Where documents come from and how they are packed."""

    source: Literal["stdlib", "folder", "jsonl"] = "stdlib"  # stdlib: this Python's own sources
    path: str = ""  # the folder, or the JSONL file
    pattern: str = "**/*.txt"  # which files of the folder are documents
    field: str = "text"  # the JSONL field that holds a document's text
    tokenizer: str = "bytes"  # bytes, a tokenizer.json, or a name that transformers loads
    length: int = 4096  # tokens in a packed stream
    global_batch: int = 8  # streams in an optimizer step, over all ranks
    micro_batch: int = 1  # streams in one forward, joined end to end
    held_out: float = 0.05  # fraction of documents kept for validation

    def __post_init__(self) -> None:
        _check_values("data", self)
        for option in ("global_batch", "micro_batch"):
            check(getattr(self, option) >= 1, f"data.{option}", getattr(self, option), "1 or more")
        # A stream of one token has no target.
        check(self.length >= 2, "data.length", self.length, "2 or more")
        most = ((1 << 31) - 1) // self.micro_batch
        works = f"at most {most} works with data.micro_batch = {self.micro_batch}"
        check(self.length <= most, "data.length", self.length, f"{works}: positions have 32 bits")
        check(0 < self.held_out < 1, "data.held_out", self.held_out, "0 < held_out < 1 works")
        if self.source == "stdlib":
            check(not self.path, "data.path", self.path, "source 'stdlib' takes no path")
        else:
            # Whether it is there shows when it is read: settings of a run whose data has moved
            # must be readable.
            works = f"source {self.source!r} works with an existing path"
            check(bool(self.path), "data.path", self.path, works)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW under a linear warm-up and a cosine."""

    lr: float = 1e-3  # at the end of the warm-up
    min_lr: float = 0.1  # at the last step, as a fraction of lr
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # largest global gradient norm; 0 or inf: no clipping
    # skipped steps in a row, whose gradients are not finite, that end a run; 0: the first does
    max_skipped: int = 3

    def __post_init__(self) -> None:
        _check_values("optimizer", self)
        check(self.lr > 0, "optimizer.lr", self.lr, "a positive number works")
        check(0 <= self.min_lr <= 1, "optimizer.min_lr", self.min_lr, "0 <= min_lr <= 1 works")
        for option in ("warmup_steps", "weight_decay", "clip", "max_skipped"):
            value = getattr(self, option)
            check(value >= 0, f"optimizer.{option}", value, "0 or more works")
        for option in ("beta1", "beta2"):
            value = getattr(self, option)
            check(0 <= value < 1, f"optimizer.{option}", value, f"0 <= {option} < 1 works")
        check(self.eps > 0, "optimizer.eps", self.eps, "a positive number works")

    @property
    def largest_norm(self) -> float:
        """``clip`` as libraries take it: 0 for no clipping."""
        return 0.0 if self.clip == math.inf else self.clip


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks are used: dp replicas of cp (megatron: pp x cp x tp) ranks."""

    # what spreads weights and runs the steps
    engine: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(ENGINES) + "}")] = "fsdp2"
    cp: int = 1  # ranks that share one sequence
    dp: int = -1  # replicas, each with its share of the batch; -1: the rest of the world
    tp: int = 1  # megatron: ranks that share the heads and widths of each block
    pp: int = 1  # megatron: stages, each with its share of the blocks
    sequence_parallel: bool = False  # megatron: tp ranks share the tokens between the projections
    layout: Literal["contiguous", "zigzag", "zigzag_per_document"] = "zigzag"
    # fsdp2: False keeps gathered weights until backward has used them
    reshard_after_forward: bool = True
    # deepspeed: 1 shards optimizer state, 2 gradients too, 3 weights too
    zero_stage: Literal[1, 2, 3] = 3

    def __post_init__(self) -> None:
        _check_values("parallel", self)
        check(self.engine in ENGINES, "parallel.engine", self.engine, f"{tuple(ENGINES)} work")
        for option in ("cp", "tp", "pp"):
            value = getattr(self, option)
            check(value >= 1, f"parallel.{option}", value, "1 or more works")
        check(self.dp >= 1 or self.dp == -1, "parallel.dp", self.dp, "1 or more, or -1, works")


@dataclass(frozen=True)
class RunSettings:
    """How long, on what, and what is kept of it."""

    name: str = "run"
    folder: str = ""  # where everything is written; empty: runs/NAME-TIME
    resume: bool = False  # continue from the folder's latest checkpoint, if it has one
    steps: int = 1000  # optimizer steps
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is a GPU
    # auto: bfloat16 with float32 weights on cuda, else float32
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    timeout: float = 600.0  # seconds that ranks wait for each other before the run ends
    log_every: int = 10  # steps between log lines
    validate_every: int = 0  # steps between validations; 0: at the end only
    validation_streams: int = 16  # held-out streams that a validation reads
    checkpoint_every: int = 500  # steps between checkpoints; 0: at the end, or a signal, only
    keep_checkpoints: int = 2  # older ones are removed; 0: keep all
    tensorboard: bool = True
    sample_tokens: int = 200  # length of the sample at the end; 0: none
    prompt: str = "def "  # what the sample continues
    temperature: float = 0.8

    def __post_init__(self) -> None:
        _check_values("run", self)
        for option in ("steps", "log_every", "validation_streams"):
            check(getattr(self, option) >= 1, f"run.{option}", getattr(self, option), "1 or more")
        for option in ("validate_every", "checkpoint_every", "keep_checkpoints", "sample_tokens"):
            check(getattr(self, option) >= 0, f"run.{option}", getattr(self, option), "0 or more")
        works = "less than 10^8 work: the names of checkpoints have eight digits"
        check(self.steps < 10**8, "run.steps", self.steps, works)
        works = "a number of seconds above 0 and up to a million works"
        check(0 < self.timeout <= 1e6, "run.timeout", self.timeout, works)
        works = "a positive number works"
        check(self.temperature > 0, "run.temperature", self.temperature, works)
        check(bool(self.prompt) or not self.sample_tokens, "run.prompt", self.prompt, "some text")


@dataclass(frozen=True)
class Settings:
    """A whole run."""

    attention: NSAConfig
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        check(
            self.data.global_batch % self.data.micro_batch == 0,
            "data.micro_batch",
            self.data.micro_batch,
            f"a divisor of data.global_batch = {self.data.global_batch} works",
        )
        _check_engine(self)
        _check_dense(self)


def _check_engine(settings: Settings) -> None:
    """Refuse what the engine cannot run: options of other engines, and what it refuses itself."""
    engine = engine_spec(settings.parallel.engine)
    for other in all_specs():
        for option in sorted(set(other.options) - set(engine.options)):
            section, name = option.split(".")
            options = getattr(settings, section)
            default = next(f.default for f in dataclasses.fields(options) if f.name == name)
            works = f"{default!r} works with parallel.engine = {engine.name!r}"
            works = f"{works}: others are of engine {other.name!r}"
            found = getattr(options, name)
            check(found == default, option, found, works)
    engine.check_settings(settings)


def _check_dense(settings: Settings) -> None:
    """Refuse splits of packed streams that dense layers have no algorithm for."""
    cp, layout, dtype = settings.parallel.cp, settings.parallel.layout, settings.run.dtype
    if cp == 1 or not settings.model.has_dense:
        return
    why = f"with dense layers (model.attention, model.dense_every) and parallel.cp = {cp}"
    works = f"'zigzag_per_document' in bfloat16 and 'contiguous' in every run.dtype work {why}"
    check(layout != "zigzag", "parallel.layout", layout, works)
    works = f"'bfloat16', or parallel.layout = 'contiguous', works {why}"
    right = layout == "contiguous" or dtype in ("auto", "bfloat16")
    check(right, "run.dtype", dtype, works)


T = TypeVar("T")


def _convert(value: Any, hint: Any, option: str) -> Any:
    """A TOML value as the type that a field declares."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_table(hint, value, option)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return _convert(value, inner, option)
    if origin is Literal:
        # True equals 1 but is another value.
        known = any(type(value) is type(a) and value == a for a in arguments)
        check(known, option, value, f"{arguments} work")
        return value
    if origin is tuple:
        check(isinstance(value, list), option, value, "a list works")
        inner_hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        check(len(value) == len(inner_hints), option, value, f"{len(inner_hints)} values work")
        pairs = enumerate(zip(value, inner_hints, strict=True))
        return tuple(_convert(v, h, f"{option}[{i}]") for i, (v, h) in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        check(
            abs(value) < 1 << 63, option, value, "a number of at most 64 bits or a fraction works"
        )
        return float(value)
    check(type(value) is hint, option, value, f"a value of type {hint.__name__} works")
    return value


def from_table(cls: type[T], table: Any, section: str = "") -> T:
    """``cls`` from a TOML table.

    Raises:
        ValueError: for a table that is none, an unknown or missing key, or a value that does not
            fit; names the key, the value found and what works.
    """
    check(isinstance(table, dict), section, table, "a table works")
    hints, prefix = get_type_hints(cls), section and f"{section}."
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in table.items():
        where = f"keys of [{section}]" if section else "sections"
        check(key in fields, f"{prefix}{key}", value, f"{where}: {', '.join(fields)}")
    missing = [
        f"{prefix}{name}"
        for name, f in fields.items()
        if name not in table
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not set; a value is required")
    values = {key: _convert(v, hints[key], f"{prefix}{key}") for key, v in table.items()}
    if cls in (NSAConfig, RotaryConfig):
        # The layer's own errors do not know the section that they come from.
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from None
    return cls(**values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ValueError: if the file is missing or is no TOML.
    """
    try:
        table: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        # ValueErrors are no TOML, no UTF-8, and integers of thousands of digits.
        raise ValueError(f"config: found {str(path)!r}; a TOML file works ({error})") from None
    return table


def from_toml(path: str | Path) -> Settings:
    """Settings of a TOML file, checked.

    Raises:
        ValueError: as ``read_toml`` and ``from_table`` say, or if its format is a later one.
    """
    return _from_document(read_toml(path))


def _from_document(table: dict[str, Any]) -> Settings:
    """Settings of a whole TOML document, which may say its format."""
    number = table.get("format", FORMAT)
    works = f"1 to {FORMAT} work; later ones are of later versions of this program"
    check(type(number) is int and 1 <= number <= FORMAT, "format", number, works)
    return from_table(Settings, {key: table[key] for key in table if key != "format"})


def from_command_line(arguments: Sequence[str]) -> Settings:
    """Settings of ``CONFIG.toml [--section.option value ...]``; the command line goes first.

    A bad option on the command line ends the program with tyro's message, told once, and status 2.

    Raises:
        ValueError: as ``from_toml``, and if ``to_toml`` could not write the settings.
    """
    check(
        bool(arguments) and not arguments[0].startswith("-"),
        "config",
        arguments[0] if arguments else None,
        "train.py CONFIG.toml [--section.option value ...] works",
    )
    default = from_toml(arguments[0])
    shown = arguments[0].encode("utf-8", "backslashreplace").decode()
    settings = read_once(
        lambda: tyro.cli(
            Settings,
            prog=f"train.py {shown}",
            default=default,
            args=list(arguments[1:]),
            config=(tyro.conf.FlagConversionOff,),
        )
    )
    to_toml(settings)  # What no run could be resumed from is told before it starts.
    return settings


def to_toml(settings: Settings) -> str:
    """The TOML text that ``from_toml`` reads back as equal settings.

    TOML has no null: an option that is None is left out, which reads back as its default.

    Raises:
        ValueError: if that text would read back otherwise.
    """
    lines = [f"format = {FORMAT}", ""]
    for section in dataclasses.fields(settings):
        lines.append(f"[{section.name}]")
        for name, value in dataclasses.asdict(getattr(settings, section.name)).items():
            if value is not None:
                lines.append(f"{name} = {_toml(value)}")
        lines.append("")
    text = "\n".join(lines)
    read = _from_document(tomllib.loads(text))
    for section in dataclasses.fields(settings):
        written, found = getattr(settings, section.name), getattr(read, section.name)
        works = f"options that settings.toml gives back work; it gives {found!r}"
        check(written == found, section.name, written, works)
    return text


def _toml(value: Any) -> str:
    if value in (math.inf, -math.inf):
        return "inf" if value > 0 else "-inf"
    # JSON's strings, numbers, booleans and arrays are TOML's, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
