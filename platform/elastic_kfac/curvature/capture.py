"""Capture: the sums that a layer's passes add up to, for as long as they are part of its gradient.

Which passes count is decided in passes/. Here a call's input and output gradient become sums, by
batch: a batch knows how many samples it holds, on which axis they are, which rows are real, and what
a sample's loss was multiplied by.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.curvature.fisher import fisher_losses
from elastic_kfac.curvature.kronecker import LinearLayer
from elastic_kfac.curvature.layer import Layer, Observation
from elastic_kfac.curvature.passes.batches import Batch
from elastic_kfac.curvature.passes.recorder import Call, Recorder

# Key of output sums that already are at per-sample scale.
_SAMPLED = 0


@dataclass
class Sums:
    """What the passes of one rank have added up for one layer."""

    inputs: Tensor | None = None
    outputs: dict[float, Tensor] = field(default_factory=dict)
    """By what a sample's loss was multiplied by, where the batch says so, else by the negative size of
    the batch: a mean loss multiplies by one over that size, and which scale applies is known for
    certain only at the step."""
    batches: dict[Batch, None] = field(default_factory=dict)
    rows: int = 0
    open: dict[Hashable, tuple[float, Tensor]] = field(default_factory=dict)
    """Gradients of samples that further calls may add to, and their key in `outputs`, by samples."""
    seen: set[Hashable] = field(default_factory=set)
    """The samples of a layer that has one row of each per call."""

    @property
    def samples(self) -> int:
        """Samples of all batches: a layer that is called several times sees the same ones."""
        return sum(batch.size for batch in self.batches)

    def scaled(
        self, layer: Layer, names: frozenset[str], loss_scale: float | None, extra_scale: float
    ) -> dict[str, Tensor]:
        """The sums of the named factors at per-sample scale, zeros where nothing was seen; consumes
        them.

        Args:
            layer: Whose sums they are.
            names: Factors that are wanted.
            loss_scale: What one sample's loss was multiplied by before backward; None means one over
                the size of its batch.
            extra_scale: A further factor on every gradient (accumulation, loss scaling).
        """
        raw = layer.options.factor_scale == "kaisa"  # squares the gradients of the mean loss
        total: Tensor | None = None
        for key, part in self.outputs.items():
            scale = 1.0
            if key != _SAMPLED and not raw:
                given = key if key > 0 else loss_scale
                scale = (-1.0 / key if given is None else given) * extra_scale
            part.mul_(1.0 / (scale * scale))
            total = part if total is None else total.add_(part)
        result = {}
        for name in layer.factor_names:
            if name not in names:
                continue
            value = total if name == layer.output_factor else self.inputs
            if value is None:
                shape = layer.factor_shapes[name]
                value = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
            result[name] = value
        return result

    def tensors(self) -> list[Tensor]:
        sums = [*self.outputs.values(), *(() if self.inputs is None else (self.inputs,))]
        return [*sums, *(rows for _, rows in self.open.values())]

    def add_inputs(self, part: Tensor | None) -> None:
        if part is not None:
            self.inputs = part if self.inputs is None else self.inputs.add_(part)

    def add_outputs(self, key: float, part: Tensor) -> None:
        self.outputs[key] = self.outputs[key].add_(part) if key in self.outputs else part

    def add_samples(self, samples: Hashable, key: float, rows: Tensor) -> str:
        """Adds gradients of samples to those of other calls; returns why that cannot be, if it cannot."""
        if samples in self.open:
            key, known = self.open[samples]
            if known.shape != rows.shape:
                return _other_rows(len(known), len(rows))
            rows = known + rows
        self.open[samples] = key, rows
        return ""

    def close(self, layer: Layer) -> Sums:
        """Squares the gradients of samples: no further call adds to them."""
        for key, rows in self.open.values():
            self.add_outputs(key, layer.squared(rows))
        self.open.clear()
        return self


@dataclass
class _Shared:
    """What the layers of one capture share."""

    fisher: str
    counts_positions: bool
    due: Mapping[str, frozenset[str]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    saw_empty: bool = False
    """Whether a call without any rows was part of the gradient."""
    has_positions: bool = False
    """Whether a batch was seen whose outputs have several positions per sample."""
    last_called: str | None = None
    """Name of the layer with a G that was called last in the first pass."""
    drawn: dict[tuple[_Watched, Hashable], tuple[Call, Tensor]] = field(default_factory=dict)
    """Gradients of samples in the pass over sampled labels that runs, and a call to count them for."""
    called_again: set[str] = field(default_factory=set)
    """Layers with one row per sample and call that were called several times for the same samples."""

    def due_of(self, layer: Layer) -> frozenset[str]:
        """The factors of a layer that the coming passes are for."""
        return self.due.get(layer.name, frozenset())


def shared_by_all(rows: int, samples: int) -> str:
    """Why a layer's statistics cannot be right: its output gradients are sums over samples."""
    return f"its input of {rows} rows is shared by all samples of a batch of {samples}"


def _other_rows(one: int, other: int) -> str:
    return (
        f"its calls see {min(one, other)} and {max(one, other)} rows of the same samples, so that the "
        "gradient of one sample is not known"
    )


