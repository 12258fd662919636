"""The command line `elastic-kfac`.

Everything heavy (torch, ray, pyarrow) is imported inside the subcommand that needs it, so that
help, a misspelt option and a bad configuration answer at once.
"""

from __future__ import annotations

from elastic_kfac.cli.entry import main

__all__ = ["main"]
