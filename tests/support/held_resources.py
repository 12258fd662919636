"""What a process holds of the machine, read from /proc, so that a test can tell whether it leaks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_LISTENING = "0A"
"""The state of a listening socket in /proc/net/tcp."""


@dataclass(frozen=True)
class Held:
    """Counts of one process."""

    files: int
    """Open descriptors that are no sockets."""
    sockets: int
    listening: int
    """Ports that others can connect to."""
    threads: int
    children: int
    shared_memory: int
    """Mapped or open files of /dev/shm."""

    def more_than(self, before: Held) -> dict[str, int]:
        """What there is more of, by name."""
        return {
            name: value - getattr(before, name)
            for name, value in vars(self).items()
            if value > getattr(before, name)
        }


def held() -> Held:
    """What this process holds now."""
    links = _open_files()
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in links if "socket:" in link}
    in_memory = {link for link in links if link.startswith("/dev/shm/")}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/shm/" in line:
            in_memory.add(line.split(maxsplit=5)[5])
    return Held(
        files=len(links) - sum("socket:" in link for link in links),
        sockets=len(sockets),
        listening=len(sockets & _listening()),
        threads=len(list(Path("/proc/self/task").iterdir())),
        children=len(children(os.getpid())),
        shared_memory=len(in_memory),
    )


def held_at_rest(timeout_s: float = 2.0) -> Held:
    """What this process holds once that has stopped changing: threads end a moment after their work."""
    deadline, before, now = time.monotonic() + timeout_s, None, held()
    while now != before and time.monotonic() < deadline:
        time.sleep(0.05)
        before, now = now, held()
    return now


def children(pid: int) -> list[int]:
    """Living children of a process; those that ended but are not collected yet do not count."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs or stands still; one that ended but is not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_in_shared_memory(pids: list[int]) -> list[str]:
    """Files of /dev/shm that carry the number of one of these processes in their names."""
    names = [path.name for path in Path("/dev/shm").iterdir()]
    return [name for name in names if set(name.split("_")) & {str(pid) for pid in pids}]


def _open_files() -> list[str]:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue  # the descriptor that listed the folder
    return links


def _listening() -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        path = Path(table)
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == _LISTENING:
                inodes.add(fields[9])
    return inodes
