"""What the training loop (train.py) needs, and what knows nothing of diffusion: configuration, optimizers, checkpoints, locks, the first NaN."""
