"""Who holds, needs and sends what: pure functions of the config, the layout and the batch."""

from nsa_dist.plan.build import build_plan
from nsa_dist.plan.tables import BlockOwnership, Halo, Plan

__all__ = ["BlockOwnership", "Halo", "Plan", "build_plan"]
