"""KFAC and who computes it: options, exchange, state, sharding by owner."""
