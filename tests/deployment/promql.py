"""PromQL expressions taken apart: which series they read, under which functions and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser

GRAFANA_VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}
_WRAPPERS = (promql_parser.ParenExpr, promql_parser.UnaryExpr, promql_parser.SubqueryExpr)


@dataclass(frozen=True)
class Selector:
    """One series selector of an expression."""

    metric: str
    matchers: tuple[tuple[str, str], ...]
    """Label names with what they are matched against."""
    function: str
    """The function around its range, empty for an instant selector."""


@dataclass(frozen=True)
class Expression:
    """What an expression reads and groups by."""

    selectors: tuple[Selector, ...]
    grouped_by: frozenset[str]


def parse(text: str) -> Expression:
    """Parses an expression, with Grafana's interval variables filled in.

    Raises:
        ValueError: If it is not PromQL.
    """
    for name, value in GRAFANA_VARIABLES.items():
        text = text.replace(name, value)
    tree = promql_parser.parse(text)
    labels: set[str] = set()
    selectors = tuple(_selectors(tree, "", labels))
    return Expression(selectors, frozenset(labels))


def _selectors(node: Any, function: str, labels: set[str]) -> Iterator[Selector]:
    if isinstance(node, promql_parser.VectorSelector):
        matchers = tuple((m.name, m.value) for m in node.matchers.matchers)
        yield Selector(node.name or "", matchers, function)
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from _selectors(node.vector_selector, function, labels)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from _selectors(argument, node.func.name, labels)
    elif isinstance(node, promql_parser.BinaryExpr):
        matching = getattr(node.modifier, "matching", None) if node.modifier else None
        labels.update(matching.labels if matching is not None else ())
        yield from _selectors(node.lhs, function, labels)
        yield from _selectors(node.rhs, function, labels)
    elif isinstance(node, promql_parser.AggregateExpr):
        labels.update(node.modifier.labels if node.modifier is not None else ())
        yield from _selectors(node.expr, function, labels)
    elif isinstance(node, _WRAPPERS):
        yield from _selectors(node.expr, function, labels)
    elif not isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral):
        raise ValueError(f"no such expression: {type(node).__name__}")
