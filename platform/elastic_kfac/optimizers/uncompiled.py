"""torch's first-order rules without torch's compiler.

`Optimizer.__init__` and every `step` import `torch._dynamo` (some 900 modules with sympy and Triton:
seconds of CPU and 100 MB) only to mark code that a compiler must skip; a run would wait that long for a
replacement worker. The rules here call the same functions beneath those marks; results and state are
torch's. To compile an optimizer's step, use torch's own classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Uncompiled(torch.optim.Optimizer):
    """First base class of a rule that must not import the compiler."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


def _step_of(rule: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    # Replaces `_use_grad_for_differentiable` for rules that are not differentiable.
    return torch.no_grad()(inspect.unwrap(rule.step))


class SGD(Uncompiled, torch.optim.SGD):
    """`torch.optim.SGD`."""

    step = _step_of(torch.optim.SGD)


class Adam(Uncompiled, torch.optim.Adam):
    """`torch.optim.Adam`."""

    step = _step_of(torch.optim.Adam)


class AdamW(Uncompiled, torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    step = _step_of(torch.optim.AdamW)
