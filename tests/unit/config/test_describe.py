"""`elastic-kfac config` and docs/configuration.md: every key, explained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.cli import main
from elastic_kfac.config import Config
from elastic_kfac.config.describe import as_markdown, as_text, keys_of
from elastic_kfac.config.kfac import LevenbergMarquardt, MilestoneSchedule, WarmupSchedule

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
MAPPINGS = (WarmupSchedule, MilestoneSchedule, LevenbergMarquardt)
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}


def test_every_key_and_section_has_a_meaning() -> None:
    named = {**SECTIONS, **{mapping.__name__: mapping for mapping in MAPPINGS}}
    keys = {(name, key.name): key.help for name, each in named.items() for key in keys_of(each)}
    assert {key for name, key in keys if name in SECTIONS} == {
        key for section in SECTIONS.values() for key in section.model_fields
    }
    assert [key for key, text in keys.items() if not text.endswith(".")] == []
    assert [name for name, section in SECTIONS.items() if not section.__doc__] == []


def test_documentation_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_markdown(), (
        "run: elastic-kfac config --markdown > docs/configuration.md"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_the_terminal_and_names_every_key(width: int) -> None:
    text = as_text([], width)
    assert max(map(len, text.splitlines())) <= width
    for name, section in SECTIONS.items():
        assert all(f"  {name}.{key} = " in text for key in section.model_fields)


def test_command_prints_a_section_or_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "plan"]) == 0
    assert "plan.calibrate = false  (bool)" in capsys.readouterr().out
    assert main(["config", "kfac.damping", "train.target_accuracy"]) == 0
    out = capsys.readouterr().out
    assert "kfac.damping = 0.001" in out and "levenberg_marquardt" in out
    assert "(float in (0, 1] | null)" in out
    assert "factor_decay" not in out
    assert "{rule: levenberg_marquardt} initial = (required)  (float > 0)" in out
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kfca"], "no section kfca; allowed: data,"),
        (["jobs/digits.yaml"], "config explains keys, and this is a file; given: jobs/digits.yaml"),
        (["kfac.dampin"], "did you mean damping?"),
        (["kfac", "--markdown"], "--markdown prints all sections; given: kfac"),
    ],
)
def test_unknown_name_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["config", *words]) == 2
    assert said in capsys.readouterr().err
