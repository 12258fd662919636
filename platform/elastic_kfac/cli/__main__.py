"""`python -m elastic_kfac.cli`."""

from __future__ import annotations

import sys

from elastic_kfac.cli.entry import main

sys.exit(main())
