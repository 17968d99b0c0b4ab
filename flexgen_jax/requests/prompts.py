"""What may be given as a prompt, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]


class RequestError(ValueError):
    """A prompt that cannot be run, or sampling parameters that do not fit it."""


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many, as a list."""
    if isinstance(prompts, (str, Mapping)) or getattr(prompts, "ndim", None) == 1:
        return [prompts]
    several = list(prompts)
    return [several] if several and all(isinstance(i, int) for i in several) else several


def made_of_each(prompts: Iterable[Any], make: Callable[[int, Any], T]) -> list[T]:
    """``make`` of every place and prompt.

    Raises:
        RequestError: of all those it failed for.
    """
    made, problems = [], []
    for index, prompt in enumerate(prompts):
        try:
            made.append(make(index, prompt))
        except RequestError as error:
            problems.append(f"prompt {index}: {error}")
    if problems:
        raise RequestError("; ".join(problems))
    return made


def parse_prompt(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """(text, token ids); token ids win where both are given."""
    if isinstance(prompt, Mapping):
        if prompt.get("prompt_token_ids") is not None:
            text, ids = prompt.get("prompt"), prompt["prompt_token_ids"]
            return text if isinstance(text, str) else None, _token_ids(ids)
        if "prompt" not in prompt:
            raise RequestError("expected a 'prompt' or 'prompt_token_ids', found neither")
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return prompt, None
    return None, _token_ids(prompt)


def _token_ids(value: object) -> list[int]:
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        value = value.tolist()  # NumPy's and JAX's arrays
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        ids = list(value)
        if all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            return ids
    raise RequestError(f"expected a text or a list of token ids, got {shown(value)}")


def shown(value: object) -> str:
    """A short ``repr``."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
