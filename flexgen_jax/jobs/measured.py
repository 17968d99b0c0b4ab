"""What a job needs that is run to be measured: made-up prompts, and a model without weights."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_jax.planning.auto import Uniform
from flexgen_jax.weights.checkpoint import cache_directory, convert_dummy, is_store, resolve

if TYPE_CHECKING:
    from flexgen_jax.llm import LLM
    from flexgen_jax.requests.sampling_params import SamplingParams

DUMMY = "_DUMMY_"


@contextlib.contextmanager
def directory(prompt_len: int | None) -> Iterator[Path]:
    """A directory for what nobody asked to keep; the current one where nothing is made up."""
    if prompt_len is None:
        yield Path()
        return
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-") as path:
        yield Path(path)


def prompts(where: Path, llm: LLM, prompt_len: int, params: SamplingParams) -> Path:
    """A file of one block of prompts of ``prompt_len`` token ids, all different.

    Raises:
        RequestError: so many tokens do not fit the model.
    """
    # One block of the policy for as many such prompts as there is room for.
    llm.policy = llm.choose_policy(Uniform(prompt_len, params.max_tokens or 1))
    vocab, path = llm.config.vocab_size, where / "prompts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in range(llm.policy.block_size):
            ids = [(7919 * row + 31 * i + 11) % vocab for i in range(prompt_len)]
            llm.request(row, ids, params)
            file.write(json.dumps({"prompt_token_ids": ids}, allow_nan=False) + "\n")
    return path


def store(
    model: str,
    path: str | None,
    *,
    dtype: str | None,
    weight_bits: int | None,
    group_size: int,
    offload_dir: str | None,
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None],
) -> Path:
    """The weight store of ``model``, below ``path`` or ``offload_dir``; made on first use.

    Args:
        path: ``_DUMMY_``: random weights of the preset ``model``.
        dtype: None: the model's own, and float32 of random weights.
        weight_bits: 4 or 8: quantised; None: as a weight store has them.

    Raises:
        As :func:`resolve` and :func:`convert_dummy`.
    """
    if path != DUMMY:
        return resolve(
            model,
            dtype=dtype,
            weight_bits=weight_bits,
            group_size=group_size,
            offload_dir=offload_dir if path is None else path,
            say=say,
            progress=progress,
        )
    dtype = dtype or "float32"
    base = cache_directory() if offload_dir is None else Path(offload_dir)
    name = re.sub(r"[^\w.-]+", "--", model)
    form = f"{dtype}-{weight_bits}bit-g{group_size}" if weight_bits else dtype
    made = Path(os.path.abspath(base)) / "stores" / f"{name}-dummy-{form}"
    if not is_store(made):
        say(f"making random {form} weights of {model} in {made}, once")
    return convert_dummy(
        model,
        made,
        dtype=dtype,
        weight_bits=weight_bits,
        group_size=group_size,
        progress=progress,
        say=say,
    )
