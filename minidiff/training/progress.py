"""What a run shows and leaves: the memory it took."""

import sys


def peak_memory_gb() -> float | None:
    """The most memory this process has held; Windows does not say."""
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kilobytes
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)
