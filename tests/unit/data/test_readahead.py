"""Reading ahead: the right shards, once, within the cache, and never in the way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from elastic_kfac.data import ShardSet
from elastic_kfac.data.cache import ReadAhead, ShardCache
from elastic_kfac.errors import DataError


class Recorder(ShardCache):
    """A cache that only writes down what is fetched."""

    def __init__(self, folder: Path, limit_bytes: int, fail: bool = False) -> None:
        super().__init__(folder, limit_bytes)
        self.fetched: list[int] = []
        self.fail = fail
        self.changed = threading.Condition()

    def fetch(self, shard_set: ShardSet, index: int) -> None:
        with self.changed:
            self.fetched.append(index)
            self.changed.notify_all()
        if self.fail:
            raise DataError("lost")

    def wait_for(self, count: int) -> list[int]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.fetched) >= count, timeout=20)
            return sorted(self.fetched)


def test_want_repeated_fetches_each_shard_once(digits_train: ShardSet, tmp_path: Path) -> None:
    cache = Recorder(tmp_path, 2**30)
    ahead = ReadAhead(cache, digits_train)
    ahead.want([0, 1])
    ahead.want([0, 1])
    ahead.want([1, 2])
    assert cache.wait_for(3) == [0, 1, 2]
    ahead.close()
    assert sorted(cache.fetched) == [0, 1, 2]
    ahead.want([0])  # Closed: nothing more, and no new thread.
    assert not [t for t in threading.enumerate() if t.name.startswith("sample-readahead")]


def test_want_more_than_half_the_cache_takes_the_most_urgent(
    digits_train: ShardSet, tmp_path: Path
) -> None:
    sizes = [shard.bytes for shard in digits_train.shards]
    cache = Recorder(tmp_path, 2 * (sizes[2] + sizes[0]) + 10)
    ahead = ReadAhead(cache, digits_train)
    ahead.want([2, 0, 1])
    assert cache.wait_for(2) == [0, 2]
    ahead.close()
    assert sorted(cache.fetched) == [0, 2]


def test_want_shard_already_here_is_not_fetched(digits_train: ShardSet, tmp_path: Path) -> None:
    ShardCache(tmp_path, 2**30).fetch(digits_train, 1)
    cache = Recorder(tmp_path, 2**30)
    ahead = ReadAhead(cache, digits_train)
    ahead.want([1, 2])
    assert cache.wait_for(1) == [2]
    ahead.close()


@pytest.mark.parametrize("fail", [True, False])
def test_want_failing_fetch_is_left_to_the_reader(
    digits_train: ShardSet, tmp_path: Path, fail: bool
) -> None:
    cache = Recorder(tmp_path, 2**30, fail)
    ahead = ReadAhead(cache, digits_train)
    ahead.want([0])
    assert cache.wait_for(1) == [0]
    ahead.close()
