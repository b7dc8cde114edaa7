"""What moves between ranks: each transfer is an autograd pair whose backward runs it in reverse."""

from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.fetch import FetchBlocks, FetchPlan, Transfer, request_blocks
from nsa_dist.comm.gather import GatherCompressed
from nsa_dist.comm.halo import HaloExchange

__all__ = [
    "CommunicationCounter",
    "FetchBlocks",
    "FetchPlan",
    "GatherCompressed",
    "HaloExchange",
    "Transfer",
    "request_blocks",
]
