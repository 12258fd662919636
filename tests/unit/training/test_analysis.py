"""Analyses against a dense Hessian, their budget and memory, what they leave alone, and the probes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.analysis.hessian_report import analyse, analysis_row, check_before_start
from elastic_kfac.analysis.low_rank_probe import epsilon_rank, gaussian_kernel_block, matrices
from elastic_kfac.cli import main
from elastic_kfac.cli.analyze import low_rank_table, table
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.reports.analysis import analysis_section, figures, training_figure
from elastic_kfac.runs.checkpoint_analysis import (
    analyse_checkpoint,
    measure_bias_variance,
    probe_low_rank,
)
from elastic_kfac.runs.checkpoints import choose_state, restored
from elastic_kfac.runs.history import read_run
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.tasks.models import build_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from support.training_problems import MemoryDataset, memory_datasets, small_config

BATCH_NORM = {"model.name": "support.training_problems:batch_norm_cnn"}
FULL = AnalysisConfig(
    samples=30,
    top_k=4,
    lanczos_steps=200,
    tolerance=1e-10,
    one_samples=2,
    trace_draws=40,
    density_draws=2,
    landscape_points=5,
)


def trained(folder: Path, changes: dict[str, Any] | None = None) -> tuple[RunFolder, Outcome]:
    run = RunFolder(folder)
    config = small_config({**BATCH_NORM, **(changes or {})})
    run.write_config(config)
    outcome = run_rank(
        config,
        Communicator.solo(),
        store=CheckpointStore(run.uri),
        callback=FolderWriter(run),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    return run, outcome


def problem() -> tuple[nn.Module, FixedSamples, Any]:
    config = small_config(BATCH_NORM)
    model = build_model(config.model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    dataset = MemoryDataset(50)
    model(dataset.read(0, 0, 50).inputs)  # running statistics that differ from their initial values
    samples = FixedSamples(
        dataset,
        Preprocessor(dataset, torch.float64, torch.device("cpu")),
        FULL,
        Communicator.solo(),
    )
    return model, samples, make_task(config, ()).loss


def dense(model: nn.Module, samples: FixedSamples, loss: Any) -> Tensor:
    model.eval()
    batches = list(samples)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    named = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def of(flat: Tensor) -> Tensor:
        parts = zip(named, flat.split(sizes), named.values(), strict=True)
        values = {name: part.view_as(like) for name, part, like in parts}
        mean: Tensor = loss(functional_call(model, values, (images,)), labels) / len(labels)
        return mean

    flat = torch.cat([p.reshape(-1) for p in named.values()])
    matrix = torch.autograd.functional.hessian(of, flat)
    model.train()
    assert isinstance(matrix, Tensor)
    return matrix


def test_analysis_of_a_batch_norm_model_is_that_of_the_dense_hessian() -> None:
    model, samples, loss = problem()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrix = dense(model, samples, loss)
    values = torch.linalg.eigvalsh(matrix)
    by_size = values[values.abs().argsort(descending=True)]
    found = analyse(model, loss, samples, FULL, Communicator.solo(), landscape={"train": samples})
    assert found["spectrum"]["eigenvalues"] == pytest.approx(by_size[:4].tolist(), rel=1e-8)
    assert found["spectrum"]["largest"] == pytest.approx(float(values[-1]), rel=1e-8)
    assert found["spectrum"]["smallest"] == pytest.approx(float(values[0]), rel=1e-6)
    last = matrix[-sum(p.numel() for p in model[-1].parameters()) :][:, -(3 * 64 + 3) :]  # type: ignore[index]
    block = torch.linalg.eigvalsh(last).flip(0)
    assert found["last_layer"]["eigenvalues"][0] == pytest.approx(float(block[0]), rel=1e-8)
    trace = found["trace"]
    assert abs(trace["mean"] - float(matrix.trace())) <= 3 * trace["standard_error"]
    seen = found["landscape"]
    assert seen["curvature"] == pytest.approx(float(by_size[0]), rel=1e-8)
    assert seen["losses"]["train"][2] == pytest.approx(found["loss"], rel=1e-12)
    assert found["one_sample"]["samples"] == 2
    assert found["samples_seen"] == 30
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kfac", [False, True])
def test_training_ends_in_the_same_bits_with_and_without_analyses(
    kfac: bool, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"kfac.enabled": kfac, "kfac.damping": 0.1}
    _, plain = trained(tmp_path / "plain", changes)
    extra = {"analysis.every_epochs": 1, "analysis.samples": 20, "analysis.lanczos_steps": 10}
    run, watched = trained(tmp_path / "watched", {**changes, **extra})
    assert watched.state_sha256 == plain.state_sha256
    rows = [row for row in run.metrics() if "top_eigenvalue" in row]
    assert [row["epoch"] for row in rows] == [1.0, 2.0, 3.0]
    assert all(row["gradient_norm"] > 0 and row["last_layer_eigenvalue"] for row in rows)
    assert watched.progress.analyses == 3
    assert watched.progress.hessian_s > 0
    read = read_run(tmp_path / "watched")
    assert len(read.steps) == watched.progress.step
    assert training_figure(read) is not None


def test_spent_budget_names_what_is_missing_and_keeps_the_rest() -> None:
    model, samples, loss = problem()
    request = FULL.model_copy(update={"budget_s": 1e-9})
    found = analyse(
        model, loss, samples, request, Communicator.solo(), landscape={"train": samples}
    )
    assert "spectrum" not in found
    missing = "\n".join(found["notes"])
    for part in ("gradient", "spectrum", "last_layer", "landscape", "trace", "one_sample"):
        assert f"{part}: left out" in missing
    assert found["loss"] is None


def test_request_that_cannot_fit_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples, loss = problem()
    monkeypatch.setattr("elastic_kfac.analysis.hessian_report.free_bytes", lambda device: 1000.0)
    with pytest.raises(ConfigError, match="does not fit in memory"):
        analyse(model, loss, samples, FULL, Communicator.solo())
    with pytest.raises(UsageError, match="too many eigenvalues"):
        analyse(
            model,
            loss,
            samples,
            FULL.model_copy(update={"top_k": 10**6}),
            Communicator.solo(),
        )
    # In training it is a row, not the end of the run.
    config = small_config({**BATCH_NORM, "analysis.every_epochs": 1})
    row = analysis_row(
        model,
        loss,
        Preprocessor(MemoryDataset(50), torch.float64, torch.device("cpu")),
        memory_datasets(),
        config,
        Communicator.solo(),
    )
    assert "does not fit" in row["analysis_problem"]
    assert "top_eigenvalue" not in row


def test_train_refuses_an_analysis_that_cannot_fit_before_it_starts(
    digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = small_config(
        {"data.shards": str(digits), "model.name": "small_cnn", "analysis.every_epochs": 1}
    )
    check_before_start(config, workers_here=2)
    settings = {"shards": f"data.shards={digits}", "every": "analysis.every_epochs=1"}
    options = [*settings.values(), "analysis.memory_gib=1e-6"]
    sets = [word for option in options for word in ("--set", option)]
    config_file = Path(__file__).parents[3] / "jobs" / "configs" / "digits.yaml"
    assert main(["train", str(config_file), "--storage", str(tmp_path / "r"), *sets]) == 2
    assert "does not fit in memory" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_checkpoints_are_chosen_by_step_by_epoch_or_the_newest(tmp_path: Path) -> None:
    changes = {"elastic.snapshot_interval_s": 1e-6, "elastic.keep_checkpoints": 20}
    run, outcome = trained(tmp_path, changes)
    steps = CheckpointStore(run.uri, 20).steps()
    assert choose_state(run).progress.step == outcome.progress.step
    assert choose_state(run, step=steps[0]).progress.step == steps[0]
    # Which steps have a snapshot depends on how fast they are written; the final state always has.
    whole = {step: choose_state(run, step=step).progress for step in steps}
    for epoch in (1, 2, 3):
        expected = [s for s, p in whole.items() if (p.epoch, p.consumed) <= (epoch, 0)]
        if expected:
            assert choose_state(run, epoch=epoch).progress.step == max(expected)
    assert choose_state(run, epoch=3).progress.step == outcome.progress.step
    with pytest.raises(UsageError, match=f"step {steps[0]}"):
        choose_state(run, epoch=0.001)
    with pytest.raises(UsageError, match=f"step {steps[-1]}"):
        choose_state(run, step=9999)
    with pytest.raises(UsageError, match="give one of them"):
        choose_state(run, step=1, epoch=1)


def test_analysed_run_shows_its_figures_and_probes_in_the_report(tmp_path: Path) -> None:
    run, _ = trained(tmp_path)
    with restored(run, datasets=memory_datasets()) as here:
        found = analyse_checkpoint(here, FULL)
        spread = measure_bias_variance(here, AnalysisConfig(samples=None))
        low_rank = probe_low_rank(here, AnalysisConfig(samples=16))
        with pytest.raises(UsageError, match="allowed: train, test"):
            analyse_checkpoint(here, FULL, split="validation")
    written = json.loads(run.storage.read(found["file"]))
    assert written["spectrum"] == found["spectrum"]
    assert written["landscape"]["losses"].keys() == {"train", "test"}
    assert figures(found).keys() == {"spectrum", "landscape", "density"}
    assert any("not a saddle" in line or "saddle" in line for line in table(found))
    train = spread["splits"]["train"]
    expected = train["loss"] + math.sqrt(train["variance"] / train["samples"])
    assert train["bound"] == pytest.approx(expected, rel=1e-12)
    assert sum("holds" in line or "FAILS" in line for line in low_rank_table(low_rank)) == 3
    text = analysis_section(read_run(tmp_path))
    for heading in ("Loss surface", "Bias and variance", "Low-rank probe"):
        assert heading in text
    assert text.count("<svg") == 3


def test_kernel_block_has_low_rank_and_unrolled_inputs_have_not() -> None:
    block = gaussian_kernel_block()
    assert block.shape == (256, 256)
    assert epsilon_rank(block, 1e-6) == 7
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(512, 144, generator=generator)
    assert epsilon_rank(patches, 1e-6) == 144
    thin = torch.randn(100, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
    assert epsilon_rank(thin, 1e-5) == 3
    assert epsilon_rank(torch.zeros(3, 3), 1e-6) == 0


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_unrolled_inputs_times_weights_are_the_convolution(padding: int | str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 5, (3, 2), padding=padding, bias=False).double()
    images = torch.randn(4, 2, 6, 7, dtype=torch.float64)
    found = {kind: (matrix, other) for _, kind, matrix, other in matrices(layer, images)}
    unrolled, weights = found["im2col"]
    outputs = layer(images).permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(unrolled @ weights, outputs, rtol=1e-12, atol=1e-12)
    assert torch.equal(found["weights"][0], weights.T)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["shards", "make", "--source", "digits", "--out", str(folder)]) == 0
    return folder


def test_analyze_and_probe_from_the_command_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "digits-1")
    config = small_config(
        {"data.shards": str(digits), "model.name": "small_cnn", "train.epochs": 0.2}
    )
    run.write_config(config)
    name = ["digits-1", "--storage", str(tmp_path)]
    assert main(["analyze", *name]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err
    run_rank(
        config,
        Communicator.solo(),
        store=CheckpointStore(run.uri),
        callback=FolderWriter(run),
        control=KeepGoing(),
    )
    assert main(["analyze", *name, "--top-k", "2", "--samples", "32", "--budget-s", "3"]) == 0
    out = capsys.readouterr().out
    assert "gradient norm" in out and "report.html" in out
    assert main(["probe", "lowrank", *name, "--images", "8"]) == 0
    assert "holds: kernel blocks" in capsys.readouterr().out
    assert main(["probe", "bias-variance", *name, "--samples", "64", "--factor", "2"]) == 0
    assert "C = 2" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "digits-1" / "analysis").iterdir()}
    assert {"low-rank.json", "bias-variance.json"} < files
    assert "Low-rank probe" in (tmp_path / "digits-1" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["analyze", "--samples", "0"], "a whole number from 1, or all"),
        (["analyze", "--top-k", "0"], "analysis.top_k"),
        (["analyze", "--budget-s", "-1"], "analysis.budget_s"),
        (["analyze", "--topk", "3"], "did you mean --top-k?"),
        (["probe", "lowrank", "--images", "9999"], "1 to 256"),
        (["probe", "lowrnak"], "did you mean lowrank?"),
        (["probe"], "needs a subcommand"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    run = [str(tmp_path)] if words not in (["probe"], ["probe", "lowrnak"]) else []
    assert main([*words, *run]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
