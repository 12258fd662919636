"""Process-wide module hooks that look a module up by identity, so that nothing is put on it.

Three ways lead from a call to whoever watches the module's layers (a `Site`):

    eager       a forward hook; the gradient comes through a hook on the output tensor
    compiled    while a graph is traced, an identity on the output whose backward calls an operator:
                no graph break; two graphs, with statistics and without
    attention   torch's function for it runs with projections of ours, in either case
"""

from __future__ import annotations

import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from elastic_kfac.curvature.dtensors import is_sharded


class Root(Protocol):
    """Whoever wants to know about calls of a whole model."""

    @property
    def active(self) -> bool:
        """Whether it records now."""

    def enter_root(self, arguments: Sequence[Any]) -> None:
        """A call begins."""

    def leave_root(self, keywords: Mapping[str, Any], output: Any) -> None:
        """It has returned. Its keyword arguments are not seen before."""


class Site(Protocol):
    """Whoever wants to know about calls of one layer."""

    def is_recording(self) -> bool: ...

    def called(
        self, inputs: Tensor, weight: Tensor | None, axis: int | None
    ) -> Callable[[Tensor], None] | None:
        """What to call with the gradient of the output; None if the call does not count.

        Args:
            inputs: Of the layer.
            weight: What the call used.
            axis: The dimension that counts samples, where the layout is not the model's.
        """

    def staged_in_graph(self, gradient: Tensor, inputs: Tensor, axis: int | None) -> None:
        """A compiled backward pass has reached the output of a call with `inputs`."""

    def looked_up(self, indices: Tensor) -> Callable[[Tensor | None], None]:
        """What to call with the gradient of the table that a look-up of `indices` has made."""


class Registry:
    """What the hooks look up: numbers of sites by the identity of modules and weights, and roots."""

    def __init__(self) -> None:
        self.roots: dict[int, list[weakref.ref[Root]]] = {}
        self.numbered: list[weakref.ref[Site]] = []
        self.numbers: dict[int, list[int]] = {}
        """Of the sites of a module: what a compiled graph can hold."""
        self.projections: dict[int, list[list[int]]] = {}
        """Of the parts of an attention's weight: three of a packed one, else one."""
        self.tables: dict[int, list[weakref.ref[Site]]] = {}
        """Sites of large embeddings by their module, whose look-ups are followed in every pass."""
        self.in_pieces: dict[int, dict[str, int]] = {}
        """Of an attention whose weights `fully_shard` keeps in pieces: their paths in it, and the
        identities under which they are in `projections`."""
        self.recorders = 0
        self.handles: list[RemovableHandle] = []
        self.recording = False
        """Whether any recorder is active: compiled graphs are guarded by it."""
        self._active = 0

    def count(self, change: int) -> None:
        """Recorders have become active or inactive."""
        self._active += change
        self.recording = self._active > 0

    def add(self, module: nn.Module, site: Site) -> int:
        """Registers a site; returns its number."""
        number = len(self.numbered)
        self.numbered.append(weakref.ref(site))
        self.numbers.setdefault(id(module), []).append(number)
        return number

    def add_projection(
        self, module: nn.Module, parameter: nn.Parameter, rows: slice | None, number: int
    ) -> None:
        """Registers a site as a projection of an attention, by its weight and its rows in it."""
        if is_sharded(parameter):
            path = next(name for name, p in module.named_parameters() if p is parameter)
            self.in_pieces.setdefault(id(module), {})[path] = id(parameter)
        parts = 1 if rows is None else 3
        part = 0 if rows is None else 3 * rows.start // parameter.shape[0]
        known = self.projections.setdefault(id(parameter), [[] for _ in range(parts)])
        known[part].append(number)
        weakref.finalize(parameter, self.forget, id(parameter))

    def add_table(self, module: nn.Module, site: Site) -> None:
        """Follows the look-ups of an embedding."""
        self.tables.setdefault(id(module), []).append(weakref.ref(site))

    def find_whole(self, module: nn.Module) -> None:
        """Knows the projections of an attention by the whole weights that it has during a pass."""
        for path, key in self.in_pieces.get(id(module), {}).items():
            whole = module.get_parameter(path)
            if id(whole) not in self.projections:
                self.projections[id(whole)] = self.projections[key]
                weakref.finalize(whole, self.forget, id(whole))

    def live(self, numbers: Sequence[int]) -> Iterator[Site]:
        """The sites among `numbers` that record now."""
        for number in numbers:
            site = self.numbered[number]()
            if site is not None and site.is_recording():
                yield site

    def forget(self, key: int) -> None:
        """Forgets an identity: another object may get it."""
        tables: tuple[dict[int, Any], ...] = (self.roots, self.numbers, self.projections)
        for table in (*tables, self.in_pieces, self.tables):
            table.pop(key, None)

    def prune(self) -> None:
        """Forgets the sites of recorders that are gone, where their modules live on."""
        dead = {number for number, known in enumerate(self.numbered) if known() is None}
        lists = [*self.numbers.values(), *chain.from_iterable(self.projections.values())]
        for numbers in lists:
            numbers[:] = [number for number in numbers if number not in dead]
        for roots in self.roots.values():
            roots[:] = [known for known in roots if known() is not None]
        for tables in self.tables.values():
            tables[:] = [known for known in tables if known() is not None]

    def install(self) -> None:
        # The extra call for the compiled wrapper is harmless: no layer is registered for it.
        warnings.filterwarnings(
            "ignore", r"Using `torch.compile\(module\)` when there are global hooks"
        )
        self.recorders += 1
        if self.recorders == 1:
            self.handles = [
                register_module_forward_pre_hook(_before_forward),
                register_module_forward_hook(_after_forward, with_kwargs=True, always_call=True),
            ]

    def uninstall(self) -> None:
        self.recorders -= 1
        if not self.recorders:
            for handle in self.handles:
                handle.remove()
            self.handles = []


