"""Identities: the hash of a configuration, seeds from counters, the machine type."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import torch

from elastic_kfac.config import Config


def config_sha256(config: Config) -> str:
    """A hash of the resolved configuration."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def counter_seed(*counters: int) -> int:
    """A seed from counters only (seed, step, sample id): independent of resizes and restarts."""
    text = ":".join(str(counter) for counter in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def machine_type(device: torch.device) -> str:
    """The processor and the instruction set of its kernels."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"


def processor_name() -> str:
    """The model of this machine's processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
