"""Which file a model family is in. Nothing else names one; a family is imported when it is used."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexgen_jax.models.family import Config, ConfigError, Family, read_token_ids

# ``model_type`` of a ``config.json`` -> the file beside this one.
FAMILIES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "glm4_moe": "glm4_moe",
    "gpt_oss": "gpt_oss",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "opt": "opt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
}

# What a GGUF calls an architecture -> Hugging Face's class and ``model_type``, and whether the rows
# of queries and keys lie in pairs.
GGUF_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", True),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", False),
}
# Of those with experts.
GGUF_WITH_EXPERTS = {
    "llama": ("MixtralForCausalLM", "mixtral", True),
    "olmoe": ("OlmoeForCausalLM", "olmoe", False),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe", False),
}
# Of these, gates are divided by their sum; a file does not say it.
GGUF_NORMED_GATES = frozenset({"llama", "qwen3moe"})

# The preset whose layers a machine is measured with.
MEASURED_WITH = "facebook/opt-1.3b"


@functools.cache
def family_of_type(model_type: str) -> Family:
    """The family that runs ``model_type``.

    Raises:
        ConfigError: none does; the message lists those that are there.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type is {model_type!r}, which no family here runs; there are: "
            f"{', '.join(sorted(FAMILIES))}. docs/families.md says how to add one"
        )
    module = importlib.import_module(f"flexgen_jax.models.{FAMILIES[model_type]}")
    family: Family = module.FAMILY
    return family


def family_of(config: Config) -> Family:
    """The family of a config."""
    return family_of_type(config.model_type)


def families() -> Iterator[Family]:
    """Each once."""
    for file in dict.fromkeys(FAMILIES.values()):
        module = importlib.import_module(f"flexgen_jax.models.{file}")
        yield module.FAMILY


def read_config(values: Mapping[str, Any]) -> Config:
    """The config of a ``config.json``.

    Raises:
        ConfigError: no family runs it, or a value is out of range.
    """
    if not isinstance(values.get("model_type"), str):
        raise ConfigError("there is no model_type, which says what kind of model it is")
    return family_of_type(values["model_type"]).read(values)


def write_config(config: Config) -> dict[str, Any]:
    """A ``config.json`` that transformers, and :func:`read_config`, read as ``config``."""
    return family_of(config).write(config)


def load_config(path: str | Path, family: Family | None = None) -> Config:
    """Reads ``config.json`` at ``path`` (the file, or the directory that holds it).

    What ends a text is what ``generation_config.json`` beside it says, where there is one, as
    transformers has it: no ``eos_token_id`` there means that nothing does.

    Args:
        family: That it is to be of; None: the one it says.

    Raises:
        ConfigError: no such file, not JSON, or not a model that can be run; the message names the
            file.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    values = _object(file)
    try:
        config = read_config(values) if family is None else family.read(values)
        _check_switches(config)
        hash(config)  # a list where a number belongs is found by nothing else
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except _STRANGE as error:
        raise ConfigError(
            f"{file} has a value that no model has ({type(error).__name__}: {error})"
        ) from error
    generation = file.with_name("generation_config.json")
    if not generation.is_file():
        return config
    try:
        ids = read_token_ids(_object(generation), "eos_token_id", None, config.vocab_size)
    except ConfigError as error:
        named = str(error) if str(generation) in str(error) else f"{generation}: {error}"
        raise ConfigError(named) from error
    replaced: Config = dataclasses.replace(config, eos_token_id=ids)  # type: ignore[type-var]
    return replaced


def _check_switches(config: Config) -> None:
    """Refuses ``"false"``, which is true."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type] # each family's is one
        value = getattr(config, field.name)
        if field.type == "bool" and value not in (True, False, None):
            raise ConfigError(f"{field.name} must be true or false, got {value!r}")


_MOST_CHARACTERS = 8 << 20  # a thousand times what a config has
# What comes of a value of another kind, or size.
_STRANGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _object(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as text:
            content = text.read(_MOST_CHARACTERS + 1)
        if len(content) > _MOST_CHARACTERS:
            raise ValueError(f"more than {_MOST_CHARACTERS} characters")
        values = json.loads(content)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def preset(name: str) -> Config:
    """A published model's config by its hub name, or what stands behind the slash.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    for family in families():
        found = family.named(name)
        if found is not None:
            return found
    raise ConfigError(f"no preset {name!r}; presets: {', '.join(preset_names())}")


def preset_names() -> list[str]:
    """Of all families."""
    return [name for family in families() for name in family.presets]
