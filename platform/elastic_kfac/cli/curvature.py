"""`elastic-kfac curvature`: the curvature of a checkpoint as a file (docs/curvature.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic_kfac.cli.runs import locate_run, open_run
from elastic_kfac.errors import UsageError
from elastic_kfac.paths import join_uri, local_folder


def curvature(arguments: argparse.Namespace) -> int:
    """Writes factors, eigenbases and eigenvalues of a checkpoint as safetensors."""
    from elastic_kfac.checkpoints import write_tree
    from elastic_kfac.kfac.exported import curvature_of
    from elastic_kfac.runs.checkpoints import restored

    uri = locate_run(arguments.run, arguments.storage)
    if arguments.out is None and local_folder(uri) is None:
        raise UsageError("exporting from a remote run needs a local file", change="add --out FILE")
    out = Path(arguments.out or join_uri(uri, "curvature.safetensors"))
    folder = open_run(uri, arguments.shards)
    with restored(folder, step=arguments.checkpoint) as here:
        state = here.state.part("kfac")
        if state is None:
            raise UsageError("the run was trained without K-FAC", given=uri)
        tree = curvature_of(here.model, here.config.kfac, state)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tree(out, tree)
    print(f"{len(tree['layers'])} layers at step {tree['step']}: {out}")
    return 0
