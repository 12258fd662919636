"""What a run reports about itself: the metric table and the structured log."""
