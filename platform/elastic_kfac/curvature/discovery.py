"""Which layers of a model K-FAC covers, and why it leaves out the others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvLayer,
    ConvTransposeLayer,
)
from elastic_kfac.curvature.dtensors import (
    fully_sharded,
    is_sharded,
    refuse_old_wrapper,
    tensor_parallel,
)
from elastic_kfac.curvature.kronecker import (
    AttentionProjection,
    EmbeddingLayer,
    KroneckerLayer,
    LinearLayer,
)
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.curvature.norm import NORMS, norm_layer
from elastic_kfac.errors import ConfigError

COVERED = "covered"
_WRAPPER_PREFIX = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass
class Found:
    """The covered layers of a model."""

    modules: dict[str, tuple[nn.Module, tuple[Layer, ...]]] = field(default_factory=dict)
    """By name, in registration order: a module and the layers inside it, four for attention, else one."""
    coverage: dict[str, str] = field(default_factory=dict)
    """Every layer with parameters by name: `covered`, or the reason why not."""

    sharing: dict[str, list[str]] = field(default_factory=dict)
    """Modules by the name of the first that has their weight; its layer is that of all of them."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All of them in registration order."""
        every = [layer for _, layers in self.modules.values() for layer in layers]
        return tuple({layer.name: layer for layer in every}.values())

    def leave_out(self, name: str, reason: str) -> None:
        """Uncovers a module again, and all that share its weight."""
        for user in self.sharing.pop(name, [name]):
            if user in self.modules:
                for layer in self.modules.pop(user)[1]:
                    del self.coverage[layer.name]
                self.coverage[user] = reason

    def share(self) -> None:
        """Makes one layer of all uses of a weight."""
        for users in self.sharing.values():
            uses = [cast(KroneckerLayer, self.modules[user][1][0]) for user in users]
            for user, use in zip(users, uses, strict=True):
                self.modules[user] = (self.modules[user][0], (use.sharing(uses),))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def clean_name(name: str) -> str:
    """A module path without the components that compile and checkpoint wrappers insert."""
    return _WRAPPER_PREFIX.sub("", name).lstrip(".")


def each_parameter(model: nn.Module) -> list[nn.Parameter]:
    """`model.parameters()` for every step: without names, and each once."""
    found: dict[nn.Parameter, None] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None:
            found.update((p, None) for p in module._parameters.values() if p is not None)
            stack += module._modules.values()
    return [*found]


def shape_of(model: nn.Module) -> list[tuple[object, ...]]:
    """What coverage depends on: which modules hold which parameters, and what those are."""
    return [
        (id(module), id(parameter), parameter.requires_grad, *_kind_of(parameter))
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    ]


def _kind_of(parameter: nn.Parameter) -> tuple[object, ...]:
    return parameter.dtype, parameter.device, parameter.shape


def find_layers(model: nn.Module, options: KfacOptions) -> Found:
    """The layers K-FAC covers, in registration order.

    One warning names the modules of other kinds, whose gradients stay as they are.

    Raises:
        ConfigError: If nothing is left, or a pattern of `skip_layers` is not a regular expression.
    """
    if isinstance(model, nn.DataParallel):
        raise ConfigError(
            "K-FAC does not see the replicas of DataParallel",
            given="nn.DataParallel",
            change="use one process per device and DistributedDataParallel",
        )
    refuse_old_wrapper(model)
    cut_by_fsdp = fully_sharded(model)
    patterns = _compiled(options.skip_layers)
    found = Found()
    left_out: list[str] = []
    owners: dict[int, str] = {}
    inside_attention: set[int] = set()
    for raw_name, module in unwrap(model).named_modules():
        name = clean_name(raw_name)
        if id(module) in inside_attention:
            continue
        is_attention = isinstance(module, nn.MultiheadAttention)
        parameters = list(module.parameters(recurse=is_attention))
        if is_attention:
            inside_attention.update(id(child) for child in module.modules())
        trainable = [p for p in parameters if p.requires_grad]
        if not trainable:
            if parameters:
                found.coverage[name] = "frozen"
            continue
        skipped = next((p.pattern for p in patterns if p.search(name)), None)
        if skipped is not None:
            found.coverage[name] = f"skip_layers matches it: {skipped}"
            for owner in {owners.setdefault(id(p), name): None for p in trainable}:
                if owner in found.modules:
                    reason = f"shares a weight with {name}, which skip_layers matches"
                    found.leave_out(owner, reason)
                    left_out.append(f"{owner} ({reason})")
            continue
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in trainable):
            raise ConfigError(
                f"layer {name} has no shape yet",
                change="run one forward pass before building the preconditioner",
            )
        if any(is_sharded(p) and id(p) not in cut_by_fsdp for p in trainable):
            raise tensor_parallel(name)
        layers = _layers_of(name, module, options)
        sharers = dict.fromkeys(owners[id(p)] for p in trainable if id(p) in owners)
        first = next(iter(sharers), name)
        if sharers and not (len(sharers) == 1 and _can_share(found.modules.get(first), layers)):
            found.coverage[name] = f"shares a weight with {first}"
            for sharer in sharers:
                found.leave_out(sharer, f"shares a weight with {name}")
            left_out.append(f"{name} (shares a weight with {first})")
            continue
        if sharers:
            found.sharing.setdefault(first, [first]).append(name)
        owners.update((id(p), first) for p in trainable)
        if isinstance(layers, str):
            found.coverage[name] = layers
            kind = type(module).__name__
            reason = kind if layers.startswith("unsupported type") else f"{kind}: {layers}"
            left_out.append(f"{name or '<root>'} ({reason})")
        else:
            found.modules[name] = (module, layers)
            found.coverage.update((layer.name, COVERED) for layer in layers)
    found.share()
    # Shared weights last, as they were found out last.
    left_out.sort(key=lambda text: "shares a weight" in text)
    if left_out:
        warnings.warn(
            "K-FAC does not precondition: " + ", ".join(left_out), UserWarning, stacklevel=3
        )
    if not found.modules:
        raise ConfigError(
            "the model has no layer that K-FAC covers",
            given=", ".join(left_out) or type(unwrap(model)).__name__,
            allowed="Linear, Conv1d to Conv3d, ConvTranspose1d to 3d, Embedding, MultiheadAttention, "
            "BatchNorm, LayerNorm, RMSNorm, GroupNorm with trainable weights, not matched by skip_layers",
        )
    return found


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(
            "skip_layers holds a bad regular expression", given=error.pattern, allowed=str(error)
        ) from None


