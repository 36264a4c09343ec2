"""Captioned images, latents computed from them, and the built-in world."""
