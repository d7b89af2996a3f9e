"""What makes a potential: configuration, checked frames, losses and the training run."""
