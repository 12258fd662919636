"""A run's weights as one file, with what a program needs to use them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save

from elastic_kfac.config import Config
from elastic_kfac.data.dataset import open_split
from elastic_kfac.data.storage import write_named_file
from elastic_kfac.errors import DataError, UsageError
from elastic_kfac.paths import user_path
from elastic_kfac.runs.checkpoints import choose_state, newest_state, weights_to_use
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.choice import make_task

CARD = "elastic_kfac"
"""Key of the card in the metadata of the file."""


def export_run(folder: RunFolder, out: str | Path, *, step: int | None = None) -> int:
    """Writes parameters and buffers of a checkpoint as a safetensors file.

    `model.initial_weights` of another run and `safetensors.torch.load_file` read it. Its metadata hold a
    card (see `docs/export.md`); where the shards are gone, without classes and normalisation.

    Args:
        folder: The run.
        out: The file; links are followed, pipes and devices written through.
        step: Step of the checkpoint; None is the newest.

    Returns:
        The number of tensors.

    Raises:
        UsageError: If the run has no such checkpoint, or `out` is a file of another kind.
        StateError: If it is damaged.
    """
    _refuse_other_file(out)
    if step is None:
        state = newest_state(folder, allow_older=False)
    else:
        state = choose_state(folder, step=step)
    config = folder.located_config()
    card = {
        "model": config.model.name,
        "arguments": config.model.arguments,
        "task": config.task.name,
        "averaged": state.part("average") is not None,
        "step": state.progress.step,
    }
    try:
        card |= _data_card(config)
    except DataError as error:
        line = f"without classes and normalisation, as the shards cannot be read: {error.line()}"
        print(f"warning: {line}", file=sys.stderr)
    tensors = weights_to_use(state)
    metadata = {
        "step": str(state.progress.step),
        "run": folder.uri,
        CARD: json.dumps(card, ensure_ascii=False),
    }
    write_named_file(out, save(tensors, metadata=metadata))
    return len(tensors)


def _refuse_other_file(out: str | Path) -> None:
    path = user_path(out).resolve()
    if path.suffix == ".safetensors" or not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{":
        raise UsageError(
            "this file holds no weights and would be overwritten",
            given=out,
            change="name another file, or delete this one",
        )


def _data_card(config: Config) -> dict[str, Any]:
    with open_split(config, config.data.train_split) as split:
        columns = split.columns
        classes = [column.class_names for column in columns if column.role == "target"]
        card: dict[str, Any] = {
            "num_outputs": make_task(config, columns).num_outputs(columns),
            "input_shape": list(split.input_shape),
            "image_size": config.data.image_size,
            "classes": list(classes[0]) if len(classes) == 1 else [],
        }
        normalization = split.normalization
        features = [c for c in columns if c.role == "input" and c.kind == "tensor" and c.mean]
    if normalization is not None:
        # (pixel / 255 - mean) / std
        card |= {"pixel_scale": 255, "mean": normalization[0].tolist()}
        card["std"] = normalization[1].tolist()
    elif len(features) == 1:
        card |= {"mean": list(features[0].mean), "std": [s or 1.0 for s in features[0].std]}
    return card
