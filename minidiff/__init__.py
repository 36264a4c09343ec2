"""minidiff: text-to-image diffusion from scratch."""