def _layers_of(name: str, module: nn.Module, options: KfacOptions) -> tuple[Layer, ...] | str:
    """The layers of a module, or why there are none."""
    if isinstance(module, nn.MultiheadAttention):
        return _projections(name, module, options)
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding, *NORMS)):
        return f"unsupported type {type(module).__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not a parameter"
    if not weight.requires_grad:
        return "its weight is frozen"
    if weight.is_complex():
        return "complex weights"
    if not weight.numel():
        return "its weight has no elements"
    further = sorted(n for n, p in module._parameters.items() if p is not None)
    further = [name for name in further if name not in ("weight", "bias")]
    if further:
        return f"further parameters: {', '.join(further)}"
    if isinstance(module, nn.Embedding):
        if module.sparse or module.max_norm is not None or module.scale_grad_by_freq:
            return "unsupported options: sparse, max_norm or scale_grad_by_freq"
        return (EmbeddingLayer(name, module, options, weight),)
    if isinstance(module, nn.Linear):
        return (LinearLayer(name, module, options, weight, module.bias),)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        kind = ConvLayer if isinstance(module, CONVOLUTIONS) else ConvTransposeLayer
        return (kind(name, module, options, weight, module._parameters.get("bias")),)
    if isinstance(module, NORMS):
        if options.method == "one_sided":
            return "method=one_sided covers layers with a factor of their inputs"
        return (norm_layer(name, module, options),)
    return f"unsupported type {type(module).__name__}"


def _can_share(
    first: tuple[nn.Module, tuple[Layer, ...]] | None, layers: tuple[Layer, ...] | str
) -> bool:
    """Whether a module that has parameters of a first one is a further use of its weight."""
    if first is None or isinstance(layers, str) or not len(first[1]) == len(layers) == 1:
        return False
    return isinstance(first[1][0], KroneckerLayer) and first[1][0].can_share(layers[0])


def _projections(
    name: str, module: nn.MultiheadAttention, options: KfacOptions
) -> tuple[Layer, ...] | str:
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "unsupported: overrides the forward of nn.MultiheadAttention"
    if module.bias_k is not None:
        return "unsupported option: add_bias_kv"
    if not all(p.requires_grad for p in module.parameters()):
        return "some of its parameters are frozen"
    size, packed = module.embed_dim, module._qkv_same_embed_dim
    layers = []
    for index, letter in enumerate("qkv"):
        rows = slice(index * size, (index + 1) * size)
        weight = module.in_proj_weight if packed else getattr(module, f"{letter}_proj_weight")
        layers.append(
            AttentionProjection(
                f"{name}.{letter}_proj",
                module,
                options,
                cast(nn.Parameter, weight),
                module.in_proj_bias,
                weight_rows=rows if packed else slice(None),
                bias_rows=rows,
            )
        )
    out = module.out_proj
    layers.append(
        AttentionProjection(
            f"{name}.out_proj",
            module,
            options,
            cast(nn.Parameter, out.weight),
            cast("nn.Parameter | None", out.bias),
        )
    )
    return tuple(layers)
