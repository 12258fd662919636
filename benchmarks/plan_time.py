"""How long planning takes: 1024 ranks x 500 layers, alone and beside a previous plan.

python benchmarks/plan_time.py [--out benchmarks/results/plan_time.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

from elastic_kfac import __version__
from elastic_kfac.placement.costs import LayerShape
from elastic_kfac.placement.planner import make_plan

RANKS, LAYERS, REPEATS = 1024, 500, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    random.seed(0)
    layers = []
    for index in range(LAYERS):
        a, g = random.choice((65, 577, 1153, 4609)), random.choice((64, 256, 512, 2048))
        layers.append(LayerShape(f"layer{index}", a, g, a * g))
    rows = []
    for fraction in (1 / RANKS, 0.25, 1.0):
        previous = make_plan(layers, RANKS - 24, fraction)
        for name, known in (("alone", None), ("after a resize", previous)):
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                make_plan(layers, RANKS, fraction, previous=known)
                times.append(1e3 * (time.perf_counter() - start))
            median, most = statistics.median(times), max(times)
            rows.append(
                {
                    "grad_worker_frac": fraction,
                    "case": name,
                    "median_ms": round(median, 1),
                    "max_ms": round(most, 1),
                    "n": REPEATS,
                }
            )
            print(f"f={fraction:<8.4g} {name:15s} median {median:6.1f} ms  max {most:6.1f} ms")
    result = {
        "benchmark": "plan_time",
        "what": f"{RANKS} ranks x {LAYERS} layers, wall-clock ms per plan",
        "rows": rows,
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "elastic_kfac": __version__},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
