"""What a line of a job asks, and what is wrong with one: the same for all dialects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

MAX_ID = 1000  # characters
NO_ANSWER = "no_answer"  # the kind of error of a request that was run

# How a line is answered: as a plain one, or as OpenAI answers at this endpoint.
Dialect = Literal["plain", "completion", "chat"]


class LineError(ValueError):
    """A line that is no request; ``kind`` classes the mistake, ``id`` is the line's, if any."""

    def __init__(self, kind: str, message: str, line_id: Any = None, openai: bool = False) -> None:
        super().__init__(message)
        self.kind, self.id, self.openai = kind, line_id, openai


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as its line words it.

    Attributes:
        prompts: For ``LLM.request``, each; OpenAI's lines may have several. ``sampling``: of all,
            unchecked.
        echo: The answer begins with the prompt. ``silent``: it is nothing but that.
        metadata: Comes back with the answer as it is; None: there is none.
    """

    line: int
    id: Any
    prompts: tuple[Mapping[str, Any], ...]
    sampling: Mapping[str, Any]
    dialect: Dialect = "plain"
    echo: bool = False
    silent: bool = False
    metadata: Any = None

    @property
    def openai(self) -> bool:
        """Whether it is one of OpenAI's lines."""
        return self.dialect != "plain"

    @property
    def prompt(self) -> Mapping[str, Any]:
        """The first, which is the only one of most lines."""
        return self.prompts[0]

    def alone(self, place: int) -> Asked:
        """As if only that of its prompts were asked for."""
        return dataclasses.replace(self, prompts=(self.prompts[place],))
