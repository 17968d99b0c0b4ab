"""How many rows an expert multiplies with at a time.

Always whole tiles: so a row's bits do not depend on how many others chose its expert. Small tiles
waste less where few rows choose an expert; large ones read the matrices less often. The policy's
block decides of decode steps, whatever is left of it; a batch's prompts decide of their own.
"""

from __future__ import annotations

import math

# Measured with AVX-512 and AMX: 16 rows take as long as 9, and 128 a quarter of 8 times 16.
SMALLEST, LARGEST = 16, 128
_SIZES = (SMALLEST, 32, 64)
_ENOUGH = 8  # rows of a batch for an expert, on average: a block has several batches


def decode_tile(rows: int, chosen: int, experts: int) -> int:
    """Of a decode step of a block of so many ``rows``, each of which chooses some experts.

    One tile does for most experts: those that more rows choose than do on average, by no more than
    the standard deviation. Two tiles take longer than one of twice the rows.
    """
    mean = rows * chosen / experts
    return next((size for size in _SIZES if mean + math.sqrt(mean) <= size), LARGEST)


def prompt_tile(tokens: int, chosen: int, experts: int) -> int:
    """Of a batch's prompts of so many ``tokens``."""
    return LARGEST if tokens * chosen >= _ENOUGH * experts else SMALLEST
