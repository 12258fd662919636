"""Names, YAML and checkpoints from somebody else: nothing leaves the storage root, nothing runs."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elastic_kfac
from elastic_kfac.cli.entry import main
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config, read_config
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import ConfigError, DataError, ElasticKfacError, StateError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.line_log import LineLog
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.models import build_model
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import run_rank
from support.training_problems import RecordingCallback, memory_datasets, small_config

HOSTILE_NAMES = (
    "../escaped",
    "..",
    ".",
    "/etc/cron.d/x",
    "a/../../b",
    "a/b",
    "a\\b",
    "-rf",
    "~root",
    "$(id)",
    "a;id",
    "a\nb",
    "a\x00b",
    "",
    "ü" * 3,
    "a" * 101,
)


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a finished run's checkpoint."""
    run_rank(
        small_config(),
        Communicator.solo(),
        store=CheckpointStore(tmp_path / "run"),
        callback=RecordingCallback(),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    return folder


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_run_name_that_is_no_plain_name_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{}", encoding="utf-8")
    root = tmp_path / "root"
    assert main(["train", str(config), "--storage", str(root), f"--name={name}"]) == 2
    assert "bad value for --name" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..", "checkpoints/../../x"])
def test_storage_refuses_names_that_lead_out_of_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("secret")
    storage = Storage(tmp_path / "root")
    calls: tuple[Callable[[], Any], ...] = (
        lambda: storage.read(name),
        lambda: storage.write(name, b"owned"),
        lambda: LineLog(storage, name).append(b"owned\n"),
        lambda: LineLog(storage, name).truncate(0),
        lambda: storage.exists(name),
        lambda: storage.folders(name),
        lambda: storage.files(name),
        lambda: storage.delete(name),
        lambda: storage.path(name),
    )
    for call in calls:
        with pytest.raises(DataError, match="leads out of the folder"):
            call()
    assert (tmp_path / "x").read_text() == "secret"


def test_names_with_dots_inside_the_root_are_allowed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("a..b/c.d", b"x")
    assert storage.read("a..b/c.d") == b"x"


def test_manifest_that_names_a_file_outside_is_not_followed(checkpoint: Path) -> None:
    outside = checkpoint.parents[2] / "secret.safetensors"
    manifest = manifest_of(checkpoint)
    name = manifest["files"]["tensors"]["name"]
    (checkpoint / name).rename(outside)
    manifest["files"]["tensors"]["name"] = "../../../secret.safetensors"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    with pytest.raises(StateError, match="leads out of the folder"):
        CheckpointStore(checkpoint.parents[1]).load_latest()


def test_pickle_in_place_of_tensors_is_an_error_and_does_not_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    import hashlib

    trace = tmp_path / "owned"
    content = pickle.dumps(Touch(trace))
    manifest = manifest_of(checkpoint)
    for entry in manifest["files"].values():
        (checkpoint / entry["name"]).write_bytes(content)
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    with pytest.raises((ElasticKfacError, UnicodeDecodeError)):
        CheckpointStore(checkpoint.parents[1]).load_latest()
    assert not trace.exists()
    # The file is a weapon: unpickling it does what the test looks for.
    pickle.loads(content)
    assert trace.exists()


def test_initial_weights_that_are_a_pickle_do_not_run(tmp_path: Path) -> None:
    import torch

    trace = tmp_path / "owned"
    torch.save({"weight": Touch(trace)}, tmp_path / "weights.pt")
    config = small_config({"model.initial_weights": str(tmp_path / "weights.pt")})
    with pytest.raises(ElasticKfacError):
        build_model(config.model, num_outputs=2, input_shape=(1, 4, 4), seed=0)
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [
        "train: !!python/object/apply:pathlib.Path.touch [{trace}]",
        "!!python/object/apply:os.system ['touch {trace}']",
        "model: !!python/name:os.system",
        "model: !!python/object/new:pathlib.Path [{trace}]",
        "train: {{epochs: !!python/object/apply:os.system ['touch {trace}']}}",
    ],
)
def test_yaml_tags_do_not_run_anywhere(text: str, tmp_path: Path) -> None:
    trace = tmp_path / "owned"
    hostile = text.format(trace=trace)
    (tmp_path / "config.yaml").write_text(hostile, encoding="utf-8")

    with pytest.raises(ConfigError):
        read_config(str(tmp_path / "config.yaml"), [])
    value = hostile.partition(": ")[2] or hostile
    (tmp_path / "empty.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError):
        read_config(str(tmp_path / "empty.yaml"), [f"train.epochs={value}"])
    with pytest.raises(ConfigError):
        RunFolder(tmp_path).read_config()
    assert not trace.exists()


@pytest.mark.parametrize("factory", ["os:system", "subprocess:Popen", "builtins:eval", "os:remove"])
def test_functions_that_are_no_model_factories_do_nothing(factory: str, tmp_path: Path) -> None:
    trace = tmp_path / "owned"
    arguments = {"command": f"touch {trace}", "args": ["touch", str(trace)]}
    config = parse_config({"model": {"name": factory, "arguments": arguments}})
    with pytest.raises(ConfigError):
        build_model(config.model, num_outputs=2, input_shape=(1, 4, 4), seed=0)
    assert not trace.exists()


def test_package_has_no_loader_that_can_run_code() -> None:
    """No unpickling, no unsafe YAML, no shell; collectives of a run's own ranks go through torch."""
    dangerous = re.compile(
        r"(pickle\.loads?|yaml\.(unsafe_load|full_load|load)|torch\.load|os\.system|os\.popen"
        r"|eval|exec|np\.load|cloudpickle\.loads?|marshal\.loads?|shelve\.open)$"
    )
    found = []
    for path in Path(elastic_kfac.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and dangerous.match(ast.unparse(node.func)):
                if ast.unparse(node).endswith("allow_pickle=False)"):
                    continue
                found.append(f"{path.name}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "shell":
                found.append(f"{path.name}: shell=")
    assert found == []
