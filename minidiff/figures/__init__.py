"""Every figure and picture file."""
