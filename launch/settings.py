"""The settings of a run: a frozen dataclass for each TOML section, checked when it is built.

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
from nsa_dist.checks import as_choice, check
from nsa_dist.config import split_options_problem
from nsa_kernels.compressors import parameter_names

FORMAT = 1
"""Format number of a checkpoint's settings and manifest. The oldest files have no number."""

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def _check_values(section: str, options: Any) -> None:
    """Refuse values that settings.toml could not hold, and numbers that are not finite."""
    for option in dataclasses.fields(options):
        _check_value(f"{section}.{option.name}", getattr(options, option.name))


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, str):
        is_utf8 = not any("\ud800" <= c <= "\udfff" for c in value)
        check(is_utf8, name, value, "text in UTF-8")
        # Only a prompt is text; all others are names and paths.
        fits = "\0" not in value or name == "run.prompt"
        check(fits, name, value, "text without NUL")
    elif isinstance(value, float):
        # An infinite clip is no clipping.
        fits = math.isfinite(value) or (name == "optimizer.clip" and value == math.inf)
        check(fits, name, value, "a finite number")
    elif isinstance(value, int):
        fits = -(1 << 63) <= value < 1 << 63
        check(fits, name, value, "an integer of 64 bits")
    elif isinstance(value, tuple):
        for at, each in enumerate(value):
            _check_value(f"{name}[{at}]", each)


def _check_minimum(section: str, options: Any, name: str, minimum: int) -> None:
    value = getattr(options, name)
    check(value >= minimum, f"{section}.{name}", value, f"at least {minimum}")