class _Watched:
    """One layer's side of the recorder."""

    def __init__(self, layer: Layer, shared: _Shared, first: _Watched | None = None) -> None:
        self.sums = Sums()
        self._first = first or self
        """Whose sums these are, where several modules share a weight."""
        self.layer = layer
        self._shared = shared

    @property
    def is_wanted(self) -> bool:
        shared, layer = self._shared, self.layer
        # The layer called last counts the rows that are terms of the loss.
        counts = shared.counts_positions or shared.last_called in (None, layer.name)
        return counts or bool(shared.due_of(layer))

    def samples_in(self, inputs: Tensor) -> int | None:
        return self.layer.samples_in(inputs)

    def condenses_together(self, call: Call) -> bool:
        """Whether its layer sums inputs that nothing sets apart from others."""
        layer = self.layer
        return (
            isinstance(layer, LinearLayer)
            and layer.observes_together
            and call.batch.mask is None
            and layer.factor_names[0] in self._shared.due_of(layer)
        )

    def note(self) -> Any:
        return self.layer.note()

    def condense(self, call: Call) -> Observation:
        layer, inputs = self._at(call), self.batched(call.inputs, call)
        if reason := layer.misfit(inputs):
            self._shared.faults.setdefault(layer.name, reason)
        return layer.observe(inputs, self._shared.due_of(layer))

    def fold(self, call: Call) -> None:
        layer, sums, batch = self._at(call), self._first.sums, call.batch
        observed: Observation = call.inputs if call.version is None else self.condense(call)
        if not batch.is_folded:
            # The first one in a backward pass: the layer that was called last, whose rows are the terms
            # of the loss.
            batch.is_folded = True
            self._shared.has_positions |= batch.has_positions
            if self._shared.counts_positions and not batch.is_given:
                batch.size = observed.rows
        if self._shared.last_called is None and layer.output_factor == "G":
            self._shared.last_called = layer.name
        self._shared.saw_empty |= not observed.rows
        sums.batches[batch] = None
        sums.rows += observed.rows
        sums.add_inputs(observed.input_sum)
        if layer.reduces:
            if call.samples in sums.seen:
                self._shared.called_again.add(layer.name)
            sums.seen.add(call.samples)
        if layer.output_factor not in self._shared.due_of(layer):
            return
        if call.sampled is not None:
            sums.add_outputs(_SAMPLED, call.sampled)
        if call.gradient is None:
            return
        gradient = self.batched(call.gradient, call)
        if observed.rows != (found := layer.output_rows(gradient)):
            reason = f"its output has {found} rows where its options give {observed.rows}"
            self._shared.faults.setdefault(layer.name, reason)
        elif self._shared.fisher == "empirical":
            key = -float(batch.size) if batch.scale is None else batch.scale
            part = layer.output_sum(gradient, observed.kept)
            if not layer.adds_calls:
                sums.add_outputs(key, part)
            elif reason := sums.add_samples(call.samples, key, part):
                self._shared.faults.setdefault(layer.name, reason)

    def clear(self) -> None:
        self.sums = Sums()

    def weight_gradient(self, call: Call) -> Tensor:
        assert call.staged is not None
        inputs, gradient = self.batched(call.inputs, call), self.batched(call.staged, call)
        return self._at(call).weight_gradient(inputs, gradient)

    def sampled(self, call: Call, gradient: Tensor, weight: float) -> None:
        """Adds the gradient of a loss over sampled labels; it counts once the call does."""
        layer = self._at(call)
        if layer.output_factor not in self._shared.due_of(layer):
            return
        kept = call.inputs.kept if call.version is None else self.condense(call).kept
        part = layer.output_sum(self.batched(gradient, call), kept)
        if not layer.adds_calls:
            _count_sampled(call, part.mul_(weight))
            return
        key = self, call.samples
        first, known = self._shared.drawn.get(key, (call, None))
        if known is not None and known.shape != part.shape:
            reason = _other_rows(len(known), len(part))
            self._shared.faults.setdefault(layer.name, reason)
            return
        self._shared.drawn[key] = first, part if known is None else known + part

    def _at(self, call: Call) -> Layer:
        """The layer as it sees a call."""
        real, layer = call.batch.real, self.layer
        layer = layer if real is None else layer.masked(real)
        return layer if call.note is None else layer.noting(call.note)

    def batched(self, tensor: Tensor, call: Call) -> Tensor:
        """`[n, ...]`."""
        tensor = self.layer.samples_first(tensor, call.axis)
        batch, rows = call.batch, tensor.shape[0]
        # Nobody but the user can tell parameters that are samples, one each, from those of all samples.
        are_samples = batch.is_given and rows == batch.size
        if rows < batch.extent or (call.of_parameter and batch.extent > 1 and not are_samples):
            self._shared.faults[self.layer.name] = shared_by_all(rows, batch.extent)
        return tensor


def _count_sampled(call: Call, part: Tensor) -> None:
    call.sampled = part if call.sampled is None else call.sampled.add_(part)


