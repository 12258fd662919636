"""One reading of paths and URIs."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import DataError
from elastic_kfac.paths import join_uri, local_folder, user_path


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("runs", "runs"),
        ("exp:1", "exp:1"),
        ("a b#c?d%20e", "a b#c?d%20e"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file:///tmp/a b", "/tmp/a b"),
        ("file://localhost/tmp/x", "/tmp/x"),
        ("file:/tmp/x", "/tmp/x"),
        ("FILE:///tmp/x", "/tmp/x"),
        ("file:///tmp/caf%C3%A9", "/tmp/café"),
        ("C:\\runs", "C:\\runs"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("s3://bucket/x", None),
        ("gs://bucket", None),
        ("http://host/x", None),
    ],
)
def test_local_folder(text: str, folder: str | None) -> None:
    assert local_folder(text) == (None if folder is None else Path(folder))


@pytest.mark.parametrize("text", ["s3:/bucket/x", "gs:/x", "file://host/x", "file://", "file://x"])
def test_what_is_no_uri_is_refused(text: str) -> None:
    for read in (local_folder, Storage):
        with pytest.raises(DataError):
            read(text)


def test_storage_reads_what_local_folder_reads(tmp_path: Path) -> None:
    for name in ("a b", "exp:1", "x%20y", "q?r#s&t"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
        assert Storage(tmp_path / name).read("f") == name.encode()
    encoded = f"file://{tmp_path}/a%20b"
    assert Storage(encoded).read("f") == b"a b" and local_folder(encoded) == tmp_path / "a b"
    assert Storage(join_uri(f"file://{tmp_path}", "exp:1")).read("f") == b"exp:1"
    assert Storage(tmp_path).child("x%20y").read("f") == b"x%20y"
    assert join_uri("s3://b/a?scheme=http", "n") == "s3://b/a/n?scheme=http"


def test_home_that_is_not_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/x") == Path("/somewhere/x")
