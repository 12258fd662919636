"""`elastic-kfac shards make` for `ray job submit`: the same options, on the cluster of the job.

Source and `--out` must be places that every node can reach.
"""

from __future__ import annotations

from elastic_kfac.cli.entry import main_of_job

if __name__ == "__main__":
    main_of_job("shards make")
