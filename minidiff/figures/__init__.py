"""Every figure and image file."""
