"""Who computes and keeps what: costs, plans, planner, performance model. No processes."""
