"""Where tokens stand in their own sequences, which batches pad on the left."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int


@flax.struct.dataclass
class Positions:
    """Of the tokens that a call computes.

    Attributes:
        index: Each token's place in its own sequence, from 0; negative: padding.
        length: Tokens of each sequence so far, these included.
    """

    index: Int[Array, "batch seq"]
    length: Int[Array, "batch 1"]


def positions(
    first: Int[Array, ""] | int, count: int, padding: Int[Array, "batch"], total: int | None = None
) -> Positions:
    """Of ``count`` columns from column ``first`` on.

    Args:
        padding: Columns of padding at the left of each row.
        total: Columns of which these are a piece; None: they are the last ones.
    """
    index = first + jnp.arange(count)[None, :] - padding[:, None]
    end = first + count if total is None else total
    return Positions(index, jnp.asarray(end - padding[:, None], jnp.int32))
