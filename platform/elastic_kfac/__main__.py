"""`python -m elastic_kfac` is `elastic-kfac`."""

from elastic_kfac.cli import main

main()
