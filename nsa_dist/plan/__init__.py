"""The plan: which rank holds, needs and sends what. It only depends on config, layout and batch."""

from nsa_dist.plan.build import build_plan
from nsa_dist.plan.grid import Grid
from nsa_dist.plan.tables import BlockOwnership, Halo, Plan

__all__ = ["BlockOwnership", "Grid", "Halo", "Plan", "build_plan"]
