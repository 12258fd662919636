"""A run's state as one value: checkpoints, ledger, run folder, transfer. Runs without Ray."""
