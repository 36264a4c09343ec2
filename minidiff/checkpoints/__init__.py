"""Models as files: our folder, and the published layouts."""
