"""Which passes the gradient in `.grad` is made of: layer inputs and output gradients, and nothing else.

Process-wide hooks (hooks.py) look a module up by identity, so nothing is ever put on the user's modules:
a copy, a pickle, an EMA model or a replica is a stranger, and closing in any order is a dictionary
removal. The life of one forward call of a watched layer:

    forward   a `Call` notes the input (autograd holds the same tensor) and hooks the output
    backward  the output's gradient is staged under the number of the running graph task
    commit    when the weight's own gradient accumulates in that task; `autograd.grad`, probes,
              Hessian products and passes through a frozen weight never get here
    fold      inputs and gradients become sums; at once, or, where the graph is kept for further
              passes (`retain_graph`), when those have been added: G belongs to the summed gradient
    reset     `zero_grad`, in both forms, clears what was committed

Seven private names of torch answer what has no public answer (`TORCH_INTERNALS`); a test fails when
an upgrade changes one of them.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic_kfac.curvature.dtensors import any_nonzero, is_sharded
from elastic_kfac.curvature.passes.batches import Batch, Batches
from elastic_kfac.curvature.passes.explained import CHECK_TRIES, doubt, unexplained
from elastic_kfac.curvature.passes.hooks import Activity, registry
from elastic_kfac.curvature.passes.joins import Joins
from elastic_kfac.curvature.passes.look_ups import LookUps

TORCH_INTERNALS = (
    "torch._C._current_graph_task_id",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._functorch.peek_interpreter_stack",
    "torch.autograd.graph.queue_callback",
    "torch._C._FunctionBase._sequence_nr",
    "torch._C._FunctionBase._input_metadata",
)

T = TypeVar("T")

SMALL = 8192
"""Elements of an input and its output gradient together that may wait for the end of a pass."""


class Layer(Protocol):
    """What a watched layer does with its passes."""

    @property
    def is_wanted(self) -> bool:
        """Whether its passes are recorded now."""

    def samples_in(self, inputs: Tensor) -> int | None:
        """How many samples the layer itself sees in its inputs, where their shape leaves no doubt."""

    def condense(self, call: Call) -> Any:
        """What the layer needs of `call.inputs`, where the tensor itself should not be kept."""

    def note(self) -> Any:
        """What the module alone knows about the call that it has just made."""

    def fold(self, call: Call) -> None:
        """Adds a call to the layer's sums: `call.inputs`, as it was given or condensed, and
        `call.gradient`."""

    def clear(self) -> None:
        """Forgets the sums."""

    def weight_gradient(self, call: Call) -> Tensor:
        """What `call.inputs` and `call.staged` contribute to the weight's gradient, in its shape."""

    def sampled(self, call: Call, gradient: Tensor, weight: float) -> None:
        """Adds the gradient of a loss over sampled labels to `call.sampled`."""


@dataclass(eq=False, slots=True)
class Call:
    """One forward call whose gradient is still to come, or may still grow."""

    site: Site
    inputs: Any
    version: int | None
    """Of the input tensor; None once it is condensed."""
    batch: Batch
    axis: int
    """The dimension of the input and of the gradient that counts samples."""
    staged: Tensor | None = None
    task: int = -1
    """The graph task that staged it."""
    gradient: Tensor | None = None
    sampled: Tensor | None = None
    """What gradients of sampled labels have added up to."""
    epoch: int = -1
    of_parameter: bool = False
    """Whether the input is a parameter itself, and so the same for all samples."""
    of_pass: object = None
    """The call of the model, among those about the same batch, that it was a part of."""
    note: Any = None
    """What the layer's module knew about it."""

    @property
    def samples(self) -> Hashable:
        """What calls about the same samples have in common: a batch, unless its size says that every
        call of the model is about a part of it."""
        batch = self.batch
        is_whole = not batch.is_given or batch.size == batch.extent or batch.real is not None
        return batch if is_whole else (batch, self.of_pass)


