"""Programs that wait for one another, side by side on the GPUs of a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What one program does.

    Args:
        act: takes the GPU that it runs on, "" without GPUs; returns whether it came to its end.
        after: names of tasks that must have come to their end, where they are to be done.
        alone: whether it has a GPU for itself, as its times are reported.
    """

    name: str
    act: Callable[[str], bool]
    after: frozenset[str] = frozenset()
    alone: bool = False


def do_tasks(tasks: Iterable[Task], gpus: Sequence[str], jobs: int) -> list[str]:
    """Do each task as soon as it can begin and a GPU has room for it, the first ones first.

    Args:
        jobs: tasks at a time on each GPU, of those that need none for themselves.

    Returns:
        Names of the tasks that never began, as one before them did not come to its end.

    Raises:
        Exception: what the first task that failed raised, when all others are done.
    """
    left, ended, errors = list(tasks), set[str](), list[BaseException]()
    names = {task.name for task in left}
    room = dict.fromkeys(gpus or [""], jobs)
    running = dict[Future[bool], tuple[Task, str, int]]()
    with ThreadPoolExecutor(jobs * len(room)) as pool:
        while True:
            for task in list(left):
                gpu = max(room, key=room.__getitem__)
                size = jobs if task.alone else 1
                if task.after & names <= ended and room[gpu] >= size:
                    left.remove(task)
                    room[gpu] -= size
                    running[pool.submit(task.act, gpu)] = task, gpu, size
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, gpu, size = running.pop(future)
                room[gpu] += size
                error = future.exception()
                if error is not None:
                    errors.append(error)
                elif future.result():
                    ended.add(task.name)
    if errors:
        raise errors[0]
    return [task.name for task in left]
