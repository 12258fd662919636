"""The published large-batch K-FAC recipe (Osawa et al. 2019): six batch sizes on ImageNet-1k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from elastic_kfac.optimizers.schedules import Schedule, polynomial_decay

IMAGENET_SAMPLES = 1_281_167


@dataclass(frozen=True)
class LargeBatchPreset:
    """One row of the recipe table."""

    batch_size: int
    mixup_alpha: float
    power: float
    start_epoch: float
    end_epoch: float
    base_lr: float
    base_momentum: float
    damping: float
    epochs: int
    printed_iterations: int
    """As printed on the poster; for 8,192 it differs from the formula (5,434 against 5,474)."""
    top1_percent: float
    """Published for ResNet-50."""

    @property
    def iterations(self) -> int:
        """⌈1,281,167 · epochs / batch⌉."""
        return -(-IMAGENET_SAMPLES * self.epochs // self.batch_size)

    def lr_schedule(self) -> Schedule:
        """Factor of `base_lr` over fractional epochs."""
        return polynomial_decay(self.start_epoch, self.end_epoch, self.power)


def _presets() -> Mapping[int, LargeBatchPreset]:
    rows = (
        LargeBatchPreset(4096, 0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 35, 10948, 75.1),
        LargeBatchPreset(8192, 0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 35, 5434, 75.2),
        LargeBatchPreset(16384, 0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 35, 2737, 75.2),
        LargeBatchPreset(32768, 0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 45, 1760, 75.3),
        LargeBatchPreset(65536, 0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 60, 1173, 75.0),
        LargeBatchPreset(131072, 1.0, 2.9, 3, 107.6, 7.0e-2, 0.93, 1.0e-4, 100, 978, 75.0),
    )
    return MappingProxyType({row.batch_size: row for row in rows})


PRESETS = _presets()
"""By batch size; 131,072 is the paper's 100-epoch row."""
