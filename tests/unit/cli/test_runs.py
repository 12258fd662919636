from __future__ import annotations

import argparse
import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cli import main
from elastic_kfac.cli.runs import locate_run
from elastic_kfac.cli.train import check_name, fresh_name
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.config import Config
from elastic_kfac.errors import UsageError
from elastic_kfac.state.run_folder import RunFolder

DIGITS = Path(__file__).parents[3] / "jobs" / "configs" / "digits.yaml"


def make_run(storage: Path, name: str) -> Path:
    folder = storage / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {name: small_cnn}\n")
    row = {"step": 1, "loss": 2.0, "wall_time_s": 0.5, "world_size": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("elastic-kfac: error: ")
    assert err.count("\n") == 1
    return err


def test_locate_run_takes_a_folder_or_a_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "digits-1")
    assert locate_run(str(folder), "elsewhere") == str(folder)
    assert locate_run("digits-1", str(tmp_path)) == str(folder)
    assert locate_run("digits-1", "s3://bucket/runs/") == "s3://bucket/runs/digits-1"


def test_locate_run_of_misspelt_name_suggests_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path, "digits-1")
    with pytest.raises(UsageError, match="did you mean digits-1"):
        locate_run("digit-1", str(tmp_path))


@pytest.mark.parametrize("verb", ["report", "audit", "evaluate", "export"])
def test_command_on_missing_run_prints_one_line_and_returns_2(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "nothing", "--storage", str(tmp_path)]) == 2
    assert "no such run" in error_of(capsys)


def test_report_writes_the_page_and_prints_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, "digits-1")
    assert main(["report", "digits-1", "--storage", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"Report: {folder}/report.html")
    assert "digits-1" in (folder / "report.html").read_text()


def test_fresh_name_counts_up(tmp_path: Path) -> None:
    make_run(tmp_path, "digits-1")
    assert fresh_name("digits", str(tmp_path)) == "digits-2"
    unnamed = argparse.Namespace(name=None, storage="s3://bucket/runs")
    with pytest.raises(UsageError, match="--name"):
        check_name(unnamed)


def test_fresh_names_of_calls_at_the_same_time_differ(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: fresh_name("digits", str(tmp_path)), range(64)))
    assert sorted(names) == sorted(f"digits-{number}" for number in range(1, 65))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--resize-at", "10:3"], "1 to 2 nodes"),
        (["--kill-at", "10:2"], "ranks 0 to 1"),
        (["--resize-at", "10:1", "--resize-at", "10:2"], "two --resize-at"),
        (["--resize-at", "10:1", "--address", "auto"], "local cluster only"),
        (["--set", "kfac.grad_worker_frac=3"], "kfac.grad_worker_frac"),
        (["--set", "kfac.dampign=1"], "did you mean damping?"),
        (["--set", "nonsense"], "section.key=value"),
        (["--storage", "s3://bucket/runs"], "--name"),
    ],
)
def test_train_refuses_the_impossible_before_anything_starts(
    extra: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(DIGITS), *extra]) == 2
    assert expected in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_train_of_missing_or_broken_file_returns_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "no.yaml")]) == 2
    assert "no such configuration file" in error_of(capsys)
    (tmp_path / "bad.yaml").write_text("kfac: [\n")
    assert main(["train", str(tmp_path / "bad.yaml")]) == 2
    assert "bad YAML" in error_of(capsys)


def test_train_without_shards_and_source_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("data: {shards: nowhere}\n")
    assert main(["train", "c.yaml"]) == 2
    assert "shards make" in error_of(capsys)


def test_shards_make_verify_and_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "make", "--source", "digits", "--out", "d"]) == 0
    assert main(["shards", "verify", "d"]) == 0
    assert main(["shards", "describe", "d"]) == 0
    described: dict[str, Any] = json.loads(capsys.readouterr().out.split("\n", 4)[-1])
    assert sum(split["samples"] for split in described["splits"].values()) == 1797
    shard = next((tmp_path / "d" / "train").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["shards", "verify", "d"]) == 2
    assert shard.name in error_of(capsys)


