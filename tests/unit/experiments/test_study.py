"""Study files: what a cell's configuration is, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_kfac.errors import ConfigError
from elastic_kfac.experiments.study import Place, expand, load_study, operator_of

ROOT = Path(__file__).parents[3]

SMALL: dict[str, Any] = {
    "base": {"train": {"epochs": 2}, "optimizer": {"lr": 0.1}},
    "methods": {
        "KFAC": {"at": {64: {"optimizer.lr": 0.7}}},
        "SGD": {"set": {"kfac.enabled": False, "optimizer.lr": 0.2}, "batch_sizes": [32, 128]},
    },
    "batch_sizes": [32, 64, 128],
    "seeds": [3, 5],
    "assertions": [
        {"says": "x", "column": "accuracy", "compare": ["KFAC@* - SGD@*"], "at_least": 0.0}
    ],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def test_cells_are_seeds_by_batch_sizes_by_the_methods_that_run_there(tmp_path: Path) -> None:
    loaded = load_study(write(tmp_path))
    assert [cell.name for cell in loaded.cells] == [
        f"{place}-s{seed}"
        for seed in (3, 5)
        for place in ("KFAC-B32", "SGD-B32", "KFAC-B64", "KFAC-B128", "SGD-B128")
    ]


def test_later_changes_win_base_batch_size_method_method_at_batch_command_line_seed(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, set={"optimizer.momentum": 0.5})
    configs = {cell.name: cell.config for cell in load_study(path).cells}
    assert configs["KFAC-B32-s3"].optimizer.lr == 0.1
    assert configs["KFAC-B64-s3"].optimizer.lr == 0.7
    assert configs["SGD-B128-s5"].optimizer.lr == 0.2
    sgd = configs["SGD-B128-s5"]
    assert (sgd.train.global_batch_size, sgd.train.seed, sgd.train.epochs) == (128, 5, 2)
    assert (sgd.kfac.enabled, sgd.optimizer.momentum) == (False, 0.5)
    changed = load_study(path, ["optimizer.lr=0.4"], seeds=1, parallelism=3)
    assert {cell.config.optimizer.lr for cell in changed.cells} == {0.4}
    assert [cell.seed for cell in changed.cells] == [0] * 5
    assert changed.study.parallelism == 3


def test_batch_size_may_set_another_key_and_a_base_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"train": {"global_batch_size": 16}}))
    path = write(
        tmp_path,
        base="base.yaml",
        batch_key="batch.max_batch_size",
        methods={"BL": {"set": {"batch.policy": "bl"}}},
        assertions=[],
    )
    config = load_study(path).cells[2].config
    assert (config.train.global_batch_size, config.batch.max_batch_size) == (16, 128)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batchsizes": [1]}, ["unknown key batchsizes", "batch_sizes"]),
        ({"methods": {"A": {"sets": {}}}}, ["unknown key methods.A.sets", "batch_sizes", "set"]),
        ({"methods": {}}, ["methods"]),
        ({"methods": {"a b": {}}}, ["methods.a b"]),
        ({"seeds": 0}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds holds a value twice"]),
        ({"batch_sizes": [0]}, ["batch_sizes.0", "greater than or equal to 1"]),
        ({"columns": ["acuracy"]}, ["'acuracy'", "did you mean accuracy?"]),
        ({"parallelism": 0}, ["parallelism"]),
        ({"base": "absent.yaml"}, ["no such base configuration", "absent.yaml"]),
        (
            {"methods": {"A": {"set": {"optimizer.lrr": 1}}}, "assertions": []},
            ["method A at batch size 32", "optimizer.lrr", "did you mean lr?"],
        ),
        (
            {"methods": {"A": {"set": {"train.epochs": -1}}}, "assertions": []},
            ["method A at batch size 32", "train.epochs", "-1"],
        ),
        (
            {"methods": {"A": {"batch_sizes": [7]}}, "assertions": []},
            ["methods.A names batch size 7"],
        ),
        (
            {"methods": {"A": {"set": {"batch.policy": "abs"}}}, "assertions": []},
            ["method A at batch size 32", "needs batch.max_batch_size", "batch.policy=abs"],
        ),
        ({"measure": {"attack": "fgsm", "adversarial_steps": 3}}, ["measure", "use pgd"]),
        ({"measure": {"radius": 3}}, ["unknown key measure.radius", "adversarial_radius"]),
    ],
)
def test_bad_study_is_one_line_that_names_the_field(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, **changes))
    line = caught.value.line()
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a bound is missing"),
        ({"above": 1, "at_least": 1}, "exclude"),
        ({"above": 2, "below": 1}, "nothing is between"),
        ({"above": 0, "column": "speed"}, "'speed' is not one of"),
        ({"above": 0, "compare": ["KFAC@32"]}, "is not a comparison"),
        ({"above": 0, "compare": ["KFAC@32 - ADAM@32"]}, "'ADAM' is not one of KFAC, SGD"),
        ({"above": 0, "compare": ["KFAC@32 - SGD@64"]}, "names SGD@64, which the study does not"),
        ({"above": 0, "compare": ["KFAC@32 / SGD@32"]}, "bounds of a ratio are positive"),
        (
            {"above": 1, "compare": ["KFAC@32 / SGD@32", "KFAC@32 - SGD@32"]},
            "differences and ratios",
        ),
        ({"above": 0, "over": "all"}, "over"),
    ],
)
def test_bad_assertion_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assertion = {"says": "x", "column": "accuracy", "compare": ["KFAC@32 - SGD@32"], **changes}
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, assertions=[assertion]))
    assert words in caught.value.line()


def test_star_stands_for_the_batch_sizes_of_the_starred_sides(tmp_path: Path) -> None:
    study = load_study(write(tmp_path)).study
    both = expand("KFAC@* - SGD@*", study)
    assert both == [(Place("KFAC", b), Place("SGD", b)) for b in (32, 128)]
    one = expand("KFAC@* / SGD@32", study)
    assert one == [(Place("KFAC", b), Place("SGD", 32)) for b in (32, 64, 128)]
    assert (operator_of("KFAC@* / SGD@32"), operator_of("A@1 - B@2")) == ("/", "-")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")))
def test_committed_studies_are_valid(path: Path) -> None:
    assert load_study(path).cells
