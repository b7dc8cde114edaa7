"""What an attention layer computes, as frozen values that are checked once.

Nothing here knows about ranks, layouts or devices: two layers with equal configs compute the
same function wherever and however they run.  Files and command lines are read in ``launch/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from nsa_dist.checks import as_choice, as_int, as_number, check, check_bool

BRANCHES = ("compressed", "selected", "window")
"""The order of branches everywhere: in gates, in projections, in what is returned."""

CompressKind = Literal["mlp", "linear", "conv1d", "attention_pool", "mean", "custom"]
GateKind = Literal["linear", "mlp", "static"]
ScalingKind = Literal["none", "linear", "llama3", "yarn"]


def _put(config: object, option: str, value: Any) -> None:
    """Set an option of a frozen config that is being built, as its own type."""
    object.__setattr__(config, option, value)


@dataclass(frozen=True)
class NSAConfig:
    """Native Sparse Attention's hyperparameters (arXiv 2502.11089, section 3).

    The paper's model has 64 query heads, 4 KV heads, widths 192 (queries, keys) and 128 (values);
    the remaining defaults are the paper's.

    Args:
        num_heads: query heads H.
        num_kv_heads: KV heads G; each group of R = H/G query heads (1..32) shares one KV head and
            one choice of blocks.
        head_dim: width Dk of a query or key head.
        v_head_dim: width Dv of a value head; ``head_dim`` when None.
        compress_block: tokens l in a compression block.
        compress_stride: stride d between compression blocks; divides l and l'.
        select_block: tokens l' in a selection block; at least l.
        num_selected: selected blocks n a query, the forced ones included.
        num_init_blocks: forced blocks at a document's start.
        num_local_blocks: newest forced blocks, the query's own included; at least 1.
        window: query t sees keys t-window+1..t of its document.
        branches: the branches in use, any non-empty subset of ``BRANCHES``; kept in that order.
        compress: the function phi that makes one token of a compression block; ``"custom"`` leaves
            it to modules given to the layer.
        compress_hidden: hidden width of ``compress="mlp"``; 2*D when None.
        compress_per_head: one set of compressor weights a KV head instead of one for all.
        compress_pre_rope: compress unrotated keys, and rotate the compressed ones at the middle of
            their block.
        independent_kv: each branch has its own K and V; False shares one K, V.
        scale: factor of the logits; 1/sqrt(head_dim) when None.
        gate: how gate logits are made: a linear map or a two-layer MLP of the layer's input, or
            learned constants a head.
        gate_hidden: hidden width of ``gate="mlp"``; ``head_dim`` when None.
        gate_init: initial gate logits of (compressed, selected, window).

    Raises:
        ValueError: naming the option, the value found and the values that work.
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

        for option, kinds in (("compress", get_args(CompressKind)), ("gate", get_args(GateKind))):
            _put(self, option, as_choice(option, getattr(self, option), kinds))
        # An option without effect is a misunderstanding, better told than trained with.
        for option, kind_option in (("compress_hidden", "compress"), ("gate_hidden", "gate")):
            value, kind = getattr(self, option), getattr(self, kind_option)
            must = f"None with {kind_option}={kind!r} (only {kind_option}='mlp' has a hidden width)"
            check(value is None or kind == "mlp", option, value, must)
        check(
            not self.compress_per_head or self.compress not in ("mean", "custom"),
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

    @property
    def kernel_options(self) -> dict[str, int]:
        """What a backend may be limited in."""
        names = ("compress_block", "compress_stride", "select_block", "num_selected", "window")
        widths = {"head_dim": self.head_dim, "v_head_dim": self.value_dim}
        return widths | {name: getattr(self, name) for name in names}

    @property
    def uses_compression(self) -> bool:
        """Whether compressed keys are made: the selected branch scores blocks with them too."""
        return "compressed" in self.branches or "selected" in self.branches

    @property
    def key_branches(self) -> tuple[str, ...]:
        """Branches that read keys: those in use, and ``compressed`` where selection needs it."""
        wanted = set(self.branches) | ({"compressed"} if self.uses_compression else set())
        return tuple(b for b in BRANCHES if b in wanted)

    @property
    def num_key_sets(self) -> int:
        """Key projections of the layer: one a key branch, or one for all."""
        return len(self.key_branches) if self.independent_kv else 1

    @property
    def num_value_sets(self) -> int:
        """Value projections of the layer: one a branch, or one for all."""
        return len(self.branches) if self.independent_kv else 1


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding of queries and keys (arXiv 2104.09864), in the half-split form.

    Args:
        theta: base of the frequencies.
        dim: channels that are rotated, the first of each head; all of them when None.
        scaling: how frequencies change for long contexts: ``"none"``, ``"linear"`` (positions over
            ``factor``), ``"llama3"`` (Llama 3.1's interpolation by wavelength) or ``"yarn"``
            (arXiv 2309.00071).
        factor: how many times longer the context gets.
        original_max_positions: context length that the frequencies were first made for.
        low_freq_factor, high_freq_factor: bounds of llama3's blend, in turns over that context.
        beta_fast, beta_slow: bounds of yarn's blend, in turns over that context.
        attention_factor: multiplies cos and sin under yarn; 0.1 ln(factor) + 1 when None.

    Raises:
        ValueError: naming the option, the value found and the values that work.
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
        """Channels of a head of width ``head_dim`` that are rotated.

        Raises:
            ValueError: if ``dim`` passes ``head_dim``, or ``dim`` is None and ``head_dim`` is odd.
        """
        dim = head_dim if self.dim is None else self.dim
        must = f"an even number up to head_dim = {head_dim}"
        check(dim <= head_dim and dim % 2 == 0, "rotary dim", dim, must)
        return dim
