"""Models, losses and metrics, input preprocessing, attacks and mixing."""
