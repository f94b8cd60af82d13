"""Files that are complete or absent: locks, renaming, leftovers, the cache, names that are not UTF-8."""
