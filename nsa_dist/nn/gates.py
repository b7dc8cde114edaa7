"""Gates: the weight in (0, 1) of each branch's output, per token and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa_dist.config import BRANCHES, NSAConfig


def initial_gate_logits(config: NSAConfig) -> Tensor:
    """``gate_init`` of the branches in use, equal for all heads: float32 [H, nb].

    Flattened it is the initial bias of a linear layer to logits, whose rows are (head, branch).
    """
    logits = [config.gate_init[BRANCHES.index(branch)] for branch in config.branches]
    return torch.tensor(logits).expand(config.num_heads, -1)


class LogitLinear(nn.Linear):
    """Linear layer to logits [H*nb] whose bias starts at ``gate_init``.

    It sets the bias within its own constructor, because ZeRO 3 may shard the weights right after.
    """

    def __init__(self, in_features: int, config: NSAConfig, **factory: object) -> None:
        self.config = config  # nn.Linear's constructor calls reset_parameters, which reads it.
        width = config.num_heads * len(config.branches)
        super().__init__(in_features, width, **factory)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.bias.copy_(initial_gate_logits(self.config).flatten())

    @torch.no_grad()
    def start_as_constant(self) -> None:
        self.weight.zero_()
        self.bias.copy_(initial_gate_logits(self.config).flatten())


class LinearGate(nn.Module):
    """sigmoid(W x + b), W [H*nb, hidden] with rows ordered (head, branch); b starts at
    ``gate_init``."""

    def __init__(self, hidden_size: int, config: NSAConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        self.proj = LogitLinear(hidden_size, config, **factory)

    def reset_parameters(self) -> None:
        """Initialise W like torch's linear layers, and b to ``gate_init``."""
        self.proj.reset_parameters()

    def start_as_constant(self) -> None:
        """Set the weights so that the logits of every token are ``gate_init``."""
        self.proj.start_as_constant()

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to gates [..., H, nb], float32 (float64 for float64)."""
        return gates_from_logits(self.proj(x), self.config)


class MLPGate(nn.Module):
    """sigmoid(W2 silu(W1 x + b1) + b2), W1 [gate_hidden, hidden]; b2 starts at ``gate_init``."""

    def __init__(self, hidden_size: int, config: NSAConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        gate_hidden = config.gate_hidden or config.head_dim
        self.up = nn.Linear(hidden_size, gate_hidden, **factory)  # type: ignore[arg-type]
        self.down = LogitLinear(gate_hidden, config, **factory)

    def reset_parameters(self) -> None:
        """Initialise the weights like torch's linear layers, and b2 to ``gate_init``."""
        self.up.reset_parameters()
        self.down.reset_parameters()

    def start_as_constant(self) -> None:
        """Set W2 and b2 so that the logits of every token are ``gate_init``."""
        self.down.start_as_constant()

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to gates [..., H, nb], float32 (float64 for float64)."""
        return gates_from_logits(self.down(nn.functional.silu(self.up(x))), self.config)


class StaticGate(nn.Module):
    """sigmoid of learned logits [H, nb], the same for every token; they start at ``gate_init``."""

    def __init__(self, hidden_size: int, config: NSAConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_heads, len(config.branches))
        self.logits = nn.Parameter(torch.empty(shape, **factory))  # type: ignore[call-overload]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the logits to ``gate_init``."""
        self.logits.copy_(initial_gate_logits(self.config))

    def start_as_constant(self) -> None:
        """As ``reset_parameters``."""
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to gates [..., H, nb], float32 (float64 for float64)."""
        gates = gates_from_logits(self.logits.flatten(), self.config)
        return gates.expand(*x.shape[:-1], *gates.shape)


def gates_from_logits(logits: Tensor, config: NSAConfig) -> Tensor:
    """The sigmoid of logits, in the shape that ``native_sparse_attention`` takes.

    Args:
        logits: [..., H*nb] of any floating dtype, ordered (head, branch), branches in the order of
            ``config.branches``.

    Returns:
        gates [..., H, nb], float32 (float64 for float64).
    """
    # 16-bit gates would round every branch's output once more, to 8 or 11 bits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.sigmoid(logits).unflatten(-1, (config.num_heads, len(config.branches)))


def make_gate(hidden_size: int, config: NSAConfig, **factory: object) -> nn.Module:
    """The module for ``config.gate``."""
    kind = {"linear": LinearGate, "mlp": MLPGate, "static": StaticGate}[config.gate]
    return kind(hidden_size, config, **factory)
