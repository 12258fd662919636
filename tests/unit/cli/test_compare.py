"""`elastic-kfac compare` before anything starts, and the job that calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.entry import main
from elastic_kfac.experiments import engine
from elastic_kfac.experiments.study import load_study

ROOT = Path(__file__).parents[3]


def test_options_of_compare_reach_the_study() -> None:
    words = "compare s.yaml --seeds 2 --parallelism 3 --set train.epochs=1 --name n --address auto"
    arguments = parse_arguments(words.split())
    assert (arguments.study, arguments.seeds, arguments.parallelism) == ("s.yaml", 2, 3)
    assert (arguments.overrides, arguments.name, arguments.address) == (
        ["train.epochs=1"],
        "n",
        "auto",
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compare"], "STUDY"),
        (["compare", "absent.yaml"], "no such study file"),
        (["compare", "s.yaml", "--seeds", "0"], "bad value for --seeds; given: 0"),
        (["compare", "s.yaml", "--sed", "3"], "did you mean --seeds?"),
        (["compare", "s.yaml", "--set", "train.epochs"], "allowed: section.key=value"),
        (["compare", "s.yaml", "--set", "train.epoch=1"], "method A at batch size 8: unknown"),
        (["compare", "s.yaml", "--set", "train.micro_batch_size=9"], "method A at batch size 8"),
    ],
)
def test_bad_call_is_one_line_before_a_cluster_starts(
    argv: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    study = {"base": {}, "methods": {"A": {}}, "batch_sizes": [8]}
    Path("s.yaml").write_text(yaml.safe_dump(study))
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "s.yaml"]


def test_study_with_a_cell_that_cannot_run_is_refused_before_a_cluster_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "cluster_for", lambda *_, **__: pytest.fail("a cluster started"))
    monkeypatch.chdir(tmp_path)
    base = {"data": {"shards": "d", "source": "digits"}, "model": {"name": "mlp"}}
    study = {"base": base, "methods": {"A": {}}, "batch_sizes": [64, 2048]}
    Path("s.yaml").write_text(yaml.safe_dump(study))
    assert main(["compare", "s.yaml"]) == 2
    err = capsys.readouterr().err
    assert "A-B2048-s0 cannot run: train.global_batch_size is larger" in err
    assert err.count("\n") == 1


def test_every_cell_of_the_clusters_study_follows_its_policy() -> None:
    cells = load_study(ROOT / "benchmarks" / "studies" / "clusters10.yaml").cells
    assert len({cell.seed for cell in cells}) >= 5
    policies = {(str(c.place), c.config.batch.policy, c.config.batch.max_batch_size) for c in cells}
    sizes = (256, 1024, 4096)
    expected = {("BL@32", "bl", 32)}
    expected |= {
        (f"{n}@{b}", n.lower(), b) for n in ("BL", "FB", "GG", "ABS", "ABSA") for b in sizes
    }
    assert policies == expected
    assert {cell.config.train.global_batch_size for cell in cells} == {32}
