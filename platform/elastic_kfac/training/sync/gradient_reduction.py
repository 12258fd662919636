"""How the gradients of a step are summed over the ranks: algorithm and wire format of a configuration."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from elastic_kfac.communication.allreduce import Topology, allreduce, nodes_by_name
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.compression import CompressedAllReduce
from elastic_kfac.communication.wire_formats import wire_format
from elastic_kfac.config import CommunicationConfig

_NAME = "gradients"


class GradientReduction:
    """Sums flat gradients; its residual, if any, is part of the training state.

    Built anew for every world: `state_dict` before, `load_state_dict` after, and no residual is lost
    in between. Building one is collective.
    """

    def __init__(self, config: CommunicationConfig, communicator: Communicator, seed: int) -> None:
        self._communicator = communicator
        self._algorithm = config.algorithm
        self._topology: Topology | None = None
        self._compressed: CompressedAllReduce | None = None
        if config.algorithm == "hierarchical":
            hosts = communicator.all_gather_object(socket.gethostname(), tag="topology")
            self._topology = nodes_by_name(hosts)
        if config.wire_format != "fp32":
            self._compressed = CompressedAllReduce(
                communicator,
                wire_format(config.wire_format, topk_ratio=config.topk_ratio),
                error_feedback=config.error_feedback,
                seed=seed,
            )

    def __call__(self, flat: Tensor, step: int) -> None:
        """Sums `flat` [n] over the ranks, in place."""
        if self._compressed is not None:
            self._compressed.all_reduce(flat, step=step, tag=_NAME)
            return
        allreduce(self._communicator, flat, self._algorithm, topology=self._topology, tag=_NAME)

    def state_dict(self) -> dict[str, Tensor]:
        """The residual, summed over ranks; empty without error feedback. Collective."""
        return {} if self._compressed is None else self._compressed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a residual over, so that the sum over ranks is what it was."""
        if self._compressed is not None:
            self._compressed.load_state_dict(dict(state))


def make_reduction(
    config: CommunicationConfig, communicator: Communicator, seed: int
) -> GradientReduction | None:
    """The configured reduction; None where the plain all-reduce of one flat vector does."""
    if config.algorithm == "native" and config.wire_format == "fp32":
        return None
    return GradientReduction(config, communicator, seed)
