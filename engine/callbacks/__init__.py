"""What happens beside training: checkpoints, the choice of the best, progress, panels, W&B, a stop on request."""
