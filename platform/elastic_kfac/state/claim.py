"""One writer per folder: a run, search, study or cell is claimed before anything in it is written.

With flock (local disks, NFS 4) a claim is a lock on `.lock`; the kernel drops it with the process.

Elsewhere (object stores, where pyarrow cannot create a file only if there is none) a claimant announces
itself in `.claims/<token>` and then lists `.claims`. Listings show every finished write, so of two
claimants the one that announced itself later sees the other: never do both go on. If both see each
other, both withdraw and try again after random pauses. An announcement is renewed every `BEAT_S`; one
that stays the same for `STALE_S` under a claimant's eyes is stale. No two clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import DataError, UsageError
from elastic_kfac.json_text import parsed

LOCK_FILE = ".lock"
CLAIMS_FOLDER = ".claims"
BEAT_S = 15.0
STALE_S = 60.0
TRIES = 10
"""Of claimants that keep seeing each other."""

VANISHED = 100
"""How often a lock file may be removed between its opening and its locking."""

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of file systems without flock: FUSE, Lustre without `flock`, NFS 3 without its lock daemon."""
_GONE = (errno.ENOENT, errno.ESTALE)
"""Errors when another process, for NFS another machine, has removed the file in this moment."""


class Claim:
    """The right to write into a folder, until `release`."""

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self.what, self.say = what, say
        self.is_lost = False
        """Whether another process has taken over, as this one seemed to have ended."""

    def check(self) -> None:
        """Raises UsageError if the claim is lost."""
        if self.is_lost:
            raise UsageError(
                f"{self.what} was taken over by another process, as this one had stood still",
                change="let the other process finish",
            )

    def _tell_stale(self, owner: str) -> None:
        self.say(f"{self.what}: the process that wrote it ({owner}) ended without notice.")


@contextlib.contextmanager
def claimed(
    storage: Storage,
    what: str,
    *,
    say: Callable[[str], None] = lambda line: None,
    wait_s: float = 0.0,
) -> Iterator[Claim]:
    """Claims a folder for the block.

    Args:
        storage: The folder; a local one is created, and removed if nothing was written into it.
        what: Its name for people, such as `run digits-1`.
        say: Receives a line about a stale claim, and about waiting.
        wait_s: How long to wait for an owner to finish.

    Raises:
        UsageError: If another process has claimed the folder, or it cannot be written.
    """
    deadline = time.monotonic() + wait_s
    claim = Claim(what, say)
    with contextlib.ExitStack() as stack:
        try:
            held = None
            if storage.is_local:
                held = _flock(storage, claim, deadline)
            stack.callback(held or _announce(storage, claim, deadline))
        except (OSError, DataError) as error:
            raise UsageError(
                f"cannot write the folder of {what}", given=storage.uri, change=str(error)
            ) from None
        yield claim


def _me() -> dict[str, Any]:
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def _owner(content: bytes) -> str:
    """An owner in words."""
    try:
        found = parsed(content)
        return f"host {found['host']}, pid {found['pid']}, since {found['started']}"
    except (KeyError, TypeError, ValueError):
        return "unknown"


def _refuse(what: str, content: bytes) -> UsageError:
    return UsageError(
        f"{what} is in use by another process",
        given=_owner(content),
        change="wait until it has ended, or use another --name",
    )


# ---- where there is flock ----------------------------------------------------------------------


def _flock(storage: Storage, claim: Claim, deadline: float) -> Callable[[], None] | None:
    """Locks the folder; returns what releases it, or None where the file system has no flock."""
    path = Path(storage.path(LOCK_FILE))
    vanished = 0
    while True:
        try:
            stream = _locked(path)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _refuse(claim.what, path.read_bytes() if path.exists() else b"") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                with contextlib.suppress(FileNotFoundError):
                    if not path.stat().st_size:  # Created by the attempt.
                        path.unlink()
                return None
            vanished += 1
            if error.errno not in _GONE or vanished > VANISHED:
                raise

    def release() -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        stream.close()
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    try:
        stream.seek(0)
        if earlier := stream.read():
            claim._tell_stale(_owner(earlier))
        stream.truncate(0)
        stream.write(json.dumps(_me()).encode())
    except OSError:
        release()
        raise
    return release


def _locked(path: Path) -> IO[bytes]:
    """The open and locked file.

    Raises:
        OSError: With an errno of `_GONE` if its owner removed file or folder in this moment.
        BlockingIOError: If another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("ab+", buffering=0)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            raise FileNotFoundError(errno.ENOENT, "removed by its owner", str(path))
    except OSError:
        stream.close()
        raise
    return stream


# ---- elsewhere ---------------------------------------------------------------------------------


def _announce(storage: Storage, claim: Claim, deadline: float) -> Callable[[], None]:
    """Announces this process until it is alone; returns what withdraws it."""
    claims, own = storage.child(CLAIMS_FOLDER), os.urandom(8).hex()
    me, tries = _me(), 0
    stale: dict[str, bytes] = {}

    def write(is_owner: bool, beat: int = 0) -> None:
        claims.write(own, json.dumps({**me, "is_owner": is_owner, "beat": beat}).encode())

    while True:
        write(is_owner=False)
        others = sorted({*_announcements(claims)} - {own, *stale})
        if not others:
            break
        claims.delete(own)
        contents = [_read(claims, other) for other in others]
        if tries < TRIES and not any(b'"is_owner": true' in content for content in contents):
            tries += 1
            time.sleep(random.uniform(0.0, 0.2 * tries))
        elif contents[0]:
            claim.say(
                f"{claim.what} is claimed ({_owner(contents[0])}): waiting for a sign of life …"
            )
            fate = _watch(claims, others[0], contents[0], deadline)
            if fate == "alive":
                raise _refuse(claim.what, contents[0])
            if fate == "stale":
                stale[others[0]] = contents[0]
    for other, content in stale.items():
        claim._tell_stale(_owner(content))
        claims.delete(other)
    write(is_owner=True)
    over = threading.Event()

    def renew() -> None:
        beat = 0
        while not over.wait(BEAT_S):
            # A store that is away for a while leaves the announcement as it was.
            with contextlib.suppress(OSError, DataError):
                if own not in _announcements(claims):
                    claim.is_lost = True
                    return
                beat += 1
                write(is_owner=True, beat=beat)

    thread = threading.Thread(target=renew, name="claim", daemon=True)
    thread.start()

    def release() -> None:
        over.set()
        thread.join()
        with contextlib.suppress(OSError, DataError):
            claims.delete(own)

    return release


def _announcements(claims: Storage) -> list[str]:
    # A local file system also shows files that are being written.
    return [name for name in claims.files() if not name.startswith(".")]


def _read(claims: Storage, name: str) -> bytes:
    # It may be withdrawn between two requests.
    with contextlib.suppress(FileNotFoundError, DataError):
        return claims.read(name)
    return b""


def _watch(claims: Storage, name: str, first: bytes, deadline: float) -> str:
    """`alive`, `stale`, or `gone`, of another claimant's announcement."""
    content, changed = first, time.monotonic()
    while True:
        time.sleep(min(1.0, BEAT_S / 4))
        now, before, content = time.monotonic(), content, _read(claims, name)
        if not content:
            return "gone"
        if content != before:
            changed = now
        if content != first and now >= deadline:
            return "alive"
        if now - changed >= STALE_S:
            return "stale"