@dataclass(eq=False)
class Site:
    """A layer as the hooks see it: several may share a module (attention) or a weight (its packed
    projections)."""

    layer: Layer
    weight: Weight
    rows: slice | None = None
    """The part of a packed weight that belongs to the layer."""
    recomputed: list[Batch] = field(default_factory=list)
    """Since the last step: of calls inside a backward pass."""

    def is_recording(self) -> bool:
        recorder = self.weight.recorder()
        return recorder is not None and recorder.active

    def called(
        self, inputs: Tensor, weight: Tensor | None, axis: int | None
    ) -> Callable[[Tensor], None] | None:
        recorder = self.weight.recorder()
        # `functional_call` swaps parameters: then the call is about other weights.
        if recorder is None or not self.weight.is_used_as(weight):
            return None
        return recorder.called(self, inputs, axis=axis)

    def looked_up(self, indices: Tensor) -> Callable[[Tensor | None], None]:
        return self.weight.look_ups.follow(indices)

    def staged_in_graph(self, gradient: Tensor, inputs: Tensor, axis: int | None) -> None:
        recorder = self.weight.recorder()
        if recorder is None:
            return
        if self.layer.is_wanted:
            self.weight.stage(recorder.call(self, inputs, axis), gradient)
        else:
            recorder.batch_of(self, inputs, axis)


@dataclass(eq=False)
class Weight:
    """A watched parameter: calls are committed when its own gradient accumulates."""

    recorder: weakref.ref[Recorder]
    parameter: weakref.ref[nn.Parameter]
    sites: list[Site] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    whole: weakref.ref[Tensor] | None = None
    """Of a parameter that `fully_shard` keeps in pieces: what autograd accumulates into."""
    unreduced: bool = False
    """Whether the gradient of the whole one has not come to the pieces yet."""
    staged: dict[int, list[Call]] = field(default_factory=dict)
    """By graph task: a reentrant checkpoint runs one inside another."""
    fresh: bool = False
    """Whether nothing was in `.grad` when the last task began."""
    open: list[Call] = field(default_factory=list)
    """Committed calls that further passes may still reach."""
    epoch: int = 0
    committed: bool = False
    mark: tuple[weakref.ref[Tensor], int] | None = None
    """The gradient tensor after the last commit, and its version."""
    look_ups: LookUps = field(default_factory=LookUps)

    def is_used_as(self, used: Tensor | None) -> bool:
        """Whether a call that used this tensor is about the weight."""
        parameter = self.parameter()
        if parameter is None or used is None or not is_sharded(parameter):
            return parameter is used
        if is_sharded(used) or used.shape != parameter.shape:
            return False
        if self.whole is None or self.whole() is not used:
            # Its passes end with the whole one's gradient, also where ranks exchange none (no_sync).
            self.whole = weakref.ref(used)
            self.commit_with(used)
        return True

    def commit_with(self, parameter: Tensor) -> None:
        known = weakref.ref(self)

        def accumulated(parameter: Tensor) -> None:
            its = known()
            if its is not None:
                its.accumulated(parameter)

        self.handles.append(parameter.register_post_accumulate_grad_hook(accumulated))

    def _has_no_gradient(self) -> bool:
        holder = self.parameter() if self.whole is None else self.whole()
        return holder is not None and holder.grad is None

    def stage(self, call: Call, gradient: Tensor) -> None:
        """Notes an output gradient of the running graph task."""
        recorder = self.recorder()
        if recorder is None:
            return
        detached = gradient.detach()
        if recorder.sampling_weight is not None:
            recorder.sample(call, detached)
            return
        task = torch._C._current_graph_task_id()
        calls = self.staged.get(task)
        if calls is None:
            calls = self.staged[task] = []
            recorder.reached(self, task)
            self.fresh = self._has_no_gradient()
        if call.task == task and call.staged is not None:
            call.staged = call.staged + detached
        else:
            call.staged, call.task = detached, task
            calls.append(call)

    def drop(self, task: int) -> None:
        """Forgets what a task has staged and not committed."""
        for call in self.staged.pop(task, ()):
            call.staged = None

    def was_touched(self) -> bool:
        """Whether `.grad` has changed since the last commit. If it is gone, so are the sums."""
        if not self.committed or self.unreduced:
            return False
        parameter = self.parameter()
        if parameter is None or parameter.grad is None:
            self.clear()
            return False
        seen, version = self.mark if self.mark is not None else (None, -1)
        return seen is None or seen() is not parameter.grad or parameter.grad._version != version

    def remember(self) -> None:
        """What is in `.grad` now belongs to the committed calls."""
        parameter = self.parameter()
        if parameter is not None and parameter.grad is not None:
            self.mark = weakref.ref(parameter.grad), parameter.grad._version

    def clear(self) -> None:
        """Forgets everything since the last step."""
        self.epoch += 1
        self.open, self.committed, self.mark, self.unreduced = [], False, None, False
        for site in self.sites:
            site.layer.clear()
            site.recomputed.clear()

    def rows_looked_up(self) -> Tensor | None:
        """The indices of all rows of `.grad` that may be other than zero, where that is certain."""
        parameter = self.parameter()
        return None if parameter is None else self.look_ups.rows(parameter.grad)

    def accumulated(self, parameter: Tensor) -> None:
        """Commits what the running task has staged: it is part of `parameter.grad` now."""
        if parameter.grad is not None:
            self.look_ups.match(parameter.grad)
        recorder = self.recorder()
        self.unreduced = self.whole is not None and not is_sharded(parameter)
        calls = self.staged.get(torch._C._current_graph_task_id())
        if not calls or recorder is None:
            return
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if self.fresh and not self.committed and not is_sharded(parameter):
            recorder.check(self, parameter, calls)
        for call in calls:
            staged, call.staged = call.staged, None
            assert staged is not None
            if call.epoch == self.epoch and call.gradient is not None:
                call.gradient = call.gradient + staged  # another pass over the same graph
            else:
                call.gradient, call.epoch = staged, self.epoch
                if keep:
                    self.open.append(call)
            if not keep:
                if call in self.open:
                    self.open.remove(call)
                recorder.commit(call)
        calls.clear()
        self.committed = True
        self.remember()


