"""The attention's operators on one device; nothing here knows of ranks or process groups."""

from nsa_kernels.backend import BACKENDS, Backend, get_backend
from nsa_kernels.segments import QuerySegments, Segment

__all__ = ["BACKENDS", "Backend", "QuerySegments", "Segment", "get_backend"]
