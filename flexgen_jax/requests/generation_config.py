"""Sampling defaults that a model's publishers suggest, in its ``generation_config.json``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flexgen_jax.requests.sampling_params import SamplingParams
from storage.json_text import read_json

# What vLLM takes of the file, and the names here.
FIELDS = {
    **{n: n for n in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}
_NAME = "generation_config.json"


def default_params(generation_config: str | os.PathLike[str], model: Path) -> SamplingParams:
    """What calls without sampling parameters get: what is :func:`suggested`."""
    return SamplingParams(**suggested(generation_config, model))


def suggested(generation_config: str | os.PathLike[str], model: Path) -> dict[str, Any]:
    """Sampling parameters by name, as far as the file has them.

    Args:
        generation_config: ``"auto"``: of the file of ``model``, if there is one; ``"vllm"``:
            nothing; or a directory that has such a file.

    Raises:
        ValueError: there is no such file, or it has a value that cannot be; the message names it.
    """
    if generation_config == "vllm":
        return {}
    auto = generation_config == "auto"
    path = (model if auto else Path(generation_config)) / _NAME
    if auto and not path.is_file():
        return {}
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        given = {FIELDS[name]: values[name] for name in FIELDS if values.get(name) is not None}
        SamplingParams(**given)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot take sampling defaults from {path}: {why}; without the file: "
            "generation_config='vllm', --generation-config vllm"
        ) from error
    return given
