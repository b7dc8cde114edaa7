"""Distillation: sparse layers learn from the dense attention of their own queries and keys."""

from nsa_dist.distillation.distill import DenseDistillation, LayerDistillation, distill_dense

__all__ = ["DenseDistillation", "LayerDistillation", "distill_dense"]
