"""What may be given as a prompt, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from flexgen_jax.arguments import is_int, shown

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]
OnError = Literal["raise", "record"]

FIELDS = ("prompt", "prompt_token_ids")


class RequestError(ValueError):
    """A prompt that cannot be run, or sampling parameters that do not fit it."""


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many, as a list.

    Raises:
        RequestError: neither.
    """
    return list(each_of(prompts))


def each_of(prompts: Any) -> Iterator[Any]:
    """One prompt or many, lazily; a list of token ids is one prompt.

    Raises:
        RequestError: neither. At once, not when the first one is taken.
    """
    if isinstance(prompts, (str, Mapping)) or getattr(prompts, "ndim", None) == 1:
        return iter([prompts])
    if isinstance(prompts, (bytes, set, frozenset)) or not isinstance(prompts, Iterable):
        ordered = ", which have an order" if isinstance(prompts, (set, frozenset)) else ""
        raise RequestError(
            "prompts must be a text, a list of token ids, a dict with one of them, or several of "
            f"these{ordered}; got {shown(prompts)} ({type(prompts).__name__})"
        )
    if isinstance(prompts, (list, tuple)) and prompts and all(map(is_int, prompts)):
        return iter([prompts])
    return iter(prompts)


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
    """(text, token ids), one of which is None.

    Raises:
        RequestError: no prompt, or two; or fields that a prompt does not have.
    """
    if not isinstance(prompt, Mapping):
        return (prompt, None) if isinstance(prompt, str) else (None, _token_ids(prompt))
    unknown = [name for name in prompt if name not in FIELDS]
    if unknown:
        raise RequestError(
            f"unknown field {', '.join(map(shown, unknown[:5]))} of a prompt, which is a text, or "
            "has 'prompt' or 'prompt_token_ids'; sampling fields go into SamplingParams, and other "
            "columns of a dataset are left out (select_columns)"
        )
    given = [name for name in FIELDS if prompt.get(name) is not None]
    if len(given) > 1:
        raise RequestError("'prompt' and 'prompt_token_ids' are both given: give one")
    if not given:
        raise RequestError("expected a 'prompt' or 'prompt_token_ids', found neither")
    value = prompt[given[0]]
    if given[0] == "prompt" and isinstance(value, str):
        return value, None
    return None, _token_ids(value)


def _token_ids(value: object) -> list[int]:
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        value = value.tolist()  # NumPy's and JAX's arrays
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        ids = list(value)
        if all(map(is_int, ids)):
            return list(map(int, ids))
    raise RequestError(f"expected a text or a list of token ids, got {shown(value)}")
