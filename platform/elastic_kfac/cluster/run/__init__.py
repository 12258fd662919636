"""One elastic run under Ray Train: driver, run coordinator, workers, in-memory checkpoint replicas."""
