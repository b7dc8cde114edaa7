"""The fetch of blocks where links have two levels: once a node, then shared inside it.

A block of another node that several ranks of a node want is received by one of them, its
*carrier*: the rank with the owner's place in its node. So every rank sends and receives its share
of what crosses nodes. Two messages take the place of each one:

    request     each rank tells its node's ranks what it wants of what they own or carry
                each carrier tells the owners what its node wants
    fetch       owners send to readers of their node, and to the carriers of other nodes
    share       carriers send to the readers of their node
    share_grad  readers return to carriers, which add in float32 (float64), in rank order, to their
                own gradient, and round once
    fetch_grad  readers of the owner's node and carriers return to the owner, which adds

Sizes are known after one wait of the host, as on one level. A rank keeps what it carries beside
what it reads. Exchanges are all-to-alls of the whole group whose other splits are empty.

Letters: G KV heads, P ranks, L ranks of a node, B selection blocks of all documents, ordered by
owner; M blocks that a rank carries; F fetched tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import add_returned_rows, begin_all_to_all
from nsa_dist.comm.fork import Fork
from nsa_dist.comm.nodes import Nodes
from nsa_dist.comm.work import Work
from nsa_dist.plan import BlockOwnership


@dataclass(frozen=True, eq=False)
class Share:
    """What the ranks of a node pass to each other of one transfer.

    Attributes:
        send_rows: int64 [sum(send_counts)], rows of what the fetch brought, by receiving rank.
        send_counts, recv_counts: tokens for and from each rank.
    """

    send_rows: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Requests:
    """Who wants which blocks, and by which way.

    Attributes:
        asked_GPB: bool [G, P, own blocks], which own blocks each rank fetches.
        fetched_GB: bool, what this rank fetches of owners, for itself or its node.
        passed_GPM: bool, which blocks that this rank carries each rank wants of it.
        shared_GB: bool, what this rank gets of carriers.
    """

    asked_GPB: Tensor
    fetched_GB: Tensor
    passed_GPM: Tensor
    shared_GB: Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """The ranks of a group as one rank sees them.

    Attributes:
        counts: blocks of each owner.
    """

    nodes: Nodes
    rank: int
    counts: tuple[int, ...]

    @property
    def mates(self) -> tuple[int, ...]:
        """The ranks of the own node."""
        return self.nodes.mates(self.rank)

    @property
    def sources(self) -> list[int]:
        """The owners whose blocks this rank carries, node after node."""
        return [owner for owner in self.nodes.counterparts(self.rank) if owner != self.rank]

    @property
    def routes(self) -> list[tuple[int, list[int]]]:
        """Each carrier of the own node but this one, with the owners that it carries from."""
        found = []
        for mate in self.mates:
            if mate != self.rank:
                owners = [owner for owner in self.nodes.counterparts(mate) if owner != mate]
                found.append((mate, owners))
        return found

    def of_owners(self, values_GB: Tensor) -> list[Tensor]:
        """[G, blocks] of each owner."""
        return list(values_GB.split(self.counts, dim=-1))

    def carried(self, values_GB: Tensor) -> Tensor:
        """[G, M], of what this rank carries."""
        parts = self.of_owners(values_GB)
        return torch.cat([parts[owner] for owner in self.sources], dim=-1)

    def by_route(self, values_GB: Tensor) -> list[Tensor]:
        """[G, blocks] of each other carrier of the node."""
        parts = self.of_owners(values_GB)
        return [torch.cat([parts[o] for o in owners], dim=-1) for _, owners in self.routes]

    def from_routes(self, of_routes: Sequence[Tensor], like_GB: Tensor) -> Tensor:
        """The reverse of ``by_route``; blocks that no route brings are those of ``like_GB``."""
        parts = self.of_owners(like_GB)
        for (_, owners), values in zip(self.routes, of_routes, strict=True):
            of_owners = values.split([self.counts[owner] for owner in owners], dim=-1)
            for owner, part in zip(owners, of_owners, strict=True):
                parts[owner] = part
        return torch.cat(parts, dim=-1)


def places_of(blocks: BlockOwnership, channel: Channel) -> Places:
    """This rank's view; the channel has nodes."""
    assert channel.nodes is not None
    return Places(channel.nodes, channel.group.rank, blocks.counts)


