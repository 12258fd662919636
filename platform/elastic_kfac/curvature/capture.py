"""Capture: from a model to its curvature blocks, and from forward and backward passes to their sums.

The input side of a call is summed in a forward hook; the output side in a hook on the gradient of the
output tensor, which also commits the input side. So a forward pass that is never differentiated, a
recomputation under activation checkpointing, and evaluation contribute nothing, and every call
contributes exactly once.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic_kfac.curvature.attention import forward_with_linear, is_plain
from elastic_kfac.curvature.block import Block, BlockOptions, Call
from elastic_kfac.curvature.kronecker_block import KroneckerBlock
from elastic_kfac.curvature.norm_block import NormBlock
from elastic_kfac.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_WRAPPER_PREFIX = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass
class _Layer:
    """A module and the blocks that cover its parameters (three or four for attention)."""

    module: nn.Module
    blocks: tuple[Block, ...]


def hidden_from_compiler(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, which would import the compiler (seconds) where nothing is compiled."""
    hidden = torch._disable_dynamo(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            return hidden(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def clean_name(name: str) -> str:
    """A module path without the components that compile and checkpoint wrappers insert."""
    return _WRAPPER_PREFIX.sub("", name).lstrip(".")


def find_layers(
    model: nn.Module, options: BlockOptions, skip_layers: Sequence[str]
) -> list[_Layer]:
    """The layers K-FAC covers, in registration order.

    Parameters of any other kind of module are named in one warning and keep their plain gradient.

    Raises:
        ConfigError: If nothing is left, or a pattern of `skip_layers` is not a regular expression.
    """
    try:
        patterns = [re.compile(pattern) for pattern in skip_layers]
    except re.error as error:
        raise ConfigError(
            "skip_layers holds a bad regular expression", given=error.pattern, allowed=str(error)
        ) from None
    layers: list[_Layer] = []
    left_out: list[str] = []
    owners: dict[int, str] = {}
    shared: list[str] = []
    inside_attention: set[int] = set()
    for raw_name, module in unwrap(model).named_modules():
        name = clean_name(raw_name)
        if id(module) in inside_attention:
            continue
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(id(child) for child in module.modules())
            own = [p for p in module.parameters() if p.requires_grad]
        if not own:
            continue
        if any(pattern.search(name) for pattern in patterns):
            continue
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in own):
            raise ConfigError(
                f"layer {name} has no shape yet",
                change="run one forward pass before building the preconditioner",
            )
        first_owner = next((owners[id(p)] for p in own if id(p) in owners), None)
        if first_owner is not None:
            shared.append(f"{name} (shares a weight with {first_owner})")
            layers = [layer for layer in layers if layer.blocks[0].name != first_owner]
            continue
        owners.update((id(p), name) for p in own)
        blocks = _blocks_of(name, module, options)
        if blocks:
            layers.append(_Layer(module, blocks))
        else:
            left_out.append(f"{name or '<root>'} ({type(module).__name__})")
    left_out += shared
    if left_out:
        warnings.warn(
            "K-FAC leaves the plain gradient to: " + ", ".join(left_out), UserWarning, stacklevel=3
        )
    if not layers:
        raise ConfigError(
            "the model has no layer that K-FAC covers",
            given=type(unwrap(model)).__name__,
            allowed="Linear, Conv2d, Embedding, MultiheadAttention, BatchNorm, LayerNorm, GroupNorm "
            "with trainable weights, not matched by skip_layers",
        )
    return layers


def _blocks_of(name: str, module: nn.Module, options: BlockOptions) -> tuple[Block, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return _attention_blocks(name, module, options)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return ()
    if isinstance(module, nn.Embedding):
        plain = not module.sparse and module.max_norm is None and not module.scale_grad_by_freq
        if not plain:
            return ()
        return (KroneckerBlock(name, module, options, weight=weight, bias=None),)
    if isinstance(module, nn.ConvTranspose2d):
        return ()
    if isinstance(module, nn.Linear | nn.Conv2d):
        bias = module.bias if isinstance(module.bias, nn.Parameter) else None
        return (KroneckerBlock(name, module, options, weight=weight, bias=bias),)
    if isinstance(module, _NORMS):
        return (NormBlock(name, module, options),)
    return ()


def _attention_blocks(
    name: str, module: nn.MultiheadAttention, options: BlockOptions
) -> tuple[Block, ...]:
    if not is_plain(module) or module.bias_k is not None:
        return ()
    if not all(p.requires_grad for p in module.parameters()):
        return ()
    size = module.embed_dim
    blocks: list[Block] = []
    for index, letter in enumerate("qkv"):
        part = slice(index * size, (index + 1) * size)
        packed = module._qkv_same_embed_dim
        weight = module.in_proj_weight if packed else getattr(module, f"{letter}_proj_weight")
        blocks.append(
            KroneckerBlock(
                f"{name}.{letter}_proj",
                module,
                options,
                weight=cast(nn.Parameter, weight),
                bias=module.in_proj_bias,
                rows=part if packed else None,
                bias_rows=part,
            )
        )
    out = module.out_proj
    blocks.append(
        KroneckerBlock(
            f"{name}.out_proj",
            module,
            options,
            weight=cast(nn.Parameter, out.weight),
            bias=cast("nn.Parameter | None", out.bias),
        )
    )
    return tuple(blocks)


class Capture:
    """Hooks on the layers of one model; `active` says whether passes are recorded."""

    def __init__(self, layers: Sequence[_Layer], *, fisher: str) -> None:
        self.active = False
        self.fisher = fisher
        # While sampled labels are propagated, gradients belong to the model's own Fisher.
        self.sampling_weight: float | None = None
        self._micro_batch = 0
        self._saw_backward = False
        self._handles: list[RemovableHandle] = []
        self._patched: list[nn.MultiheadAttention] = []
        for layer in layers:
            if isinstance(layer.module, nn.MultiheadAttention):
                self._patch_attention(layer.module, layer.blocks)
            else:
                hook = _ForwardHook(self, layer.module, layer.blocks[0])
                self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        for module in self._patched:
            del module.forward
        self._handles, self._patched = [], []

    def recording(self, module: nn.Module) -> bool:
        """Whether a forward call happening now counts."""
        return self.active and module.training and torch.is_grad_enabled()

    def open(self, block: Block, inputs: Tensor) -> Call:
        """Records the input side of a call."""
        in_backward = torch._C._current_graph_task_id() != -1  # a recomputation, not a new pass
        if self._saw_backward and not in_backward:
            self._micro_batch += 1
            self._saw_backward = False
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            return block.open_call(inputs.detach(), self._micro_batch)

    def close_call(self, block: Block, call: Call, gradients: Tensor) -> None:
        """Records the output side of a call, once its gradient is known."""
        self._saw_backward = True
        if not self.active:
            return
        sampled = self.sampling_weight is not None
        counts = sampled == (self.fisher != "empirical")
        with torch.no_grad(), torch.autocast(gradients.device.type, enabled=False):
            block.close_call(call, gradients.detach() if counts else None, self.sampling_weight)

    def _patch_attention(self, module: nn.MultiheadAttention, blocks: tuple[Block, ...]) -> None:
        original = module.forward
        recorder = _AttentionRecorder(self, module, blocks)
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

    def __init__(self, capture: Capture, module: nn.Module, block: Block) -> None:
        self.capture, self.module, self.block = capture, module, block

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
        if inputs.dim() == 1 + (isinstance(module, nn.Conv2d) * 2):
            inputs, restore = inputs.unsqueeze(0), True  # an unbatched call: one sample
        else:
            restore = False
        call = self.capture.open(self.block, inputs)

        def record(gradients: Tensor) -> None:
            shaped = gradients.unsqueeze(0) if restore else gradients
            self.capture.close_call(self.block, call, shaped)

        output.register_hook(record)


class _Inert:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """A hook that was loaded from a pickle: there is no preconditioner to tell."""


def _inert_hook() -> _Inert:
    return _Inert()


class _AttentionRecorder:
    """Records the projections of one nn.MultiheadAttention."""

    def __init__(
        self, capture: Capture, module: nn.MultiheadAttention, blocks: tuple[Block, ...]
    ) -> None:
        self.capture, self.module, self.blocks = capture, module, blocks
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
            for block, rows in self._covered(weight):
                self._record(block, inputs, output, rows)
        return output

    def _covered(self, weight: Tensor) -> Iterator[tuple[Block, slice]]:
        """Blocks whose weight lies inside `weight`, and which of its output rows they own."""
        itemsize = weight.element_size() * weight.shape[1]
        for block in self.blocks:
            assert isinstance(block, KroneckerBlock)
            own: Tensor = block.parameters[0]
            own = own if block.rows is None else own[block.rows]
            offset, rest = divmod(own.data_ptr() - weight.data_ptr(), itemsize)
            if rest == 0 and offset >= 0 and offset + own.shape[0] <= weight.shape[0]:
                yield block, slice(offset, offset + own.shape[0])

    def _record(self, block: Block, inputs: Tensor, output: Tensor, rows: slice) -> None:
        call = self.capture.open(block, self._by_sample(inputs.detach()))

        def record(gradients: Tensor) -> None:
            self.capture.close_call(block, call, self._reshape(gradients[..., rows], call.samples))

        output.register_hook(record)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        return self._reshape(tensor, self.samples)

    @staticmethod
    def _reshape(tensor: Tensor, samples: int) -> Tensor:
        """`[positions, n, d]` or `[positions·n, d]` to `[n, positions, d]`."""
        return tensor.reshape(-1, samples, tensor.shape[-1]).transpose(0, 1)
