"""The self-check: each attention of a user's model over P ranks against the same on one rank.

``recording.py`` watches one forward and backward of the model, ``reference.py`` computes an
attention once more on one rank, and ``check.py`` compares the two.
"""

from nsa_dist.self_check.check import check_parallel
from nsa_dist.self_check.report import ParallelReport, TensorDifference

__all__ = ["ParallelReport", "TensorDifference", "check_parallel"]
