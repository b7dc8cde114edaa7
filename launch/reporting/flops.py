"""Operations of a step that the model asks for, and what share of a GPU's peak they are (MFU).

Counted are matrix products, two operations a multiplication and addition, forward and backward:

    6 N T + layers (attention + choice + compression)

N are the weights that each of T tokens is multiplied with: all matrices but the embedding's table
and the compressors. Backward costs twice what forward does, once where weights are not trained
(``optimizer.train_only``). A stage that distils (``optimizer.distill_dense``) has no head, no
backward through weights that stay, and forwards of dense attention beside the sparse one. Attention
is counted by the (query, key) pairs of each branch, by the documents of the batch as they are
packed:

    NSA:    6 (Dk + Dv) H (pairs compressed + pairs selected + pairs window)
    dense:  6 (Dk + Dv) H n (n + 1) / 2 for each document of n tokens

The scores by which blocks are chosen are those of the compressed branch; without that branch they
are 2 Dk H products a compressed pair of their own, without a gradient. What is computed again in
backward, by kernels or by ``model.recompute``, and masked pairs count as time only. So does what
dense attention would do and this one does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from launch.bench.work import pairs_at
from launch.engines.base import is_decayed
from launch.estimating.costs import call_flops
from launch.model import Decoder, compute_dtype
from launch.processes.ranks import Ranks
from launch.settings import Settings

PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense products in bfloat16 a second, by the makers' data sheets; a name that contains another one
stands before it."""


def peak_flops(gpu: str) -> float | None:
    """The peak of a GPU by its name; None if it is not known here."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


class StepFlops:
    """Counts the operations of streams of a run's model.

    Attributes:
        weights: N, that each token is multiplied with.
        trained: those of them that are trained.
    """

    def __init__(self, settings: Settings, vocab_size: int) -> None:
        with torch.device("meta"):
            decoder = Decoder(settings, vocab_size)
        counted: list[Tensor] = [
            p
            for name, p in decoder.named_parameters()
            if is_decayed(name, p) and "compressor" not in name and name != "embedding.weight"
        ]
        if decoder.head is None:
            counted.append(decoder.embedding.weight)
        self.weights = sum(p.numel() for p in counted)
        self.trained = sum(p.numel() for p in counted if p.requires_grad)
        self._distills = settings.optimizer.distill_dense
        if self._distills:
            head = decoder.embedding if decoder.head is None else decoder.head
            self.weights -= head.weight.numel()
        self._config = settings.attention
        is_dense = [settings.model.is_dense(layer) for layer in range(settings.model.layers)]
        self._dense, self._sparse = is_dense.count(True), is_dense.count(False)

    def of(self, streams: Iterable[Tensor]) -> float:
        """Operations of one forward and backward.

        Args:
            streams: each one's ``cu_seqlens``, int32 [documents + 1] on the CPU.
        """
        return sum(self._of_stream(cu_seqlens.long()) for cu_seqlens in streams)

    def _of_stream(self, cu_seqlens: Tensor) -> float:
        config, tokens = self._config, int(cu_seqlens[-1])
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        pairs = pairs_at(config, torch.arange(tokens) - starts)
        a_pair = 6.0 * (config.head_dim + config.value_dim) * config.num_heads
        by_branch = {
            "compressed": pairs.compressed,
            "selected": pairs.selected,
            "window": pairs.window,
        }
        sparse = a_pair * sum(by_branch[name] for name in config.branches)
        if "selected" in config.branches and "compressed" not in config.branches:
            sparse += 2.0 * config.head_dim * config.num_heads * pairs.compressed
        compression = call_flops(config, pairs, tokens)["compression"]
        sparse += compression.forward + compression.backward
        if self._distills:
            sparse += a_pair / 3 * pairs.dense
            total = 2.0 * (self.weights + self.trained) * tokens
            return total + self._sparse * sparse + self._dense * a_pair / 3 * pairs.dense
        total = (4.0 * self.weights + 2.0 * self.trained) * tokens
        return total + self._sparse * sparse + self._dense * a_pair * pairs.dense


class Speed:
    """How fast a run is, by torchtitan's names of metrics."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self._size, self.peak = ranks.size, None
        # Other dtypes have other peaks.
        if ranks.device.type == "cuda" and compute_dtype(settings, ranks.device) == torch.bfloat16:
            self.peak = peak_flops(torch.cuda.get_device_name(ranks.device))

    def metrics(self, tokens: int, flops: float, seconds: float, steps: int) -> dict[str, float]:
        """Tokens and TFLOP a second and process (a GPU each), the share of the peak in per cent
        where that is known, and seconds a step.

        Args:
            tokens, flops: of all ranks in ``seconds`` and ``steps``.
        """
        rate = flops / seconds / self._size
        found = {
            "throughput(tps)": tokens / seconds / self._size,
            "tflops": rate / 1e12,
            "time_metrics/end_to_end(s)": seconds / steps,
        }
        if self.peak is not None:
            found["mfu(%)"] = 100 * rate / self.peak
        return found
