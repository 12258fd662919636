"""Nested state (dicts, lists, tensors, numbers) as named tensors plus a JSON skeleton: no pickle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from elastic_kfac.errors import StateError

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"


def split_tree(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of `tree` into `tensors`, under names that begin with `prefix`.

    Returns:
        A JSON skeleton for `join_tree`, with a name in place of each tensor.

    Raises:
        StateError: If the tree holds something that is neither a tensor nor plain data.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach()
        return {_TENSOR: prefix}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, dict):
        parts = [(key, split_tree(part, f"{prefix}/{key}", tensors)) for key, part in tree.items()]
        if all(isinstance(key, str) and not key.startswith("__") for key in tree):
            return dict(parts)
        return {_ITEMS: [[key, part] for key, part in parts]}
    if isinstance(tree, (list, tuple)):
        listed = [split_tree(part, f"{prefix}/{index}", tensors) for index, part in enumerate(tree)]
        return {_TUPLE: listed} if isinstance(tree, tuple) else listed
    raise StateError(
        "state holds something that cannot be saved",
        given=f"{prefix}: {type(tree).__name__}",
        allowed="tensors, numbers, strings, dicts, lists and tuples of them",
    )


def join_tree(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of `split_tree`.

    Raises:
        StateError: If a tensor is missing.
    """
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            name = skeleton[_TENSOR]
            if name not in tensors:
                raise StateError("a tensor of the state is missing", given=name)
            return tensors[name]
        if _TUPLE in skeleton:
            return tuple(join_tree(part, tensors) for part in skeleton[_TUPLE])
        if _ITEMS in skeleton:
            return {_key(key): join_tree(part, tensors) for key, part in skeleton[_ITEMS]}
        return {key: join_tree(part, tensors) for key, part in skeleton.items()}
    if isinstance(skeleton, list):
        return [join_tree(part, tensors) for part in skeleton]
    return skeleton


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
