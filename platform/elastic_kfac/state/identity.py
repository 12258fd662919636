"""Identities: the changes of a configuration, seeds from counters, the machine type."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from elastic_kfac.host import processor_name


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (old, new) of two resolved configurations; None where one lacks the key."""
    found = {}
    for section in sorted({*old, *new}):
        before, after = old.get(section) or {}, new.get(section) or {}
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                found[f"{section}.{key}"] = (before.get(key), after.get(key))
    return found


def counter_seed(*counters: int) -> int:
    """A seed from counters only (seed, step, sample id): independent of resizes and restarts."""
    text = ":".join(str(counter) for counter in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def machine_type(device: torch.device) -> str:
    """The processor and the instruction set of its kernels."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"