def test_plan_prints_one_plan_per_world_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "make", "--source", "digits", "--out", "data/digits"]) == 0
    capsys.readouterr()
    code = main(["plan", str(DIGITS), "--world-size", "1,5", "--set", "kfac.grad_worker_frac=0.4"])
    out = capsys.readouterr().out
    assert code == 0
    head, *lines = out.split("\n\n")[1].splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "1"], ["5", "0.333"]]
    assert head.split()[:2] == ["ranks", "fraction"]
    assert "1 thread(s)" in out
    _, _, head, *lines = out.split("\n\n")[2].splitlines()
    assert head.split()[:2] == ["ranks", "kfac.grad_worker_frac"]
    assert [line.split()[0] for line in lines] == ["1", "5"]
    assert "3 columns of 1 or 2 (" not in out
    assert "cross-over: dividing decompositions among ranks" in out
    few = ["plan", str(DIGITS), "--world-size", "5", "--set", "kfac.grad_worker_frac=0.4"]
    assert main([*few, "--layers", "--device", "h100", "--input-shape", "3x16x16"]) == 0
    out = capsys.readouterr().out
    assert "plan for 5 ranks" in out
    assert "3 columns of 1 or 2 (" in out
    assert "estimated for h100" in out
    assert main([*few, "--device", "abacus"]) == 2
    assert "cpu, v100, a100, h100" in error_of(capsys)
    assert main(["plan", str(DIGITS), "--world-size", "1,5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["world_size"] for row in found["world_sizes"]] == [1, 5]
    assert set(found["world_sizes"][1]["suggested"]) == {
        "grad_worker_frac",
        "micro_batch_size",
        "inverse_update_steps",
        "step_s",
        "phases_s",
        "received_bytes",
        "received_bytes_by_purpose",
        "memory_bytes",
    }
    assert set(found["cross_over"]) == {"divide_from", "flat_from"}
    [resize] = found["resizes"]
    assert (resize["from"], resize["to"]) == (1, 5)
    assert resize["moved_bytes"] > 0
    assert "world_size: 1 -> 5" in resize["changes"]


def test_plan_without_kfac_returns_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DIGITS), "--world-size", "2", "--set", "kfac.enabled=false"]) == 2
    assert "kfac.enabled" in error_of(capsys)


def test_plan_without_shards_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--set", "data.source=imagefolder:photos"]
    assert main(["plan", str(DIGITS), "--world-size", "2", *own]) == 2
    error = error_of(capsys)
    assert "`elastic-kfac shards make --source imagefolder:photos --out data/digits`" in error
    assert "--input-shape 1x8x8 --classes 10" in error


def test_plan_of_an_embedded_set_needs_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["plan", str(DIGITS), "--world-size", "1,5", "--device", "h100"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "without data, for samples of 1x8x8 (data.source=digits)" in out
    assert main([*args, "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert main(["shards", "make", "--source", "digits", "--out", "data/digits"]) == 0
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for ours, theirs in zip(without["world_sizes"], found["world_sizes"], strict=True):
        assert ours["plan"] == theirs["plan"]
        for costs in ("predicted", "suggested"):
            # The statistics of pixels are two numbers that only shards have.
            memory = theirs[costs].pop("memory_bytes")
            assert ours[costs].pop("memory_bytes") == pytest.approx(memory, rel=1e-4)
            assert ours[costs] == theirs[costs]


def test_train_failed_run_still_writes_the_report_with_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elastic_kfac.errors import RunError

    def fail(config: Config, *, name: str, storage: str, **rest: object) -> None:
        RunFolder(make_run(Path(storage), name)).write_config(config)
        raise RunError("rank 1 gave up")

    monkeypatch.chdir(tmp_path)
    fake = types.ModuleType("elastic_kfac.cluster.run.trainer")
    fake.train = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elastic_kfac.cluster.run.trainer", fake)
    assert main(["train", str(DIGITS)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "elastic-kfac: error: rank 1 gave up\n"
    assert captured.out.startswith("elastic-kfac ")
    page = (tmp_path / "runs" / "digits-1" / "report.html").read_text()
    assert "pyarrow" in page


def test_train_with_faults_that_never_fired_returns_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(config: object, *, name: str, storage: str, **rest: object) -> object:
        make_run(Path(storage), name)
        assert rest["resize_at"] == [(9000, 1)]
        return RunResult("finished", "", {}, unfired=("--resize-at 9000:1",))

    monkeypatch.chdir(tmp_path)
    fake = types.ModuleType("elastic_kfac.cluster.run.trainer")
    fake.train = finish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elastic_kfac.cluster.run.trainer", fake)
    assert main(["train", str(DIGITS), "--resize-at", "9000:1"]) == 1
    assert "--resize-at 9000:1" in capsys.readouterr().err