@dataclass(frozen=True)
class ModelSettings:
    """The decoder around the attention."""

    attention: Literal["nsa", "dense"] = "nsa"  # dense: causal softmax over the whole document
    dense_every: int = 0  # with nsa: 4 makes the 4th, 8th, ... layer dense; 0: none
    layers: int = 4  # transformer blocks
    hidden_size: int = 128  # width of the residual stream
    mlp_hidden: int = 384  # hidden width of SwiGLU
    norm_eps: float = 1e-6  # RMSNorm's epsilon
    tie_embeddings: bool = False  # the output layer uses the embedding's weight
    bias: bool = False  # biases in the attention's projections
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    dropout: float = 0.0  # on the attention's output
    backend: str = "auto"  # with nsa: auto (triton on NVIDIA GPUs, else pytorch), pytorch, triton
    recompute: bool = False  # recompute activations in backward
    # what is recomputed: block (the whole block), attention (between the projections; megatron), or
    # mlp (fsdp2: neither attention nor its messages are done again)
    recompute_part: Literal["block", "attention", "mlp"] = "block"
    # fsdp2: what torch.compile compiles of each block: norms, projections (with rotary), mlp
    compile: tuple[Literal["norms", "projections", "mlp"], ...] = ()
    # fsdp2: how logits and loss are computed: in pieces of tokens, by torch, or by Liger's kernel
    loss: Literal["pieces", "liger"] = "pieces"

    def __post_init__(self) -> None:
        _check_values("model", self)
        for option in ("layers", "hidden_size", "mlp_hidden"):
            _check_minimum("model", self, option, 1)
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and below 1")
        check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "a positive number")
        must = f"0, or 2 to model.layers = {self.layers} with model.attention = 'nsa'"
        some = self.attention == "nsa" and 2 <= self.dense_every <= self.layers
        check(some or self.dense_every == 0, "model.dense_every", self.dense_every, must)
        must = "each part once"
        check(len(set(self.compile)) == len(self.compile), "model.compile", self.compile, must)

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

    # stdlib: this Python's own sources; prepared: what prepare_data.py wrote
    source: Literal["stdlib", "folder", "jsonl", "prepared"] = "stdlib"
    path: str = ""  # the folder, or the JSONL file
    # prepared: several folders in the place of path, mixed by weights
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # of each of sources, how much of the streams is from it
    # documents for validation, as path; empty: those of path that held_out keeps for it
    validation_path: str = ""
    pattern: str = "**/*.txt"  # which files of the folder are documents
    field: str = "text"  # the JSONL field that holds a document's text
    tokenizer: str = "bytes"  # bytes, a tokenizer.json, or a name that transformers loads
    length: int = 4096  # tokens in a packed stream
    global_batch: int = 8  # streams in an optimizer step, over all ranks
    micro_batch: int = 1  # streams in one forward, joined end to end
    held_out: float = 0.05  # fraction of documents kept for validation
    prefetch: int = 2  # steps whose batches a thread makes ahead; 0: none, and no thread
    # prepared: compare all files with their checksums at the start, about a second a GB and process
    verify: bool = True

    def __post_init__(self) -> None:
        _check_values("data", self)
        for option in ("global_batch", "micro_batch"):
            _check_minimum("data", self, option, 1)
        _check_minimum("data", self, "prefetch", 0)
        # A stream of one token has no target.
        check(self.length >= 2, "data.length", self.length, "at least 2")
        most = ((1 << 31) - 1) // self.micro_batch
        must = f"at most {most} with data.micro_batch = {self.micro_batch} (positions have 32 bits)"
        check(self.length <= most, "data.length", self.length, must)
        check(0 < self.held_out < 1, "data.held_out", self.held_out, "above 0 and below 1")
        self._check_unused()
        self._check_mixture()
        if self.sources:
            must = "empty with data.sources, which have the place of it"
            check(not self.path, "data.path", self.path, must)
        elif self.source == "stdlib":
            must = "empty with data.source = 'stdlib'"
            check(not self.path, "data.path", self.path, must)
            check(not self.validation_path, "data.validation_path", self.validation_path, must)
        else:
            # That it exists is checked when it is read: settings of a run whose data has moved
            # must stay readable.
            must = f"an existing path with data.source = {self.source!r}"
            check(bool(self.path), "data.path", self.path, must)

    def _check_mixture(self) -> None:
        """Refuse sources and weights that do not belong together."""
        sources, weights = self.sources, self.weights
        must = "empty unless data.source = 'prepared'"
        check(self.source == "prepared" or not sources, "data.sources", sources, must)
        must = f"{len(sources)} numbers, one for each of data.sources" if sources else "empty"
        must += "" if sources else " without data.sources"
        check(len(weights) == len(sources), "data.weights", weights, must)
        for at, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            check(bool(source), f"data.sources[{at}]", source, "the path of a prepared folder")
            must = "different from all before it (a weight says how often a folder is read)"
            check(source not in sources[:at], f"data.sources[{at}]", source, must)
            check(weight > 0, f"data.weights[{at}]", weight, "a positive number")
        must = "a prepared folder with data.sources (validation has files of its own)"
        named = bool(self.validation_path) or not sources
        check(named, "data.validation_path", self.validation_path, must)

    def _check_unused(self) -> None:
        """Refuse options that would do nothing."""
        unused: dict[str, str] = {}
        if self.validation_path:
            unused["held_out"] = "with data.validation_path"
        if self.source == "prepared":
            case = "with data.source = 'prepared' (the folder's own holds)"
            unused |= dict.fromkeys(("pattern", "field", "tokenizer", "held_out"), case)
        else:
            unused["verify"] = "unless data.source = 'prepared'"
        for option, case in unused.items():
            value, default = getattr(self, option), getattr(type(self), option)
            check(value == default, f"data.{option}", value, f"{default!r} {case}")


