"""The processes that stand for ranks, as tests share them."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from tests.distributed.ranks import rank_pool


def test_what_is_broken_off_answers_no_later_test() -> None:
    """As by a test's time limit, which is a signal too."""

    def broken_off(*_: Any) -> None:
        raise TimeoutError("the test took too long")

    before = signal.signal(signal.SIGUSR1, broken_off)
    try:
        with rank_pool() as get:
            assert get(1).run(abs, -1) == [1]
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(TimeoutError):
                get(1).run(time.sleep, 2)
            assert get(1).run(abs, -3) == [3]
    finally:
        signal.signal(signal.SIGUSR1, before)
