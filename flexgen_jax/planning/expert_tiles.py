"""How many rows an expert multiplies with at a time.

Always whole tiles: so a row's bits do not depend on how many others chose its expert. Of decode
steps few rows choose an expert, and small tiles waste less; of prompts many do, and a large tile
reads the matrices less often.
"""

from __future__ import annotations

# Measured with AVX-512 and AMX: 16 rows take as long as 9, and 128 half as long as 8 times 16.
DECODE_TILE, PROMPT_TILE = 16, 128
_ENOUGH = 8  # rows of a batch for an expert, on average: a block has several batches


def tile_of(tokens: int, chosen: int, experts: int) -> int:
    """Of a batch's prompts of so many ``tokens``, each of which chooses some of the experts."""
    return PROMPT_TILE if tokens * chosen >= _ENOUGH * experts else DECODE_TILE
