"""Shard sets on an object store: an S3 server of a few lines, which can be slow, flaky and lying."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
import pytest

from elastic_kfac.data import SampleStream, ShardSet, join_uri, make_shards, verify_shards
from elastic_kfac.errors import DataError

SMALL = 512 * 64 / 2**20


class Store:
    """Objects of one bucket, and what goes wrong with the next requests."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.delay_s = 0.0
        self.on_get: Callable[[str, bytes], bytes | int] = lambda key, data: data
        """Changes what a GET of a whole object answers: other bytes, or an HTTP error."""


def unchunk(file: BinaryIO) -> bytes:
    """The content of a chunked body; what follows the last chunk is dropped."""
    body = b""
    while size := int(file.readline().split(b";")[0], 16):
        body += file.read(size)
        file.readline()
    while file.readline().strip():
        pass
    return body


class Handler(BaseHTTPRequestHandler):
    """The part of the S3 protocol that pyarrow uses."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def parse(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        _, _, key = unquote(parts.path).lstrip("/").partition("/")
        time.sleep(self.store.delay_s)
        with self.store.lock:
            self.store.counts[self.command] += 1
        return key, query

    def payload(self) -> bytes:
        # The client may chunk twice: for HTTP, and inside that for the checksum it appends.
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = unchunk(self.rfile)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = unchunk(io.BytesIO(body))
        return body

    def do_HEAD(self) -> None:
        key, _ = self.parse()
        if key and key not in self.store.objects:
            return self.answer(404)
        size = len(self.store.objects.get(key, b""))
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.end_headers()
        return None

    def do_GET(self) -> None:
        key, query = self.parse()
        if not key:
            return self.listing(query)
        if key not in self.store.objects:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = self.store.on_get(key, self.store.objects[key])
        if isinstance(data, int):
            return self.answer(data, b"<Error><Code>AccessDenied</Code></Error>")
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            low, high = int(first), min(int(last or len(data) - 1), len(data) - 1)
            span = f"bytes {low}-{high}/{len(data)}"
            return self.answer(206, data[low : high + 1], Content_Range=span)
        return self.answer(200, data)

    def listing(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names, folders = [], set()
        for key in sorted(self.store.objects):
            if key.startswith(prefix):
                head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
                if found:
                    folders.add(prefix + head + delimiter)
                else:
                    names.append(key)
        items = "".join(
            f"<Contents><Key>{escape(n)}</Key><Size>{len(self.store.objects[n])}</Size>"
            "<LastModified>2026-11-01T00:00:00.000Z</LastModified></Contents>"
            for n in names[: int(query.get("max-keys", 1000))]
        )
        items += "".join(
            f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders
        )
        count = items.count("<Key>") + len(folders)
        head = f"<IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>"
        body = f"<ListBucketResult>{head}{items}</ListBucketResult>"
        self.answer(200, body.encode())

    def do_PUT(self) -> None:
        key, query = self.parse()
        body = self.payload()
        with self.store.lock:
            if "uploadId" in query:
                self.store.uploads[query["uploadId"]][int(query["partNumber"])] = body
            elif key:
                self.store.objects[key] = body
        self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def do_POST(self) -> None:
        key, query = self.parse()
        body = self.payload()
        with self.store.lock:
            if "uploads" in query:
                upload = f"upload-{len(self.store.uploads)}"
                self.store.uploads[upload] = {}
                text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
                text += "</InitiateMultipartUploadResult>"
            elif "delete" in query:
                for part in body.decode().split("<Key>")[1:]:
                    self.store.objects.pop(part.split("</Key>")[0], None)
                text = "<DeleteResult></DeleteResult>"
            else:
                parts = self.store.uploads.pop(query["uploadId"])
                self.store.objects[key] = b"".join(parts[n] for n in sorted(parts))
                text = (
                    "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
                )
        self.answer(200, b'<?xml version="1.0" encoding="UTF-8"?>' + text.encode())

    def do_DELETE(self) -> None:
        key, _ = self.parse()
        with self.store.lock:
            self.store.objects.pop(key, None)
        self.answer(204)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, str]]:
    """(what the server holds, a root URI on it)."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = Store()
    handler = type("BoundHandler", (Handler,), {"store": store})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
    thread.start()
    options = f"endpoint_override=127.0.0.1:{listening.server_port}&scheme=http&region=us-east-1"
    try:
        yield store, f"s3://bucket/sets/digits?{options}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def test_remote_set_equals_the_local_one(
    server: tuple[Store, str], digits: Path, tmp_path: Path
) -> None:
    store, root = server
    made = make_shards("digits", root, shard_mib=SMALL)
    assert made["out"] == root
    for split in ("train", "test"):
        prefix = f"sets/digits/{split}/"
        held = {k.removeprefix(prefix): v for k, v in store.objects.items() if k.startswith(prefix)}
        held.pop("", None)
        local = {p.name: p.read_bytes() for p in (digits / split).iterdir() if p.name[0] != "."}
        assert {k: v for k, v in held.items() if not k.endswith("/")} == local
    assert verify_shards(root).num_samples == 1797
    local_set = ShardSet.open(digits / "train")
    remote_set = ShardSet.open(join_uri(root, "train"))
    assert remote_set.manifest_sha256 == local_set.manifest_sha256
    with (
        SampleStream(local_set, seed=1, cache_dir=str(tmp_path / "a")) as local_stream,
        SampleStream(remote_set, seed=1, cache_dir=str(tmp_path / "b")) as remote_stream,
    ):
        expected, found = local_stream.read(0, 0, 1438), remote_stream.read(0, 0, 1438)
    assert np.array_equal(expected.images, found.images)
    assert np.array_equal(expected.ids, found.ids)
    assert not list((tmp_path / "b").glob("*.parquet*"))


