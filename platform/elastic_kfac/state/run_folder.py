"""A run's folder, which users, reports and `audit` read.

`config.yaml`, `shards.json` (where the data was), `metrics.jsonl`, `events.jsonl`, `ledger.parquet`,
`result.json`, `checkpoints/`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic_kfac.config import Config, dump_yaml, load_yaml, parse_config
from elastic_kfac.data.manifest import has_splits
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.json_text import parsed
from elastic_kfac.paths import local_folder
from elastic_kfac.state.claim import Claim, claimed
from elastic_kfac.state.line_log import LineLog

Row = Mapping[str, Any]
_SHARDS = "shards.json"

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class RunFolder:
    """Reads and writes the files of one run. One process writes; any number may read.

    Args:
        uri: The folder.
        shards: Where the shard sets are now; None looks where the run had them.
    """

    def __init__(self, uri: str | Path, shards: str | None = None) -> None:
        self.storage = Storage(uri)
        self.uri = self.storage.uri
        self._shards = shards
        self._claim: Claim | None = None
        self._logs = {name: LineLog(self.storage, name) for name in (METRICS, EVENTS)}

    @classmethod
    def existing(cls, uri: str | Path, shards: str | None = None) -> RunFolder:
        """Opens the folder of a run that was started before.

        Raises:
            UsageError: If there is no `config.yaml`.
        """
        folder = cls(uri, shards)
        if not folder.storage.exists("config.yaml"):
            raise UsageError(
                "not a run folder",
                given=folder.uri,
                change="name a folder that holds config.yaml, for example runs/digits",
            )
        return folder

    @contextlib.contextmanager
    def claimed(
        self, what: str, say: Callable[[str], None] = lambda line: None, *, wait_s: float = 0.0
    ) -> Iterator[None]:
        """For the block, only this process writes; see `claim.claimed`."""
        with claimed(self.storage, what, say=say, wait_s=wait_s) as self._claim:
            yield

    def check_claim(self) -> None:
        """Raises UsageError if another process has taken over what this one had claimed."""
        if self._claim is not None:
            self._claim.check()

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration, and the absolute place of the shards beside it."""
        shards = local_folder(config.data.shards)
        here = config.data.shards if shards is None else str(shards.absolute())
        self.storage.write(_SHARDS, json.dumps({"shards": here}).encode())
        self.storage.write("config.yaml", dump_yaml(config.model_dump(mode="json")).encode())

    def config_values(self) -> dict[str, Any]:
        """The sections of `config.yaml`, not validated: it may be that of another version.

        Raises:
            ConfigError: If it is not plain YAML or not a mapping.
        """
        what = f"config.yaml of {self.uri}"
        try:
            values = load_yaml(self.storage.read("config.yaml").decode(), what=what) or {}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{what} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{what} is damaged: it holds no sections")
        return {str(key): part for key, part in values.items()}

    def read_config(self) -> Config:
        """The configuration of the run.

        Raises:
            ConfigError: If it is not plain YAML or not valid.
        """
        return parse_config(self.config_values())

    def located_config(self) -> Config:
        """The configuration with `data.shards` where the shard sets are: the folder may have moved.

        Raises:
            ConfigError: As `read_config`.
        """
        config = self.read_config()
        places = [self._shards] if self._shards else [*self._recorded_shards(), config.data.shards]
        place = next(filter(has_splits, places), places[0])
        data = config.data.model_copy(update={"shards": place})
        return config.model_copy(update={"data": data})

    def _recorded_shards(self) -> list[str]:
        try:
            return [str(parsed(self.storage.read(_SHARDS))["shards"])]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # Runs of earlier versions have none.

    def append_events(self, rows: Iterable[Row]) -> None:
        """Adds rows to `events.jsonl`."""
        self.append(EVENTS, rows)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl`."""
        return self.rows(METRICS)[0]

    def events(self) -> list[dict[str, Any]]:
        """All rows of `events.jsonl`."""
        return self.rows(EVENTS)[0]

    def rewind_metrics(self, step: int) -> int:
        """Drops metric rows of later steps, which a restart from `step` repeats.

        Returns:
            The number of dropped rows.
        """
        # Rows are ordered by step: only the end of a long file is parsed.
        content = self._logs[METRICS].content()
        end, dropped = len(content), 0
        while end > 0:
            begin = content.rfind(b"\n", 0, end - 1) + 1
            row = _row(content[begin:end])
            if row is not None and row.get("step", 0) <= step:
                break
            end, dropped = begin, dropped + (row is not None)
        if dropped:
            self._logs[METRICS].truncate(end)
        return dropped

    def write_result(self, result: Row) -> None:
        """Writes `result.json`."""
        self.storage.write("result.json", (json.dumps(result, indent=2) + "\n").encode())

    def result(self) -> dict[str, Any] | None:
        """`result.json`; None until the run has ended, and of a damaged one."""
        if not self.storage.exists("result.json"):
            return None
        return _row(self.storage.read("result.json"))

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Adds rows to a file: all of them, or none and an error."""
        content = "".join(json.dumps(dict(row)) + "\n" for row in rows).encode()
        if content:
            self._logs[name].append(content)

    def finish_rows(self) -> None:
        """Makes one file of each log on an object store."""
        for log in () if self.storage.is_local else self._logs.values():
            log.finish()

    def content(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        if name in self._logs:
            return self._logs[name].content()
        return self.storage.read(name) if self.storage.exists(name) else None

    def rows(self, name: str, containing: bytes = b"") -> tuple[list[dict[str, Any]], int]:
        """The rows of a file, and how many torn lines were left out.

        Lines without `containing` are not parsed: steps are thousands of rows and evaluations a few.
        """
        content = self._logs[name].content()
        lines = [line for line in content.splitlines() if line.strip() and containing in line]
        rows = [row for row in map(_row, lines) if row is not None]
        return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    # A killed writer leaves at most one torn line; the restart repeats it.
    try:
        row = parsed(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
