"""Between a model on disk and parameters as Flax has them: a nested dict of arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexgen_jax.models.family import Config
from flexgen_jax.models.params import flatten, nest, param_records, param_shapes
from flexgen_jax.models.registry import write_config
from flexgen_jax.weights.checkpoint import open_model, resolve
from flexgen_jax.weights.dtypes import checked_dtype
from flexgen_jax.weights.element_blocks import dense_array
from storage.array_file import StoreError


def load_params(
    model: str | Path,
    *,
    dtype: Any = "auto",
    offload_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All parameters of a model in memory, for ``fg.opt.forward`` and its like.

    Args:
        model: A weight store, a Hugging Face directory or a hub name.
        dtype: As ``LLM`` has it.
        offload_dir: Where a converted model is kept, as ``LLM`` has it.
        say: Called with a line before a conversion.

    Returns:
        ``params[unit][module][leaf]``, JAX arrays; matrices are ``kernel`` (n_in, n_out), as
        Flax's. What is stored in codes is dense again.

    Raises:
        As :func:`convert`.
    """
    import jax.numpy as jnp

    store = resolve(model, dtype=checked_dtype(dtype), offload_dir=offload_dir, say=say)
    stored = open_model(store, dtype=checked_dtype(dtype))
    flat = {}
    for name in param_records(stored.config):
        array = dense_array(stored.format, stored.config, stored.arrays, name)
        flat[name] = jnp.asarray(
            array.T if stored.format.transposes(stored.config, name) else array
        )
    return nest(flat)


def save_params(params: Mapping[str, Any], config: Config, directory: str | Path) -> Path:
    """Writes parameters as a model that ``LLM`` takes: ``config.json`` and an Orbax checkpoint.

    Args:
        params: As :func:`load_params` gives them, of any float dtype; NumPy's or JAX's arrays.
        config: Of the model.
        directory: Must not exist.

    Returns:
        ``directory``, made absolute.

    Raises:
        StoreError: the directory exists, or the parameters are not those of ``config``.
    """
    import orbax.checkpoint as ocp

    target = Path(os.path.abspath(directory))
    if target.exists():
        raise StoreError(f"{target} exists already; remove it, or give another name")
    found = {name: tuple(leaf.shape) for name, leaf in flatten(dict(params)).items()}
    expected = param_shapes(config)
    for name in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if name in expected else "is not one of the config's"
        raise StoreError(f"the parameter {name} {state}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise StoreError(
                f"the parameter {name} has shape {list(found[name])}, expected {list(shape)}"
            )
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", dict(params))
    text = json.dumps(write_config(config), indent=2, allow_nan=False) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")
    os.rename(partial, target)
    return target
