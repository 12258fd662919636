"""The published CIFAR-10 table (eigen, inverse, SGD at 256, 512 and 1024) at a small scale.

    python benchmarks/studies/cifar10_jpeg.py --data FOLDER [--seeds 3] [--storage ./runs]

FOLDER holds `cifar10_jpeg_train.parquet` and `cifar10_jpeg_test.parquet`. Writes shards of their first
images and runs `elastic-kfac compare` on `cifar10_jpeg.yaml` beside this file; called again, it
continues.
`comparison.json` of the study becomes `benchmarks/results/cifar10_jpeg.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq

from elastic_kfac.cli.entry import main as elastic_kfac
from elastic_kfac.data.shards import make_shards

HERE = Path(__file__).parent
SHARDS = Path("data/cifar10_jpeg_4k")
SAMPLES = {"train": 4000, "test": 2000}


def make_subset(data: Path) -> None:
    """The first images of each split as shards, once."""
    if SHARDS.exists():
        return
    folder = SHARDS.with_name(f"{SHARDS.name}_parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SAMPLES.items():
        table = pq.read_table(data / f"cifar10_jpeg_{split}.parquet")
        pq.write_table(table.slice(0, count), folder / f"cifar10_jpeg_{split}.parquet")
    make_shards(f"parquet:{folder / 'cifar10_jpeg'}", str(SHARDS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Parquet files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--storage", default="./runs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "cifar10_jpeg.json")
    arguments = parser.parse_args()
    make_subset(arguments.data)
    options = ["--storage", arguments.storage, "--seeds", str(arguments.seeds)]
    code = elastic_kfac(["compare", str(HERE / "cifar10_jpeg.yaml"), *options])
    found = Path(arguments.storage) / "cifar10_jpeg" / "comparison.json"
    if code == 0 and found.exists():
        arguments.out.write_text(found.read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())
