"""Native Sparse Attention on the command line of Megatron-LM's programs.

``add_nsa_args`` adds the options of ``NSAConfig`` that Megatron's own do not tell.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from nsa_dist.checks import check
from nsa_dist.config import BRANCHES, NSAConfig
from nsa_kernels.compressors import COMPRESSORS

SPEC = ["nsa_dist.adapters.megatron", "nsa_spec"]
"""The value of ``--spec`` that makes layers sparse in every release."""

DENSE_GATES = (-10.0, 0.0, 0.0)
"""Gate logits of (compressed, selected, window): 0.5 + 0.5 + 4.5e-5, one dense attention."""


class _Flag(NamedTuple):
    """An option of ``NSAConfig`` as a flag.

    type: of its value, or of each of its values; None for a flag without one.
    keywords: more arguments of ``add_argument``.
    """

    option: str
    type: Callable[[str], Any] | None
    help: str
    keywords: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)


FLAGS = (
    _Flag("compress_block", int, "tokens in a compression block"),
    _Flag("compress_stride", int, "tokens between the starts of compression blocks"),
    _Flag("select_block", int, "tokens in a selection block"),
    _Flag("num_selected", int, "blocks that a query selects, the forced ones included"),
    _Flag("num_init_blocks", int, "blocks at the start that every query selects"),
    _Flag("num_local_blocks", int, "newest blocks that every query selects"),
    _Flag("window", int, "tokens of the sliding window"),
    _Flag("branches", str, "branches in use", {"nargs": "+", "choices": BRANCHES}),
    _Flag("compress", str, "kind of compressor", {"choices": tuple(COMPRESSORS)}),
    _Flag("compress_hidden", int, "hidden width of --nsa-compress mlp"),
    _Flag("compress_per_head", None, "compressor weights for each KV head"),
    _Flag("gate", str, "source of the gates", {"choices": ("linear", "mlp", "static")}),
    _Flag("gate_hidden", int, "hidden width of --nsa-gate mlp"),
    _Flag(
        "gate_init",
        float,
        "gate logits of the compressed, selected and window branch at the start",
        {"nargs": 3, "metavar": ("C", "S", "W")},
    ),
)


def add_nsa_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of this attention, for ``extra_args_provider`` of Megatron-LM's programs.

    It also makes ``--spec nsa_dist.adapters.megatron nsa_spec`` the default: a program that knows
    the flags builds sparse layers.

    Args:
        parser: of Megatron's arguments.

    Returns:
        ``parser``.
    """
    group = parser.add_argument_group(title="Native Sparse Attention")
    defaults = {field.name: field.default for field in fields(NSAConfig)}
    for flag in FLAGS:
        name = f"--nsa-{flag.option.replace('_', '-')}"
        if flag.type is None:
            group.add_argument(name, action="store_true", help=flag.help)
        else:
            default = defaults[flag.option]
            text = flag.help if default is None else f"{flag.help}; default {_shown(default)}"
            group.add_argument(name, type=flag.type, help=text, **flag.keywords)
    group.add_argument(
        "--nsa-shared-kv",
        action="store_true",
        help="one key and value for all branches, as dense models have them",
    )
    group.add_argument(
        "--nsa-from-dense",
        action="store_true",
        help="start near dense attention, for --load of a dense checkpoint with --finetune: "
        "constant gates of 0, 0.5 and 0.5 (unless --nsa-gate-init), compressors that take means; "
        "needs --nsa-shared-kv",
    )
    group.add_argument("--nsa-backend", default="auto", help="kernels: auto, triton or pytorch")
    parser.set_defaults(spec=SPEC)
    return parser


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def nsa_config_from_args(args: Namespace, config: TransformerConfig) -> NSAConfig:
    """The attention that a command line describes.

    Args:
        args: of a parser that ``add_nsa_args`` has seen; options that it lacks keep the defaults
            of ``NSAConfig``.
        config: sets heads and widths.

    Raises:
        ValueError: if an option has a value that is not allowed.
    """
    given = {flag.option: getattr(args, f"nsa_{flag.option}", None) for flag in FLAGS}
    options: dict[str, Any] = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in given.items()
        if value is not None
    }
    from_dense = starts_from_dense(args)
    shared = getattr(args, "nsa_shared_kv", False)
    check(shared or not from_dense, "nsa_shared_kv", shared, "True with --nsa-from-dense")
    if from_dense:
        options.setdefault("gate_init", DENSE_GATES)
    return NSAConfig(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        scale=config.softmax_scale,
        independent_kv=not shared,
        **options,
    )


def starts_from_dense(args: Namespace) -> bool:
    """Whether layers start near dense attention."""
    return bool(getattr(args, "nsa_from_dense", False))


def uses_transformer_engine(args: Namespace) -> bool:
    """Whether layers are made of TransformerEngine's modules."""
    return bool(getattr(args, "transformer_impl", "local") == "transformer_engine")


def backend_of(args: Namespace) -> str:
    """The backend that a command line names."""
    return str(getattr(args, "nsa_backend", "auto"))


def program_arguments() -> Namespace | None:
    """The arguments of the Megatron-LM program that runs in this process, if one does."""
    variables = sys.modules.get("megatron.training.global_vars")
    arguments: Namespace | None = getattr(variables, "_GLOBAL_ARGS", None)
    return arguments
