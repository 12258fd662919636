"""One rank's training: loop, world-size-free state, checkpoints, ledger. Runs without Ray."""
