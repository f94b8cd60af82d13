"""Facts about this process."""

import resource


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
