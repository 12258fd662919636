"""YAML as people expect it."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.config import dump_yaml, load_yaml, read_config, split_override
from elastic_kfac.errors import ConfigError
from elastic_kfac.state.run_folder import RunFolder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert load_yaml(text, what="t") == value
    assert load_yaml(dump_yaml(value), what="t") == value


@pytest.mark.parametrize(
    "text", ["010", "1e3", "1:30", "null", "~", "", "0x1F", "true", ".5", "yes"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert load_yaml(dump_yaml({"key": text}), what="t") == {"key": text}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("kfac: {damping: 1}\ntrain: {}\nkfac: {damping: 2}\n", (3, 1)),
        ("train:\n  epochs: 1\n  seed: 0\n  epochs: 2\n", (4, 2)),
        ("train: {epochs: 1, epochs: 2}", (1, 1)),
        ("a:\n  - b: 1\n    b: 1\n", (3, 2)),
    ],
)
def test_doubled_keys_are_refused_with_both_lines(
    text: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    match = rf"at line {lines[0]}: \w+ is there twice, first at line {lines[1]}"
    for read in (lambda: read_config(tmp_path / "config.yaml"), RunFolder(tmp_path).read_config):
        with pytest.raises(ConfigError, match=match):
            read()


def test_sexagesimal_epochs_and_octal_seeds(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {seed: 010}")
    assert read_config(path).train.seed == 10
    path.write_text("train: {epochs: 1:30}")
    with pytest.raises(ConfigError, match=r"train\.epochs.*1:30"):
        read_config(path)
    assert split_override("train.seed=010") == ("train.seed", 10)


@pytest.mark.parametrize(
    "text",
    [
        *("!!int x", "!!bool maybe", "!!timestamp 1", "[1,", "a: b: c", "\x00", "!!float x"),
        *("x: !!python/name:os.system", "[" * 3000, "&a [*b]", "? [a]\n: 1", "- \tx\n -y"),
    ],
)
def test_what_is_no_yaml_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, what="t")
    assert "\n" not in caught.value.line()


def test_folder_as_a_configuration_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"a folder is no configuration file.*digits\.yaml"):
        read_config(tmp_path)


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbftrain: {seed: 3}")
    assert read_config(tmp_path / "c.yaml").train.seed == 3
