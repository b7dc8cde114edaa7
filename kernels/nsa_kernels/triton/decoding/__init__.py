"""Attention of few queries for each row of a batch, over caches: see operator.py."""

from __future__ import annotations

from nsa_kernels.triton.decoding.operator import attend_few

__all__ = ["attend_few"]
