"""One rank of an exchange over slow links: blocks fetched, and their gradients returned.

    python -m tests.distributed.slow_links RANK SIZE FOLDER

Run in the network namespace of the rank's node. Writes seconds and bytes between nodes, by way, to
``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import CommunicationCounter, NSAConfig, get_plan
from nsa_dist.comm import Channel, HeadFetch, begin_request, fetch_all_visible
from nsa_dist.comm.group import context_group
from nsa_dist.comm.nodes import nodes_of_neighbours
from nsa_dist.plan import Plan

RANKS_PER_NODE = 4
LENGTH = 8192
CONFIG = NSAConfig(4, 2, 64, select_block=64, num_selected=16)
STRETCH = 2048
"""Coherent choices: so many neighbouring queries choose the same blocks, beside the forced ones."""
WAYS = {"full": 1, "chosen": 3, "two levels": 3}
"""How often each is timed: all visible blocks; chosen ones, by each rank; chosen ones, by node."""


def coherent_choices(plan: Plan) -> Tensor:
    """int32 [N, G, n], of this rank's queries; every rank draws the same."""
    torch.manual_seed(3)
    select, free = CONFIG.select_block, CONFIG.num_selected - 3
    drawn = torch.rand(LENGTH // STRETCH, CONFIG.num_kv_heads, free)
    own = plan.positions // select
    first = plan.positions // STRETCH * STRETCH // select
    far = (drawn[plan.positions // STRETCH] * first[:, None, None]).int()
    forced = torch.stack((torch.zeros_like(own), (own - 1).clamp(min=0), own), dim=-1).int()
    chosen = torch.cat((forced[:, None].expand(-1, CONFIG.num_kv_heads, -1), far), dim=-1)
    chosen = chosen.sort(-1).values
    again = torch.cat((torch.zeros_like(chosen[..., :1]).bool(), chosen.diff(dim=-1) == 0), dim=-1)
    chosen = torch.where(again, CONFIG.select_block * LENGTH, chosen).sort(-1).values
    return torch.where(chosen == CONFIG.select_block * LENGTH, -1, chosen).int()


def exchange(plan: Plan, way: str) -> tuple[float, int, int]:
    """Seconds of all messages of the selected branch, forward and backward, and bytes between
    nodes that came in and went out (on one level without the request's few)."""
    counter, context = CommunicationCounter(), context_group(dist.group.WORLD)
    nodes = nodes_of_neighbours(RANKS_PER_NODE, context.size)
    channel = Channel(context, counter, plan, nodes)
    asking = channel if way == "two levels" else Channel(context, CommunicationCounter(), plan)
    chosen = coherent_choices(plan)
    rows = plan.halos["selected"].num_rows
    k, v = (torch.randn(rows, CONFIG.num_kv_heads, 64).requires_grad_() for _ in range(2))
    dist.barrier()
    start = time.monotonic()
    if way == "full":
        fetch = fetch_all_visible(CONFIG.num_kv_heads, plan)
    else:
        fetch = begin_request(chosen, plan, asking).finish()
    fetched: list[Tensor] = []
    for g, transfer in enumerate(fetch.transfers):
        head = HeadFetch(k[:, g : g + 1], v[:, g : g + 1], channel)
        head.begin(transfer)
        fetched += head.finish()
    torch.autograd.backward(fetched, [torch.ones_like(x) for x in fetched])
    dist.barrier()
    seconds = time.monotonic() - start
    came, went = counter.received_between_nodes, counter.sent_between_nodes
    return seconds, sum(came.values()), sum(went.values())


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    plan = get_plan(
        *(CONFIG, "zigzag", dist.group.WORLD),
        batch=1,
        local_length=LENGTH // size,
        cu_seqlens=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    exchange(plan, "full")  # Makes connections.
    found = {way: [exchange(plan, way) for _ in range(runs)] for way, runs in WAYS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
