"""`elastic-kfac config`: every configuration key with its type, default and meaning."""

from __future__ import annotations

import argparse
import shutil

from elastic_kfac.errors import UsageError


def config(arguments: argparse.Namespace) -> int:
    """Prints the named sections or keys, or all of them."""
    from elastic_kfac.config.describe import as_markdown, as_text

    if arguments.markdown and arguments.names:
        raise UsageError(
            "--markdown prints all sections",
            given=" ".join(arguments.names),
            change="drop the names or --markdown",
        )
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    text = as_markdown() if arguments.markdown else as_text(arguments.names, columns)
    print(text.rstrip("\n"))
    return 0
