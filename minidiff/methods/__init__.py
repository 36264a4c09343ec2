"""One paper, one file; each imports the core alone."""
