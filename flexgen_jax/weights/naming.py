"""Which tensor of a checkpoint a parameter is: PyTorch's names, Flax's, or our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from flexgen_jax.models.family import Config, Source
from flexgen_jax.models.params import TOKEN_TABLE, param_records
from flexgen_jax.models.registry import family_of

# What else Flax may call the leaf that is PyTorch's ``weight``.
_FLAX_LEAVES = ("kernel", "scale", "embedding", "weight")
_HEAD = "lm_head"


class Naming(NamedTuple):
    """Of one checkpoint.

    Attributes:
        source: Parameter -> where it is.
        prefix: What stands before the names.
        head: Of a head's own table.
    """

    source: Callable[[str], Source]
    prefix: str
    head: Source


def naming(config: Config, keys: Iterable[str]) -> Naming:
    """Whose names ``keys`` are, and what stands before them."""
    keys = frozenset(keys)
    for around in ("", "params."):
        if around + TOKEN_TABLE in keys:
            return _own(config, keys, around)
    family = family_of(config)
    table = family.source(config, TOKEN_TABLE).key
    first = family.prefixes[0]
    stem = table.removeprefix(first)
    for prefix in family.prefixes:
        if prefix + stem in keys:
            return _torch(config, prefix)
    flax = f"{stem.rpartition('.')[0]}.embedding"
    for key in keys:
        if key.endswith(flax) and (key == flax or key[-len(flax) - 1] == "."):
            return _flax(config, keys, key.removesuffix(flax))
    return _torch(config, first)


def _torch(config: Config, prefix: str) -> Naming:
    family = family_of(config)
    first = family.prefixes[0]

    def source(name: str) -> Source:
        found = family.source(config, name)
        if not found.key.startswith(first):
            return found
        return found._replace(key=prefix + found.key.removeprefix(first))

    return Naming(source, prefix, Source(f"{_HEAD}.weight"))


def _flax(config: Config, keys: frozenset[str], prefix: str) -> Naming:
    """Flax's kernels lie as ours do, but for the head's."""
    family = family_of(config)
    first = family.prefixes[0]
    head = Source(f"{prefix.removesuffix(first)}{_HEAD}.kernel", transposed=True)

    def source(name: str) -> Source:
        found = family.source(config, name)
        if found.key == f"{_HEAD}.weight":
            return head
        whole, _, leaf = (prefix + found.key.removeprefix(first)).rpartition(".")
        if leaf != "weight":
            return Source(f"{whole}.{leaf}")
        # A key that is not there is named as Flax would name it.
        role = param_records(config)[name].role
        usual = {"matrix": "kernel", "norm": "scale"}.get(role, "embedding")
        there = (x for x in (usual, *_FLAX_LEAVES) if f"{whole}.{x}" in keys)
        return Source(f"{whole}.{next(there, usual)}")

    return Naming(source, prefix, head)


def _own(config: Config, keys: frozenset[str], around: str) -> Naming:
    """A tree of our own params, whichever way its matrices lie."""

    def source(name: str) -> Source:
        if param_records(config)[name].role == "matrix" and around + name not in keys:
            published = f"{around}{name.rpartition('.')[0]}.weight"
            if published in keys:
                return Source(published, transposed=True)
        return Source(around + name)

    return Naming(source, around, Source(f"{around}head.tokens"))
