"""`elastic-kfac shards make` for `ray job submit`: the same options, on the cluster of the job.

Ray tells its jobs where their cluster is (RAY_ADDRESS), so that no `--address` is needed; source and
`--out` must be places that every node reaches.
"""

from __future__ import annotations

import sys

from elastic_kfac.cli.entry import main

if __name__ == "__main__":
    sys.exit(main(["shards", "make", *sys.argv[1:]]))
