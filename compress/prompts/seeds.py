"""Seeds that cannot collide: one per use, derived from the user's seed."""

import hashlib


def derive_seed(seed: int, *uses: str) -> int:
    """A 63-bit seed from the user's seed and what it is for, such as ("check", "self")."""
    digest = hashlib.sha256("/".join((str(seed), *uses)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
