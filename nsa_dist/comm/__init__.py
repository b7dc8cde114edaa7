"""Communication between ranks.

Every transfer is a pair: ``begin_...`` sends and returns a ``Work``, whose ``finish`` waits and
returns what arrived. Backward runs the pair in reverse: the receiving half begins the return of
gradients, the sending half finishes it. ``nsa_dist.attention.flow`` sets the order in which a pass
begins and finishes transfers.
"""

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.fetch import (
    FetchPlan,
    HeadFetch,
    begin_request,
    fetch_all_visible,
    heads_per_transfer,
)
from nsa_dist.comm.gather import begin_gather
from nsa_dist.comm.halo import begin_halo
from nsa_dist.comm.work import Work

__all__ = [
    "Channel",
    "CommunicationCounter",
    "FetchPlan",
    "HeadFetch",
    "Work",
    "begin_gather",
    "begin_halo",
    "begin_request",
    "fetch_all_visible",
    "heads_per_transfer",
]
