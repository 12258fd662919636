"""`elastic-kfac suggest`: the search, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_kfac.cli.arguments import parse_arguments
from elastic_kfac.cli.entry import main
from elastic_kfac.cli.suggest import WIDTH, closing_lines, sparkline
from elastic_kfac.config import Config, parse_config, read_config
from elastic_kfac.runs import suggestion
from elastic_kfac.runs.suggestion import Suggestion, Trial, changed


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that is far from good: the clip bounds every step to almost nothing."""
    folder = tmp_path_factory.mktemp("suggest")
    config = folder / "digits.yaml"
    config.write_text(
        f"data: {{shards: {folder}/digits, source: digits}}\n"
        "model: {name: mlp, arguments: {hidden: [16]}}\n"
        "train: {epochs: 4, global_batch_size: 128}\n"
        "kfac: {kl_clip: 1.0e-9}\n"
    )
    return config


def test_suggestion_beats_a_bad_configuration_and_trains(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = digits.parent / "runs"
    arguments = ["--storage", str(storage), "--name", "better", "--minutes", "30"]
    assert main(["suggest", str(digits), *arguments]) == 0
    text = capsys.readouterr().out
    assert "K-FAC's defaults" in text
    written = json.loads((storage / "better" / "suggestion.json").read_text())
    assert written["share"] == 1
    assert written["changes"]["kfac.kl_clip"] >= 1e-3
    assert written["confirmed"]
    given, *others = written["trials"]
    assert given["changes"] == {}
    assert {trial["seed"] for trial in others} == {0}
    ended = [trial for trial in others if not trial["ended"]]
    assert {len(trial["losses"]) for trial in ended} == {len(given["losses"])} == {48}
    stopped = [trial for trial in others if trial["ended"] == "worse than most"]
    assert {len(trial["losses"]) for trial in stopped} <= {12, 24}
    seeds = [pair[0]["seed"] for pair in written["confirming"]]
    assert seeds == [1000, 1001, 1002]
    assert all(winner["test_loss"] < given["test_loss"] for given, winner in written["confirming"])
    page = (storage / "better" / "report.html").read_text()
    assert "<svg" in page
    assert "<h1>Suggested: kfac." in page

    file = storage / "better" / "suggested.yaml"
    assert read_config(file).train == read_config(digits).train
    train = ["train", str(file), "--local", "--storage", str(storage), "--name", "run"]
    assert main(train) == 0
    assert json.loads((storage / "run" / "result.json").read_text())["best_accuracy"] > 0.9

    capsys.readouterr()
    assert main(["suggest", str(digits), *arguments]) == 2
    assert "choose another --name" in capsys.readouterr().err


def test_a_time_that_is_too_short_is_refused_in_one_line_with_what_would_do(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = digits.parent / "short"
    code = main(["suggest", str(digits), "--minutes", "0.001", "--storage", str(storage)])
    # A slow machine also reports on the shards that it writes first.
    (error,) = [x for x in capsys.readouterr().err.splitlines() if "samples (" not in x]
    assert code == 2
    assert "use --minutes" in error
    assert not storage.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--minutes", "0"], "a number above 0"),
        (["--minutes", "nan"], "a number above 0"),
        (["--storage", "s3://bucket/runs"], "keeps its files in a folder"),
        (["--set", "kfac.damping=-1"], "kfac.damping"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    words: list[str],
    reason: str,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(digits.parent)
    assert main(["suggest", str(digits), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
    assert not (digits.parent / "runs" / "suggest-digits-1").exists()


def test_five_minutes_by_default() -> None:
    assert parse_arguments(["suggest", "c.yaml"]).minutes == 5.0


# -- the search alone, over a loss that is known ---------------------------------------------------


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Trial]]:
    """Trials that end at once; the loss is a function of damping and momentum."""
    made: list[Trial] = []

    def train(self: object, trial: Trial, config: Config, rivals: object) -> None:
        damping, momentum = config.kfac.damping, config.optimizer.momentum
        kfac = config.kfac
        assert isinstance(damping, float)
        assert isinstance(kfac.factor_update_steps, int)
        assert isinstance(kfac.inverse_update_steps, int)
        trial.losses = [1.0] * 32
        trial.seconds = 32.0 / kfac.factor_update_steps + 32.0 / kfac.inverse_update_steps
        trial.test_loss = 1 + math.log10(damping / 1e-1) ** 2 + abs(momentum - 0.8)
        if config.train.seed >= 1000 and momentum == 0.8:
            trial.test_loss += 100 * self.luck  # type: ignore[attr-defined]
        made.append(trial)

    monkeypatch.setattr(suggestion.TrialRunner, "_train", train)
    monkeypatch.setattr(suggestion.TrialRunner, "luck", 0.0, raising=False)
    monkeypatch.setattr(suggestion, "_trial_length", lambda *_: (32, 1.0))
    yield made


def test_search_follows_a_direction_while_it_helps(formula: list[Trial]) -> None:
    config = parse_config({"optimizer": {"lr_schedule": "cosine"}})
    found = suggestion.suggest(config, minutes=1)
    labels = [trial.label for trial in found.trials]
    # Damping 1e-1 is the optimum; the step beyond it is the last of its direction, and the other
    # direction is not tried. Momentum 0.6 is worse than 0.9 here, by the distance from 0.8.
    assert labels[:4] == ["as given", "damping 0.01", "damping 0.1", "damping 1"]
    assert "damping 0.0001" not in labels
    assert [x for x in labels if x.startswith("momentum")] == ["momentum 0.6", "momentum 0.8"]
    # Cheaper at the same loss.
    assert found.changes == {
        "kfac.damping": 0.1,
        "optimizer.momentum": 0.8,
        "kfac.factor_update_steps": 10,
        "kfac.inverse_update_steps": 50,
    }
    assert found.is_confirmed
    assert changed(config, found.changes).kfac.damping == 0.1


def test_a_winner_by_luck_is_not_suggested(
    formula: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestion.TrialRunner, "luck", 1.0, raising=False)
    found = suggestion.suggest(parse_config({}), minutes=1)
    assert found.winner is not None
    assert len(found.confirming) == suggestion.CONFIRMING_SEEDS
    assert found.changes == {}
    assert found.suggested == Config()
    assert "not better with unseen seeds" in "\n".join(closing_lines(found))


def test_an_interrupted_search_suggests_what_it_has_seen(
    formula: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(found: Suggestion, trial: Trial) -> None:
        if trial.label == "damping 1":
            raise KeyboardInterrupt

    found = suggestion.suggest(parse_config({}), minutes=1, show=show)
    assert found.interrupted
    assert found.changes == {"kfac.damping": 0.1}
    assert "Interrupted" in closing_lines(found)[0]


def test_sparkline_is_as_long_as_the_trial_was() -> None:
    whole = [math.exp(-step / 10) for step in range(40)]
    assert len(sparkline(whole, whole)) == WIDTH
    assert sparkline(whole, whole)[0] == "█"
    assert len(sparkline(whole[:10], whole)) == WIDTH // 4
    assert sparkline([math.nan] * 40, whole) == "✗" * WIDTH
