"""What completes requests, to those that only want something completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner
from flexgen_jax.report import Report
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import Prompt
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from scheduling.policy import Policy


class Completer(Protocol):
    """An ``LLM``, as scoring and streaming see it; its methods are described there."""

    config: Any
    report: Report | None

    @property
    def policy(self) -> Policy: ...

    @property
    def planner(self) -> Planner: ...

    def encode(self, text: str) -> list[int]: ...

    def request(
        self, index: int, prompt: Prompt, params: SamplingParams, *, scoring: bool = False
    ) -> Request: ...

    def choose_policy(self, job: Sequence[Request]) -> Policy: ...

    def run(
        self, requests: Sequence[Request], *, progress: Callable[[int], None] | None = None
    ) -> list[RequestOutput]: ...

    def run_blocks(
        self,
        blocks: Sequence[Block],
        on_block: Callable[[int, dict[int, RequestOutput], Report], None],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> None: ...
