"""What the training loop of train.py stands on. Nothing here knows diffusion."""
