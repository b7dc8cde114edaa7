"""Finding a hang: what each rank waits for, told before ``run.timeout`` ends the run.

A run is asked for a sign of life at every step. A rank that gives none for ``SHARE`` of the timeout
writes where its threads are to ``stalls/rank_00003.txt`` in the run's folder. Rank 0 then reads the
files of all ranks and prints which wait together, and who did not answer: a rank that is stopped or
dead, or whose machine is gone. The watchdog itself ends nothing; the process groups do, at the
timeout. All of this passes through files, since the ranks' messages are what may hang.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

SHARE = 0.8
"""Of the timeout, after which a rank without progress says so: before the process groups end it."""
ANSWER_SHARE = 0.05
"""Of the timeout, that rank 0 waits for the files of the others."""

_ROOT = Path(__file__).resolve().parents[2]
_OWN = tuple(str(_ROOT / name) + os.sep for name in ("launch", "nsa_dist"))
_MESSAGES = "nsa_dist/comm/"
_COLLECTIVES = os.sep + os.path.join("torch", "distributed") + os.sep


class Watchdog:
    """Watches one rank while it is used as a context.

    Args:
        folder: of the run; its ``stalls`` gets the files.
        timeout: ``run.timeout``, seconds.
    """

    def __init__(self, folder: Path, rank: int, size: int, timeout: float) -> None:
        self._folder, self._rank, self._size = folder / "stalls", rank, size
        self._timeout = timeout
        self._what, self._since = "the start", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._put_away()
        self.now(self._what)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def now(self, what: str) -> None:
        """A sign of life: what begins now."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        told = -1.0
        while not self._ended.wait(self._timeout / 50):
            since = self._since
            if told >= 0 and since > told:
                self._say(f"rank {self._rank} goes on: {self._what}")
                self._put_away()
                told = -1.0
            elif told < 0 and time.monotonic() - since > SHARE * self._timeout:
                self._tell(since)
                told = since

    def _tell(self, since: float) -> None:
        """Write this rank's file; on rank 0 print what all files say."""
        try:
            self._folder.mkdir(exist_ok=True)
            temporary = self._path(self._rank).with_suffix(".new")
            temporary.write_text(self._state(), encoding="utf-8")
            temporary.replace(self._path(self._rank))
        except OSError as error:
            self._say(f"rank {self._rank}: {error}; it would have written:\n{self._state()}")
        if self._rank == 0 and not self._ended.wait(ANSWER_SHARE * self._timeout):
            seconds = time.monotonic() - since
            self._say(
                f"no progress for {seconds:.0f} s, and the run ends after run.timeout = "
                f"{self._timeout:g} s without any\n{self._answers()}\n"
                f"  stacks of each rank: {self._folder}"
            )

    def _state(self) -> str:
        place = f"{self._what}, {waits_at(_frames())}"
        where = f"rank {self._rank}, process {os.getpid()} on {socket.gethostname()}"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = (
            f"thread {names.get(thread, thread)}\n{''.join(traceback.format_stack(frame))}"
            for thread, frame in sys._current_frames().items()
            if thread != threading.get_ident()
        )
        return "\n".join((place, where, "", *stacks))

    def _answers(self) -> str:
        """A line for each place, with its ranks."""
        places: dict[str, list[int]] = {}
        for rank in range(self._size):
            try:
                with self._path(rank).open(encoding="utf-8") as file:
                    place = file.readline().strip()
            except FileNotFoundError:
                place = "no answer: stopped, dead, or elsewhere than in a wait"
            except OSError as error:
                place = f"no answer that can be read ({error})"
            places.setdefault(place, []).append(rank)
        return "\n".join(f"  {named(ranks)}: {place}" for place, ranks in places.items())

    def _put_away(self) -> None:
        """Leave an earlier stall's file under another name."""
        path = self._path(self._rank)
        if path.exists():
            path.replace(path.with_suffix(".earlier.txt"))

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.txt"

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def waits_at(stacks: Iterable[Sequence[FrameType]]) -> str:
    """The function that a thread is in, and the line of ours that called it.

    Of the threads (frames from the outermost on, the main thread first) the first one that is in a
    collective, else the main thread. Where autograd runs on a thread of its own, that one waits.
    """
    places = [_place(frames) for frames in stacks]
    return next((text for text, is_collective in places if is_collective), places[0][0])


def _place(frames: Sequence[FrameType]) -> tuple[str, bool]:
    """Of one thread, and whether it is in a collective."""
    own = [at for at, frame in enumerate(frames) if frame.f_code.co_filename.startswith(_OWN)]
    if not own:
        return "outside of this program", False
    frame = frames[own[-1]]
    path = Path(frame.f_code.co_filename).relative_to(_ROOT).as_posix()
    text = f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
    # Messages of the attention have a kind, which is a name there as in the tables of the docs.
    kind = frame.f_locals.get("kind") if path.startswith(_MESSAGES) else None
    if kind is not None:
        return f"in the message {kind!r}, {text}", True
    # torch wraps its collectives for its logs.
    inner = [f for f in frames[own[-1] + 1 :] if f.f_code.co_name != "wrapper"]
    if not inner:
        return f"at {text}", False
    collective = [f for f in inner if _COLLECTIVES in f.f_code.co_filename]
    return f"in {(collective or inner)[-1].f_code.co_name} from {text}", bool(collective)


def _frames() -> list[list[FrameType]]:
    """The frames of each thread but this one, from the outermost on; the main thread first."""
    main, own = threading.main_thread().ident, threading.get_ident()
    found = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return [
        [f for f, _ in traceback.walk_stack(top)][::-1] for thread, top in found if thread != own
    ]


def named(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
