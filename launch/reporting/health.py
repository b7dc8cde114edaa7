"""Checks of a run: each step's loss and gradient norm, and the state before it is saved.

Engines skip, on the device, an update whose gradient norm is not finite; a loss that is not finite
makes the norm so (``engines.base.spoil_gradients``). Here skipped steps are counted and reported,
and a run that cannot recover ends. All decisions follow from numbers that are the same on every
rank, so that every rank ends at the same step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from launch.processes.ranks import Ranks
from launch.reporting.report import Report
from launch.settings import OptimizerSettings

HUGE_NORM = 1e6
"""A larger gradient norm is always reported."""
HUGE_RATIO = 1e3
"""A gradient norm larger than this times the median of the latest norms is reported."""
LATEST = 100
"""Number of norms in the median, which is used once there are a tenth of them."""


class Health:
    """Checks every step one step late, so that the device never waits for the host.

    Attributes:
        skipped: steps of this process without an update.
        in_a_row: those of them since the last update.
        stops: whether any rank had been asked to stop at the last step checked.
    """

    def __init__(self, settings: OptimizerSettings, report: Report) -> None:
        self.skipped = self.in_a_row = 0
        self.stops = False
        self._most, self._report = settings.max_skipped, report
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._norms: deque[float] = deque(maxlen=LATEST)
        self._reported = 0.0

    def add(self, step: int, values: Tensor) -> None:
        """Take what ``train_step`` returned for a step, counted from 1; check the step before it.

        Raises:
            FloatingPointError: on every rank, if the run cannot go on.
        """
        done = None
        if values.is_cuda:
            host = torch.empty(3, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values[:3], non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._waiting.append((step, values, done))
        while len(self._waiting) > 1:
            self._check()

    def settle(self) -> None:
        """Check all steps so far; waits for the device.

        Raises:
            FloatingPointError: as ``add``.
        """
        while self._waiting:
            self._check()

    def _check(self) -> None:
        step, values, done = self._waiting.popleft()
        if done is not None:
            done.synchronize()
        loss, norm, stops = values[:3].tolist()
        self.stops |= stops > 0
        wrong = not_finite(loss, norm)
        if math.isfinite(norm):
            self.in_a_row = 0
            self._report_huge(step, norm)
            if wrong:
                raise FloatingPointError(
                    f"step {step}: {wrong} although its gradients are finite, and the update was "
                    "made; resume from an earlier checkpoint"
                )
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self._report.skipped(step, wrong, self.in_a_row)
        if self.in_a_row >= max(self._most, 1):
            which = f"{step - self.in_a_row + 1} to {step}" if self.in_a_row > 1 else f"{step}"
            raise FloatingPointError(
                f"optimizer.max_skipped must be above {self.in_a_row} to go on, got {self._most}: "
                f"the update was skipped in steps {which}, {wrong} in the last; a smaller "
                "optimizer.lr or other data may help from the latest checkpoint on"
            )

    def _report_huge(self, step: int, norm: float) -> None:
        """Report a norm that is finite but huge, once. It is reported again after normal norms, or
        if it has grown by the same factor again."""
        few = len(self._norms) * 10 < LATEST
        usual = math.inf if few else statistics.median(self._norms)
        is_huge = norm > HUGE_NORM or norm > HUGE_RATIO * usual
        if is_huge and norm > HUGE_RATIO * self._reported:
            before = "" if few else f"; the median of the {len(self._norms)} before is {usual:.3g}"
            self._report.line(f"step {step}: warning: the gradient norm is {norm:.3g}{before}")
            self._reported = norm
        if not is_huge:
            self._norms.append(norm)
            self._reported = 0.0


def not_finite(loss: float, norm: float) -> str:
    """Which of the two is not finite, in words; empty if both are finite."""
    values = (("the loss", loss), ("the gradient norm", norm))
    return " and ".join(f"{name} is {value}" for name, value in values if not math.isfinite(value))


def finite_mean(values: Sequence[float]) -> float:
    """The mean of the finite values; nan if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def check_validation(loss: float, step: int) -> None:
    """Refuse a validation loss that is not finite.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the validation loss after step {step} is {loss} although all weights are finite; "
            "resume from an earlier checkpoint with a smaller optimizer.lr"
        )


def check_state(tensors: Iterable[tuple[str, Tensor]], when: str, ranks: Ranks) -> None:
    """Refuse a state that is not finite; collective.

    Args:
        tensors: this rank's part of weights and optimizer state, by name; integers are not checked.
        when: of which moment the state is, such as "after step 10".

    Raises:
        FloatingPointError: on every rank, naming the first three such tensors of each rank.
    """
    # If any element is not finite, the largest magnitude is not; this needs no copy of a tensor.
    largest = {
        name: torch.linalg.vector_norm(tensor.detach(), math.inf)
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
    }
    flags = [value.isfinite().all().to(ranks.device) for value in largest.values()]
    wrong = torch.stack(flags).logical_not() if flags else torch.zeros(1, device=ranks.device)
    if not int(ranks.total(wrong.sum())):
        return
    bad = wrong.tolist()
    mine = [name for name, is_wrong in zip(largest, bad, strict=True) if is_wrong] if flags else []
    found: list[list[str]] = [[]] * ranks.size
    dist.all_gather_object(found, mine[:3])
    which = "; ".join(f"rank {rank}: {', '.join(n)}" for rank, n in enumerate(found) if n)
    raise FloatingPointError(
        f"the state {when} is not finite ({which}); resume from an earlier checkpoint"
    )
