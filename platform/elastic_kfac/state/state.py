"""The state of a run as one value that is independent of the world size.

It continues with any number of ranks: parameters, buffers, optimizer, K-FAC, position in the data, clocks
and the ledger's tail. Randomness is counter-based (functions of seed, epoch, step and sample), so there
is no generator state.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from elastic_kfac.errors import StateError
from elastic_kfac.json_text import parsed
from elastic_kfac.state.ledger import ROW, LedgerValue, Rows, Segment

_TAIL = "ledger/tail"
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"
"""Marks of the skeleton of a nested state: no pickle."""

Buffer = npt.NDArray[np.uint8]
_RENAMED = {
    "best_accuracy": "best_value",
    "time_to_accuracy_s": "time_to_target_s",
    "train_time_to_accuracy_s": "train_time_to_target_s",
}
"""Fields of `Progress` in earlier versions."""


@dataclass(frozen=True)
class Progress:
    """Progress and costs of a run."""

    step: int = 0
    """Committed optimizer steps."""
    epoch: int = 0
    consumed: int = 0
    """Committed positions of the current epoch's order."""
    samples_committed: int = 0
    wall_time_s: float = 0.0
    """Time in which the run existed: with evaluation and downtime, without that between two calls."""
    train_time_s: float = 0.0
    """Stepping time, without evaluation and downtime."""
    computation_s: float = 0.0
    """Stepping time of rank 0 without communication and waiting for data."""
    communication_s: float = 0.0
    """Stepping time of rank 0 inside collectives."""
    hessian_s: float = 0.0
    """Time of eigenvalues for the batch policy and of analyses; not part of the stepping time."""
    worker_seconds: float = 0.0
    gpu_seconds: float = 0.0
    evaluations: int = 0
    """Evaluation points passed."""
    analyses: int = 0
    """Analysis points passed."""
    best_value: float | None = None
    """Of the metric of the run's target, or else the most important one of its task."""
    time_to_target_s: float | None = None
    train_time_to_target_s: float | None = None

    def evaluated(
        self,
        value: float,
        points: int,
        target: float | None,
        wall_time_s: float,
        direction: Literal["max", "min"] = "max",
    ) -> Progress:
        """Progress after evaluation number `points`; the first value at `target` stops the clock."""
        best = value
        if self.best_value is not None:
            best = (max if direction == "max" else min)(value, self.best_value)
        progress = replace(self, best_value=best, evaluations=points)
        if target is None or progress.time_to_target_s is not None:
            return progress
        if not (value >= target if direction == "max" else value <= target):
            return progress
        return replace(
            progress, time_to_target_s=wall_time_s, train_time_to_target_s=progress.train_time_s
        )


