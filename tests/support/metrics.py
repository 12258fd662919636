"""Metrics as Prometheus sees them."""

from __future__ import annotations

from elastic_kfac.observability.metric_names import Metric, label

RAY_PREFIX = "ray_"
"""Ray puts it before the names of `ray.util.metrics`."""


def prometheus_name(entry: Metric) -> str:
    """The name of a metric in Prometheus."""
    return RAY_PREFIX + entry.exported_name


def most_series(entry: Metric) -> int:
    """Bound on the number of series of a metric, `other` included."""
    total = 1
    for name in entry.labels:
        bound = label(name)
        total *= (len(bound.values) or bound.most) + 1
    return total
