"""Seeing the projections inside nn.MultiheadAttention, which are function calls and not modules."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation

Linear = Callable[..., Tensor]


def forward_with_linear(module: nn.MultiheadAttention, linear: Linear) -> Callable[..., Any]:
    """The module's own forward, calling `linear(input, weight, bias)` for its projections.

    The functions between are torch's, run with globals of their own in which `linear` is ours: nothing
    is patched outside this module, in any thread.
    """
    scope: dict[str, Any] = dict(vars(F))
    scope["linear"] = linear
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        scope[name] = _with_globals(getattr(F, name), scope)
    functional = types.SimpleNamespace(**vars(F))
    functional.multi_head_attention_forward = scope["multi_head_attention_forward"]
    outer = dict(vars(activation))
    outer["F"] = functional
    return types.MethodType(_with_globals(nn.MultiheadAttention.forward, outer), module)


def is_plain(module: nn.MultiheadAttention) -> bool:
    """Whether the module runs torch's own forward, so that it can be seen into."""
    return type(module).forward is nn.MultiheadAttention.forward


def _with_globals(function: Any, scope: dict[str, Any]) -> Any:
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