@dataclass(frozen=True)
class TrainingState:
    """State at a step boundary. Its tensors are on the CPU and shared with nothing."""

    progress: Progress
    tensors: Mapping[str, Tensor]
    """`model/…`, `optimizer/…`, `kfac/…` by name."""
    skeleton: Mapping[str, Any]
    """The nested state without its tensors, as JSON."""
    ledger: LedgerValue = field(default_factory=LedgerValue)
    seed: int = 0
    data_sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration."""

    def part(self, name: str) -> Any:
        """The nested state of one part: `optimizer`, `kfac`, …; None if there is none."""
        return join_tree(self.skeleton.get(name), dict(self.tensors))

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        prefix = "model/"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def sha256(self) -> str:
        """`final_state_sha256`: hash of all tensors, by name in sorted order."""
        return tensors_sha256(self.tensors)

    def meta(self) -> dict[str, Any]:
        """Everything except the tensors, as JSON."""
        return {
            "progress": asdict(self.progress),
            "skeleton": dict(self.skeleton),
            "segments": [asdict(segment) for segment in self.ledger.segments],
            "world_sizes": list(self.ledger.world_sizes),
            "seed": self.seed,
            "data_sha256": self.data_sha256,
            "config": dict(self.config),
        }

    def payload(self) -> bytes:
        """The tensors and the ledger's tail as a safetensors file."""
        tail = torch.frombuffer(bytearray(self.ledger.tail.tobytes() or b"\0"), dtype=torch.uint8)
        if not len(self.ledger.tail):
            tail = tail[:0]
        return bytes(
            save({**{n: t.contiguous() for n, t in self.tensors.items()}, _TAIL: tail.clone()})
        )

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], payload: bytes) -> TrainingState:
        """Rebuilds a state from `meta()` and `payload()`.

        Raises:
            StateError: If they are damaged or do not belong together.
        """
        try:
            tensors = load(payload)
            tail = np.frombuffer(tensors.pop(_TAIL).numpy().tobytes(), ROW)
            return cls._from_meta(meta, tensors, tail)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise StateError(f"a training state cannot be read: {error!r}") from None

    @classmethod
    def outline(cls, meta: Mapping[str, Any]) -> TrainingState:
        """A state without tensors and without the ledger's tail.

        Raises:
            StateError: If `meta` is damaged.
        """
        try:
            return cls._from_meta(meta, {}, np.empty(0, ROW))
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"a training state cannot be read: {error!r}") from None

    def to_buffers(self) -> list[Buffer]:
        """The state, unwritten ledger segments included, for a peer or an in-memory replica.

        One-dimensional uint8 arrays: a head (its length in 8 bytes, then JSON), the memory of every
        tensor without a copy, and the ledger's tail. Concatenated they are `to_bytes`.
        """
        meta = self.meta()
        meta["unwritten"] = [[asdict(s), content.hex()] for s, content in self.ledger.unwritten]
        meta["tensors"] = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in self.tensors.items()
        ]
        head = json.dumps(meta).encode()
        return [
            np.frombuffer(len(head).to_bytes(8, "little") + head, np.uint8),
            *(_memory(tensor) for tensor in self.tensors.values()),
            np.frombuffer(self.ledger.tail.tobytes(), np.uint8),
        ]

    def to_bytes(self) -> bytearray:
        """`to_buffers`, concatenated."""
        return bytearray().join(buffer.data for buffer in self.to_buffers())

    @classmethod
    def from_bytes(cls, content: bytes | bytearray | memoryview) -> TrainingState:
        """Rebuilds a state from `to_bytes`, copying it.

        Raises:
            StateError: If the bytes are damaged.
        """
        view = memoryview(content)
        length = int.from_bytes(view[:8], "little")
        begin = 8 + length
        tensors = {}
        try:
            meta = parsed(bytes(view[8:begin]))
            unwritten = tuple((Segment(**s), bytes.fromhex(text)) for s, text in meta["unwritten"])
            for name, dtype_name, shape in meta["tensors"]:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
                _memory(tensor)[:] = np.frombuffer(view, np.uint8, tensor.nbytes, begin)
                tensors[name] = tensor
                begin += tensor.nbytes
            tail = np.frombuffer(bytes(view[begin:]), ROW)
            state = cls._from_meta(meta, tensors, tail)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise StateError(f"a training state cannot be read: {error!r}") from None
        return replace(state, ledger=replace(state.ledger, unwritten=unwritten))

    @classmethod
    def _from_meta(
        cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], tail: Rows
    ) -> TrainingState:
        segments = tuple(Segment(**segment) for segment in meta["segments"])
        return cls(
            # Earlier versions had `started_at` in the place of `wall_time_s`.
            progress=Progress(
                **{
                    _RENAMED.get(name, name): value
                    for name, value in meta["progress"].items()
                    if name != "started_at"
                }
            ),
            tensors=tensors,
            skeleton=meta["skeleton"],
            ledger=LedgerValue(segments, tail, tuple(meta["world_sizes"])),
            seed=meta["seed"],
            data_sha256=meta["data_sha256"],
            config=meta.get("config", {}),
        )