class Recorder:
    """Watches the layers of one model for one preconditioner."""

    def __init__(
        self,
        root: nn.Module,
        *,
        axis: int = 0,
        condense_together: Callable[[Sequence[Call]], None] | None = None,
    ) -> None:
        """`axis` counts samples in the inputs of the model; `condense_together` is called with small
        calls before they are folded."""
        self._condense_together = condense_together
        self._small: list[Call] = []
        """Committed in the running graph task."""
        self.sampling_weight: float | None = None
        self.batches, self.joins = Batches(axis), Joins()
        self._activity = Activity()
        weakref.finalize(self, self._activity.set, False)
        self.faults: list[tuple[Layer, str]] = []
        """Layers whose passes do not explain their gradient, and the reason; for the owner to take."""
        self._weights: dict[int, Weight] = {}
        self._reached: dict[int, list[Weight]] = {}
        """By graph task that runs: weights whose calls it has come to."""
        self._unchecked: dict[int, int] = {}
        """Sites whose first statistics are still to be checked, and how often that is tried."""
        registry.install()
        registry.roots.setdefault(id(root), []).append(weakref.ref(self))
        weakref.finalize(root, registry.forget, id(root))
        weakref.finalize(self, registry.uninstall)
        weakref.finalize(self, _release, self._weights)

    @property
    def active(self) -> bool:
        """Whether passes are recorded now."""
        return self._activity.on

    @active.setter
    def active(self, on: bool) -> None:
        self._activity.set(on)

    def watch(
        self,
        module: nn.Module,
        parameter: nn.Parameter,
        layer: Layer,
        rows: slice | None = None,
        *,
        is_table: bool = False,
    ) -> None:
        """Has calls of `module` recorded for `layer`, committed with `parameter`'s gradient; with
        `is_table`, remembers in every pass which rows of the parameter are looked up."""
        weight = self._weights.get(id(parameter))
        if weight is None:
            weight = Weight(weakref.ref(self), weakref.ref(parameter))
            weight.commit_with(parameter)
            self._weights[id(parameter)] = weight
        site = Site(layer, weight, rows)
        weight.sites.append(site)
        self._unchecked[id(site)] = CHECK_TRIES
        number = registry.add(module, site)
        if is_table:
            registry.add_table(module, site)
        weakref.finalize(module, registry.forget, id(module))
        if isinstance(module, nn.MultiheadAttention):
            registry.add_projection(module, parameter, rows, number)

    def rows_looked_up(self, parameter: nn.Parameter) -> Tensor | None:
        """See `Weight.rows_looked_up`."""
        weight = self._weights.get(id(parameter))
        return None if weight is None else weight.rows_looked_up()

    def close(self) -> None:
        """Stops watching; the model is as before."""
        _release(self._weights)
        self.active = False

    # -- batches -------------------------------------------------------------------------------

    def micro_batch(self, batch: Batch) -> AbstractContextManager[Batch]:
        """Forward calls inside are about `batch`."""
        return self.batches.micro_batch(batch)

    def enter_root(self, arguments: Sequence[Any]) -> None:
        """A forward call of the whole model begins."""
        self.batches.enter(arguments)

    def leave_root(self, keywords: Mapping[str, Any], output: Any) -> None:
        """The call has returned."""
        self.batches.leave(keywords, output, keeps_nodes=self.joins.are_looked_for)

    # -- calls ---------------------------------------------------------------------------------

    def called(
        self, site: Site, inputs: Tensor, *, axis: int | None = None
    ) -> Callable[[Tensor], None] | None:
        """Records a forward call whose output may be differentiated.

        Args:
            axis: Which dimension counts samples, where the layer's inputs are not laid out as the
                batch says.

        Returns:
            What to call with the gradient of its output; None if the call does not count.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        saving = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if saving and in_backward:
            return None  # a checkpoint is recomputed, for a call that is known already
        if not site.layer.is_wanted:
            # Still, the first layer of a pass may tell how many samples it has.
            self.batch_of(site, inputs, axis)
            return None
        call = self.call(site, inputs.detach(), axis)
        call.of_parameter = isinstance(inputs, nn.Parameter)
        if (saving or torch.is_autocast_enabled(inputs.device.type)) and not self._is_due(site):
            # Somebody saves memory here; a reference to the input would undo it.
            call.inputs, call.version = _exactly(site.layer.condense, call), None
        known = weakref.ref(site.weight)

        def staged(gradient: Tensor) -> None:
            weight = known()
            recorder = None if weight is None else weight.recorder()
            if weight is not None and recorder is not None and recorder.active:
                weight.stage(call, gradient)

        return staged

    def call(self, site: Site, inputs: Tensor, axis: int | None) -> Call:
        """A call of a layer with `inputs`."""
        batch = self.batch_of(site, inputs, axis)
        call = Call(site, inputs, inputs._version, batch, batch.axis if axis is None else axis)
        in_backward = torch._C._current_graph_task_id() != -1
        call.of_pass = object() if in_backward else batch.newest_pass
        call.note = site.layer.note()
        return call

    def batch_of(self, site: Site, inputs: Tensor, axis: int | None) -> Batch:
        """The batch that a call of a layer is about."""
        batch = self.batches.of(inputs, axis, site.recomputed)
        if not batch.is_given:
            samples = site.layer.samples_in(inputs)
            if samples is not None:
                batch.set_length(samples)
        return batch

    def _is_due(self, site: Site) -> bool:
        """Whether the layer's first statistics are still to be checked."""
        return id(site) in self._unchecked

    def commit(self, call: Call) -> None:
        """Takes a call that no further pass will reach; small ones wait for the end of this one."""
        assert call.gradient is not None
        is_small = call.version is not None and call.inputs.numel() + call.gradient.numel() <= SMALL
        if is_small and self._condense_together is not None:
            self._small.append(call)
            return
        if not call.batch.is_folded:
            self._fold_small()  # the call that comes first counts the batch's rows
        self.fold(call)

    def _fold_small(self) -> None:
        calls, self._small = self._small, []
        sound = [
            c for c in calls if c.inputs._version == c.version and c.epoch == c.site.weight.epoch
        ]
        if len(sound) > 1 and self._condense_together is not None:
            together = self._condense_together
            _exactly(lambda call: together(sound), sound[0])
        for call in calls:
            self.fold(call)

    def fold(self, call: Call) -> None:
        """Turns a committed call into sums and lets go of its tensors."""
        self.batches.age()
        if call.version is not None and call.inputs._version != call.version:
            reason = "its input was changed in place before the backward pass"
            self.faults.append((call.site.layer, reason))
        elif call.epoch == call.site.weight.epoch:
            _exactly(call.site.layer.fold, call)
        call.inputs = call.gradient = None

    def reached(self, weight: Weight, task: int) -> None:
        """A graph task has come to the first call of a weight."""
        weights = self._reached.get(task)
        if weights is None:
            weights = self._reached[task] = []
            torch.autograd.graph.queue_callback(lambda: self._ended(task))
        weights.append(weight)
        if weight.was_touched():
            self._reset_zeroed()
        if len(weights) == 1:
            self._look_at_graph(is_further=weight.committed)

    def _look_at_graph(self, *, is_further: bool) -> None:
        """Notes how the losses of several calls are put together; `is_further` passes add to others."""
        if self.joins.are_looked_for:
            calls = [(batch.nodes, batch.size) for batch in self.batches.opened if batch.nodes]
            self.joins.look_at(calls, is_further=is_further)

    def _ended(self, task: int) -> None:
        for weight in self._reached.get(task, ()):
            weight.drop(task)
        self._fold_small()
        # After those that are queued already: DistributedDataParallel writes reduced gradients.
        torch.autograd.graph.queue_callback(lambda: self._remember(task))

    def _remember(self, task: int) -> None:
        for weight in self._reached.pop(task, ()):
            if weight.committed:
                weight.remember()

    def _reset_zeroed(self) -> None:
        """Clears the sums of weights whose `.grad` was zeroed since the last commit; one transfer to
        the host for all, and none where nobody touched a gradient."""
        touched = [weight for weight in self._weights.values() if weight.was_touched()]
        if not touched:
            return
        # Touched: clipping, unscaling and reductions leave something, `zero_grad` does not.
        alive = any_nonzero([w.parameter().grad for w in touched])  # type: ignore[union-attr,misc]
        for weight, is_alive in zip(touched, alive, strict=True):
            if is_alive:
                weight.remember()
            else:
                weight.clear()

    def settle(self) -> None:
        """Folds what was kept for further passes; drops what somebody has reset."""
        self._fold_small()
        self._reset_zeroed()
        for weight in reversed(self._weights.values()):  # as a backward pass would
            still_open, weight.open = weight.open, []
            for call in reversed(still_open):
                self.fold(call)

    def clear(self) -> None:
        """Forgets everything; what was taken before stays as it is."""
        for weight in self._weights.values():
            weight.clear()
            for task in list(weight.staged):  # of passes that raised
                weight.drop(task)
        self._reached.clear()
        self._small = []
        self.batches.clear()

    @contextlib.contextmanager
    def sampling(self, weight: float) -> Iterator[None]:
        """Gradients that are propagated inside come from sampled labels; their squares count for
        `weight`."""
        self.sampling_weight = weight
        try:
            yield
        finally:
            self.sampling_weight = None

    def sample(self, call: Call, gradient: Tensor) -> None:
        """Notes a gradient of sampled labels."""
        assert self.sampling_weight is not None
        layer, weight = call.site.layer, self.sampling_weight
        _exactly(lambda call: layer.sampled(call, gradient, weight), call)

    @torch.no_grad()
    def check(self, weight: Weight, parameter: Tensor, calls: Sequence[Call]) -> None:
        """At a layer's first statistics: do its passes explain the gradient that it got?"""
        due = [site for site in weight.sites if self._is_due(site)]
        if not due or any(call.version is None for call in calls):
            return
        parts = (
            (call.site.rows, _exactly(call.site.layer.weight_gradient, call)) for call in calls
        )
        difference = unexplained(parameter, parts)
        for site in due:
            self._unchecked[id(site)] -= 1
            # No gradient, or not finite: the next statistics show it.
            if math.isfinite(difference) or not self._unchecked[id(site)]:
                del self._unchecked[id(site)]
        if reason := doubt(difference):
            self.faults += [(site.layer, reason) for site in due]


def _exactly(function: Callable[[Call], T], call: Call) -> T:
    """Calls `function` without gradients and without autocast."""
    parameter = call.site.weight.parameter()
    device = "cpu" if parameter is None else parameter.device.type
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
        return function(call)  # as in most backward passes
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return function(call)


def _release(weights: dict[int, Weight]) -> None:
    """Removes the hooks on the weights, and breaks the circles that would keep layers alive."""
    for weight in weights.values():
        for handle in weight.handles:
            handle.remove()
        weight.sites.clear()
    weights.clear()
    registry.prune()
