"""`elastic-kfac tune` for `ray job submit`: the same options, on the cluster of the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from elastic_kfac.cli.entry import main


def arguments_for(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The argument list of `elastic-kfac`: inside a Ray job, `--address auto` unless one is given."""
    given = any(word == "--address" or word.startswith("--address=") for word in argv)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment
    address = ["--address", "auto"] if in_job and not given else []
    return ["tune", *argv, *address]


if __name__ == "__main__":
    sys.exit(main(arguments_for(sys.argv[1:], os.environ)))
