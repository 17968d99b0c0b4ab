"""The command line's option for what a model's publishers suggest for sampling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from flexgen_jax.requests.sampling_params import SamplingParams

generation_config_option = click.option(
    "--generation-config",
    metavar="auto|vllm|DIR",
    default="vllm",
    show_default=True,
    help="Where the defaults of --temperature, --top-k, --top-p, --min-p, --repetition-penalty and "
    "--max-tokens come from: auto, the model's generation_config.json; DIR, such a file in that "
    "directory; vllm, no file.",
)


class Suggestions:
    """What the option says; takes it out of ``options``. Options that are given win.

    Args:
        fixed: Names of options that count as given.
    """

    def __init__(self, options: dict[str, Any], fixed: frozenset[str] = frozenset()) -> None:
        self._where: str = options.pop("generation_config")
        context = click.get_current_context()
        shown = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
        self._given = fixed | {n for n in options if context.get_parameter_source(n) not in shown}

    @property
    def wanted(self) -> bool:
        """Whether a file is looked at."""
        return self._where != "vllm"

    def over(
        self, defaults: SamplingParams, model: Path, *, chats: bool = False
    ) -> tuple[SamplingParams, int | None]:
        """``defaults`` with what is suggested, and the suggested limit of new tokens.

        Args:
            model: Where its files lie.
            chats: Whether only conversations go on to a limit: then it shortens other answers,
                and does not lengthen them.

        Raises:
            ValueError: there is no such file, or it has a value that cannot be.
        """
        from flexgen_jax.requests.generation_config import suggested

        found = suggested(self._where, model)
        found = {name: value for name, value in found.items() if name not in self._given}
        longest = found.get("max_tokens")
        if longest is not None and chats and defaults.max_tokens is not None:
            found["max_tokens"] = min(longest, defaults.max_tokens)
        return dataclasses.replace(defaults, **found), longest

    def known(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Of what a job is compared by, what is known before the file is read."""
        if not self.wanted:
            return identity
        from flexgen_jax.requests.generation_config import FIELDS

        unknown = {*FIELDS.values(), "chats at most"} - self._given
        task = {name: value for name, value in identity["task"].items() if name not in unknown}
        return {**identity, "task": task}