STAGES = {
    "gates": (".attention.gate.",),
    "compressors": (".attention.k_compressor.", ".attention.v_compressor."),
}
"""Choices of ``optimizer.train_only``, and what stands in the names of their weights."""


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
    # this many skipped steps in a row (gradients not finite) end the run; 0: the first one does
    max_skipped: int = 3
    # fsdp2: train these parts of the sparse layers alone, and leave all other weights as they are;
    # empty: train everything
    train_only: tuple[Literal["gates", "compressors"], ...] = ()
    # fsdp2, with train_only: learn what dense attention does with each layer's queries, keys and
    # values, in the place of the next token
    distill_dense: bool = False

    def __post_init__(self) -> None:
        _check_values("optimizer", self)
        check(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        check(0 <= self.min_lr <= 1, "optimizer.min_lr", self.min_lr, "between 0 and 1")
        for option in ("warmup_steps", "weight_decay", "clip", "max_skipped"):
            _check_minimum("optimizer", self, option, 0)
        for option in ("beta1", "beta2"):
            value = getattr(self, option)
            check(0 <= value < 1, f"optimizer.{option}", value, "at least 0 and below 1")
        check(self.eps > 0, "optimizer.eps", self.eps, "a positive number")

    @property
    def largest_norm(self) -> float:
        """``clip`` as libraries expect it: 0 means no clipping."""
        return 0.0 if self.clip == math.inf else self.clip


FETCH_AGAIN = {"auto": None, "always": True, "never": False}
"""Names of the layers' ``fetch_again``."""


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
    # which selected blocks of other ranks are fetched: those chosen, or all that may be
    fetch: Literal["chosen", "full"] = "chosen"
    # whether backward fetches selected blocks of other ranks again, with cp > 1: less memory, and
    # as many bytes more as a forward receives. auto: with more than two KV heads
    fetch_again: Literal["auto", "always", "never"] = "auto"
    # branches that backward computes again, whose results are not kept
    recompute_branches: tuple[str, ...] = ()
    # consecutive ranks of cp that share a node: then blocks of other nodes are fetched once a node.
    # 0: those of each host, where hosts have equally many, at least two; 1: one level of links
    ranks_per_node: int = 0
    # gradients of the attention have the same bits for cp = 1, 2, 4, ... up to this many, a power
    # of two; streams are padded to multiples of twice as many. 0: they agree to rounding
    exact_gradients: int = 0
    # fsdp2: False keeps gathered weights until backward has used them
    reshard_after_forward: bool = True
    # fsdp2: blocks whose weights are gathered while the ones before them compute, forward and
    # backward. 0: torch's own order, none ahead of the host forward and one backward
    gather_ahead: int = 1
    # deepspeed: 1 shards optimizer state, 2 gradients too, 3 weights too
    zero_stage: Literal[1, 2, 3] = 3

    def __post_init__(self) -> None:
        _check_values("parallel", self)
        as_choice("parallel.engine", self.engine, tuple(ENGINES))
        for option in ("cp", "tp", "pp"):
            _check_minimum("parallel", self, option, 1)
        check(self.dp >= 1 or self.dp == -1, "parallel.dp", self.dp, "at least 1, or -1")
        _check_minimum("parallel", self, "gather_ahead", 0)
        _check_minimum("parallel", self, "ranks_per_node", 0)
        given = self.ranks_per_node
        must = f"0 or a divisor of parallel.cp = {self.cp}"
        check(not given or self.cp % given == 0, "parallel.ranks_per_node", given, must)
        must = "0 or 1 with parallel.exact_gradients (a node's sums would follow from its ranks)"
        check(given <= 1 or not self.exact_gradients, "parallel.ranks_per_node", given, must)


@dataclass(frozen=True)
class RunSettings:
    """How long a run is, where it runs, and what it logs, saves and samples."""

    name: str = "run"
    folder: str = ""  # where everything is written; empty: runs/NAME-TIME
    resume: bool = False  # continue from the folder's latest checkpoint, if it has one
    # begin at step 0 with the weights of another run, by its folder or one of its checkpoints
    start_from: str = ""
    steps: int = 1000  # optimizer steps
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is a GPU
    # auto: bfloat16 with float32 weights on cuda, else float32
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    timeout: float = 600.0  # seconds that ranks wait for each other before the run ends
    dry_run: bool = (
        False  # print ranks, memory, bytes and time by estimate, and end without training
    )
    # compare each attention over cp ranks with one rank's, on one step, and end without training
    self_check: bool = False
    self_check_rows: int = 0  # with self_check: compare about this many queries; 0: all
    # record some steps by torch's profiler: a trace and a table in the folder's "profile"
    profile: bool = False
    profile_after: int = 10  # with profile: steps of this process before those
    profile_steps: int = 3  # with profile: how many are recorded
    profile_ranks: Literal["first", "all"] = "first"  # with profile: which ranks record
    log_every: int = 10  # steps between log lines
    # warn of a rank whose own computing takes this many times the median rank's; 0: never
    slow_factor: float = 1.25
    validate_every: int = 0  # steps between validations; 0: at the end only
    validation_streams: int = 16  # held-out streams that a validation reads
    checkpoint_every: int = 500  # steps between checkpoints; 0: at the end, or a signal, only
    keep_checkpoints: int = 2  # older ones are removed; 0: keep all
    # fsdp2: copy the state to the CPU's memory and write it while the next steps run
    async_checkpoints: bool = False
    tensorboard: bool = True
    sample_tokens: int = 200  # length of the sample at the end; 0: none
    prompt: str = "def "  # what the sample continues
    temperature: float = 0.8

    def __post_init__(self) -> None:
        _check_values("run", self)
        for option in ("steps", "log_every", "validation_streams"):
            _check_minimum("run", self, option, 1)
        for option in ("validate_every", "checkpoint_every", "keep_checkpoints", "sample_tokens"):
            _check_minimum("run", self, option, 0)
        must = "empty with run.resume (a resumed run has weights of its own)"
        check(not (self.resume and self.start_from), "run.start_from", self.start_from, must)
        _check_minimum("run", self, "self_check_rows", 0)
        must, used = "0 without run.self_check", self.self_check or not self.self_check_rows
        check(used, "run.self_check_rows", self.self_check_rows, must)
        self._check_profile()
        must = "0, or above 1"
        check(
            self.slow_factor == 0 or self.slow_factor > 1, "run.slow_factor", self.slow_factor, must
        )
        must = "below 10^8 (names of checkpoints have eight digits)"
        check(self.steps < 10**8, "run.steps", self.steps, must)
        must = "a number of seconds above 0 and up to a million"
        check(0 < self.timeout <= 1e6, "run.timeout", self.timeout, must)
        check(self.temperature > 0, "run.temperature", self.temperature, "a positive number")
        must = "some text, unless run.sample_tokens = 0"
        check(bool(self.prompt) or not self.sample_tokens, "run.prompt", self.prompt, must)

    def _check_profile(self) -> None:
        _check_minimum("run", self, "profile_after", 0)
        _check_minimum("run", self, "profile_steps", 1)
        for option in ("profile_after", "profile_steps", "profile_ranks"):
            value, default = getattr(self, option), getattr(type(self), option)
            must = f"{default!r} without run.profile"
            check(self.profile or value == default, f"run.{option}", value, must)
        needed = self.profile_after + self.profile_steps
        must = f"at least run.profile_after + run.profile_steps = {needed} with run.profile"
        check(not self.profile or self.steps >= needed, "run.steps", self.steps, must)


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
            f"a divisor of data.global_batch = {self.data.global_batch}",
        )
        problem = split_options_problem(
            self.attention,
            None,
            self.parallel.recompute_branches,
            self.parallel.fetch,
            self.parallel.exact_gradients,
            self.parallel.cp,
        )
        if problem is not None:
            raise ValueError(f"parallel.{problem}")
        _check_engine(self)
        _check_dense(self)
        _check_train_only(self)
        _check_distillation(self)
        must = (
            "False with dense layers (model.attention, model.dense_every), which have no estimate"
        )
        some = not (self.model.has_dense and self.run.dry_run)
        check(some, "run.dry_run", self.run.dry_run, must)
        must = "False with parallel.exact_gradients, which has no estimate"
        exact = self.parallel.exact_gradients
        check(not (exact and self.run.dry_run), "run.dry_run", self.run.dry_run, must)
        must = "False with run.dry_run"
        check(not (self.run.self_check and self.run.dry_run), "run.self_check", True, must)
        must = "False with model.attention = 'dense' (NSA layers are checked)"
        some = self.model.attention == "nsa" or not self.run.self_check
        check(some, "run.self_check", self.run.self_check, must)


