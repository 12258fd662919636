"""An S3 server of a few lines on loopback, which can be slow, flaky and lying."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest


class Store:
    """Objects of one bucket, and what goes wrong with the next requests."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.transferred: Counter[str] = Counter()
        """Bytes of objects by method."""
        self.delay_s = 0.0
        self.on_get: Callable[[str, bytes], bytes | int] = lambda key, data: data
        """Changes what a GET of a whole object answers: other bytes, or an HTTP error."""
        self.on_put: Callable[[str], int] = lambda key: 200
        """What an upload to this key answers; after an error nothing of it is kept."""


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
    # Else a body waits 40 ms for the headers before it to be acknowledged.
    disable_nagle_algorithm = True
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
            with self.store.lock:
                self.store.transferred["GET"] += high + 1 - low
            return self.answer(206, data[low : high + 1], Content_Range=span)
        with self.store.lock:
            self.store.transferred["GET"] += len(data)
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
            self.store.transferred["PUT"] += len(body)
        code = self.store.on_put(key)
        if code != 200:
            return self.answer(code, b"<Error><Code>SlowDown</Code></Error>")
        with self.store.lock:
            if "uploadId" in query:
                self.store.uploads[query["uploadId"]][int(query["partNumber"])] = body
            elif key:
                self.store.objects[key] = body
        return self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

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


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Callable[[str], str]]]:
    """What a server holds, and a function that makes the URI of a folder on it."""
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = Store()
    handler = type("BoundHandler", (Handler,), {"store": store})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
    thread.start()
    options = f"endpoint_override=127.0.0.1:{listening.server_port}&scheme=http&region=us-east-1"
    try:
        yield store, lambda folder: f"s3://bucket/{folder}?{options}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
