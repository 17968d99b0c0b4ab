"""How many rows an expert multiplies with at a time.

Always whole tiles: so a row's bits do not depend on how many others chose its expert. Small tiles
waste less where few rows choose an expert; large ones read the matrices less often. The policy's
block decides of decode steps, whatever is left of it; a batch's prompts decide of their own.
"""

from __future__ import annotations

# Measured with AVX-512 and AMX: 16 rows take as long as 9, and 128 a quarter of 8 times 16.
SMALLEST, PROMPT_TILE = 16, 128
_SIZES = (128, 64, 32)
_ENOUGH = 8  # rows of a batch for an expert, on average: a block has several batches


def decode_tile(rows: int, chosen: int, experts: int) -> int:
    """Of a decode step of a block of so many ``rows``, each of which chooses some experts."""
    mean = rows * chosen / experts
    return next((size for size in _SIZES if mean >= size), SMALLEST)


def prompt_tile(tokens: int, chosen: int, experts: int) -> int:
    """Of a batch's prompts of so many ``tokens``."""
    return PROMPT_TILE if tokens * chosen >= _ENOUGH * experts else SMALLEST
