"""What holds for every test: which ones run, one thread, a fixed seed, poisoned memory."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator

# cuBLAS reads this once, when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.distributed.ranks import Ranks, rank_pool
from tests.interpreter import quicken
from tests.on_gpus import take_own_gpu

take_own_gpu()  # Before the next line starts CUDA.

# Without a GPU kernels run in Triton's interpreter. Triton reads this when it is imported, which
# torch does below.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Also fills uninitialised tensors with NaN, so that a read of memory never written shows.
torch.use_deterministic_algorithms(True)
quicken()

# A slow test's limit: ten times what one takes beside others on two cores.
SLOW_SECONDS = 900


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--threads", type=int, default=1, help="threads of this process's tensors")


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts with & ignores it, and so would all that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Many tests start processes of their own, and one thread fixes the order of every sum.
    torch.set_num_threads(config.getoption("--threads"))
    given = os.environ.get("PYTHONWARNINGS")
    filters = [*([given] if given else []), *config.getini("filterwarnings")]
    os.environ["PYTHONWARNINGS"] = ",".join(filters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    skip_multi_gpu = pytest.mark.skip(reason=f"needs two CUDA devices, found {gpus}")
    kept, deselected = [], []
    for item in items:
        if item.get_closest_marker("slow"):
            if not config.getoption("--run-slow"):
                deselected.append(item)
                continue
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
        kept.append(item)
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(skip_gpu)
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(skip_multi_gpu)
    items[:] = kept
    config.hook.pytest_deselected(items=deselected)


def pytest_collection_finish() -> None:
    # Modules and tests stay to the end: no collection need look through them again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """ranks_of(P): P gloo processes that all tests share, started at the first request."""
    with rank_pool(ends_groups=True) as get:
        yield get
