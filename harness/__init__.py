"""What carries a training run, whatever is trained: options, session, progress, checkpoints, W&B, torchrun."""
