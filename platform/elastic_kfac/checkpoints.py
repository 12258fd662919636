"""State of a person's own loop in files that do not depend on the number of ranks.

`save_distributed` and `load_distributed` use a folder of torch.distributed.checkpoint: every rank writes
what it holds and reads what it keeps, at any number of ranks, in any wrapper. `save_folder` and
`load_folder` write safetensors in the layout of the Hugging Face Hub, `config.json` and
`model.safetensors`; beside them `optimizer.safetensors` and `kfac.safetensors`.

`save_curvature` and `load_curvature` are about the curvature itself, for influence functions or a Laplace
approximation (docs/curvature.md).

K-FAC's part holds no pickled objects. `optimizer` is a KFACOptimizer, or any other with its KFAC beside
it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from elastic_kfac.errors import StateError, UsageError
from elastic_kfac.json_text import parsed
from elastic_kfac.kfac.exported import Curvature, curvature_of
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.kfac.optimizer import KFACOptimizer
from elastic_kfac.kfac.parts import assembled, kept_here, own_parts

__all__ = [
    "load_curvature",
    "load_distributed",
    "load_folder",
    "save_curvature",
    "save_distributed",
    "save_folder",
]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_NUMBERS, _SHARED = "numbers/", "numbers"
"""Names of JSON texts, as bytes, of a layer and of what is shared."""


def _taken_apart(
    optimizer: torch.optim.Optimizer, kfac: KFAC | None
) -> tuple[torch.optim.Optimizer, KFAC | None]:
    if not isinstance(optimizer, KFACOptimizer):
        return optimizer, kfac
    if kfac is not None:
        raise UsageError("a KFACOptimizer has its own KFAC", change="leave out kfac=")
    return optimizer.inner, optimizer.kfac


# -- torch.distributed.checkpoint --------------------------------------------------------------


def save_distributed(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kfac: KFAC | None = None,
) -> None:
    """Saves weights, the optimizer's state and K-FAC's. Collective.

    A layer's factors and decompositions are written by the rank that decides about it, so that no rank
    needs memory for those of others. Gradients must be cleared.
    """
    inner, kfac = _taken_apart(optimizer, kfac)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, inner),
    }
    if kfac is not None:
        kfac.flush()
        tensors, facts = own_parts(kfac)
        texts = {f"{_NUMBERS}{name}": _as_bytes(part) for name, part in facts["layers"].items()}
        if kfac.communicator.rank == 0:
            texts[_SHARED] = _as_bytes(facts["shared"])
        state["kfac"] = {**tensors, **texts}
    with _quiet():
        dcp.save(state, checkpoint_id=str(folder), process_group=_group(kfac))


def load_distributed(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kfac: KFAC | None = None,
) -> None:
    """Continues from `save_distributed`, of any number of ranks and any wrapper, into a model, optimizer
    and KFAC that were just made. Collective.

    Raises:
        StateError: If the folder has no checkpoint or no K-FAC state, or it belongs to another model,
            other options or another version.
    """
    inner, kfac = _taken_apart(optimizer, kfac)
    if not (Path(folder) / ".metadata").is_file():
        raise StateError("no checkpoint in this folder", given=folder)
    known = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    group = _group(kfac)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, inner),
    }
    curvature = None if kfac is None else _read_kfac(folder, kfac, known)
    with _quiet():
        dcp.load(state, checkpoint_id=str(folder), process_group=group)
    if kfac is not None and curvature is not None:
        kfac.load_state_dict(curvature)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, inner, state["optimizer"])


def _read_kfac(folder: str | Path, kfac: KFAC, known: Mapping[str, Any]) -> dict[str, Any]:
    names = [name.removeprefix("kfac.") for name in known if name.startswith("kfac.")]
    if not names:
        raise StateError("the checkpoint holds no K-FAC state", given=folder)
    texts = [name for name in names if name == _SHARED or name.startswith(_NUMBERS)]
    kept = kept_here(kfac, [name for name in names if name not in texts])
    tensors = {
        name: torch.empty(known[f"kfac.{name}"].size, dtype=known[f"kfac.{name}"].properties.dtype)
        for name in [*texts, *kept]
    }
    with _quiet():
        dcp.load({"kfac": tensors}, checkpoint_id=str(folder), process_group=_group(kfac))
    numbers = {name: json.loads(bytes(tensors.pop(name).tolist())) for name in texts}
    shared = numbers.pop(_SHARED)
    layers = {name.removeprefix(_NUMBERS): part for name, part in numbers.items()}
    return assembled(tensors, {"shared": shared, "layers": layers})


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _group(kfac: KFAC | None) -> Any:
    return None if kfac is None else kfac.communicator.group


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says where there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


# -- safetensors -------------------------------------------------------------------------------


def save_folder(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    kfac: KFAC | None = None,
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes safetensors files; large weights in several, as on the Hugging Face Hub. Collective; the
    first rank writes.

    Args:
        folder: Made if it does not exist.
        model: Its parameters and buffers.
        optimizer: Goes to `optimizer.safetensors`, by parameter name.
        kfac: Goes to `kfac.safetensors` (docs/curvature.md has its layout).
        config: `config.json`; None writes the name of the model's class as `architectures`.
    """
    from huggingface_hub import save_torch_state_dict

    if optimizer is not None:
        optimizer, kfac = _taken_apart(optimizer, kfac)
    weights = get_model_state_dict(model, options=_WHOLE)
    states: dict[str, Any] = {}
    if optimizer is not None:
        states["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if kfac is not None:
        states["kfac"] = kfac.state_dict()
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    described = config or {"architectures": [type(getattr(model, "module", model)).__name__]}
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(_compact(weights), path)
    for name, tree in states.items():
        write_tree(path / f"{name}.safetensors", tree)


def _compact(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors with memory of their own, the same one for the same weight: gathered ones are views."""
    owned: dict[tuple[Any, ...], Tensor] = {}
    compact = {}
    for name, tensor in weights.items():
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in owned:
            owned[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        compact[name] = owned[key]
    return compact


def load_folder(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    kfac: KFAC | None = None,
) -> None:
    """Continues from `save_folder`, whatever the number of ranks and the wrapper are now. Collective.

    Raises:
        StateError: If a file is missing, or belongs to something else.
    """
    path = Path(folder)
    if optimizer is not None:
        optimizer, kfac = _taken_apart(optimizer, kfac)
    weights = _read_weights(path)
    states = {
        name: read_tree(path / f"{name}.safetensors")
        for name, target in (("optimizer", optimizer), ("kfac", kfac))
        if target is not None
    }
    if kfac is not None:
        kfac.load_state_dict(states["kfac"])
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=whole)
    if optimizer is not None:
        found = states["optimizer"]
        parts = [t for own in found.get("state", {}).values() for t in own.values()]
        # torch refuses a whole state without tensors, which SGD without momentum has.
        is_empty = not any(isinstance(t, Tensor) and t.dim() for t in parts)
        set_optimizer_state_dict(model, optimizer, found, options=None if is_empty else whole)


def save_curvature(path: str | Path, model: nn.Module, kfac: KFAC) -> None:
    """Writes factors, eigenbases and eigenvalues as one safetensors file (docs/curvature.md). Collective;
    the first rank writes.

    Raises:
        ConfigError: For one-sided K-FAC.
        StateError: If there are no factors yet.
    """
    tree = curvature_of(model, kfac.options, kfac.state_dict())
    if kfac.communicator.rank == 0:
        write_tree(Path(path), tree)


def load_curvature(path: str | Path, model: nn.Module) -> Curvature:
    """The curvature in a file, for a model with the weights that it belongs to.

    Raises:
        StateError: If it is another file, or belongs to another model.
    """
    return Curvature(model, read_tree(Path(path)))


def _read_weights(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise StateError("no model.safetensors in this folder", given=folder)
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            same |= opened.metadata() or {}
    # Weights with two names are stored under one, and the other one names it.
    return {**tensors, **{name: tensors[first] for name, first in same.items() if first in tensors}}


def write_tree(path: Path, tree: Any) -> None:
    """Writes nested data with tensors as one safetensors file: tensors by their path, and the data around
    them as JSON in the entry `skeleton` of its metadata."""
    from safetensors.torch import save_file

    from elastic_kfac.state.state import split_tree

    tensors: dict[str, Tensor] = {}
    parts = {name: split_tree(part, name, tensors) for name, part in tree.items()}
    owned = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(owned, path, metadata={"format": "pt", "skeleton": json.dumps(parts)})


def read_tree(path: Path) -> dict[str, Any]:
    """The data of `write_tree`.

    Raises:
        StateError: If there is no such file, or it is another one.
    """
    from safetensors import safe_open

    from elastic_kfac.state.state import join_tree

    if not path.is_file():
        raise StateError("the state has no such file", given=path)
    with safe_open(path, framework="pt") as opened:
        skeleton = (opened.metadata() or {}).get("skeleton")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if skeleton is None:
        raise StateError("not a file of optimizer or K-FAC state", given=path)
    return {name: join_tree(part, tensors) for name, part in parsed(skeleton).items()}
