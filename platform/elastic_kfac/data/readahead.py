"""Fetching the shards that an epoch needs next, while the current ones are being read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from elastic_kfac.data.cache import ShardCache
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.errors import DataError

# Downloads overlap each other's latency; more would only take bandwidth from the one that is waited for.
_FETCHERS: Final = 4


class ReadAhead:
    """Brings shards into the cache in the background, each at most once per call for it.

    It never asks for more than half of the cache, so it cannot evict what is being read. Errors
    are left to the reader, who meets the same one when it needs the shard.
    """

    def __init__(self, cache: ShardCache, shard_set: ShardSet) -> None:
        self._cache = cache
        self._set = shard_set
        self._asked: set[int] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def want(self, shards: Sequence[int]) -> None:
        """Says which shards will be needed, the most urgent first."""
        chosen: list[int] = []
        room = self._cache.limit_bytes // 2
        for shard in shards:
            room -= self._set.shards[shard].bytes
            if room < 0:
                break
            chosen.append(shard)
        with self._lock:
            new = [shard for shard in chosen if shard not in self._asked]
            self._asked = set(chosen)
            new = [shard for shard in new if not self._cache.has(self._set, shard)]
            if not new or self._stopped.is_set():
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="sample-readahead")
            for shard in new:
                self._pool.submit(self._fetch, shard)

    def close(self) -> None:
        """Stops after the fetches that are under way."""
        self._stopped.set()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, shard: int) -> None:
        if not self._stopped.is_set():
            with contextlib.suppress(DataError):
                self._cache.fetch(self._set, shard)
