"""What is finished of a block: a prompt's completions count when the last of them is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from flexgen_jax.engine.waiting import Key
from flexgen_jax.planning.blocks import Block
from flexgen_jax.requests.generated import Generated


class Finishing:
    """Gathers results.

    Args:
        block: Whose requests they are; of one that is no rolling block, all of them.
    """

    def __init__(self, block: Block) -> None:
        self._in_block = None if block.room else Counter(r.index for r in block.requests)
        self._parts: dict[int, list[Generated]] = {}
        self._whole: list[Generated] = []

    def add(self, result: Generated) -> None:
        """Takes one, in any order."""
        index = result.request.index
        parts = self._parts.setdefault(index, [])
        parts.append(result)
        wanted = result.request.params.n if self._in_block is None else self._in_block[index]
        if len(parts) == wanted:
            del self._parts[index]
            self._whole += sorted(parts, key=lambda r: r.request.sample)

    def __len__(self) -> int:
        """How many results :meth:`take` would give."""
        return len(self._whole)

    def take(self) -> list[Generated]:
        """The results of prompts that have all of theirs; each is given once."""
        whole, self._whole = self._whole, []
        return whole

    def to_json(self) -> list[dict[str, Any]]:
        """Of what was not taken yet."""
        return [
            {"request": r.request.key, "result": r.to_json()}
            for parts in (self._whole, *self._parts.values())
            for r in parts
        ]

    def restore(
        self, values: list[dict[str, Any]], made: Callable[[Key], Generated | None]
    ) -> None:
        """Takes what :meth:`to_json` gave.

        Args:
            made: Gives the empty result of a request, or None if it is not wanted any more.
        """
        for value in values:
            index, sample = value["request"]
            result = made((index, sample))
            if result is not None:
                result.restore(value["result"])
                self.add(result)
