"""Training: settings, data, the loop, checkpoints and validation images."""
