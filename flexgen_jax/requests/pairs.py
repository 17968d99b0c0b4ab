"""Prompts with the sampling parameters of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexgen_jax.arguments import shown
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import FIELDS, OnError, Prompt, RequestError, as_list, each_of
from flexgen_jax.requests.sampling_params import SamplingParams


def pairs(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[tuple[Any, SamplingParams]]:
    """Each prompt with its parameters.

    Raises:
        RequestError: no prompts, no parameters, or not as many of these as of those.
    """
    prompts = as_list(prompts)
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in prompts]
    if not isinstance(params, (list, tuple)):
        raise _no_params(params)
    if len(params) != len(prompts):
        raise RequestError(
            f"{len(prompts)} prompts but {len(params)} sampling parameters: "
            "give one for all, or one per prompt"
        )
    return list(zip(prompts, params, strict=True))


def pairs_as_they_come(
    prompts: Prompt | Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None
) -> Iterator[tuple[Any, SamplingParams]]:
    """Likewise, lazily; what cannot be is said at once.

    Raises:
        RequestError: as :func:`pairs`; of too few parameters when the prompt's turn has come.
    """
    each = each_of(prompts)
    if params is None or isinstance(params, SamplingParams):
        return ((prompt, params or SamplingParams()) for prompt in each)
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise _no_params(params)
    return _paired(each, iter(params))


def _paired(
    prompts: Iterator[Prompt], params: Iterator[SamplingParams]
) -> Iterator[tuple[Any, SamplingParams]]:
    for number, prompt in enumerate(prompts):
        try:
            yield prompt, next(params)
        except StopIteration:
            raise RequestError(f"no sampling parameters for prompt {number}") from None


def _no_params(given: Any) -> RequestError:
    of_dict = ": SamplingParams(**values)" if isinstance(given, Mapping) else ""
    return RequestError(
        f"sampling_params must be SamplingParams{of_dict}, or a list with one per prompt; got "
        f"{shown(given)} ({type(given).__name__})"
    )


def check_on_error(on_error: OnError) -> None:
    """Raises ValueError: neither of the two."""
    if on_error not in ("raise", "record"):
        raise ValueError(f"on_error must be 'raise' or 'record', got {shown(on_error)}")


def failed_output(index: int, prompt: Any, error: RequestError) -> RequestOutput:
    """What stands in the place of a prompt that cannot be run."""
    text = prompt.get(FIELDS[0]) if isinstance(prompt, Mapping) else prompt
    return RequestOutput(
        str(index), text if isinstance(text, str) else None, (), (), error=str(error)
    )
