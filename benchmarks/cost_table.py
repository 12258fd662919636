"""The published cost of a batch that follows the Hessian, printed from its model.

python benchmarks/cost_table.py [--json]

Yao et al. (2018, arXiv:1810.01021) give the seconds of ResNet-18 on ImageNet by four
schedules, 90 epochs.
The model is updates·(T_comp + T_comm) + epochs·T_Hess, T_Hess being one eigenvalue per epoch.
`benchmarks/hessian_cost.py` measures T_Hess beside the rest in runs of our own.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

EPOCHS = 90


class Row(NamedTuple):
    """A schedule: its updates, and seconds per update and per eigenvalue."""

    updates: int
    computation_s: float
    communication_s: float
    hessian_s: float
    """0 where the schedule needs no eigenvalue."""
    published_s: float
    note: str

    @property
    def seconds(self) -> float:
        """The model of a run."""
        per_update = self.computation_s + self.communication_s
        return self.updates * per_update + EPOCHS * self.hessian_s


PUBLISHED = {
    "BL": Row(450_000, 2.2e-2, 1.5e-2, 0.0, 16_666, "updates published"),
    "GG": Row(166_200, 2.2e-2, 1.5e-2, 0.0, 6_150, "updates published (166k)"),
    # The source has no number of updates for ABS; this one is what its total implies.
    "ABS": Row(69_300, 2.2e-2, 1.5e-2, 1.15, 2_666, "updates implied by the total"),
    "ABSA": Row(66_000, 3.6e-2, 1.5e-2, 1.15, 3_467, "updates published (66k)"),
}


def table() -> list[dict[str, Any]]:
    """The published totals beside the model."""
    return [
        {
            "schedule": name,
            **row._asdict(),
            "model_s": round(row.seconds, 1),
            "error": round(row.seconds / row.published_s - 1, 5),
            "speed_up": round(PUBLISHED["BL"].seconds / row.seconds, 2),
        }
        for name, row in PUBLISHED.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    if parser.parse_args().json:
        print(json.dumps(table(), indent=1))
        return 0
    print("ResNet-18, ImageNet, 90 epochs (Yao et al. 2018): updates·(T_comp + T_comm) + 90·T_Hess")
    for row in table():
        print(
            f"{row['schedule']:5s}{row['updates']:>8,} updates  model {row['model_s']:>8,.0f} s  "
            f"published {row['published_s']:>6,} s ({row['error']:+.2%})  "
            f"{row['speed_up']:.2f}x  {row['note']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
