"""Durable checkpoints: content hashes, the manifest last, fallback to the next older one if damaged.

    checkpoints/step-000000000120/state-<hash>.safetensors   tensors and the ledger's tail
    checkpoints/step-000000000120/state-<hash>.json          everything else
    checkpoints/step-000000000120/manifest.json              names, sizes and hashes of the two

A folder without a manifest is unfinished and ignored. File names contain the hash, so two writers of the
same step (a fenced-off process that woke up) cannot mix their files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import ElasticKfacError, StateError
from elastic_kfac.json_text import parsed
from elastic_kfac.state.state import TrainingState

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


class StateStore(Protocol):
    """Stores states: durable checkpoints, or replicas in the memory of other nodes."""

    snapshot_cpu_s: float
    """CPU time in s of the newest snapshot outside the loop; 0 if not measured."""

    def save(self, state: TrainingState) -> None:
        """Stores `state`; returns when it is safe."""
        ...

    def save_async(self, state: TrainingState) -> Future[bool] | None:
        """Starts to store `state`; the future is True once it is safe, False if it failed.

        None while an earlier state is being written.
        """
        ...

    def wait(self) -> None:
        """Returns when no write is in progress."""
        ...

    def load_latest(self) -> TrainingState | None:
        """The newest valid state; None if there is none."""
        ...


class CheckpointStore:
    """The checkpoints of one run, below its folder.

    Args:
        keep: Number of complete checkpoints to retain.
        on_warning: Called with one line for every checkpoint that is skipped or could not be written.
    """

    snapshot_cpu_s = 0.0

    def __init__(
        self,
        uri: str | Path,
        keep: int = 3,
        *,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self.storage = Storage(uri)
        self.keep = keep
        self._warn = on_warning or (lambda line: None)
        self.before_manifest: Callable[[int], None] = lambda step: None
        """Called with the step before its manifest, the last file, is written."""
        self.after_save: Callable[[int, float], None] = lambda num_bytes, elapsed_s: None
        """Called with the bytes of each complete checkpoint and the seconds that writing it took."""
        self._lock = threading.Lock()
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[bool] | None = None

    def save(self, state: TrainingState) -> None:
        """Writes a checkpoint and applies the retention.

        Raises:
            OSError: If the storage is full, read-only or unreachable.
        """
        self.wait()
        self._save(state)

    def save_async(self, state: TrainingState) -> Future[bool] | None:
        """Writes in the background; a failure is a warning because the next write may succeed."""
        if self._pending is not None and not self._pending.done():
            return None
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._writer.submit(self._save_or_warn, state)
        return self._pending

    def wait(self) -> None:
        """Waits for the background writer."""
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """Waits for the background writer and stops its thread."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
            self._writer = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first; they may be damaged."""
        return [step for step in self._folders() if self._has_manifest(step)]

    def load(self, step: int) -> TrainingState:
        """Reads and verifies one checkpoint.

        Raises:
            StateError: If it is unfinished, damaged, or of a newer format.
        """
        files = self._manifest(step)["files"]
        contents = {kind: self._content(step, entry) for kind, entry in files.items()}
        state = TrainingState.from_parts(parsed(contents["meta"]), contents["tensors"])
        # The ledger's older rows are part of the state and stored elsewhere.
        state.ledger.rows(self.storage)
        return state

    def outline(self) -> TrainingState | None:
        """The newest checkpoint without its tensors and the ledger's newest rows, which may be damaged.

        None if there is none, or the newest one cannot be read.
        """
        with contextlib.suppress(StateError):
            for step in self.steps()[-1:]:
                content = self._content(step, self._manifest(step)["files"]["meta"])
                return TrainingState.outline(parsed(content))
        return None

    def _content(self, step: int, entry: Mapping[str, Any]) -> bytes:
        folder = _folder(step)
        try:
            content = self.storage.read(f"{folder}/{entry['name']}")
        except FileNotFoundError:
            raise StateError(f"{entry['name']} is missing", given=folder) from None
        if len(content) != entry["bytes"]:
            raise StateError(
                f"{entry['name']} has {len(content)} bytes instead of {entry['bytes']}",
                given=folder,
            )
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise StateError(f"{entry['name']} is damaged (its hash differs)", given=folder)
        return content

    def load_latest(self) -> TrainingState | None:
        """The newest valid checkpoint; every skipped one is a warning.

        Raises:
            StateError: If there are finished checkpoints but none is valid, or the newest was
                written by a newer version.
        """
        self.wait()
        finished = self.steps()
        for step in self._folders():
            if step not in finished:
                self._warn(f"checkpoint {_folder(step)} is unfinished and was skipped")
        problems = []
        for step in reversed(finished):
            try:
                return self.load(step)
            except _NewerFormat:
                raise
            except (ElasticKfacError, OSError) as error:
                line = error.line() if isinstance(error, ElasticKfacError) else str(error)
                problems.append(line)
                self._warn(f"checkpoint of step {step} was skipped: {line}")
        if problems:
            raise StateError(
                f"none of {len(problems)} checkpoints can be read; newest: {problems[0]}",
                given=self.storage.uri,
                change="restore the files from a copy, or start a run under another name",
            )
        return None

    def _save_or_warn(self, state: TrainingState) -> bool:
        try:
            self._save(state)
        except Exception as error:
            self._warn(f"checkpoint of step {state.progress.step} was not written: {error}")
            return False
        return True

    def _save(self, state: TrainingState) -> None:
        with self._lock:
            begin = time.perf_counter()
            state.ledger.write_segments(self.storage)
            folder = _folder(state.progress.step)
            files = {}
            for kind, suffix, content in (
                ("tensors", "safetensors", state.payload()),
                ("meta", "json", json.dumps(state.meta()).encode()),
            ):
                sha256 = hashlib.sha256(content).hexdigest()
                name = f"state-{sha256[:16]}.{suffix}"
                self.storage.write(f"{folder}/{name}", content)
                files[kind] = {"name": name, "bytes": len(content), "sha256": sha256}
            manifest = {
                "format": "elastic-kfac checkpoint",
                "version": FORMAT_VERSION,
                "step": state.progress.step,
                "state_sha256": state.sha256(),
                "files": files,
            }
            self.before_manifest(state.progress.step)
            self.storage.write(f"{folder}/{_MANIFEST}", json.dumps(manifest, indent=1).encode())
            num_bytes = sum(int(str(entry["bytes"])) for entry in files.values())
            self.after_save(num_bytes, time.perf_counter() - begin)
            self._retain(state.progress.step)

    def _retain(self, newest: int) -> None:
        older = [step for step in self._folders() if step < newest]
        finished = [step for step in older if self._has_manifest(step)]
        kept = finished[len(finished) - self.keep + 1 :] if self.keep > 1 else []
        for step in older:
            if step not in kept:
                # Manifest first: a partly deleted checkpoint must not look like a damaged one.
                self.storage.delete(f"{_folder(step)}/{_MANIFEST}")
                self.storage.delete(_folder(step))

    def _folders(self) -> list[int]:
        names = self.storage.folders("checkpoints")
        numbers = (name.removeprefix("step-") for name in names if name.startswith("step-"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def _has_manifest(self, step: int) -> bool:
        return self.storage.exists(f"{_folder(step)}/{_MANIFEST}")

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            content = self.storage.read(f"{_folder(step)}/{_MANIFEST}")
        except FileNotFoundError:
            raise StateError("the checkpoint is unfinished", given=_folder(step)) from None
        try:
            manifest = dict(parsed(content))
            version = int(manifest["version"])
            if version <= FORMAT_VERSION:
                entries = manifest["files"]
                if {"name", "bytes", "sha256"} - (set(entries["tensors"]) & set(entries["meta"])):
                    raise ValueError("incomplete")
        except (KeyError, TypeError, ValueError):
            raise StateError("the manifest is damaged", given=_folder(step)) from None
        if version > FORMAT_VERSION:
            raise _NewerFormat(
                "the checkpoint was written by a newer elastic-kfac",
                given=f"format {version}",
                allowed=f"up to format {FORMAT_VERSION}",
                change="update the package",
            )
        return manifest


class _NewerFormat(StateError):
    """No damage: an older checkpoint must not silently replace it."""


def _folder(step: int) -> str:
    return f"checkpoints/step-{step:012d}"
