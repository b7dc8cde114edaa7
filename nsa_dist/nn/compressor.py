"""Compressors: the learned map phi from a compression block to one token.

Keys and values have one compressor each. All KV heads share its weights and position embedding, or
each head has its own. There are no biases: a constant added to every compressed key cancels in the
softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.checks import as_int, check, describe
from nsa_dist.config import NSAConfig
from nsa_kernels import Backend
from nsa_kernels.compressors import COMPRESSORS


def compressor_options(config: NSAConfig, dim: int) -> dict[str, Any]:
    """The options that a built-in compressor of width ``dim`` depends on, as errors name them."""
    hidden = config.compress_hidden or 2 * dim
    return {
        "width": dim,
        "compress": config.compress,
        "compress_block": config.compress_block,
        "compress_hidden": hidden if config.compress == "mlp" else None,
        "compress_per_head": config.compress_per_head,
        "num_kv_heads": config.num_kv_heads if config.compress_per_head else None,
    }


class BlockCompressor(nn.Module):
    """phi of a built-in kind, of which `nsa_kernels.compressors` has the table.

    Args:
        config: sets the kind, the block length l, the hidden width, and weights per head or not.
        dim: width D of the keys or values.

    Parameters (with a leading [G] if ``compress_per_head``):
        position [l, D]: embedding e added to a block's rows, initially zero; not for ``mean``.
        mlp: up [hidden, l*D], down [D, hidden]: down @ silu(up @ vec(x + e)).
        linear: weight [D, l*D].  conv1d: weight [D, l], depthwise.  attention_pool: query [D].

    ``mlp`` and ``linear`` are initialised like torch's linear layers; ``conv1d`` and
    ``attention_pool`` initially compute the mean of the block.
    """

    def __init__(
        self,
        config: NSAConfig,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(
            config.compress != "custom",
            "compress",
            config.compress,
            "one of the built-in kinds for a BlockCompressor",
        )
        dim = as_int("dim", dim, 1)
        self.options = compressor_options(config, dim)
        self.kind = config.compress
        self.block = config.compress_block
        self.dim = dim
        hidden = config.compress_hidden or 2 * dim
        self._parameters_of_kind = COMPRESSORS[self.kind](self.block, dim, hidden)
        heads = (config.num_kv_heads,) if config.compress_per_head else ()
        for name, parameter in self._parameters_of_kind.items():
            empty = torch.empty(heads + parameter.shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's generator."""
        for name, parameter in self.named_parameters():
            init = self._parameters_of_kind[name].init
            if init == "zero":
                parameter.zero_()
            elif init == "mean":
                parameter.fill_(1.0 / self.block)
            else:
                assert init == "linear", init
                bound = 1.0 / math.sqrt(parameter.shape[-1])
                parameter.uniform_(-bound, bound)

    @torch.no_grad()
    def start_as_mean(self) -> None:
        """Set the weights so that a block's token is the mean of its rows."""
        if self.kind not in ("mlp", "linear"):
            drawn = [n for n, p in self._parameters_of_kind.items() if p.init == "linear"]
            assert not drawn, f"{self.kind} needs a start as the mean of a block for {drawn}"
            self.reset_parameters()
            return
        parameters, dim = dict(self.named_parameters()), self.dim
        parameters["position"].zero_()
        if self.kind == "linear":
            self._set_mean(parameters["weight"], 1.0)
            return
        # silu(a) - silu(-a) = a: the first 2D hidden channels give the mean, the others give 0.
        up, down = parameters["up"], parameters["down"]
        must = f"at least 2 * width = {2 * dim} to start as the mean of a block"
        check(up.shape[-2] >= 2 * dim, "compress_hidden", up.shape[-2], must)
        self._set_mean(up[..., :dim, :], 1.0)
        self._set_mean(up[..., dim : 2 * dim, :], -1.0)
        down.zero_()
        channel = torch.arange(dim, device=down.device)
        down[..., channel, channel] = 1.0
        down[..., channel, dim + channel] = -1.0

    def _set_mean(self, weight: Tensor, sign: float) -> None:
        """Fill [..., D, l * D], columns (row of the block, channel), with sign times the mean."""
        channel = torch.arange(self.dim, device=weight.device)
        weight.zero_()
        weight.unflatten(-1, (self.block, self.dim))[..., channel, :, channel] = sign / self.block

    def forward(self, x: Tensor, block_rows: Tensor, backend: Backend) -> Tensor:
        """Compress the blocks that start at ``block_rows``.

        Args:
            x: [E, G, D], a buffer that holds the rows of each block in sequence.
            block_rows: int64 [C].

        Returns:
            [C, G, D] in the dtype of ``x``.
        """
        # By name: FSDP1 and DataParallel set the weights as plain attributes.
        params = {name: getattr(self, name) for name in self._parameters_of_kind}
        return backend.compress(x, block_rows, self.block, self.kind, params)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, block={self.block}, dim={self.dim}"


def is_built_in(compressor: object) -> bool:
    """Whether it is a ``BlockCompressor``, or a wrapper that passes calls and attributes on to one.

    PEFT wraps a module to train a copy of it (``modules_to_save``), as ``original_module``.
    """
    if isinstance(compressor, BlockCompressor):
        return True
    return isinstance(getattr(compressor, "original_module", None), BlockCompressor)


def check_custom(name: str, given: Any, config: NSAConfig, in_use: bool) -> None:
    """Raise ValueError if a custom compressor is missing, or given where none is used.

    Args:
        name: the option.
        in_use: whether the branches in use need this compressor.
    """
    needed = in_use and config.compress == "custom"
    if (given is not None) != needed or not isinstance(given, (nn.Module, type(None))):
        must = "an nn.Module" if needed else "None"
        raise ValueError(
            f"{name} must be {must} with compress={config.compress!r} and "
            f"branches={config.branches}, got {describe(given)}"
        )


def apply_compressor(
    compressor: nn.Module, x: Tensor, block_rows: Tensor, block: int, backend: Backend
) -> Tensor:
    """Run a built-in compressor, or a custom module that maps [C, G, l, D] to [C, G, D].

    Raises:
        ValueError: if the custom module returns anything else.
    """
    if is_built_in(compressor):
        made: Tensor = compressor(x, block_rows, backend)
        return made
    blocks: Any = backend.gather_blocks(x, block_rows, block)
    out = compressor(blocks)
    expected = (*blocks.shape[:2], x.shape[-1])
    if not isinstance(out, Tensor) or out.shape != expected or not out.is_floating_point():
        raise ValueError(
            f"custom compressor must map {tuple(blocks.shape)} to floating point of shape "
            f"{expected}, got {describe(out)}"
        )
    return out.to(x.dtype)
