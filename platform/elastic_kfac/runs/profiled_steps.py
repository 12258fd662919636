"""Training steps of a configured model on one rank, and the bytes that they hold."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.communication.packing import Bucketer
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.preconditioner import make_preconditioner
from elastic_kfac.training.sync.exchange import Exchange

FACTORS_EVERY, INVERSES_EVERY = 2, 4
"""Intervals while measuring: of eight steps four are plain, four move factors, two decompose."""
SPREAD_OVER = 8
"""Steps that statistics are spread over while it is measured what that costs."""


class PeakBytes(TorchDispatchMode):
    """Bytes of all tensors that operations take or return and somebody still holds: `now`, and at most
    `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tree_map_only(Tensor, self._add, (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key)


class _Echo(Communicator):
    """Of two ranks, the other of which has nothing to add: sums are there at once."""

    def __init__(self) -> None:
        super().__init__(None)
        self.world_size = 2

    def all_reduce(self, tensor: Tensor, *, tag: str, async_op: bool = False) -> Work:
        return Work()


class Steps:
    """One rank's training steps of a configuration, on random samples; all layers at once, or spread."""

    def __init__(self, sized: Sized, *, spread: bool = False) -> None:
        config = sized.config
        kfac = {
            "enabled": True,
            "refresh": "fixed",
            "overlap_reduction": False,  # costs are those of the step that causes them
            "stagger": spread,
            "factor_update_steps": SPREAD_OVER if spread else FACTORS_EVERY,
            "inverse_update_steps": SPREAD_OVER if spread else INVERSES_EVERY,
        }
        first_order: dict[str, object] = {"lr": 1e-6}
        if config.optimizer.name == "sharded_kfac":
            first_order["name"] = "sgd"
        optimizer = config.optimizer.model_copy(update=first_order)
        changes = {
            "kfac": config.kfac.model_copy(update=kfac),
            # On one rank alone the state may not fit the budget of many.
            "plan": config.plan.model_copy(update={"memory_budget_gib": None, "calibrate": False}),
            "optimizer": optimizer,
        }
        self.sized, self.spread = sized, spread
        self.vector = Exchange(sized.model)
        self.optimizer = make_optimizer(sized.model, optimizer)
        made = make_preconditioner(
            sized.model, self.optimizer, config.model_copy(update=changes), Communicator.solo()
        )
        assert made is not None
        self.kfac: KFAC = made

    def passes(self, samples: int) -> None:
        """Leaves the gradients where a run has them to be summed over the ranks."""
        self.vector.begin_step()
        self.vector.begin_pass()
        self.sized.loss(samples).backward()
        self.vector.end_pass(samples)
        self.vector.finish_step(samples)

    def exchange(self) -> None:
        """Packs statistics as they are sent to other ranks, and unpacks them."""
        options = self.sized.config.kfac
        bucketer = Bucketer(_Echo(), tag="profile", cap_bytes=int(options.bucket_mib * 2**20))
        for layer, state in zip(self.kfac.layers, self.kfac.states, strict=True):
            for name, factor in state.factors.items():
                symmetric = options.symmetry_aware and not layer.is_diagonal(name)
                bucketer.all_reduce(torch.empty_like(factor), symmetric=symmetric)
        bucketer.flush().wait()

    def whole(self, samples: int) -> None:
        """Passes, K-FAC and optimizer."""
        self.passes(samples)
        self.kfac.step()
        self.optimizer.step()
