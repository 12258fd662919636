"""Memory and traffic of a plan, in elements; tests compare counted runs with this model.

With N ranks, a share f of gradient workers and the sums s, e, w of `costs` (KAISA, Pauloski et al.,
SC'21), the average rank holds s + f e and receives per step

    w (1 - f)  +  e (f - 1/N) / t_i  +  2 (N-1)/N s_packed / t_f  +  2 (N-1)/N |theta|

for columns of equal size. The functions here sum over the columns of a plan, which is exact for unequal
columns too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from elastic_kfac.placement.costs import (
    LayerShape,
    Method,
    factor_elements,
    second_order_elements,
)
from elastic_kfac.placement.plan import Plan


@dataclass(frozen=True)
class TrafficModel:
    """Elements that the average rank receives per step, by purpose."""

    preconditioned_gradients: Fraction
    second_order: Fraction
    factors: Fraction
    gradients: Fraction

    @property
    def total(self) -> Fraction:
        """The sum of all."""
        return self.preconditioned_gradients + self.second_order + self.factors + self.gradients


def traffic_per_step(
    plan: Plan,
    layers: Sequence[LayerShape],
    *,
    factor_update_steps: int,
    inverse_update_steps: int,
    parameter_elements: int | None = None,
    method: Method = "eigen",
    precompute: bool = True,
    symmetric: bool = True,
) -> TrafficModel:
    """Elements that the average rank receives per step under a plan.

    Args:
        factor_update_steps: t_f.
        inverse_update_steps: t_i.
        parameter_elements: Elements of the gradient all-reduce; the K-FAC weights if None.
        method: Kind of the decompositions.
        precompute: Whether the eigenvalue product travels instead of the eigenvalues.
        symmetric: Whether factors travel as triangles.
    """
    n = plan.world_size
    received_gradients = received_second_order = 0
    for layer in layers:
        workers = len(plan.gradient_workers(layer.name))
        received_gradients += layer.weight_elements * (n - workers)
        held = second_order_elements([layer], method=method, precompute=precompute)
        received_second_order += held * (workers - 1)
    parameters = (
        sum(layer.weight_elements for layer in layers)
        if parameter_elements is None
        else parameter_elements
    )
    share = Fraction(2 * (n - 1), n)
    return TrafficModel(
        preconditioned_gradients=Fraction(received_gradients, n),
        second_order=Fraction(received_second_order, n * inverse_update_steps),
        factors=share * factor_elements(layers, packed=symmetric) / factor_update_steps,
        gradients=share * parameters,
    )


def memory_elements(
    plan: Plan,
    layers: Sequence[LayerShape],
    *,
    method: Method = "eigen",
    precompute: bool = True,
    sharded: bool = False,
) -> list[int]:
    """Elements of factors and decompositions on each rank; their mean is s + f e, or (s + e) / N if
    `sharded`: then factors, too, are with the gradient workers only."""
    held = [0 if sharded else factor_elements(layers)] * plan.world_size
    for layer in layers:
        elements = second_order_elements([layer], method=method, precompute=precompute)
        elements += factor_elements([layer]) if sharded else 0
        for rank in plan.gradient_workers(layer.name):
            held[rank] += elements
    return held
