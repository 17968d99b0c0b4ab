"""How what one pipeline stage has computed gets to where the next takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from scheduling.ops import StoreHidden

if TYPE_CHECKING:
    from flexgen_jax.engine.batch_state import BatchState


class HandOver:
    """Between stages of one process: the next stage's store takes what lies on any device."""

    def involves(self, layer: int) -> bool:
        """Whether this process has a part in handing over what ``layer`` computes."""
        return True

    def hidden(
        self, op: StoreHidden, arrays: tuple[jax.Array, ...], state: BatchState
    ) -> tuple[jax.Array, ...]:
        """Hands hidden states over.

        Args:
            arrays: Empty: another process has them.

        Returns:
            What arrived; empty: it is for another process.
        """
        return arrays

    def tokens(self, op: StoreHidden, state: BatchState) -> None:
        """Makes what the last stage has sampled known to all stages: ``state.sampled``."""
