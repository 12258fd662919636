from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from elastic_kfac.cluster.ray import local_cluster
from elastic_kfac.cluster.ray.connection import environment
from elastic_kfac.cluster.ray.local_cluster import object_folder, start_line
from elastic_kfac.cluster.run.launch import run_label


@pytest.mark.parametrize(("user_wins", "inside"), [(False, "ours"), (True, "theirs")])
def test_environment_is_put_back_and_who_wins_is_the_callers_choice(
    monkeypatch: pytest.MonkeyPatch, user_wins: bool, inside: str
) -> None:
    monkeypatch.setenv("ELASTIC_KFAC_SET", "theirs")
    monkeypatch.delenv("ELASTIC_KFAC_UNSET", raising=False)
    names = ("ELASTIC_KFAC_SET", "ELASTIC_KFAC_UNSET")
    with (
        pytest.raises(ZeroDivisionError),
        environment(dict.fromkeys(names, "ours"), user_wins=user_wins),
    ):
        assert [os.environ[name] for name in names] == [inside, "ours"]
        raise ZeroDivisionError
    assert [os.environ.get(name) for name in names] == ["theirs", None]


def test_object_stores_lie_in_shared_memory_only_if_it_has_room_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shm"
    monkeypatch.setattr(local_cluster, "SHARED_MEMORY", shared)
    assert object_folder(1, tmp_path) == tmp_path / "objects"  # There is none.
    shared.mkdir()
    free = shutil.disk_usage(shared).free
    assert object_folder(free // 2, tmp_path) is None
    assert object_folder(free * 2, tmp_path) == tmp_path / "objects"
    assert (tmp_path / "objects").is_dir()


def test_metrics_of_trials_of_two_searches_differ() -> None:
    labels = [run_label(f"/runs/{name}") for name in ("a/trials/t000", "b/trials/t000", "t000")]
    assert labels == ["a/t000", "b/t000", "t000"]
    assert run_label("run") == "run"


def test_start_of_a_local_cluster_names_an_address_that_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert start_line(1) == "Starting a local Ray cluster with 1 node …"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert start_line(2).endswith(
        "2 nodes … (RAY_ADDRESS=head:6379 is used with --address auto only)"
    )
