"""One run at a time in a folder: a file that names its owner, kept fresh by a heartbeat.

The file is made by a link, so that one of two runs that start at once wins, on NFS too. A run that
finds it checks whether its owner is alive. On the owner's machine that is known at once. From
other machines it shows in the file's time, which the owner renews. Ages are measured against a file
written now in the same folder, so that the machines' clocks do not matter.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import socket
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

NAME = "run.lock"
HEARTBEAT_SECONDS = 10.0
"""Between two renewals of the file's time."""
STALE_SECONDS = 60.0
"""Without a renewal for this long, an owner on another machine counts as dead."""


@dataclass(frozen=True)
class Owner:
    """A process, identified among all processes of all machines.

    Args:
        machine: boot and process namespace, in which alone ``pid`` means anything.
        started: when the process started, to tell it from a later one with the same ``pid``.
        token: of this lock; no other has it.
    """

    host: str
    machine: str
    pid: int
    started: str
    token: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), secrets.token_hex(8))

    def lives(self) -> bool | None:
        """Whether the process runs; None where that cannot be seen from here."""
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        return bool(started) and started == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


_UNKNOWN = Owner("an unknown host", "", 0, "", "")
"""The owner of a lock whose file cannot be read."""


class FolderLock:
    """This process's lock on a folder; not shared with other ranks.

    Args:
        lost: called, by the heartbeat's thread, with the other owner, once it is another's.
    """

    def __init__(self, folder: Path, lost: Callable[[str], None] | None = None) -> None:
        self.path = folder / NAME
        self.owner = Owner.here()
        self._lost = lost or _end
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> bool:
        """Whether the lock is this process's now; False if the file is there already."""
        if not self._create(json.dumps(dataclasses.asdict(self.owner)).encode()):
            return False
        self._thread = threading.Thread(target=self._beat, name="run.lock", daemon=True)
        self._thread.start()
        return True

    def holder(self) -> Owner | None:
        """The owner, or None. If the file cannot be read, an unknown owner.

        Raises:
            OSError: if the lock is not a file but, for example, a link or a pipe.
        """
        try:
            if not stat.S_ISREG(self.path.lstat().st_mode):
                raise OSError(errno.EINVAL, "No regular file", str(self.path))
            return _parse(self.path.read_bytes())
        except FileNotFoundError:
            return None

    def heard(self) -> float | None:
        """The time of the holder's last heartbeat, by the file system's clock."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def now(self) -> float:
        """The file system's clock."""
        path = self._aside("now")
        path.touch()
        try:
            return path.stat().st_mtime
        finally:
            path.unlink()

    def remove(self, owner: Owner) -> None:
        """Free the folder of an owner that is dead; another one's lock stays."""
        aside = self._aside("dead")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        content = aside.read_bytes()
        if _parse(content) != owner:
            # Meanwhile another run replaced the dead one's lock by its own: restore that.
            self._create(content)
        aside.unlink()

    def release(self) -> None:
        """Remove the lock, if it is this process's. Where that fails it says so: a lock whose
        process is gone is free."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            try:
                if self.holder() == self.owner:
                    self.path.unlink()
            except OSError as error:
                print(f"{self.path}: not removed: {error}", file=sys.stderr, flush=True)

    def _create(self, content: bytes) -> bool:
        """Make the file, whole from its first moment, unless it is there."""
        new = self._aside("new")
        try:
            new.write_bytes(content)
            try:
                os.link(new, self.path)
            except FileExistsError:
                # NFS also says so if the link was made but its answer was lost.
                return new.stat().st_nlink == 2
            except OSError:
                # A file system without links: whole a moment later.
                return self._create_alone(content)
            return True
        finally:
            new.unlink(missing_ok=True)

    def _create_alone(self, content: bytes) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                self._renew()
            except OSError as error:
                # The server does not answer; the next beat tries again.
                print(f"{self.path}: not renewed: {error}", file=sys.stderr, flush=True)

    def _renew(self) -> None:
        holder = self.holder()
        if holder == self.owner:
            os.utime(self.path)
        elif holder is None:
            # Removed by hand: make it again, unless another run was faster.
            self._create(json.dumps(dataclasses.asdict(self.owner)).encode())
        else:
            self._done.set()
            self._lost(f"{self.path.parent}: {holder} has taken it over")

    def _aside(self, what: str) -> Path:
        return self.path.with_name(f"{NAME}.{what}-{self.owner.token}")


def _end(message: str) -> None:
    """End this process at once, as two runs must not write into one folder."""
    why = f"as this one was not heard of for {STALE_SECONDS:.0f} s; it ends here"
    print(f"run.folder: {message}, {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _parse(content: bytes) -> Owner:
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        # Being written at this moment, or cut by a full disk.
        return _UNKNOWN
    kinds = {field.name: type(getattr(_UNKNOWN, field.name)) for field in fields(Owner)}
    right = all(type(getattr(owner, name)) is kind for name, kind in kinds.items())
    return owner if right else _UNKNOWN


def _machine() -> str:
    """This boot of this machine and its process namespace, or the host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        # Not Linux.
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process of this machine started; empty if it does not run."""
    try:
        # The name may hold anything. After it come the state, ..., and, 22nd, the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # It runs, as another user.
    return "running"
