"""Sends what a run writes into its folder to trackers, from a thread of the driver.

The folder is the record: a tracker that is slow, out of reach or broken neither stops nor delays the run.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_kfac.config import Config
from elastic_kfac.errors import ConfigError, ElasticKfacError
from elastic_kfac.observability.trackers import TrackedRun, Tracker, open_tracker, values_of
from elastic_kfac.paths import join_uri, local_folder
from elastic_kfac.state.run_folder import EVENTS, METRICS, RunFolder

INTERVAL_S = 2.0
"""Between two looks into the folder."""
CLOSE_S = 30.0
"""How long the end of a run waits for its trackers."""


class Follower:
    """Sends the rows that a folder gains to trackers; `send` is called from one thread at a time."""

    def __init__(self, folder: RunFolder, trackers: Mapping[str, Tracker], *, skip: bool) -> None:
        self._folder = folder
        self._trackers = dict(trackers)
        self._sent = {METRICS: 0, EVENTS: 0}
        """Bytes of each file."""
        if skip:  # They were sent when the run was begun.
            self._sent = {name: len(folder.content(name) or b"") for name in self._sent}

    def send(self) -> None:
        """Sends what is new."""
        for row in self._new(METRICS):
            if values := values_of(row):
                step = int(row.get("step", 0))
                self._each(lambda tracker: tracker.log(step, values))  # noqa: B023
        for row in self._new(EVENTS):
            at, kind = int(row.get("step", 0)), str(row.get("kind"))
            self._each(lambda tracker: tracker.event(at, kind, row))  # noqa: B023

    def close(self, status: str) -> None:
        """Ends all trackers."""
        self._each(lambda tracker: tracker.close(status))

    def _new(self, name: str) -> Iterator[dict[str, Any]]:
        content = self._folder.content(name) or b""
        begin, end = min(self._sent[name], len(content)), content.rfind(b"\n") + 1
        # A rollback has cut the file: what follows was not sent yet.
        self._sent[name] = max(end, begin)
        for line in content[begin:end].splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                _warn(f"tracker {name} has failed and is left out: {type(error).__name__}: {error}")


@contextlib.contextmanager
def tracked(config: Config, uri: str, name: str) -> Iterator[None]:
    """Sends the metrics of the run in the block to the trackers of `tracking.to`.

    Raises:
        ConfigError: If a tracker's package is not installed, or the trackers have no local folder.
    """
    if not config.tracking.to:
        yield
        return
    folder = RunFolder(uri)
    follower = Follower(folder, _opened(config, uri, name), skip=True)
    over = threading.Event()
    status = ["failed"]

    def follow() -> None:
        while not over.wait(INTERVAL_S):
            _try(follower.send)
        _try(follower.send)
        follower.close(status[0])

    thread = threading.Thread(target=follow, name="trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(ElasticKfacError, OSError):
            status[0] = str((folder.result() or {}).get("status", "failed"))
        over.set()
        thread.join(CLOSE_S)
        if thread.is_alive():
            _warn(f"trackers have not ended within {CLOSE_S:g} s; the run's folder has everything")


def track(folder: RunFolder, name: str, config: Config) -> None:
    """Sends all rows of a run that exists.

    Raises:
        ConfigError: As `tracked`.
    """
    follower = Follower(folder, _opened(config, folder.uri, name), skip=False)
    follower.send()
    follower.close(str((folder.result() or {}).get("status", "failed")))


def _opened(config: Config, uri: str, name: str) -> dict[str, Tracker]:
    tracking = config.tracking
    local = local_folder(tracking.folder or join_uri(uri, "tracking"))
    if local is None:
        raise ConfigError(
            "trackers need a local folder", given=uri, change="set tracking.folder to one"
        )
    place = local / name if tracking.folder else local
    sections = config.model_dump(mode="json").items()
    settings = {f"{section}.{key}": v for section, part in sections for key, v in part.items()}
    run = TrackedRun(name, str(local_folder(uri) or uri), settings)
    found: dict[str, Tracker] = {}
    for each in tracking.to:
        try:
            found[each] = open_tracker(each, tracking, run, Path(place))
        except ConfigError:
            raise
        except Exception as error:
            _warn(
                f"tracker {each} cannot be opened and is left out: {type(error).__name__}: {error}"
            )
    return found


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        _warn(f"the run's folder cannot be read for its trackers: {error}")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