registry = Registry()


class Activity:
    """Whether one recorder records; counted for all of them."""

    def __init__(self) -> None:
        self.on = False

    def set(self, on: bool) -> None:
        if on != self.on:
            self.on = on
            registry.count(1 if on else -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Activity:
        return Activity()  # a copy is not counted


def _counts() -> bool:
    """Whether forward calls in this context can be part of a gradient."""
    return torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


def _key(module: nn.Module) -> int:
    """The id of the module, or of what it is the compiled form of."""
    if "_orig_mod" in module._modules:  # no dict in a ScriptModule: it has no `get`
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return id(module)


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not registry.recording:
        return
    if torch.compiler.is_compiling():
        if isinstance(module, nn.MultiheadAttention) and id(module) in registry.numbers:
            _traced_mode.__enter__()
        return
    key = _key(module)
    if key in registry.roots and _counts():
        for known in registry.roots[key]:
            recorder = known()
            if recorder is not None and recorder.active:
                recorder.enter_root(args)
    if isinstance(module, nn.MultiheadAttention) and key in registry.numbers:
        mode = _SeeProjections(module)
        mode.__enter__()
        _modes.stack.append((id(module), mode))


def _after_forward(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    # When forward raises, torch calls the hook without keyword arguments and without an output.
    if not torch.compiler.is_compiling() and id(module) in registry.tables:
        _follow_look_up(id(module), args, rest)
    if not registry.recording and (torch.compiler.is_compiling() or not _modes.stack):
        return None
    key = id(module)
    if torch.compiler.is_compiling():
        if not registry.recording or torch.compiler.is_exporting():
            return None
        numbers = registry.numbers.get(key)
        output = rest[-1]
        if numbers is None:
            return None
        if isinstance(module, nn.MultiheadAttention):
            _traced_mode.__exit__(None, None, None)
            return None
        inputs = args[0] if args else next(iter(rest[0].values()))
        return _Tap.apply(output, inputs.detach(), numbers, -1)
    if _modes.stack and _modes.stack[-1][0] == key:
        _modes.stack.pop()[1].__exit__(None, None, None)
        return None
    if len(rest) < 2:
        return None
    kwargs, output = rest
    for known in registry.roots.get(_key(module), ()):
        recorder = known()
        if recorder is not None and recorder.active and _counts():
            recorder.leave_root(kwargs, output)
    numbers = registry.numbers.get(key)
    if numbers is None or isinstance(module, nn.MultiheadAttention):
        return None
    if not isinstance(output, Tensor) or not output.requires_grad or not _counts():
        return None
    inputs = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(inputs, Tensor):
        _record(numbers, inputs, output, weight=module._parameters.get("weight"))
    return None


def _follow_look_up(key: int, args: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
    output = rest[-1] if rest else None
    node = output.grad_fn if isinstance(output, Tensor) else None
    if node is None or node.name() != "EmbeddingBackward0" or not _counts():
        return
    indices = args[0] if args else next(iter(rest[0].values()))
    for known in registry.tables[key]:
        site = known()
        if site is not None:
            made = site.looked_up(indices)
            node.register_hook(lambda gradients, _, made=made: made(gradients[0]))


def _record(
    numbers: Sequence[int],
    inputs: Tensor,
    output: Tensor,
    *,
    weight: Tensor | None,
    axis: int | None = None,
) -> None:
    for site in registry.live(numbers):
        staged = site.called(inputs, weight, axis)
        if staged is not None:
            output.register_hook(staged)


# -- compiled models ---------------------------------------------------------------------------


@torch.library.custom_op("elastic_kfac::record", mutates_args=())
def _staged_in_graph(gradient: Tensor, inputs: Tensor, numbers: list[int], axis: int) -> Tensor:
    """Stages a gradient from inside a compiled backward pass; returns it.

    Its result is the gradient, so nothing removes it. The compiler reuses the memory of both
    tensors, so both are copied.
    """
    for site in registry.live(numbers):
        site.staged_in_graph(gradient.clone(), inputs.clone(), None if axis < 0 else axis)
    return gradient.clone()


@_staged_in_graph.register_fake
def _(gradient: Tensor, inputs: Tensor, numbers: list[int], axis: int) -> Tensor:
    return torch.empty_like(gradient)


class _Tap(torch.autograd.Function):
    """The identity, whose backward records: what a hook on the output is where graphs are traced."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, numbers: list[int], axis: int) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.numbers, ctx.axis = numbers, axis
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        return _staged_in_graph(gradients[0], inputs, ctx.numbers, ctx.axis), None, None, None


# -- attention ---------------------------------------------------------------------------------


class _Modes(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[int, _SeeProjections]] = []


_modes = _Modes()


class _SeeProjections(TorchFunctionMode):
    """Runs torch's own attention function, with projections that record.

    torch's function works on `[positions, samples, features]`.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        if self._module is not None:
            registry.find_whole(self._module)
        return _attention(*args, **(kwargs or {}))


def _projected(weight: Tensor, part: int, inputs: Tensor, output: Tensor) -> Tensor:
    """Records one projection; returns its output."""
    found = registry.projections.get(id(weight))
    if found is None or not output.requires_grad:
        return output
    if torch.compiler.is_compiling():
        return _Tap.apply(output, inputs.detach(), found[part], 1)
    if _counts():
        _record(found[part], inputs, output, weight=weight, axis=1)
    return output


class _Attending:
    samples = 1
    """Samples of the call that is running: its last projection gets them flattened."""


_attending = _Attending()


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = F.linear(inputs, weight, bias)
    if inputs.dim() == 3:
        _attending.samples = inputs.shape[1]
        return _projected(weight, 0, inputs, output)
    samples = _attending.samples
    unflattened = output.view(-1, samples, output.shape[-1])
    seen = _projected(weight, 0, inputs.view(-1, samples, inputs.shape[-1]), unflattened)
    return seen.reshape(output.shape)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None
) -> tuple[Tensor, ...]:
    _attending.samples = q.shape[1]
    outputs = F._in_projection_packed(q, k, v, w, b)  # type: ignore[attr-defined]
    parts = zip((q, k, v), outputs, strict=True)
    return tuple(_projected(w, part, *pair) for part, pair in enumerate(parts))


def _with_globals(function: Any, scope: dict[str, Any]) -> Any:
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _recording_attention() -> Callable[..., Any]:
    """`F.multi_head_attention_forward` with globals of its own, in which projections record.

    Nothing is patched for anybody else, in this thread or another. Asking for further overrides is
    off, because this is already inside one.
    """
    scope: dict[str, Any] = dict(vars(F))
    scope.update(linear=_linear, _in_projection_packed=_packed)
    scope["has_torch_function"] = lambda arguments: False
    scope["_in_projection"] = _with_globals(F._in_projection, scope)  # type: ignore[attr-defined]
    attention: Callable[..., Any] = _with_globals(F.multi_head_attention_forward, scope)
    return attention


_attention = _recording_attention()

_traced_mode = _SeeProjections()
"""Entered and left while a graph is traced: nothing is left of it when the graph runs."""