def begin_node_requests(
    wanted_GB: Tensor, blocks: BlockOwnership, channel: Channel
) -> Work[Requests]:
    """Begin to ask owners for what the ranks of the node want, after these have told each other.

    Args:
        wanted_GB: bool, what this rank reads of others.
    """
    places = places_of(blocks, channel)
    num_heads, counts = wanted_GB.shape[0], places.counts
    own, size, rank = counts[places.rank], channel.group.size, places.rank
    parts = places.of_owners(wanted_GB.view(torch.uint8))

    # To each rank of the node, of what it owns and carries.
    told = [parts[owner].flatten() for mate in places.mates for owner in _owns(places, mate)]
    send = _by_rank(size, {m: _total(counts, _owns(places, m)) for m in places.mates}, num_heads)
    of_own = _total(counts, _owns(places, rank))
    receive = _by_rank(size, dict.fromkeys(places.mates, of_own), num_heads)
    heard = begin_all_to_all(torch.cat(told), send, receive, channel, "request").finish()
    of_mates = heard.view(len(places.mates), num_heads * of_own).split(
        [num_heads * counts[owner] for owner in _owns(places, rank)], dim=1
    )
    asked_of = {
        owner: part.view(len(places.mates), num_heads, counts[owner]).bool()
        for owner, part in zip(_owns(places, rank), of_mates, strict=True)
    }

    # To each owner of what this rank carries, what some rank of the node wants.
    union = {owner: asked_of[owner].any(0) for owner in places.sources}
    message = torch.cat([union[owner].view(torch.uint8).flatten() for owner in places.sources])
    send = _by_rank(size, {owner: counts[owner] for owner in places.sources}, num_heads)
    receive = _by_rank(size, dict.fromkeys(places.sources, own), num_heads)
    answer = begin_all_to_all(message, send, receive, channel, "request")

    def unpack(rows: Tensor) -> Requests:
        of_carriers = rows.view(len(places.sources), num_heads, own).bool().unbind()
        asked = [asked_of[rank].new_zeros(num_heads, own)] * size
        for at, mate in enumerate(places.mates):
            asked[mate] = asked_of[rank][at]
        for carrier, part in zip(places.sources, of_carriers, strict=True):
            asked[carrier] = part
        direct = places.of_owners(wanted_GB)
        for owner in range(size):
            if not places.nodes.together(owner, rank):
                direct[owner] = union.get(owner, torch.zeros_like(direct[owner]))
        carried_GLM = torch.cat([asked_of[owner] for owner in places.sources], dim=-1)
        passed = [torch.zeros_like(carried_GLM[0])] * size
        for at, mate in enumerate(places.mates):
            if mate != rank:  # What this rank carries for itself is there already.
                passed[mate] = carried_GLM[at]
        nothing = torch.zeros_like(wanted_GB)
        return Requests(
            torch.stack(asked, dim=1),
            torch.cat(direct, dim=-1),
            torch.stack(passed, dim=1),
            places.from_routes(places.by_route(wanted_GB), nothing),
        )

    return answer.then(unpack)


def count_shares(requests: Requests, lengths_B: Tensor, places: Places) -> Tensor:
    """Tokens to share and to get shared, and blocks to share, by head and rank: int64 [3, G, P].

    Args:
        lengths_B: int64, tokens of each block.
    """
    passed = requests.passed_GPM
    send = (passed * places.carried(lengths_B)).sum(-1)
    recv = list(torch.zeros_like(send).unbind(1))
    of_routes = places.by_route(requests.shared_GB * lengths_B)
    for (mate, _), tokens in zip(places.routes, of_routes, strict=True):
        recv[mate] = tokens.sum(-1)
    return torch.stack((send, torch.stack(recv, dim=1), passed.sum(-1)))


def share_starts(requests: Requests, lengths_B: Tensor, places: Places) -> Tensor:
    """The place of each shared block among a head's shared tokens, int64 [G, B]."""
    tokens = places.by_route(requests.shared_GB * lengths_B)
    ordered = torch.cat(tokens, dim=-1)
    starts = ordered.cumsum(-1) - ordered
    of_routes = starts.split([part.shape[-1] for part in tokens], dim=-1)
    return places.from_routes(of_routes, torch.zeros_like(requests.shared_GB, dtype=starts.dtype))


def begin_share(
    fetching: Work[Tensor], buffer: Tensor, share: Share, channel: Channel
) -> Work[Tensor]:
    """Wait for the fetch in the current stream, and begin to share inside the node.

    Args:
        fetching: receives in the first rows of ``buffer``, all but ``sum(share.recv_counts)``.

    Returns:
        A ``Work`` with ``buffer``, which another stream may finish.
    """
    fetching.finish()
    rows = buffer[share.send_rows]
    sharing = begin_all_to_all(
        rows,
        share.send_counts,
        share.recv_counts,
        channel,
        "share",
        into=buffer[len(buffer) - sum(share.recv_counts) :],
    )
    return sharing.then(lambda _: Fork.hand_over(buffer, rows))


def begin_return(
    grad: Tensor,
    share: Share,
    recv_counts: Sequence[int],
    send_counts: Sequence[int],
    channel: Channel,
) -> Work[Tensor]:
    """Begin to return gradients of fetched rows: to carriers, and the sums of these to owners.

    Args:
        grad: [F, ...], of the fetched rows, then of the shared ones.
        recv_counts, send_counts: tokens of the fetch from and for each rank.

    Returns:
        A ``Work`` with [sum(send_counts), ...], what readers and carriers returned to this rank.
    """
    fork, fetched = Fork(grad.device), sum(recv_counts)
    with fork.run(grad):
        returned = begin_all_to_all(
            grad[fetched:], share.recv_counts, share.send_counts, channel, "share_grad"
        ).finish()
        total = add_returned_rows(grad[:fetched], returned, share.send_rows, share.send_counts)
        summed = total.to(grad.dtype)
        returning = begin_all_to_all(summed, recv_counts, send_counts, channel, "fetch_grad")
    return returning.then(lambda rows: Fork.hand_over(rows, summed))


def _owns(places: Places, mate: int) -> tuple[int, ...]:
    """The owners whose blocks a rank has to give: itself, and those that it carries from."""
    return places.nodes.counterparts(mate)


def _total(counts: Sequence[int], owners: Sequence[int]) -> int:
    return sum(counts[owner] for owner in owners)


def _by_rank(size: int, counts: dict[int, int], times: int) -> list[int]:
    """Counts of some ranks, times a number; of the others 0."""
    return [times * counts.get(rank, 0) for rank in range(size)]