def test_remote_large_shard_is_uploaded_in_parts(
    server: tuple[Store, str], tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    store, root = server
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, 64 * 64, dtype=np.uint8).tobytes() for _ in range(3500)]
    source = write_parquet(images, [i % 3 for i in range(3500)], raw=True)
    make_shards(f"parquet:{source}", root)
    shards = ShardSet.open(join_uri(root, "train"))
    assert shards.num_bytes > 10 << 20 and store.uploads == {}
    assert store.counts["POST"] >= 2
    assert verify_shards(root).num_samples == 3500


def test_remote_make_interrupted_continues(server: tuple[Store, str], digits: Path) -> None:
    store, root = server

    def stop(split: str, done: int, total: int) -> None:
        if done > 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards("digits", root, "train", shard_mib=SMALL, progress=stop)
    assert "sets/digits/train/manifest.json" not in store.objects
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(join_uri(root, "train"))
    made = make_shards("digits", root, "train", shard_mib=SMALL)["splits"]["train"]
    assert (made["made"], made["reused"]) == (1, 2)
    local = (digits / "train" / "manifest.json").read_bytes()
    assert store.objects["sets/digits/train/manifest.json"] == local
    assert not any("/making/shard" in key for key in store.objects)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_remote_damaged_download_is_fetched_again(
    server: tuple[Store, str], tmp_path: Path, damage: str
) -> None:
    store, root = server
    make_shards("digits", root, "train")
    times: Counter[str] = Counter()

    def lie_twice(key: str, data: bytes) -> bytes:
        times[key] += key.endswith(".parquet")
        if not 0 < times[key] <= 2:
            return data
        return bytes([data[0] ^ 1]) + data[1:] if damage == "flip" else data[:-100] + bytes(100)

    store.on_get = lie_twice
    shards = ShardSet.open(join_uri(root, "train"))
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        assert int(stream.read(0, 0, 1438).weights.sum()) == 1438
    assert times["sets/digits/train/shard-00000.parquet"] == 3


def test_remote_always_damaged_names_the_shard(server: tuple[Store, str], tmp_path: Path) -> None:
    store, root = server
    make_shards("digits", root, "train")
    shards = ShardSet.open(join_uri(root, "train"))
    store.on_get = lambda key, data: (
        bytes([data[0] ^ 1]) + data[1:] if key.endswith(".parquet") else data
    )
    with (
        SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream,
        pytest.raises(DataError, match=r"corrupt shard.*shard-00000.*sha256"),
    ):
        stream.read(0, 0, 10)
    with pytest.raises(DataError, match=r"corrupt shard.*shard-00000.*sha256"):
        verify_shards(root)
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob(".*tmp"))


def test_remote_refusing_for_a_while_is_asked_again(
    server: tuple[Store, str], tmp_path: Path
) -> None:
    store, root = server
    make_shards("digits", root, "train")
    shards = ShardSet.open(join_uri(root, "train"))
    refusals = iter([403, 403])
    store.on_get = lambda key, data: next(refusals, data)
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        assert len(stream.read(0, 0, 100).ids) == 100
    assert next(refusals, None) is None


def test_remote_missing_shard_raises_at_once(server: tuple[Store, str], tmp_path: Path) -> None:
    store, root = server
    make_shards("digits", root, "train")
    shards = ShardSet.open(join_uri(root, "train"))
    del store.objects["sets/digits/train/shard-00000.parquet"]
    with (
        SampleStream(shards, seed=0, cache_dir=str(tmp_path), bad_records="skip") as stream,
        pytest.raises(DataError, match=r"missing.*shard-00000"),
    ):
        stream.read(0, 0, 1)


def test_remote_slow_store_gives_the_same_samples(
    server: tuple[Store, str], digits: Path, tmp_path: Path
) -> None:
    store, root = server
    make_shards("digits", root, "train", shard_mib=SMALL)
    shards = ShardSet.open(join_uri(root, "train"))
    store.delay_s = 0.1
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        stream.prefetch(0, 0, 50)
        slow = stream.read(0, 0, 50)
        requests = store.counts.total()
        stream.read(0, 50, 1388)
        assert store.counts.total() == requests  # Everything is here by now.
    with SampleStream(
        ShardSet.open(digits / "train"), seed=0, cache_dir=str(tmp_path / "local")
    ) as stream:
        assert np.array_equal(stream.read(0, 0, 50).images, slow.images)


def test_remote_block_order_fetches_the_next_block_ahead(
    server: tuple[Store, str], tmp_path: Path
) -> None:
    store, root = server
    make_shards("digits", root, "train", shard_mib=SMALL / 2)
    shards = replace(ShardSet.open(join_uri(root, "train")), shuffle_window=256)
    order = shards.order(0, 0)
    assert len(order.upcoming_shards(0)) == 2 < len(shards.shards)
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        stream.read(0, 0, 10)
        expected = {shards.shards[i].sha256 for i in order.upcoming_shards(0)}
        deadline = time.monotonic() + 20
        while {p.stem for p in tmp_path.glob("*.arrow")} != expected:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gets = store.counts["GET"]
        following = stream.read(0, 256, 10)
        assert set(following.ids.tolist()) == set(order.ids(256, 10).tolist())
    assert store.counts["GET"] <= gets + 2  # The block after: read ahead in its turn.


def test_remote_unreachable_store_raises_one_line() -> None:
    uri = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(DataError, match=r"cannot read"):
        ShardSet.open(uri)


def test_file_uri_is_the_local_folder(digits: Path) -> None:
    opened = ShardSet.open(f"file://{digits}/train")
    assert opened.num_samples == 1438 and opened.location.is_local
    assert verify_shards(f"file://{digits}").num_samples == 1797
