"""How much of a batch one call computes: what stays in a processor's caches."""

from __future__ import annotations

# Calls of 512 to 2,048 tokens stay in a CPU's caches; larger ones lose a fifth of the speed.
PREFILL_TOKENS = 1024


def rows_per_call(batch: int, seq: int) -> int:
    """The largest divisor of ``batch`` whose rows hold at most ``PREFILL_TOKENS`` tokens, or 1."""
    most = max(1, PREFILL_TOKENS // seq)
    return _divisor(batch, most)


def positions_per_call(seq: int) -> int:
    """The largest divisor of ``seq`` that is at most ``PREFILL_TOKENS``: of a long prompt."""
    return _divisor(seq, PREFILL_TOKENS)


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