def _check_engine(settings: Settings) -> None:
    """Refuse options of other engines, and what the run's own engine cannot do."""
    engine = engine_spec(settings.parallel.engine)
    for other in all_specs():
        for option in sorted(set(other.options) - set(engine.options)):
            section, name = option.split(".")
            options = getattr(settings, section)
            default = next(f.default for f in dataclasses.fields(options) if f.name == name)
            must = f"{default!r} with parallel.engine = {engine.name!r}"
            must = f"{must} (only {other.name!r} has other values)"
            value = getattr(options, name)
            check(value == default, option, value, must)
    engine.check_settings(settings)


def _check_dense(settings: Settings) -> None:
    """Refuse the ways to split a sequence that dense layers have no algorithm for."""
    cp, layout, dtype = settings.parallel.cp, settings.parallel.layout, settings.run.dtype
    if cp == 1 or not settings.model.has_dense:
        return
    case = f"with dense layers (model.attention, model.dense_every) and parallel.cp = {cp}"
    must = f"'contiguous', or 'zigzag_per_document' in bfloat16, {case}"
    check(layout != "zigzag", "parallel.layout", layout, must)
    must = f"'bfloat16', unless parallel.layout = 'contiguous', {case}"
    right = layout == "contiguous" or dtype in ("auto", "bfloat16")
    check(right, "run.dtype", dtype, must)


