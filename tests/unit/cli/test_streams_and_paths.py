"""Terminals, devices, moved and damaged runs: the right answer, or one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, load_file

import elastic_kfac
from elastic_kfac.cli import main
from elastic_kfac.cli.entry import format_warning, settle_user

CONFIG = """
data: {shards: data/digits, source: digits}
model: {name: small_cnn}
train: {epochs: 3, global_batch_size: 512, eval_every_epochs: 1}
optimizer: {lr: 0.05}
kfac: {enabled: false}
elastic: {max_workers: 1, snapshot_interval_s: 0.001}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `runs/r`, its configuration and its shards; tests take copies."""
    root = tmp_path_factory.mktemp("trained")
    (root / "c.yaml").write_text(CONFIG)
    here = Path.cwd()
    os.chdir(root)
    try:
        assert main(["train", "c.yaml", "--local", "--name", "r"]) == 0
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the working directory; the original stays where it was."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(words) == code
    err = capsys.readouterr().err
    assert err.startswith("elastic-kfac: error: ") and err.count("\n") == 1
    return err


def command(words: list[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **options.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-m", "elastic_kfac.cli", *words],
        cwd=cwd,
        env=environment,
        stderr=subprocess.PIPE,
        timeout=120,
        text=True,
        errors="replace",
        check=False,
        **options,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_of_the_terminal_is_enough(place: Path, encoding: str) -> None:
    shutil.copytree(place / "runs" / "r", place / "runs" / "ü…")
    for words in (["report", "runs/ü…"], ["audit", "runs/nothing…"]):
        done = command(
            words, place, stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": encoding}
        )
        assert done.returncode == (2 if "nothing" in words[1] else 0), done.stderr
        assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_one_line(place: Path) -> None:
    words = ["audit", "runs/r"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = command(words, place, stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left" in done.stderr
    closed = subprocess.run(
        f"exec {sys.executable} -m elastic_kfac.cli {' '.join(words)} <&- >&- 2>&-",
        shell=True,
        cwd=place,
        timeout=120,
        check=False,
    )
    assert closed.returncode == 0


def test_current_folder_that_was_deleted_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = place / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the current folder cannot be used" in refused(["audit", str(place / "runs/r")], capsys)


def test_module_is_the_command(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elastic_kfac", "audit", "runs/nothing"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and "no such run" in done.stderr


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"model:\n", "bad value for model; given: null; allowed: a mapping of keys (a section"),
        (b"# \xfc\n", "save it as UTF-8"),
        ("model: {name: mlp}".encode("utf-16"), "save it as UTF-8"),
        (b"model: {name: mlp}\n---\na: 1\n", "found another document"),
        (b"model: {name: mlp}\0", "special characters are not allowed"),
    ],
)
def test_odd_configuration_file_is_one_line(
    content: bytes, line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "odd.yaml").write_bytes(content)
    assert line in refused(["train", "odd.yaml", "--local"], capsys)


def test_run_moved_elsewhere_finds_its_shards(
    place: Path, trained: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    shutil.copytree(place / "runs" / "r", tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    for words in (["evaluate"], ["audit"], ["probe", "bias-variance", "--samples", "16"]):
        assert main([*words, str(tmp_path / "copied")]) == 0
    # Where the original is gone, --shards names it; a wrong one is refused.
    (tmp_path / "copied" / "shards.json").write_text('{"shards": "/nowhere"}')
    assert "no shard set here" in refused(["evaluate", str(tmp_path / "copied")], capsys)
    where = ["--shards", str(place / "data" / "digits")]
    assert main(["evaluate", str(tmp_path / "copied"), *where]) == 0
    assert main(["shards", "make", "--source", "clusters10", "--out", str(tmp_path / "other")]) == 0
    assert "data set has changed" in refused(
        ["evaluate", str(tmp_path / "copied"), "--shards", str(tmp_path / "other")], capsys
    )


@pytest.mark.parametrize("kind", ["device", "pipe", "link", "dangling link", "file"])
def test_export_writes_through_and_follows(kind: str, place: Path) -> None:
    out = place / "n"
    received: list[bytes] = []
    reader = None
    if kind == "device":
        try:
            os.mknod(out, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            out = Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(out)
        reader = threading.Thread(target=lambda: received.append(out.read_bytes()), daemon=True)
        reader.start()
    elif kind.endswith("link"):
        out.symlink_to(place / "real.safetensors")
        if kind == "link":
            (place / "real.safetensors").write_bytes(b"old")
    before = out.lstat().st_mode if kind != "file" else None
    assert main(["export", "runs/r", "--out", str(out)]) == 0
    if before is not None:
        assert out.lstat().st_mode == before
    if reader is not None:
        reader.join(20)
        assert len(load(received[0])) > 3
    elif kind != "device":
        assert len(load_file(place / ("n" if kind == "file" else "real.safetensors"))) > 3


def test_export_over_a_file_of_another_kind_is_refused(place: Path, capsys: Any) -> None:
    kept = (place / "runs/r/config.yaml").read_bytes()
    assert main(["export", "runs/r", "--out", "runs/r/config.yaml"]) == 2
    assert "holds no weights and would be overwritten" in capsys.readouterr().err
    assert (place / "runs/r/config.yaml").read_bytes() == kept
    (place / "empty").touch()
    for out in ("empty", "new.safetensors", "new.safetensors"):
        assert main(["export", "runs/r", "--out", out]) == 0


def test_shards_into_the_folder_of_a_run_are_refused(place: Path, capsys: Any) -> None:
    assert main(["shards", "make", "--source", "digits", "--out", "runs/r"]) == 2
    assert "--out is the folder of a run" in capsys.readouterr().err
    assert not (place / "runs/r/train").exists()


def test_export_to_a_folder_is_refused(place: Path, capsys: Any) -> None:
    assert "cannot write the file" in refused(["export", "runs/r", "--out", "data"], capsys)


def damage_newest(run: Path) -> tuple[int, int]:
    """Flips bytes of the newest checkpoint; returns its step and that of the one before."""
    *_, older, newest = sorted((run / "checkpoints").iterdir())
    (tensors,) = newest.glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-4:] = bytes(b ^ 0xFF for b in content[-4:])
    tensors.write_bytes(content)
    return int(newest.name[5:]), int(older.name[5:])


def test_damaged_newest_checkpoint_is_said_and_not_exported(place: Path, capsys: Any) -> None:
    newest, older = damage_newest(place / "runs" / "r")
    capsys.readouterr()
    assert main(["evaluate", "runs/r"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"step {older}: ")
    assert f"the checkpoint of step {newest} is damaged; using that of step {older}" in captured.err
    line = refused(["export", "runs/r"], capsys)
    assert f"of step {newest}, is damaged" in line and f"--checkpoint {older}" in line
    assert not (place / "runs" / "r" / "model.safetensors").exists()
    assert main(["export", "runs/r", "--checkpoint", str(older)]) == 0


def test_report_shows_what_it_can_read_and_counts_the_rest(place: Path, capsys: Any) -> None:
    run = place / "runs" / "r"
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write("17\n[1]\nnull\n" + "[" * 5000 + "\n")
    (run / "result.json").write_text("[1, 2]")
    assert main(["report", "runs/r"]) == 0
    for content in ("", "{", "null", "\x00"):
        (run / "result.json").write_text(content)
        assert main(["report", "runs/r"]) == 0
        assert main(["audit", "runs/r"]) == 0


def test_report_elsewhere_when_the_folder_cannot_be_written(
    place: Path, capsys: Any, monkeypatch: Any
) -> None:
    from elastic_kfac.data.storage import Storage

    def read_only(self: Storage, name: str, content: bytes) -> None:
        raise OSError(30, "Read-only file system", name)

    monkeypatch.setattr(Storage, "write", read_only)
    assert "--out" in refused(["report", "runs/r"], capsys)
    assert main(["report", "runs/r", "--out", "page.html"]) == 0
    assert "<html" in (place / "page.html").read_text()[:200]


@pytest.mark.parametrize("storage", ["exp:1", "a b", "file://{place}/c%20d"])
def test_storage_is_read_in_one_way(storage: str, place: Path, capsys: Any) -> None:
    storage = storage.format(place=place)
    words = ["train", "c.yaml", "--local", "--storage", storage, "--set", "train.epochs=1"]
    assert main(words) == 0
    assert main(words) == 0
    folder = place / {"exp:1": "exp:1", "a b": "a b"}.get(storage, "c d")
    assert sorted(each.name for each in folder.iterdir() if each.is_dir()) == ["c-1", "c-2"]
    for verb in ("audit", "report", "evaluate", "export"):
        assert main([verb, "c-2", "--storage", storage]) == 0


def test_user_without_home_or_name_gets_both(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    import pwd
    import tempfile

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        settle_user()
        home = Path(os.environ["HOME"])
        assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
        assert os.environ["USER"] == f"uid{os.getuid()}"
        assert "no HOME; caches go to" in capsys.readouterr().err
        monkeypatch.delenv("HOME")
    assert len(list(tmp_path.iterdir())) == 1
    # A folder that somebody else can write is not used.
    home.chmod(0o777)
    settle_user()
    assert Path(os.environ["HOME"]) != home


def test_config_of_a_run_that_is_no_mapping_is_one_line(place: Path, capsys: Any) -> None:
    for content in (b"17", b"[1]", b"\xff\xfe", b"train: 3", b"a: {", b"kfac: {}\nkfac: {}"):
        (place / "runs" / "r" / "config.yaml").write_bytes(content)
        for verb in ("audit", "evaluate"):
            refused([verb, "runs/r"], capsys)
    events = json.dumps({"event": "x", "step": "y"})
    (place / "runs" / "r" / "events.jsonl").write_text(events)


def test_what_is_gone_or_damaged_is_not_passed_over(place: Path, capsys: Any) -> None:
    run = place / "runs" / "r"
    ledger = run / "ledger.parquet"
    whole = ledger.read_bytes()
    for content in (b"", b"junk", whole[:-9], whole.replace(whole[40:60], bytes(20), 1)):
        ledger.write_bytes(content)
        assert "the ledger is damaged" in refused(["audit", "runs/r"], capsys)
    ledger.write_bytes(whole)
    # The newest checkpoint without its manifest looks unfinished, but the run has finished.
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "manifest.json").unlink()
    assert f"of step {int(newest.name[5:])}, is damaged" in refused(["export", "runs/r"], capsys)
    # A split whose manifest is gone is none that `verify` may leave out.
    (place / "data" / "digits" / "test" / "manifest.json").unlink()
    line = refused(["shards", "verify", "data/digits"], capsys)
    assert "the manifest of this shard set is missing" in line and "digits/test" in line
    manifest = place / "data" / "digits" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.", "0.1", 1))
    assert "damaged manifest" in refused(["shards", "describe", "data/digits/train"], capsys)


def test_warnings_of_this_package_are_one_line_without_its_source() -> None:
    ours = format_warning("wide", UserWarning, elastic_kfac.__file__, 7)
    assert ours == "elastic-kfac: warning: wide\n"
    assert format_warning("wide", UserWarning, sys.argv[0], 7) == ours
    assert "else.py:7: UserWarning: wide" in format_warning("wide", UserWarning, "else.py", 7)
