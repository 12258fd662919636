"""What is learned: models, losses and metrics, inputs, attacks and mixing."""