def _check_train_only(settings: Settings) -> None:
    """Refuse a stage of weights that the model has not, and what cannot be done in a stage."""
    only, config = settings.optimizer.train_only, settings.attention
    if not only:
        return
    has_weights = config.uses_compression and parameter_names(config.compress) != ()
    choices: tuple[str, ...] = ("gates", "compressors") if has_weights else ("gates",)
    must = f"empty, or of {choices} without repeats, with attention.compress = {config.compress!r}"
    if settings.model.attention == "dense":
        choices, must = (), "empty with model.attention = 'dense' (sparse layers have gates)"
    fits = set(only) <= set(choices) and len(set(only)) == len(only)
    check(fits, "optimizer.train_only", only, must)
    for option in ("dry_run", "self_check"):
        must = "False with optimizer.train_only (leave that out: the layers are the same)"
        value = getattr(settings.run, option)
        check(not value, f"run.{option}", value, must)


def _check_distillation(settings: Settings) -> None:
    """Refuse a stage that distils, where ``nsa_dist.distill_dense`` would refuse its steps."""
    if not settings.optimizer.distill_dense:
        return
    only = settings.optimizer.train_only
    must = "('gates', 'compressors') or ('compressors',) with optimizer.distill_dense (only these"
    must = f"{must} learn from dense attention)"
    check("compressors" in only, "optimizer.train_only", only, must)
    for option, given, fits in (
        ("parallel.cp", settings.parallel.cp, 1),
        ("parallel.exact_gradients", settings.parallel.exact_gradients, 0),
        ("model.recompute", settings.model.recompute, False),
    ):
        must = f"{fits!r} with optimizer.distill_dense"
        check(given == fits, option, given, must)
    must = "some with 'selected' with optimizer.distill_dense"
    branches = settings.attention.branches
    check("selected" in branches, "attention.branches", branches, must)


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
        check(known, option, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        check(isinstance(value, list), option, value, "a list")
        inner_hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        check(len(value) == len(inner_hints), option, value, f"{len(inner_hints)} values")
        pairs = enumerate(zip(value, inner_hints, strict=True))
        return tuple(_convert(v, h, f"{option}[{i}]") for i, (v, h) in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) < 1 << 63, option, value, "an integer of at most 64 bits, or a fraction")
        return float(value)
    check(type(value) is hint, option, value, f"of type {hint.__name__}")
    return value


