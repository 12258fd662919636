"""What `shards make | verify | describe` show, and when they use a cluster."""

from __future__ import annotations

import io
import json
import re
import shutil
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from elastic_kfac.cli import shards
from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.shards import MakingProgress, progress_line
from elastic_kfac.data import make_shards
from elastic_kfac.data.sources import KNOWN_SOURCES
from elastic_kfac.errors import DataError, UsageError


def call(*words: object) -> Namespace:
    return parse_arguments(["shards", *map(str, words)])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Advances by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    make_shards("digits", root)
    return root


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ((0, 1000, 0, 0.0), "train: 0 of 1,000 samples (0%)"),
        ((500, 1000, 500, 5.0), "train: 500 of 1,000 samples (50%), 100 samples/s, 5 s left"),
        # 400 were there before: 100 in 5 s, so 500 more take 25 s.
        ((500, 1000, 100, 5.0), "train: 500 of 1,000 samples (50%), 20 samples/s, 25 s left"),
        ((10, 1010, 10, 6.0), "train: 10 of 1,010 samples (1%), 2 samples/s, 10 min left"),
        ((10, 20_010, 10, 6.0), "train: 10 of 20,010 samples (0%), 2 samples/s, 3.3 h left"),
        ((1000, 1000, 1000, 5.0), "train: 1,000 of 1,000 samples (100%)"),
    ],
)
def test_progress_line_tells_rate_and_time_left(
    state: tuple[int, int, int, float], expected: str
) -> None:
    assert progress_line("train", *state) == expected


def test_progress_elsewhere_is_a_plain_line_per_interval() -> None:
    out, clock = io.StringIO(), Clock()
    progress = MakingProgress(out, interval_s=5, clock=clock)
    for second in range(12):
        clock.now = 100.0 + second
        progress("train", 50 * second, 1000)
    progress.close()
    assert out.getvalue() == (
        "train: 250 of 1,000 samples (25%), 50 samples/s, 15 s left\n"
        "train: 500 of 1,000 samples (50%), 50 samples/s, 10 s left\n"
    )


def test_progress_second_split_is_timed_from_its_own_start() -> None:
    out, clock = io.StringIO(), Clock()
    progress = MakingProgress(out, interval_s=0, clock=clock)
    progress("train", 0, 10)
    clock.now += 100
    progress("test", 40, 100)  # 40 were there before.
    clock.now += 2
    progress("test", 60, 100)
    assert out.getvalue().splitlines()[-1] == (
        "test: 60 of 100 samples (60%), 10 samples/s, 4 s left"
    )


def test_progress_terminal_is_one_line_that_goes_away() -> None:
    out, clock = Terminal(), Clock()
    progress = MakingProgress(out, clock=clock)
    progress("train", 0, 10)
    progress("train", 5, 10)
    progress.close()
    assert "\n" not in out.getvalue()
    assert out.getvalue().split("\r\033[K")[1:] == [
        "train: 0 of 10 samples (0%)",
        "train: 5 of 10 samples (50%)",
        "",
    ]


def test_verify_quick_does_not_read_bytes(digits: Path, tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    shard = root / "train" / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shards.verify(call("verify", root, "--quick")) == 0
    assert "checked presence and sizes" in capsys.readouterr().out
    with pytest.raises(DataError, match="corrupt shard"):
        shards.verify(call("verify", root))


def test_describe_draws_a_sheet_per_split(digits: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "sheet.png"
    assert shards.describe(call("describe", digits, "--contact-sheet", target)) == 0
    described = json.loads(capsys.readouterr().out)["splits"]
    assert sum(split["samples"] for split in described.values()) == 1797
    for name in ("train", "test"):
        file = tmp_path / f"sheet-{name}.png"
        assert described[name]["contact_sheet"] == str(file)
        with Image.open(file) as image:
            assert image.size == (10 * 50 + 2, 10 * 50 + 2)
    assert shards.describe(call("describe", digits / "test", "--contact-sheet", target)) == 0
    assert target.read_bytes() == (tmp_path / "sheet-test.png").read_bytes()


def test_describe_sheet_that_is_no_png_or_has_no_folder_raises(
    digits: Path, tmp_path: Path
) -> None:
    for name, match in (("sheet.jpg", r"a file \*\.png"), ("no/sheet.png", "cannot write")):
        with pytest.raises(UsageError, match=match):
            shards.describe(call("describe", digits, "--contact-sheet", tmp_path / name))


@pytest.mark.parametrize(
    ("address", "variable", "used"),
    [(None, None, None), ("a:1", "b:2", "a:1"), (None, "b:2", "b:2")],
)
def test_make_uses_the_cluster_of_the_option_or_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    variable: str | None,
    used: str | None,
) -> None:
    from elastic_kfac.cluster import sharding

    asked: list[str] = []

    @contextmanager
    def fake(address: str) -> Any:
        asked.append(address)
        yield lambda tasks: [task.run() for task in tasks]

    monkeypatch.setattr(sharding, "shard_tasks_on", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    where = [] if address is None else ["--address", address]
    words = ["--source", "digits", "--out", tmp_path, "--split", "test", *where]
    assert shards.make(call("make", *words)) == 0
    assert asked == ([] if used is None else [used])
    assert (tmp_path / "test" / "manifest.json").exists()


def test_help_and_docs_list_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["shards", "make", "--help"])
    shown = capsys.readouterr().out
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text()
    for source in KNOWN_SOURCES.split(", "):
        kind = re.split(r"[:\[]", source)[0]
        assert kind in shown, kind
        assert kind in page, kind
