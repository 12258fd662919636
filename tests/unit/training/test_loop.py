"""The loop in a world of one: what it writes, parks, resumes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import support.training_problems
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.data.order import id_hash
from elastic_kfac.errors import ConfigError, NumericalError, StateError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.runs.checkpoints import evaluate_run
from elastic_kfac.runs.export import export_run
from elastic_kfac.runs.final_record import compact_ledger, read_ledger, result_row
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import Ledger
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState
from elastic_kfac.tasks.models import build_model, create_model
from elastic_kfac.training.activation_checkpointing import blocks_of
from elastic_kfac.training.callbacks import Callbacks, FolderWriter, KeepGoing, Point
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import Outcome, run_rank
from elastic_kfac.training.membership import Membership
from elastic_kfac.training.rank import RankTrainer
from support.training_problems import (
    AtPoints,
    MemoryDataset,
    MemoryOrder,
    RecordingCallback,
    StopAt,
    float64_cnn,
    memory_datasets,
    small_config,
)


def run(folder: Path, changes: dict[str, object] | None = None, **arguments: object) -> Outcome:
    options: dict[str, object] = {
        "store": CheckpointStore(folder),
        "callback": RecordingCallback(),
        "control": KeepGoing(),
        "datasets": memory_datasets(),
    }
    return run_rank(small_config(changes), Communicator.solo(), **{**options, **arguments})  # type: ignore[arg-type]


def manual_sgd(steps: int) -> list[torch.Tensor]:
    """Three lines of textbook training over the same order: the oracle of the loop."""
    config = small_config()
    dataset = MemoryDataset(50)
    model = build_model(config.model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "weight" in n], "weight_decay": 1e-3},
        {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    epoch = first = 0
    for _ in range(steps):
        samples = dataset.read(epoch, first, min(16, 50 - first))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(samples.inputs), samples.targets).backward()
        optimizer.step()
        first += 16
        if first >= 50:
            epoch, first = epoch + 1, 0
    return [p.detach() for p in model.parameters()]


def test_sgd_trajectory_equals_textbook_training(tmp_path: Path) -> None:
    run(tmp_path, {"train.epochs": 2})
    state = CheckpointStore(tmp_path).load_latest()
    assert state is not None and state.progress.step == 8
    model = float64_cnn(3, (1, 4, 4))
    model.load_state_dict(state.model_tensors())
    for ours, oracle in zip(model.parameters(), manual_sgd(8), strict=True):
        assert torch.allclose(ours, oracle, rtol=0, atol=1e-12)


def test_micro_batches_give_the_same_trajectory(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", {"train.micro_batch_size": 3})
    whole = CheckpointStore(tmp_path / "whole").load_latest()
    parts = CheckpointStore(tmp_path / "parts").load_latest()
    assert whole is not None and parts is not None
    for name, tensor in whole.tensors.items():
        assert torch.allclose(tensor, parts.tensors[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_parked_and_resumed_run_ends_in_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    straight = run(tmp_path / "straight")
    recorded = RecordingCallback()
    parked = run(tmp_path / "parked", control=StopAt(stop_at), callback=recorded)
    assert (parked.status, parked.reasons, parked.progress.step) == ("parked", ("test",), stop_at)
    resumed = run(tmp_path / "parked", callback=recorded)
    assert resumed.status == "finished"
    assert resumed.state_sha256 == straight.state_sha256
    assert recorded.rewinds == [(stop_at, 0)]
    assert [row["step"] for row in recorded.metric_rows if "loss" in row] == list(range(1, 13))
    evaluated = [row["step"] for row in recorded.metric_rows if "eval_accuracy" in row]
    assert evaluated == [4, 8, 12]


class ChangesAt(Membership):
    """Alone in every world; asks for another one at the given polls."""

    polls = (3, 7)
    polled = 0

    def change_is_wanted(self) -> bool:
        self.polled += 1
        return self.polled in self.polls


@pytest.mark.parametrize("stop_at", [None, 9])
def test_pause_in_place_is_no_event_and_a_stop_is_one(tmp_path: Path, stop_at: int | None) -> None:
    meeting, recorded = torch.distributed.HashStore(), RecordingCallback()
    Membership.found(meeting, [0])
    membership = ChangesAt(meeting, 0, settle_s=0.01)
    outcome = run_member(
        small_config({"train.epochs": 3}),
        membership,
        store=CheckpointStore(tmp_path),
        callback=recorded,
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
        datasets=memory_datasets(),
    )
    status, reason = ("finished", None) if stop_at is None else ("parked", "test")
    assert outcome.status == status
    # Each pause continued without a loss, and only what ended the processes is reported.
    assert recorded.rewinds == [(3, 0), (7, 0)]
    events = [row for row in recorded.events if row["kind"] != "costs"]
    assert [(row["kind"], row.get("reason")) for row in events] == [
        ("restored", None),
        ("restored", None),
        (status, reason),
    ]
    checkpoint = CheckpointStore(tmp_path).load_latest()
    assert checkpoint is not None and checkpoint.progress.step == (stop_at or 12)


def test_lost_steps_are_repeated_and_said(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    run(tmp_path / "killed", control=StopAt(3))
    recorded = RecordingCallback(reached=9)
    resumed = run(tmp_path / "killed", callback=recorded)
    assert recorded.rewinds == [(3, 6)]
    assert resumed.state_sha256 == straight.state_sha256


def test_damaged_newest_checkpoint_ends_in_the_same_bits(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    run(tmp_path / "run", control=StopAt(3))
    run(tmp_path / "run", control=StopAt(4))
    (damaged,) = (tmp_path / "run/checkpoints/step-000000000007").glob("*.safetensors")
    damaged.write_bytes(b"")
    recorded = RecordingCallback(reached=7)
    resumed = run(tmp_path / "run", callback=recorded)
    assert recorded.rewinds == [(3, 4)]
    assert resumed.state_sha256 == straight.state_sha256
    state = CheckpointStore(tmp_path / "run").load_latest()
    assert state is not None
    report = audit_rows(state.ledger.tail, MemoryOrder())
    assert report.passed, report.line()


def test_snapshots_by_stepping_time_are_durable(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    run(tmp_path, {"elastic.snapshot_interval_s": 1e-9}, store=store)
    steps = store.steps()
    assert len(steps) >= 2 and steps[-1] == 12


@pytest.mark.parametrize(("snapshot_cpu_s", "expected"), [(1e-12, 10), (1e6, 1)])
def test_snapshots_rest_until_their_cost_is_a_small_share(
    tmp_path: Path, snapshot_cpu_s: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    class CountingStore(CheckpointStore):
        def save_async(self, state: TrainingState) -> None:
            kept.append(state.progress.step)
            self.snapshot_cpu_s = snapshot_cpu_s

    # What the loop itself measures depends on the machine.
    monkeypatch.setattr("elastic_kfac.training.loop.time.thread_time", lambda: 0.0)
    run(tmp_path, {"elastic.snapshot_interval_s": 1e-9}, store=CountingStore(tmp_path))
    assert len(kept) == expected


def test_every_sample_once_per_epoch_at_the_loss(tmp_path: Path) -> None:
    datasets = memory_datasets()
    run(tmp_path, {"train.epochs": 2, "train.micro_batch_size": 5}, datasets=datasets)
    assert isinstance(datasets.train, MemoryDataset)
    assert sorted(datasets.train.read_ids) == sorted(2 * list(range(50)))


def test_fraction_of_an_epoch_ends_there_and_is_evaluated(tmp_path: Path) -> None:
    recorded = RecordingCallback()
    outcome = run(tmp_path, {"train.epochs": 1.3}, callback=recorded)
    assert outcome.progress.samples_committed == 66
    assert [row["step"] for row in recorded.metric_rows if "eval_accuracy" in row] == [4, 5]


def test_target_accuracy_is_timed_and_can_end_the_run(tmp_path: Path) -> None:
    recorded = RecordingCallback()
    changes = {"train.target_accuracy": 0.3, "train.stop_at_target": True}
    outcome = run(tmp_path, changes, callback=recorded)
    progress = outcome.progress
    assert outcome.status == "finished" and progress.step < 12
    assert progress.time_to_target_s is not None
    assert progress.train_time_to_target_s is not None
    assert progress.train_time_to_target_s <= progress.time_to_target_s
    assert [event["kind"] for event in recorded.events] == ["target_reached", "costs", "finished"]


def test_nan_batch_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    datasets = memory_datasets()
    assert isinstance(datasets.train, MemoryDataset)
    datasets.train._images[7] = float("nan")
    with pytest.raises(NumericalError, match="not finite in step"):
        run(tmp_path, datasets=datasets)


def test_bad_records_take_no_part_in_the_mean_but_keep_their_place(tmp_path: Path) -> None:
    dataset = MemoryDataset(50)
    samples = dataset.read(0, 0, 16)
    dataset.bad_ids = frozenset(samples.ids[:3].tolist())
    trainer = RankTrainer(
        small_config({"optimizer.weight_decay": 0.0, "optimizer.momentum": 0.0}),
        Communicator.solo(),
        Datasets(dataset, None),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    loss = torch.nn.functional.cross_entropy(trainer.model(samples.inputs[3:]), samples.targets[3:])
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    result = trainer.step()
    assert result.totals.count == 13
    assert result.totals.id_hash == id_hash(samples.ids)
    for old, gradient, new in zip(before, gradients, trainer.model.parameters(), strict=True):
        assert torch.allclose(old - 0.05 * gradient, new, rtol=0, atol=1e-12)


def test_other_data_set_is_refused(tmp_path: Path) -> None:
    run(tmp_path, control=StopAt(2))
    with pytest.raises(StateError, match="data set has changed"):
        run(tmp_path, datasets=memory_datasets(num_samples=51))


def test_other_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, control=StopAt(2))
    changes = {"model.name": "support.training_problems:batch_norm_cnn"}
    with pytest.raises(StateError, match="another model"):
        run(tmp_path, changes)


def test_evaluation_counts_are_exact(tmp_path: Path) -> None:
    datasets = memory_datasets(eval_samples=23)
    config = small_config({"train.eval_batch_size": 4})
    trainer = RankTrainer(config, Communicator.solo(), datasets)
    result = trainer.evaluate()
    assert isinstance(datasets.evaluation, MemoryDataset)
    assert sorted(datasets.evaluation.read_ids) == list(range(23))
    images = datasets.evaluation._images
    with torch.no_grad():
        outputs = trainer.model(images)
    loss = torch.nn.functional.cross_entropy(outputs, datasets.evaluation._labels)
    assert result.count == 23
    right = int((outputs.argmax(1) == datasets.evaluation._labels).sum())
    assert result["accuracy"] == right / len(outputs)
    assert result.loss == pytest.approx(float(loss), abs=1e-12)


def test_batch_norm_running_statistics_do_not_depend_on_micro_batch_count(tmp_path: Path) -> None:
    """One moving-average step per optimizer step: with equal micro-batches the mean is the same."""
    changes = {"model.name": "support.training_problems:batch_norm_cnn", "optimizer.lr": 1e-12}
    whole = RankTrainer(small_config(changes), Communicator.solo(), memory_datasets())
    parts = RankTrainer(
        small_config({**changes, "train.micro_batch_size": 4}),
        Communicator.solo(),
        memory_datasets(),
    )
    for _ in range(3):
        whole.step()
        parts.step()
    first, second = whole.model[1], parts.model[1]  # type: ignore[index]
    assert torch.allclose(first.running_mean, second.running_mean, rtol=0, atol=1e-9)
    assert int(first.num_batches_tracked) == int(second.num_batches_tracked) == 3
    assert first.momentum == 0.1


def test_batch_norm_of_one_pass_equals_torch(tmp_path: Path) -> None:
    changes = {"model.name": "support.training_problems:batch_norm_cnn"}
    config = small_config(changes)
    trainer = RankTrainer(config, Communicator.solo(), memory_datasets())
    oracle = build_model(config.model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    oracle(MemoryDataset(50).read(0, 0, 16).inputs)
    trainer.step()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        ours = getattr(trainer.model[1], name)  # type: ignore[index]
        assert torch.allclose(ours, getattr(oracle[1], name), rtol=0, atol=1e-12)  # type: ignore[index]


def test_folder_of_a_run_evaluates_exports_and_compacts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = small_config()
    folder.write_config(config)
    outcome = run(tmp_path, callback=FolderWriter(folder))
    datasets = memory_datasets()
    step, evaluation = evaluate_run(folder, datasets=datasets)
    last = [row for row in folder.metrics() if "eval_accuracy" in row][-1]
    assert evaluation["accuracy"] == last["eval_accuracy"] and step == 12
    assert compact_ledger(folder) == 12
    assert audit_rows(read_ledger(folder), MemoryOrder()).passed
    result = result_row(config, outcome)
    assert (result["status"], result["epochs"], result["world_sizes"]) == ("finished", 3.0, [1])
    export_run(folder, tmp_path / "weights.safetensors")
    changes = {"model.initial_weights": str(tmp_path / "weights.safetensors")}
    again = build_model(small_config(changes).model, num_outputs=3, input_shape=(1, 4, 4), seed=1)
    state = CheckpointStore(tmp_path).load_latest()
    assert state is not None
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state.model_tensors()[name])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.write_config(small_config())
    export_run(folder, tmp_path / "weights.safetensors")
    changes = {
        "model.name": "mlp",
        "model.initial_weights": str(tmp_path / "weights.safetensors"),
    }
    with pytest.raises(ConfigError, match="does not fit"):
        run(tmp_path / "other", changes)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_resumes_in_the_same_bits(tmp_path: Path, precision: str) -> None:
    changes = {"train.precision": precision, "model.name": "mlp"}
    recorded = RecordingCallback()
    straight = run(tmp_path / "straight", changes, callback=recorded)
    run(tmp_path / "parked", changes, control=StopAt(5))
    resumed = run(tmp_path / "parked", changes)
    assert resumed.state_sha256 == straight.state_sha256
    losses = [row["loss"] for row in recorded.metric_rows if "loss" in row]
    assert losses[-1] < losses[0]


def test_fp16_overflow_skips_the_update_halves_the_scale_and_commits_the_samples() -> None:
    config = small_config({"train.precision": "fp16", "model.name": "mlp"})
    trainer = RankTrainer(config, Communicator.solo(), memory_datasets())
    trainer.scaler.scale = 2.0**24
    trainer.scaler.largest = 2.0**40
    trainer.scaler.scale = 2.0**40
    before = [p.detach().clone() for p in trainer.model.parameters()]
    result = trainer.step()
    assert not result.totals.gradients_are_finite
    assert trainer.scaler.scale == 2.0**39
    assert trainer.progress.samples_committed == 16
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_long_ledger_is_sealed_into_segments_and_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger.seal, "__defaults__", (3,))
    changes = {"elastic.snapshot_interval_s": 1e-9}
    run(tmp_path, changes, control=StopAt(7))
    run(tmp_path, changes)
    state = CheckpointStore(tmp_path).load_latest()
    assert state is not None and len(state.ledger.segments) >= 2
    rows = read_ledger(RunFolder(tmp_path))
    assert audit_rows(rows, MemoryOrder()).passed
    assert rows["step"].tolist() == list(range(1, 13))
    assert state.ledger.world_sizes == (1,)


def test_evaluation_at_a_snapshot_boundary_is_reported_once(tmp_path: Path) -> None:
    changes = {"elastic.snapshot_interval_s": 1e-9}
    recorded = RecordingCallback()

    def crash_after_the_snapshot(point: Point, step: int) -> None:
        if (point, step) == ("step_begin", 5):
            store.wait()
            raise RuntimeError("crash")

    store = CheckpointStore(tmp_path)
    crashing = Callbacks(AtPoints(crash_after_the_snapshot), recorded)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, changes, store=store, callback=crashing)
    assert store.steps()[-1] <= 4
    run(tmp_path, changes, callback=recorded)
    (rewound_to, _) = recorded.rewinds[0]
    before = [row for row in recorded.metric_rows if "eval_accuracy" in row and row["step"] == 4]
    assert len(before) == (1 if rewound_to == 4 else 2)


class OwnTask:
    """Hinge loss, as a person would write it."""

    def __init__(self, train: object) -> None:
        self.margin = 1.0

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.multi_margin_loss(
            outputs, labels, margin=self.margin, reduction="sum"
        )

    def correct(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs.topk(2, dim=1).indices == labels[:, None]).any(dim=1).sum()


def test_own_loss_and_metric_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.training_problems, "OwnTask", OwnTask, raising=False)
    recorded = RecordingCallback()
    run(tmp_path, {"train.loss": "support.training_problems:OwnTask"}, callback=recorded)
    model = build_model(small_config().model, num_outputs=3, input_shape=(1, 4, 4), seed=0)
    samples = MemoryDataset(50).read(0, 0, 16)
    task = OwnTask(None)
    outputs = model(samples.inputs).detach()
    assert recorded.metric_rows[0]["loss"] == pytest.approx(
        float(task.loss(outputs, samples.targets)) / 16
    )
    assert recorded.metric_rows[0]["accuracy"] == int(task.correct(outputs, samples.targets)) / 16


def test_own_task_without_a_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no method"):
        run(tmp_path, {"train.loss": "support.training_problems:StopAt"})


@pytest.mark.parametrize("kfac", [False, True], ids=["sgd", "kfac"])
def test_activation_checkpointing_gives_the_same_bits(kfac: bool) -> None:
    """BatchNorm statistics and Kronecker factors see every activation once, not twice."""
    changes = {
        "model.name": "resnet20",
        "model.arguments": {"width": 4},
        "kfac.enabled": kfac,
        "kfac.damping": 0.1,
    }
    datasets = Datasets(MemoryDataset(50, shape=(1, 8, 8)), None)
    hashes = []
    for flag in (False, True):
        config = small_config({**changes, "train.activation_checkpointing": flag})
        trainer = RankTrainer(config, Communicator.solo(), datasets)
        for _ in range(2):
            trainer.step()
        hashes.append(trainer.capture().sha256())
    assert hashes[0] == hashes[1]
    assert len(blocks_of(trainer.model)) == 10


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 33, 31)])
def test_small_cnn_fits_image_shapes(shape: tuple[int, int, int]) -> None:
    assert create_model("small_cnn", 10, shape, width=4)(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet999", "resnet20"),
        ("no.such.module:factory", "cannot be imported"),
        ("support.training_problems:nothing", "no callable"),
        ("support.training_problems:small_config", "do not fit"),
        (":", "package.module:factory"),
    ],
)
def test_bad_model_name_is_one_clear_line(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        create_model(name, 10, (1, 8, 8))


def test_initial_weights_depend_on_the_seed_only() -> None:
    config = small_config().model
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(config, num_outputs=3, input_shape=(1, 4, 4), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_model(config, num_outputs=3, input_shape=(1, 4, 4), seed=5)
    third = build_model(config, num_outputs=3, input_shape=(1, 4, 4), seed=6)
    weights = [next(m.parameters()) for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_target_of_a_metric_that_falls_is_timed_at_its_first_value_below(tmp_path: Path) -> None:
    recorded = RecordingCallback()
    changes = {"train.target": {"metric": "loss", "value": 0.9}, "train.stop_at_target": True}
    outcome = run(tmp_path, changes, callback=recorded)
    rows = [row for row in recorded.metric_rows if "eval_loss" in row]
    assert [row["metric"] for row in rows] == ["loss"] * len(rows)
    losses = [row["eval_loss"] for row in rows]
    assert all(loss > 0.9 for loss in losses[:-1]) and losses[-1] <= 0.9
    assert outcome.progress.best_value == min(losses) and outcome.metric == "loss"
    assert outcome.progress.time_to_target_s is not None


def test_target_of_a_metric_that_the_task_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such metric") as caught:
        run(tmp_path, {"train.target": {"metric": "miou", "value": 0.5}})
    assert "accuracy, loss" in caught.value.line()
