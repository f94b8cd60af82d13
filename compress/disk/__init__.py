"""Files that are complete or absent: renaming, JSON, locks, leftovers, the cache, git-lfs pointers, names that are not UTF-8."""
