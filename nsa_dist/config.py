"""Hyperparameters of an attention layer: frozen dataclasses, checked once when built.

Ranks, layouts and devices are not part of a config: layers with equal configs compute the same
function wherever they run. ``launch/`` reads files and command lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from nsa_dist.checks import as_choice, as_int, as_number, check, check_bool
from nsa_kernels.compressors import COMPRESSORS, parameter_names

BRANCHES = ("compressed", "selected", "window")
"""The order of branches everywhere: in gates, projections and results."""

FETCHES = ("chosen", "full")
"""Which selected blocks of other ranks are fetched: those that were chosen, or all visible ones."""

CompressKind: TypeAlias = str
"""A kind of `nsa_kernels.compressors`, or ``"custom"``."""
GateKind = Literal["linear", "mlp", "static"]
ScalingKind = Literal["none", "linear", "llama3", "yarn"]


def _put(config: object, option: str, value: Any) -> None:
    """Set an option of a frozen config during ``__post_init__``."""
    object.__setattr__(config, option, value)


@dataclass(frozen=True)
class NSAConfig:
    """Native Sparse Attention's hyperparameters (arXiv 2502.11089, section 3).

    The paper's model has 64 query heads, 4 KV heads, widths 192 (queries, keys) and 128 (values);
    the remaining defaults are the paper's.

    Args:
        num_heads: query heads H.
        num_kv_heads: KV heads G. Each group of R = H/G query heads (1 to 32) shares one KV head
            and selects the same blocks.
        head_dim: width Dk of a query or key head.
        v_head_dim: width Dv of a value head; default ``head_dim``.
        compress_block: tokens l in a compression block.
        compress_stride: stride d between compression blocks; divides l and l'.
        select_block: tokens l' in a selection block; at least l.
        num_selected: selected blocks n per query, including the forced ones.
        num_init_blocks: blocks at the document's start that every query selects.
        num_local_blocks: newest blocks that every query selects, its own included; at least 1.
        window: query t sees keys t-window+1..t of its document.
        branches: the branches in use, a non-empty subset of ``BRANCHES``, stored in that order.
        compress: the function phi that maps a compression block to one token; ``"custom"`` takes
            modules given to the layer.
        compress_hidden: hidden width of ``compress="mlp"``; default 2*D.
        compress_per_head: a set of compressor weights per KV head instead of one for all.
        compress_pre_rope: compress unrotated keys, then rotate the compressed keys at the middle
            of their block.
        independent_kv: each branch has its own K and V; False: all branches share one K and V.
        scale: factor of the logits; default 1/sqrt(head_dim).
        gate: source of the gate logits: a linear map or a two-layer MLP of the layer's input, or
            a learned constant per head.
        gate_hidden: hidden width of ``gate="mlp"``; default ``head_dim``.
        gate_init: initial gate logits of (compressed, selected, window).

    Raises:
        ValueError: if an option has a value that is not allowed.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window: int = 512
    branches: tuple[str, ...] = BRANCHES
    compress: CompressKind = "mlp"
    compress_hidden: int | None = None
    compress_per_head: bool = False
    compress_pre_rope: bool = False
    independent_kv: bool = True
    scale: float | None = None
    gate: GateKind = "linear"
    gate_hidden: int | None = None
    gate_init: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for option in (
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "compress_block",
            "compress_stride",
            "select_block",
            "num_selected",
            "num_local_blocks",
            "window",
        ):
            _put(self, option, as_int(option, getattr(self, option), 1))
        _put(self, "num_init_blocks", as_int("num_init_blocks", self.num_init_blocks, 0))
        for option in ("v_head_dim", "compress_hidden", "gate_hidden"):
            if getattr(self, option) is not None:
                _put(self, option, as_int(option, getattr(self, option), 1))
        for option in ("compress_per_head", "compress_pre_rope", "independent_kv"):
            check_bool(option, getattr(self, option))

        heads, kv_heads = self.num_heads, self.num_kv_heads
        check(
            heads % kv_heads == 0 and heads // kv_heads <= 32,
            "num_kv_heads",
            kv_heads,
            f"a divisor of num_heads = {heads} that leaves at most 32 query heads per group",
        )
        block, stride, select = self.compress_block, self.compress_stride, self.select_block
        check(
            block % stride == 0 and select % stride == 0,
            "compress_stride",
            stride,
            f"a divisor of compress_block = {block} and of select_block = {select}",
        )
        check(select >= block, "select_block", select, f"at least compress_block = {block}")
        forced = self.num_init_blocks + self.num_local_blocks
        check(
            self.num_selected >= forced,
            "num_selected",
            self.num_selected,
            f"at least num_init_blocks + num_local_blocks = {forced}",
        )

        branches = self.branches
        is_sequence = isinstance(branches, (tuple, list))
        known = is_sequence and all(isinstance(b, str) and b in BRANCHES for b in branches)
        check(
            known and len(branches) > 0 and len(set(branches)) == len(branches),
            "branches",
            branches,
            f"a non-empty choice from {BRANCHES} without repeats",
        )
        _put(self, "branches", tuple(b for b in BRANCHES if b in branches))

        for option, kinds in (("compress", (*COMPRESSORS, "custom")), ("gate", get_args(GateKind))):
            _put(self, option, as_choice(option, getattr(self, option), kinds))
        # An option without effect is a mistake: refuse it before anyone trains with it.
        for option, kind_option in (("compress_hidden", "compress"), ("gate_hidden", "gate")):
            value, kind = getattr(self, option), getattr(self, kind_option)
            must = f"None with {kind_option}={kind!r} (only {kind_option}='mlp' has a hidden width)"
            check(value is None or kind == "mlp", option, value, must)
        has_weights = self.compress != "custom" and parameter_names(self.compress) != ()
        check(
            not self.compress_per_head or has_weights,
            "compress_per_head",
            self.compress_per_head,
            f"False with compress={self.compress!r}, which has no weights of this package",
        )
        if self.scale is not None:
            must = "a positive finite number or None"
            _put(self, "scale", as_number("scale", self.scale, must))
        init = self.gate_init
        check(
            isinstance(init, (tuple, list)) and len(init) == len(BRANCHES),
            "gate_init",
            init,
            f"three numbers, one for each of {BRANCHES}",
        )
        must = "three finite numbers"
        numbers = tuple(as_number("gate_init", x, must, positive=False) for x in init)
        _put(self, "gate_init", numbers)

    @property
    def heads_per_group(self) -> int:
        """R = H/G, the query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def softmax_scale(self) -> float:
        """The factor of every logit."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def split(self, ranks: int) -> NSAConfig:
        """The config of one of ``ranks`` tensor parallel ranks, which hold whole groups of heads.

        Raises:
            ValueError: if ``ranks`` does not divide ``num_kv_heads``.
        """
        ranks = as_int("ranks", ranks, 1)
        must = f"a divisor of num_kv_heads = {self.num_kv_heads} (ranks hold whole groups of heads)"
        check(self.num_kv_heads % ranks == 0, "ranks", ranks, must)
        heads, kv_heads = self.num_heads // ranks, self.num_kv_heads // ranks
        return replace(self, num_heads=heads, num_kv_heads=kv_heads)

    @property
    def kernel_options(self) -> dict[str, int]:
        """Sizes that a backend may limit."""
        names = ("compress_block", "compress_stride", "select_block", "num_selected", "window")
        widths = {"head_dim": self.head_dim, "v_head_dim": self.value_dim}
        return widths | {name: getattr(self, name) for name in names}

    @property
    def uses_compression(self) -> bool:
        """Whether keys are compressed: selection also needs them, to score blocks."""
        return "compressed" in self.branches or "selected" in self.branches

    @property
    def key_branches(self) -> tuple[str, ...]:
        """Branches with keys: those in use, and ``compressed`` if selection needs it."""
        wanted = set(self.branches) | ({"compressed"} if self.uses_compression else set())
        return tuple(b for b in BRANCHES if b in wanted)

    @property
    def num_key_sets(self) -> int:
        """Key projections of a layer with NSA's own selector: one per key branch, or one."""
        return len(self.key_branches) if self.independent_kv else 1

    @property
    def num_value_sets(self) -> int:
        """Value projections of the layer: one per branch, or one for all."""
        return len(self.branches) if self.independent_kv else 1


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding of queries and keys (arXiv 2104.09864), in the half-split form.

    Args:
        theta: base of the frequencies.
        dim: number of channels to rotate, the first ones of each head; default all.
        scaling: how frequencies change for long contexts: ``"none"``, ``"linear"`` (positions
            divided by ``factor``), ``"llama3"`` (Llama 3.1's interpolation by wavelength) or
            ``"yarn"`` (arXiv 2309.00071).
        factor: new context length over the original one.
        original_max_positions: original context length.
        low_freq_factor, high_freq_factor: bounds of llama3's blend, in turns over that length.
        beta_fast, beta_slow: bounds of yarn's blend, in turns over that length.
        attention_factor: multiplies cos and sin under yarn; default 0.1 ln(factor) + 1.

    Raises:
        ValueError: if an option has a value that is not allowed.
    """

    theta: float = 10000.0
    dim: int | None = None
    scaling: ScalingKind = "none"
    factor: float = 1.0
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        must = "a finite number above 1"
        _put(self, "theta", as_number("theta", self.theta, must))
        check(self.theta > 1, "theta", self.theta, must)
        if self.dim is not None:
            _put(self, "dim", as_int("rotary dim", self.dim, 2))
            check(self.dim % 2 == 0, "rotary dim", self.dim, "an even number")
        kinds = get_args(ScalingKind)
        _put(self, "scaling", as_choice("scaling", self.scaling, kinds))
        must = "a finite number of at least 1"
        _put(self, "factor", as_number("factor", self.factor, must))
        check(self.factor >= 1, "factor", self.factor, must)
        check(
            self.factor == 1 or self.scaling != "none",
            "factor",
            self.factor,
            f"1.0 with scaling='none' (other factors need one of {kinds[1:]})",
        )
        longest = as_int("original_max_positions", self.original_max_positions, 1)
        _put(self, "original_max_positions", longest)
        must = "a positive finite number"
        for option in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _put(self, option, as_number(option, getattr(self, option), must))
        check(
            self.high_freq_factor > self.low_freq_factor,
            "high_freq_factor",
            self.high_freq_factor,
            f"more than low_freq_factor = {self.low_freq_factor}",
        )
        check(
            self.beta_fast > self.beta_slow,
            "beta_fast",
            self.beta_fast,
            f"more than beta_slow = {self.beta_slow}",
        )
        if self.attention_factor is not None:
            must = "a positive finite number or None"
            factor = as_number("attention_factor", self.attention_factor, must)
            _put(self, "attention_factor", factor)
            check(
                self.scaling == "yarn",
                "attention_factor",
                self.attention_factor,
                f"None with scaling={self.scaling!r} (only scaling='yarn' has one)",
            )

    def rotary_dim(self, head_dim: int) -> int:
        """The number of rotated channels of a head of width ``head_dim``.

        Raises:
            ValueError: if ``dim`` exceeds ``head_dim``, or if it is None and ``head_dim`` is odd.
        """
        dim = head_dim if self.dim is None else self.dim
        must = f"an even number up to head_dim = {head_dim}"
        check(dim <= head_dim and dim % 2 == 0, "rotary dim", dim, must)
        return dim


def split_options_problem(
    config: NSAConfig,
    fetch_again: bool | None = None,
    recompute_branches: Sequence[str] = (),
    fetch: str = "chosen",
    exact_gradients: int = 0,
    size: int = 1,
) -> str | None:
    """The error in a layer's options that change how it runs alone, not what it computes, or None.

    Args:
        size: ranks of its group.
    """
    if fetch not in FETCHES:
        return f"fetch must be one of {FETCHES}, got {fetch!r}"
    if fetch_again is not None and type(fetch_again) is not bool:
        return f"fetch_again must be True, False or None, got {fetch_again!r}"
    given = recompute_branches
    known = isinstance(given, (tuple, list)) and all(branch in config.branches for branch in given)
    if not known or len(set(given)) < len(given):
        return (
            f"recompute_branches must be a choice from branches = {config.branches} without "
            f"repeats, got {given!r}"
        )
    problem = exact_gradients_problem(exact_gradients, size)
    if problem is None and exact_gradients and config.compress == "custom":
        problem = (
            "exact_gradients must be 0 with compress='custom' (a module of your own adds over "
            f"blocks in its own order), got {exact_gradients}"
        )
    return problem


def exact_gradients_problem(exact_gradients: Any, size: int) -> str | None:
    """The error in ``exact_gradients`` over ``size`` ranks, or None."""
    value = exact_gradients
    if type(value) is not int or value < 0 or value & (value - 1):
        return f"exact_gradients must be 0 or a power of two, got {value!r}"
    if value and (size > value or size & (size - 1)):
        return (
            f"group size must be a power of two up to exact_gradients = {value} (the most ranks "
            f"whose gradients have the same bits), got {size}"
        )
    return None
