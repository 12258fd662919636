"""`elastic-kfac shards make | verify | describe`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from elastic_kfac.errors import UsageError

if TYPE_CHECKING:
    from elastic_kfac.config import Config
    from elastic_kfac.data.shards import BadImages

ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Set by Ray in its jobs; used without `--address`."""


def make(arguments: argparse.Namespace) -> int:
    """Writes a source as shards, on a cluster if there is one; continues an interrupted call."""
    address = arguments.address or os.environ.get(ADDRESS_VARIABLE)
    from elastic_kfac.data.shards import BadImages
    from elastic_kfac.state.run_folder import METRICS, RunFolder

    if RunFolder(arguments.out).storage.exists(METRICS):
        raise UsageError(
            "--out is the folder of a run", given=arguments.out, change="name another folder"
        )

    bad_images = BadImages(
        arguments.bad_records, arguments.max_bad_records, arguments.max_image_pixels
    )
    _make(arguments.source, arguments.out, arguments.split, address, bad_images)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Checks a shard set against its manifest; raises an error that names a bad shard."""
    from elastic_kfac.data.inspection import verify_shards

    found = verify_shards(
        arguments.uri, deep=not arguments.quick, max_pixels=arguments.max_image_pixels
    )
    print(found.line())
    return 0


def describe(arguments: argparse.Namespace) -> int:
    """Prints the manifests as JSON; `--contact-sheet` also draws samples of every class."""
    from elastic_kfac.data.inspection import describe_shards

    described = describe_shards(arguments.uri)
    if arguments.contact_sheet is not None:
        target = Path(arguments.contact_sheet)
        _draw(arguments.uri, described["splits"], target, arguments.max_image_pixels)
    print(json.dumps(described, indent=2, ensure_ascii=False))
    return 0


def make_missing_shards(config: Config) -> None:
    """Writes `data.shards` from `data.source` if there are none.

    Raises:
        DataError: If there are none and no source is configured, or if a split is missing.
    """
    from elastic_kfac.data.dataset import check_splits
    from elastic_kfac.data.manifest import has_splits
    from elastic_kfac.data.shards import BadImages

    data = config.data
    if data.source is not None and not has_splits(data.shards):
        bad_images = BadImages(max_pixels=data.max_image_pixels)
        _make(data.source, data.shards, None, None, bad_images)
    check_splits(config)


def _make(
    source: str,
    out: str,
    split: str | None,
    address: str | None,
    bad_images: BadImages | None = None,
) -> None:
    from elastic_kfac.data.shards import make_shards

    with _tasks_on(address) as run_tasks, _progress() as progress:
        made = make_shards(
            source, out, split, bad_images=bad_images, progress=progress, run_tasks=run_tasks
        )
    for name, part in made["splits"].items():
        size = part["bytes"] / 2**20
        reused = " (already existed)" if not part["made"] else ""
        shards = "1 shard" if part["shards"] == 1 else f"{part['shards']} shards"
        print(
            f"{name}: {part['samples']:,} samples {part['of']} in {shards}, {size:.1f} MiB{reused}"
        )
        if bad := part["bad"]:
            what = "1 bad image" if len(bad) == 1 else f"{len(bad)} bad images"
            print(f"{name}: left out {what}, the first: {bad[0]['key']}: {bad[0]['problem']}")
    where = made["out"]
    print(f"Shards: {Path(where) if '://' not in where else where} in {made['seconds']:.1f} s")


def _tasks_on(address: str | None) -> Any:
    if address is None:
        return nullcontext()
    from elastic_kfac.cluster.sharding import shard_tasks_on

    return shard_tasks_on(address)


def _draw(uri: str, splits: dict[str, Any], target: Path, max_pixels: int) -> None:
    """Draws a sheet per split and adds its path to `splits`; several get the split's name."""
    from elastic_kfac.data.contact_sheet import contact_sheet
    from elastic_kfac.data.manifest import open_splits

    if target.suffix.lower() != ".png":
        raise UsageError("bad value for --contact-sheet", given=target, allowed="a file *.png")
    for shard_set in open_splits(uri):
        name = shard_set.split
        file = target if len(splits) == 1 else target.with_stem(f"{target.stem}-{name}")
        try:
            contact_sheet(shard_set, file, max_pixels=max_pixels)
        except OSError as error:
            raise UsageError(f"cannot write the contact sheet: {error}", given=file) from None
        splits[name]["contact_sheet"] = str(file)


class MakingProgress:
    """Progress of `shards make`: one live line on a terminal, else a plain line per interval.

    Args:
        stream: Where to write.
        interval_s: Seconds between plain lines; the first comes after one interval.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._interval_s = interval_s
        self._clock = clock
        self._split: str | None = None
        self._began = self._last = clock()
        self._done_before = 0
        self._written = False

    def __call__(self, split: str, done: int, total: int) -> None:
        """Shows the state of `make_shards`; the first call of a split counts the existing samples."""
        now = self._clock()
        if split != self._split:
            self._split, self._began, self._done_before = split, now, done
        line = progress_line(split, done, total, done - self._done_before, now - self._began)
        if self._live:
            self._stream.write(f"\r\033[K{line}")
            self._written = True
        elif now - self._last >= self._interval_s:
            self._stream.write(f"{line}\n")
            self._last = now
        self._stream.flush()

    def close(self) -> None:
        """Erases the live line."""
        if self._written:
            self._stream.write("\r\033[K")
            self._stream.flush()


def progress_line(split: str, done: int, total: int, made: int, seconds: float) -> str:
    """`train: 512 of 1,438 samples (36 %), 900 samples/s, 1 s left`.

    Args:
        split: Name of the split.
        done: Samples in finished shards.
        total: Samples of the split.
        made: Samples of `done` that this call has written.
        seconds: Time that writing them took.
    """
    line = f"{split}: {done:,} of {total:,} samples ({done / total:.0%})"
    if made <= 0 or seconds <= 0 or done >= total:
        return line
    left = (total - done) * seconds / made
    return f"{line}, {made / seconds:,.0f} samples/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def _progress() -> Iterator[MakingProgress]:
    progress = MakingProgress(sys.stderr)
    try:
        yield progress
    finally:
        progress.close()
