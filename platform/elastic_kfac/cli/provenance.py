"""Versions and hardware behind a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import elastic_kfac

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the entry point of a submitted job."""

PACKAGES = ("elastic-kfac", "torch", "torchvision", "ray", "pyarrow", "numpy")


def announce() -> None:
    """Prints the imported package: an installed one may hide the intended one."""
    folder = Path(elastic_kfac.__file__).parent
    print(f"elastic-kfac {elastic_kfac.__version__} from {folder}", flush=True)


def is_ray_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return JOB_VARIABLE in environment


def provenance(use_gpu: bool) -> dict[str, str]:
    """Versions and hardware of this process, the driver; workers may differ."""
    from elastic_kfac.host import processor_name

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = f"{processor_name()}, {os.cpu_count()} cores seen"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["memory"] = f"{memory / 2**30:.0f} GiB"
    if use_gpu:
        found["gpus of the driver"] = _gpus()
    return found


def _gpus() -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(torch.cuda.get_device_name(index) for index in range(count)) or "none"