def _condense_together(calls: Sequence[Call]) -> None:
    """Condenses small calls of Linear layers of one shape in one go."""
    groups: dict[Hashable, list[tuple[Call, Tensor, LinearLayer]]] = {}
    for call in calls:
        watched = call.site.layer
        if isinstance(watched, _Watched) and watched.condenses_together(call):
            layer, inputs = watched.layer, watched.batched(call.inputs, call)
            assert isinstance(layer, LinearLayer)
            key = inputs.shape, inputs.dtype, inputs.device, layer.stack_key
            groups.setdefault(key, []).append((call, inputs, layer))
    for group in groups.values():
        observed = group[0][2].observe_all([inputs for _, inputs, _ in group])
        for (call, *_), its in zip(group, observed, strict=True):
            call.inputs, call.version = its, None


class Capture:
    """Records the passes of a model's layers.

    Args:
        root: The model; a forward call of it begins a batch.
        modules: Modules with the layers inside them.
        fisher: `empirical` sums gradients of the training loss; anything else only those of
            `sample`.
        batch_axis: The dimension of the model's inputs that counts samples.
        counts_positions: Samples are positions (tokens, pixels), counted at the layer called last.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Iterable[tuple[nn.Module, tuple[Layer, ...]]],
        *,
        fisher: str,
        batch_axis: int = 0,
        counts_positions: bool = False,
    ) -> None:
        self._shared = _Shared(fisher, counts_positions)
        self.took_empty = False
        """Whether a batch without any samples was part of what was taken last."""
        self._recorder = Recorder(root, axis=batch_axis, condense_together=_condense_together)
        self._watched: dict[str, _Watched] = {}
        for module, layers in modules:
            for layer in layers:
                watched = _Watched(layer, self._shared, self._watched.get(layer.name))
                self._watched.setdefault(layer.name, watched)
                self._recorder.watch(
                    module,
                    layer.parameters[0],
                    watched,
                    layer.weight_rows,
                    is_table=layer.uses_few_rows,
                )

    @property
    def active(self) -> bool:
        """Whether passes are recorded."""
        return self._recorder.active

    def arm(self, due: Mapping[str, frozenset[str]]) -> None:
        """Records the named factors of the coming passes, by layer name."""
        self._shared.due = due
        self._recorder.active = any(due.values())

    def micro_batch(self, batch: Batch) -> AbstractContextManager[Batch]:
        """Forward calls inside are about `batch`."""
        return self._recorder.micro_batch(batch)

    def of(self, layer: Layer) -> Sums:
        """The sums of a layer since they were last taken."""
        return self._watched[layer.name].sums

    def rows_looked_up(self, layer: Layer) -> Tensor | None:
        """Indices of the rows that `.grad` of an embedding consists of, where that is certain."""
        if not layer.uses_few_rows:
            return None
        return self._recorder.rows_looked_up(layer.parameters[0])

    def take(self, layers: Sequence[Layer]) -> list[Sums]:
        """The sums of every layer since the last call, in their order."""
        self._recorder.settle()
        taken = [self._watched[layer.name].sums.close(layer) for layer in layers]
        self.took_empty, self._shared.saw_empty = self._shared.saw_empty, False
        self.drop()
        return taken

    @property
    def last_called(self) -> str | None:
        """Name of the layer whose output is nearest to the loss: a backward pass reaches it first."""
        return self._shared.last_called

    def take_faults(self) -> dict[str, str]:
        """Layers whose statistics cannot be right, with the reason."""
        faults, self._shared.faults = self._shared.faults, {}
        for layer, reason in self._recorder.faults:
            if isinstance(layer, _Watched):
                faults.setdefault(layer.layer.name, reason)
        self._recorder.faults.clear()
        return faults

    def take_called_again(self) -> str:
        """Names of layers whose calls for the same samples count as further rows, though the positions of
        one call are one row."""
        names, self._shared.called_again = ", ".join(sorted(self._shared.called_again)), set()
        return names

    @property
    def has_positions(self) -> bool:
        """Whether a batch was seen whose outputs have several positions per sample."""
        return self._shared.has_positions

    @property
    def joined(self) -> tuple[str, int, int] | None:
        """Where the outputs of several calls of the model met in one mean loss: names of functions, the
        number of calls and of their samples."""
        return self._recorder.joins.joined

    @property
    def divides(self) -> bool:
        """Whether several passes before a step divided their losses by a number."""
        return self._recorder.joins.divides

    def drop(self) -> None:
        """Discards what was recorded."""
        self._recorder.clear()

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
        losses = fisher_losses(output, self._shared.fisher, likelihood, draws, generator)
        for loss, weight in losses:
            with self._recorder.sampling(weight / (loss_scale * loss_scale)):
                torch.autograd.grad(
                    loss * loss_scale, parameters, retain_graph=True, allow_unused=True
                )
            drawn, self._shared.drawn = self._shared.drawn, {}
            for (watched, _), (call, rows) in drawn.items():
                part = watched.layer.squared(rows).mul_(weight / (loss_scale * loss_scale))
                _count_sampled(call, part)

    def close(self) -> None:
        """Stops recording."""
        self._recorder.close()
