"""Seeds for every random choice of a run, derived from `trainer.seed` and its purpose, never from the time."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*about: str | int) -> int:
    """Return a seed in [0, 2**63) for this purpose: derive_seed(42, "sample", step, uid, repetition, turn)."""
    digest = blake2b("\x1f".join(str(part) for part in about).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
