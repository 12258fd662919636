"""Capture: from forward and backward passes to the sums of each layer.

The input side of a call is summed in a forward hook; the output side in a hook on the gradient of the
output tensor, which also commits the input side. So a forward pass that is never differentiated, a
recomputation under activation checkpointing, and evaluation contribute nothing, and every call
contributes exactly once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic_kfac.curvature.attention import forward_with_linear
from elastic_kfac.curvature.fisher import fisher_losses
from elastic_kfac.curvature.kronecker import AttentionProjection
from elastic_kfac.curvature.layer import Layer, Observation

P = ParamSpec("P")
T = TypeVar("T")

# Key of output sums that already are at per-sample scale.
_SAMPLED = 0


@dataclass
class Sums:
    """What the passes of one rank have added up for one layer."""

    inputs: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """By micro-batch size: a mean loss multiplies each gradient by one over that size, and which scale
    applies is known for certain only at the step."""
    samples: int = 0
    rows: int = 0
    micro_batch: int = -1

    def scaled(
        self, layer: Layer, names: frozenset[str], loss_scale: float | None, extra_scale: float
    ) -> dict[str, Tensor]:
        """The sums of the named factors at per-sample scale, zeros where nothing was seen; consumes
        them.

        Args:
            layer: Whose sums they are.
            names: Factors that are wanted.
            loss_scale: What one sample's loss was multiplied by before backward; None means one over
                the size of its micro-batch.
            extra_scale: A further factor on every gradient (accumulation, loss scaling).
        """
        raw = layer.options.factor_scale == "kaisa"  # squares the gradients of the mean loss
        total: Tensor | None = None
        for size, part in self.outputs.items():
            scale = 1.0
            if size != _SAMPLED and not raw:
                scale = (1.0 / size if loss_scale is None else loss_scale) * extra_scale
            part.mul_(1.0 / (scale * scale))
            total = part if total is None else total.add_(part)
        found = {layer.factor_names[0]: self.inputs} if len(layer.factor_names) > 1 else {}
        found[layer.factor_names[-1]] = total
        result = {}
        for name, value in found.items():
            if name not in names:
                continue
            if value is None:
                shape = layer.factor_shapes[name]
                value = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
            result[name] = value
        return result

    def tensors(self) -> list[Tensor]:
        return [*self.outputs.values(), *(() if self.inputs is None else (self.inputs,))]


@dataclass
class _Call:
    """One forward call of a layer whose output gradient is still to come."""

    observation: Observation
    samples: int
    micro_batch: int
    counted: bool = False


def hidden_from_compiler(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, which would import the compiler (seconds) where nothing is compiled."""
    hidden = torch._disable_dynamo(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            return hidden(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


class Capture:
    """Hooks on the modules of one model, and the sums that they collect.

    Args:
        modules: Modules with the layers inside them.
        fisher: `empirical` sums gradients of the training loss; anything else only those of
            `sample`.
    """

    def __init__(
        self, modules: Iterable[tuple[nn.Module, tuple[Layer, ...]]], *, fisher: str
    ) -> None:
        self.active = False
        """Whether passes are recorded."""
        self._sampling_weight: float | None = None
        self._fisher = fisher
        self._due: Mapping[str, frozenset[str]] = {}
        self._sums: dict[str, Sums] = {}
        self._micro_batch = 0
        self._saw_backward = False
        self._handles: list[RemovableHandle] = []
        self._patched: list[nn.MultiheadAttention] = []
        for module, layers in modules:
            if isinstance(module, nn.MultiheadAttention):
                self._patch_attention(module, layers)
            else:
                hook = _ForwardHook(self, module, layers[0])
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def arm(self, due: Mapping[str, frozenset[str]]) -> None:
        """Records the named factors of the coming passes, by layer name."""
        self._due = due
        self.active = any(due.values())

    def of(self, layer: Layer) -> Sums:
        """The sums of a layer since they were last taken."""
        return self._sums.get(layer.name) or Sums()

    def take(self, layers: Sequence[Layer]) -> list[Sums]:
        """The sums of every layer since the last call, in their order."""
        taken, self._sums = self._sums, {}
        return [taken.get(layer.name) or Sums() for layer in layers]

    def drop(self) -> None:
        """Discards what was recorded."""
        self._sums = {}

    def sample(
        self,
        output: Tensor,
        likelihood: str,
        draws: int,
        generator: torch.Generator | None,
        *,
        parameters: Sequence[nn.Parameter],
        loss_scale: float,
    ) -> None:
        """Propagates labels that the model itself predicts (see `fisher_losses`); the gradients of
        parameters stay. Does nothing where no factor is due."""
        if not self.active:
            return
        try:
            for loss, weight in fisher_losses(output, self._fisher, likelihood, draws, generator):
                self._sampling_weight = weight / (loss_scale * loss_scale)
                torch.autograd.grad(
                    loss * loss_scale, parameters, retain_graph=True, allow_unused=True
                )
        finally:
            self._sampling_weight = None

    def close(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        for module in self._patched:
            del module.forward
        self._handles, self._patched = [], []

    # -- for the hooks --------------------------------------------------------------------------

    def recording(self, module: nn.Module) -> bool:
        """Whether a forward call happening now counts."""
        return self.active and module.training and torch.is_grad_enabled()

    def open(self, layer: Layer, inputs: Tensor) -> _Call:
        """Records the input side of a call."""
        in_backward = torch._C._current_graph_task_id() != -1  # a recomputation, not a new pass
        if self._saw_backward and not in_backward:
            self._micro_batch += 1
            self._saw_backward = False
        due = self._due.get(layer.name, frozenset())
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            observation = layer.observe(inputs.detach(), due)
        return _Call(observation, inputs.shape[0], self._micro_batch)

    def close_call(self, layer: Layer, call: _Call, gradients: Tensor) -> None:
        """Records the output side of a call, once its gradient is known."""
        self._saw_backward = True
        if not self.active:
            return
        sums = self._sums.setdefault(layer.name, Sums())
        if not call.counted:
            call.counted = True
            # A module called several times in one pass sees the same samples at more positions.
            if sums.micro_batch != call.micro_batch:
                sums.samples += call.samples
                sums.micro_batch = call.micro_batch
            sums.rows += call.observation.rows
            if call.observation.input_sum is not None:
                if sums.inputs is None:
                    sums.inputs = call.observation.input_sum
                else:
                    sums.inputs += call.observation.input_sum
                call.observation = call.observation._replace(input_sum=None)
        weight = self._sampling_weight
        counts = (weight is None) == (self._fisher == "empirical")
        due = self._due.get(layer.name, frozenset())
        if not counts or layer.factor_names[-1] not in due:
            return
        with torch.no_grad(), torch.autocast(gradients.device.type, enabled=False):
            part = layer.output_sum(gradients.detach(), call.observation.kept)
            key = call.samples
            if weight is not None:
                key = _SAMPLED
                part.mul_(weight)
            if key in sums.outputs:
                sums.outputs[key] += part
            else:
                sums.outputs[key] = part

    def _patch_attention(self, module: nn.MultiheadAttention, layers: tuple[Layer, ...]) -> None:
        original = module.forward
        recorder = _AttentionRecorder(self, module, layers)
        seeing = forward_with_linear(module, recorder.linear)

        @hidden_from_compiler
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.recording(module):
                return original(*args, **kwargs)
            recorder.note_batch(args[0] if args else kwargs["query"])
            return seeing(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
        self._patched.append(module)


class _ForwardHook:
    """Forward hook of one module. A copy of the model carries it along, but inert."""

    def __init__(self, capture: Capture, module: nn.Module, layer: Layer) -> None:
        self.capture, self.module, self.layer = capture, module, layer

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()

    @hidden_from_compiler
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if module is not self.module or not self.capture.recording(module):
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        inputs = args[0] if args else kwargs["input"]
        unbatched = inputs.dim() == 1 + (isinstance(module, nn.Conv2d) * 2)  # one sample
        call = self.capture.open(self.layer, inputs.unsqueeze(0) if unbatched else inputs)

        def record(gradients: Tensor) -> None:
            shaped = gradients.unsqueeze(0) if unbatched else gradients
            self.capture.close_call(self.layer, call, shaped)

        output.register_hook(record)


class _Inert:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """A hook that was loaded from a pickle has no preconditioner to report to."""


def _inert_hook() -> _Inert:
    return _Inert()


class _AttentionRecorder:
    """Records the projections of one nn.MultiheadAttention."""

    def __init__(
        self, capture: Capture, module: nn.MultiheadAttention, layers: tuple[Layer, ...]
    ) -> None:
        self.capture, self.module = capture, module
        self.layers = [layer for layer in layers if isinstance(layer, AttentionProjection)]
        self.samples = 1

    def note_batch(self, query: Tensor) -> None:
        """Notes the batch size, which the projections' own (sequence-first) inputs hide."""
        self.samples = 1
        if query.dim() == 3:
            self.samples = query.shape[0 if self.module.batch_first else 1]

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A projection, recorded."""
        output = F.linear(inputs, weight, bias)
        if output.requires_grad:
            for layer in self.layers:
                rows = layer.rows_in(weight)
                if rows is not None:
                    self._record(layer, inputs, output, rows)
        return output

    def _record(self, layer: Layer, inputs: Tensor, output: Tensor, rows: slice) -> None:
        call = self.capture.open(layer, self._by_sample(inputs.detach(), self.samples))

        def record(gradients: Tensor) -> None:
            shaped = self._by_sample(gradients[..., rows], call.samples)
            self.capture.close_call(layer, call, shaped)

        output.register_hook(record)

    @staticmethod
    def _by_sample(tensor: Tensor, samples: int) -> Tensor:
        """`[positions, n, d]` or `[positions·n, d]` to `[n, positions, d]`."""
        return tensor.reshape(-1, samples, tensor.shape[-1]).transpose(0, 1)