def from_table(cls: type[T], table: Any, section: str = "") -> T:
    """``cls`` from a TOML table.

    Raises:
        ValueError: for anything but a table, an unknown or missing key, or a value that the key
            cannot have; names the key, what it must be and the value.
    """
    check(isinstance(table, dict), section, table, "a table")
    hints, prefix = get_type_hints(cls), section and f"{section}."
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            what = f"a key of [{section}]" if section else "a section"
            raise ValueError(f"{what} must be one of {', '.join(fields)}, got {prefix}{key}")
    missing = [
        f"{prefix}{name}"
        for name, f in fields.items()
        if name not in table
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be set, got no value")
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
        ValueError: if the file is missing or is not TOML.
    """
    try:
        table: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: not TOML, not UTF-8, or an integer of thousands of digits.
        raise ValueError(f"config must be a TOML file, got {str(path)!r} ({error})") from None
    return table


def from_toml(path: str | Path) -> Settings:
    """Settings of a TOML file, checked.

    Raises:
        ValueError: as ``read_toml`` and ``from_table`` say, or if its format is a later one.
    """
    return _from_document(read_toml(path))


def _from_document(table: dict[str, Any]) -> Settings:
    """Settings of a whole TOML document, which may have a format number."""
    number = table.get("format", FORMAT)
    must = f"1 to {FORMAT} (later versions of this program write later ones)"
    check(type(number) is int and 1 <= number <= FORMAT, "format", number, must)
    return from_table(Settings, {key: table[key] for key in table if key != "format"})


S = TypeVar("S", bound=Settings)


def from_command_line(arguments: Sequence[str]) -> Settings:
    """Settings of ``CONFIG.toml [--section.option value ...]``; options override the file.

    A bad option on the command line ends the program with tyro's message, printed by one process,
    and status 2.

    Raises:
        ValueError: as ``from_toml``, and if ``to_toml`` could not write the settings.
    """
    settings = read_command_line(arguments, Settings, "train.py")
    to_toml(settings)  # Refuses here, before the run starts, what could not be resumed from.
    return settings


def read_command_line(arguments: Sequence[str], kind: type[S], program: str) -> S:
    """As ``from_command_line``, for a program that has more sections than a run, which no file
    has."""
    check(
        bool(arguments) and not arguments[0].startswith("-"),
        "config",
        arguments[0] if arguments else None,
        f"the first argument: {program} CONFIG.toml [--section.option value ...]",
    )
    run = from_toml(arguments[0])
    default = kind(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)})
    shown = arguments[0].encode("utf-8", "backslashreplace").decode()
    return read_once(
        lambda: tyro.cli(
            kind,
            prog=f"{program} {shown}",
            default=default,
            args=list(arguments[1:]),
            config=(tyro.conf.FlagConversionOff,),
        )
    )


def to_toml(settings: Settings) -> str:
    """The TOML text that ``from_toml`` reads back as equal settings.

    TOML has no null: options that are None are left out, and read back as their default, None.

    Raises:
        ValueError: if that text would read back as other settings.
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
        written, back = getattr(settings, section.name), getattr(read, section.name)
        check(written == back, section.name, written, f"what settings.toml reads back, {back!r}")
    return text


def _toml(value: Any) -> str:
    if value in (math.inf, -math.inf):
        return "inf" if value > 0 else "-inf"
    # JSON writes strings, numbers, booleans and arrays as TOML does, except for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
