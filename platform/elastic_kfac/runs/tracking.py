"""Sends what a run writes into its folder to trackers, from a thread of the driver.

The folder is the record: a tracker that is slow, out of reach or broken neither stops nor delays the run.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_kfac.config import Config
from elastic_kfac.config.tracking import TrackingConfig
from elastic_kfac.errors import ConfigError, ElasticKfacError
from elastic_kfac.json_text import parsed
from elastic_kfac.observability.trackers import (
    TrackedRun,
    Tracker,
    check_packages,
    open_tracker,
    values_of,
)
from elastic_kfac.paths import join_uri, local_folder
from elastic_kfac.state.run_folder import EVENTS, METRICS, RunFolder

INTERVAL_S = 2.0
"""Between two looks into the folder."""
CLOSE_S = 30.0
"""How long the end of a run waits for its trackers."""


class Follower:
    """Sends the rows that a folder gains to trackers; `send` is called from one thread at a time."""

    def __init__(
        self, folder: RunFolder, trackers: Mapping[str, Tracker], sent: Mapping[str, int]
    ) -> None:
        """`sent`: bytes of each file that were sent when the run was begun (`sizes_of`)."""
        self._folder = folder
        self._trackers = dict(trackers)
        self._sent = {METRICS: 0, EVENTS: 0, **sent}

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
                yield parsed(line)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                _warn(f"tracker {name} has failed and is left out: {type(error).__name__}: {error}")


def sizes_of(folder: RunFolder) -> dict[str, int]:
    """Bytes of the files that a `Follower` sends."""
    return {name: len(folder.content(name) or b"") for name in (METRICS, EVENTS)}


@contextlib.contextmanager
def tracked(config: Config, uri: str, name: str) -> Iterator[None]:
    """Sends the metrics of the run in the block to the trackers of `tracking.to`.

    Raises:
        ConfigError: If a tracker's package is not installed, or the trackers have no local folder.
    """
    if not config.tracking.to:
        yield
        return
    root = _root(config.tracking, uri)
    folder = RunFolder(uri)
    follower = Follower(folder, _opened(config, uri, name, root), sizes_of(folder))

    def end() -> None:
        _try(follower.send)
        status = "failed"
        with contextlib.suppress(ElasticKfacError, OSError):
            status = str((folder.result() or {}).get("status", "failed"))
        follower.close(status)

    with _thread(lambda: _try(follower.send), end):
        yield


@dataclass(frozen=True)
class TrackedTrial:
    """A trial of a search or a cell of a study, as its trackers see it."""

    name: str
    uri: str
    """Of its run's folder."""
    config: Callable[[], Config]
    status: str | None
    """How it ended; empty while it runs, None before."""


@contextlib.contextmanager
def tracked_trials(
    tracking: TrackingConfig, uri: str, name: str, trials: Callable[[], Iterable[TrackedTrial]]
) -> Iterator[None]:
    """Sends the metrics of trials to the trackers of `tracking.to`, each trial as a run `NAME/TRIAL`.

    All is sent by one thread of this process, so that trials are measured without their trackers.

    Args:
        uri: The folder of the search or study; without `tracking.folder`, trackers write below it.
        trials: All trials, as they are at the time of the call.

    Raises:
        ConfigError: As `tracked`.
    """
    if not tracking.to:
        yield
        return
    check_packages(tracking.to)
    root = _root(tracking, uri)
    before = list(trials())
    # An earlier call with these trackers has sent what is there.
    sent = {each.name: sizes_of(RunFolder(each.uri)) for each in before if not each.status}
    ended = {each.name for each in before if each.status}
    followers: dict[str, Follower] = {}

    def look() -> None:
        for trial in trials():
            if trial.status is None or trial.name in ended:
                continue
            if trial.name not in followers:
                full = f"{name}/{trial.name}"
                opened = _opened(trial.config(), trial.uri, full, root, root / trial.name)
                followers[trial.name] = Follower(
                    RunFolder(trial.uri), opened, sent.get(trial.name, {})
                )
            _try(followers[trial.name].send)
            if trial.status:
                ended.add(trial.name)
                followers.pop(trial.name).close(trial.status)

    def end() -> None:
        _try(look)
        for follower in followers.values():
            follower.close("interrupted")

    with _thread(lambda: _try(look), end):
        yield


@contextlib.contextmanager
def _thread(look: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Calls `look` every INTERVAL_S, and `end` after the block; waits for it at most CLOSE_S."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(INTERVAL_S):
            look()
        end()

    thread = threading.Thread(target=follow, name="trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(CLOSE_S)
        if thread.is_alive():
            _warn(f"trackers have not ended within {CLOSE_S:g} s; the run's folder has everything")


def track(folder: RunFolder, name: str, config: Config) -> None:
    """Sends all rows of a run that exists.

    Raises:
        ConfigError: As `tracked`.
    """
    root = _root(config.tracking, folder.uri)
    follower = Follower(folder, _opened(config, folder.uri, name, root), {})
    follower.send()
    follower.close(str((folder.result() or {}).get("status", "failed")))


def _root(tracking: TrackingConfig, uri: str) -> Path:
    """Where trackers write: `tracking.folder`, or `tracking` in a local folder.

    Raises:
        ConfigError: If that is no local folder.
    """
    local = local_folder(tracking.folder or join_uri(uri, "tracking"))
    if local is None:
        raise ConfigError(
            "trackers need a local folder", given=uri, change="set tracking.folder to one"
        )
    return Path(local)


def _opened(
    config: Config, uri: str, name: str, root: Path, place: Path | None = None
) -> dict[str, Tracker]:
    """Trackers of a run that write into `place`, by default a folder of the run's own if `root` is
    `tracking.folder`, and what runs share (MLflow's files) into `root`."""
    tracking = config.tracking
    if place is None:
        place = root / name if tracking.folder else root
    sections = config.model_dump(mode="json").items()
    settings = {f"{section}.{key}": v for section, part in sections for key, v in part.items()}
    run = TrackedRun(name, str(local_folder(uri) or uri), settings, root)
    found: dict[str, Tracker] = {}
    for each in tracking.to:
        try:
            found[each] = open_tracker(each, tracking, run, place)
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