def _memory(tensor: Tensor) -> Buffer:
    """The memory of a tensor, or of a contiguous copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def capture(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Any],
    progress: Progress,
    ledger: LedgerValue,
    seed: int,
    data_sha256: str,
    config: Mapping[str, Any],
) -> TrainingState:
    """Copies the state of a running training; `parts` are further nested states, such as K-FAC's."""
    tensors: dict[str, Tensor] = {
        f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()
    }
    skeleton = {"optimizer": split_tree(optimizer_by_name(model, optimizer), "optimizer", tensors)}
    for name, tree in parts.items():
        skeleton[name] = split_tree(tree, name, tensors)
    # A copy: training continues while a background thread writes this value.
    owned = {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return TrainingState(progress, owned, skeleton, ledger, seed, data_sha256, config)


def restore_model(model: nn.Module, state: TrainingState) -> None:
    """Writes parameters and buffers into `model`.

    Raises:
        StateError: If names or shapes differ.
    """
    ours = model.state_dict()
    theirs = state.model_tensors()
    wrong = sorted(set(ours) ^ set(theirs)) or sorted(
        name for name, tensor in theirs.items() if tensor.shape != ours[name].shape
    )
    if wrong:
        raise StateError(
            f"the state belongs to another model: {', '.join(wrong[:3])} differ",
            change="use the model, classes and image shape that the run was started with",
        )
    model.load_state_dict(theirs)


def optimizer_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A first-order optimizer's state by parameter name instead of by index."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, by_name: Mapping[str, Any]
) -> None:
    """Restores the state of `optimizer_by_name`.

    Raises:
        StateError: If it names a parameter that the model does not have, or belongs to another kind
            of optimizer.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(by_name) - set(parameters))
    if unknown:
        raise StateError(f"the optimizer state names unknown parameters: {', '.join(unknown[:3])}")
    kept = _kept_by(optimizer)
    if missing := {key for saved in by_name.values() if saved for key in set(kept) - set(saved)}:
        raise StateError(
            "the optimizer's state belongs to another kind of optimizer",
            given=f"no {', '.join(sorted(missing))} in the checkpoint",
            change="continue with the optimizer of the checkpoint, or start a run under another name",
        )
    optimizer.state.clear()
    for name, values in by_name.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # Step counters of torch optimizers stay on the CPU.
            key: value.to(parameter.device if value.shape == parameter.shape else "cpu", copy=True)
            if isinstance(value, Tensor)
            # LAMB counts steps in an integer, torch in a tensor.
            else torch.tensor(float(value))
            if isinstance(kept.get(key), Tensor) and value is not None
            else value
            for key, value in values.items()
        }


def _kept_by(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a step of this optimizer keeps for a parameter, from a step on a parameter of its own."""
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [parameter]}]
    # One that needs more (a closure, a GPU, attributes that the copy lacks) is taken on trust.
    with contextlib.suppress(Exception):
        type(twin).step(twin)
    return {key: value for key, value in twin.state[parameter].items() if value is not None}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_memory(tensor).data)
    return digest.hexdigest()


def split_tree(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of `tree` into `tensors`, under names that begin with `prefix`.

    Returns:
        A JSON skeleton for `join_tree`, with a name in place of each tensor.

    Raises:
        StateError: If the tree holds something that is neither a tensor nor plain data.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach()
        return {_TENSOR: prefix}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, dict):
        parts = [(key, split_tree(part, f"{prefix}/{key}", tensors)) for key, part in tree.items()]
        if all(isinstance(key, str) and not key.startswith("__") for key in tree):
            return dict(parts)
        return {_ITEMS: [[key, part] for key, part in parts]}
    if isinstance(tree, (list, tuple)):
        listed = [split_tree(part, f"{prefix}/{index}", tensors) for index, part in enumerate(tree)]
        return {_TUPLE: listed} if isinstance(tree, tuple) else listed
    raise StateError(
        "state holds something that cannot be saved",
        given=f"{prefix}: {type(tree).__name__}",
        allowed="tensors, numbers, strings, dicts, lists and tuples of them",
    )


def join_tree(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of `split_tree`.

    Raises:
        StateError: If a tensor is missing.
    """
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            name = skeleton[_TENSOR]
            if name not in tensors:
                raise StateError("a tensor of the state is missing", given=name)
            return tensors[name]
        if _TUPLE in skeleton:
            return tuple(join_tree(part, tensors) for part in skeleton[_TUPLE])
        if _ITEMS in skeleton:
            return {_key(key): join_tree(part, tensors) for key, part in skeleton[_ITEMS]}
        return {key: join_tree(part, tensors) for key, part in skeleton.items()}
    if isinstance(skeleton, list):
        return [join_tree(part, tensors) for part in skeleton]
    return skeleton


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
