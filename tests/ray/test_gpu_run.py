"""`resources.use_gpu` on nodes with logical GPUs: what is asked of Ray, and what a rank is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train.torch
import torch

from elastic_kfac.cluster.ray.devices import backend_of, device_of_rank, local_gpu_ids
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, cluster_for
from elastic_kfac.cluster.run import launch, trainer
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.errors import ConfigError, UsageError

NO_GPU = (
    r"resources.use_gpu is set, and torch \S+ sees no GPU .*resources.use_gpu=true; "
    r"run `elastic-kfac doctor`"
)


def on_gpus(config: Config, *changes: tuple[str, Any]) -> Config:
    """The run with GPU workers, each with half a CPU beside its GPU."""
    gpus = [("resources.use_gpu", True), ("resources.per_worker", {"CPU": 0.5, "GPU": 1})]
    return parse_config(apply_overrides(config.model_dump(), [*gpus, *changes]))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes torch see so many GPUs."""

    def see(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return see


def test_scaling_config_asks_for_gpus_between_the_bounds(
    config: Callable[[int], Config],
    cluster: LocalCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Trainer:
        train_run_context = SimpleNamespace(run_id="none")

        def __init__(self, function: Any, **options: Any) -> None:
            asked.append(options["scaling_config"])

        def fit(self) -> None:
            raise RuntimeError("nothing is trained here")

    asked: list[Any] = []
    monkeypatch.setattr(launch, "LeanTrainer", Trainer)
    settings = on_gpus(config(1), ("elastic.max_workers", 3))
    options: dict[str, Any] = {"storage": str(tmp_path), "progress": Display()}
    with pytest.raises(trainer.RunError, match="nothing is trained here"):
        trainer.train(settings, name="run", cluster=cluster, **options)
    (scaling,) = asked
    assert (scaling.num_workers, scaling.use_gpu) == ((1, 3), True)
    assert scaling._resources_per_worker_not_none == {"CPU": 0.5, "GPU": 1}


@pytest.mark.parametrize(
    ("use_gpu", "chosen", "device", "backend"),
    [
        (True, "auto", "cuda:1", "nccl"),
        (True, "gloo", "cuda:1", "gloo"),
        (False, "auto", "cpu", "gloo"),
    ],
)
def test_device_is_what_ray_assigned_and_the_backend_follows(
    config: Callable[[int], Config],
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    use_gpu: bool,
    chosen: str,
    device: str,
    backend: str,
) -> None:
    made_current: list[torch.device] = []
    gpus(2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:1"))
    settings = config(1) if not use_gpu else on_gpus(config(1), ("train.backend", chosen))
    found = device_of_rank(settings)
    assert found == torch.device(device)
    assert made_current == ([found] if device != "cpu" else [])
    assert backend_of(settings, found) == backend


def test_gpu_that_torch_does_not_see_is_an_error_and_never_the_cpu(
    config: Callable[[int], Config], gpus: Callable[[int], None]
) -> None:
    gpus(0)
    with pytest.raises(UsageError, match=NO_GPU) as caught:
        device_of_rank(on_gpus(config(1)))
    assert (caught.value.exit_code, "\n" in caught.value.line()) == (2, False)
    with pytest.raises(UsageError, match=NO_GPU):
        cluster_for(on_gpus(config(1)), 2)
    # Only who says that they are numbers gets the CPU.
    assert device_of_rank(on_gpus(config(1)), logical_gpus=True) == torch.device("cpu")


def test_local_workers_take_turns_with_the_gpus_that_this_process_may_use(
    config: Callable[[int], Config],
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_gpu_ids(config(1), 8) == ()
    assert local_gpu_ids(on_gpus(config(1)), 2) == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert local_gpu_ids(on_gpus(config(1)), 2) == ("5", "3")
    with pytest.raises(ConfigError, match=r"share a GPU; given: 3 workers; allowed: 2 with NCCL"):
        local_gpu_ids(on_gpus(config(1)), 3)
    assert local_gpu_ids(on_gpus(config(1), ("train.backend", "gloo")), 3) == ("5", "3")


@pytest.fixture
def gpu_nodes(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two more nodes, with a logical GPU each; what they are called in CUDA's words is 5 and 3."""
    monkeypatch.setitem(cluster._node_options, "num_gpus", 1)
    monkeypatch.setattr(cluster, "_gpu_ids", ("5", "3"))
    return [cluster.node_id(cluster.add_node()) for _ in range(2)]


@pytest.fixture
def options(cluster: LocalCluster, tmp_path: Path) -> dict[str, Any]:
    return {
        "storage": str(tmp_path),
        "progress": Display(),
        "cluster": cluster,
        "rank_function": "gpu_ranks:notes_its_device",
    }


# Half a minute; what it asks Ray for is tested above.
@pytest.mark.soak
@pytest.mark.parametrize("member", [None, "gpu_ranks:member_notes_its_device"])
def test_run_on_logical_gpus_gives_every_rank_the_one_of_its_node(
    config: Callable[[int], Config],
    gpu_nodes: list[str],
    options: dict[str, Any],
    tmp_path: Path,
    member: str | None,
) -> None:
    result = trainer.train(
        on_gpus(config(1)), name="run", logical_gpus=True, member_function=member, **options
    )

    assert result.values["world_sizes"] == [2]
    seen = [json.loads((tmp_path / f"run/device-{rank}.json").read_text()) for rank in (0, 1)]
    given = {row["node"]: (row["gpus"], row["visible"], row["device"]) for row in seen}
    assert given == {gpu_nodes[0]: (["5"], "5", "cpu"), gpu_nodes[1]: (["3"], "3", "cpu")}


@pytest.mark.soak
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_run_whose_ranks_see_no_gpu_fails_at_once_with_one_line(
    config: Callable[[int], Config],
    gpu_nodes: list[str],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=NO_GPU):
        trainer.train(on_gpus(config(1)), name="no-gpu", **options)

    rows = (tmp_path / "no-gpu/events.jsonl").read_text().splitlines()
    kinds = [json.loads(row)["kind"] for row in rows]
    assert kinds.count("failure") == 1


def test_gpus_of_a_worker_without_use_gpu_are_refused_and_use_gpu_alone_means_one(
    config: Callable[[int], Config],
) -> None:
    with pytest.raises(
        ConfigError, match=r"GPU in resources\.per_worker needs resources\.use_gpu=true"
    ):
        on_gpus(config(1), ("resources.use_gpu", False))
    alone = on_gpus(config(1), ("resources.per_worker", {"CPU": 2.0}))
    assert alone.resources.of_a_worker() == {"CPU": 2.0, "GPU": 1.0}
    assert config(1).resources.of_a_worker() == {"CPU": 1.0}
