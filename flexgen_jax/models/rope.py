"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and the ways in which they are stretched.

A pair of elements, one of each half of a head, is turned by an angle that grows with the position.
Reads and writes what ``config.json`` says of it, in the style of transformers 4 (``rope_theta``,
``rope_scaling``) and 5 (``rope_parameters``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.positions import Positions

# What each type of scaling needs, and what it may have.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_MAY_HAVE: dict[str, tuple[str, ...]] = {
    "dynamic": ("factor",),
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("original_max_position_embeddings", "attention_factor", "factor"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys.

    Attributes:
        theta: The base of the wavelengths.
        dim: Elements of a head that are turned, the first ones; even.
        max_positions: Of the model: what some scalings are relative to.
        type: ``default``, ``linear``, ``dynamic``, ``llama3``, ``yarn`` or ``longrope``.
        numbers: What the type is scaled by, as ``config.json`` names it, sorted.
    """

    theta: float
    dim: int
    max_positions: int
    type: str = "default"
    numbers: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling``, which both versions of transformers read."""
        scaling = None
        if self.type != "default":
            numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in self.numbers}
            scaling = {"rope_type": self.type, **numbers}
        return {"rope_theta": self.theta, "rope_scaling": scaling}


def read_rope(
    values: Mapping[str, Any],
    *,
    dim: int,
    max_positions: int,
    theta: float = 10_000.0,
    original: int | None = None,
) -> Rope:
    """What a ``config.json``, or a part of it, says of rotary positions.

    Args:
        dim: Elements of a head that are turned.
        theta: Where nothing is said.
        original: Positions that the model was first trained for, where it is said elsewhere.

    Raises:
        ConfigError: an unknown type of scaling, or one without its numbers.
    """
    said = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(said, Mapping) or any(isinstance(v, Mapping) for v in said.values()):
        raise ConfigError(f"rope_scaling or rope_parameters must be one flat object, got {said!r}")
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind not in _NEEDS:
        raise ConfigError(f"rope_type must be one of {', '.join(_NEEDS)}; got {kind!r}")
    base = said.get("rope_theta", values.get("rope_theta"))
    if dim < 2 or dim % 2:
        raise ConfigError(f"rotary positions turn pairs: {dim} elements of a head are not even")
    numbers = {}
    for name in (*_NEEDS[kind], *_MAY_HAVE.get(kind, ())):
        found = said.get(name)
        if name == "original_max_position_embeddings" and original is not None:
            found = original
        if found is None:
            if name in _NEEDS[kind]:
                raise ConfigError(f"rope_type {kind!r} needs {name}")
            continue
        numbers[name] = _checked(name, found, dim)
    return Rope(
        float(theta if base is None else _checked("rope_theta", base, dim)),
        dim,
        max_positions,
        kind,
        tuple(sorted(numbers.items())),
    )


def _checked(name: str, value: Any, dim: int) -> Any:
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list) or len(value) != dim // 2:
            raise ConfigError(f"{name} must be a list of {dim // 2} numbers")
        return tuple(float(_checked("an element of " + name, v, dim)) for v in value)
    if name == "truncate":
        if not isinstance(value, bool):
            raise ConfigError(f"truncate must be true or false, got {value!r}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
    return value


class _Frequencies(NamedTuple):
    """Radians a position of each pair; ``long`` for sequences of more than ``border`` tokens."""

    short: np.ndarray
    long: np.ndarray | None
    border: int
    amplitude: float


@functools.lru_cache(maxsize=64)
def _frequencies(rope: Rope) -> _Frequencies:
    numbers: dict[str, Any] = dict(rope.numbers)
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    factor = float(numbers.get("factor", 1.0))
    original = int(numbers.get("original_max_position_embeddings", rope.max_positions))
    match rope.type:
        case "linear":
            plain = (plain / factor).astype(np.float32)
        case "llama3":
            plain = _by_wavelength(plain, factor, original, numbers)
        case "yarn":
            plain = _yarn(rope, plain, factor, original, numbers)
            return _Frequencies(plain, None, 0, _yarn_amplitude(factor, numbers))
        case "longrope":
            amplitude = numbers.get("attention_factor")
            if amplitude is None:
                stretch = float(numbers.get("factor", rope.max_positions / original))
                amplitude = 1.0
                if stretch > 1:
                    amplitude = math.sqrt(1 + math.log(stretch) / math.log(original))
            short, long = (
                (plain / np.asarray(numbers[name], np.float32)).astype(np.float32)
                for name in ("short_factor", "long_factor")
            )
            return _Frequencies(short, long, original, float(amplitude))
        case _:
            pass  # dynamic is the default up to the model's positions, beyond which nothing runs
    return _Frequencies(plain, None, 0, 1.0)


def _by_wavelength(
    plain: np.ndarray, factor: float, original: int, numbers: Mapping[str, Any]
) -> np.ndarray:
    """Llama 3.1: long waves are stretched, short ones are not, those between in part."""
    low, high = float(numbers["low_freq_factor"]), float(numbers["high_freq_factor"])
    turns = original * plain / np.float32(2 * math.pi)
    share = np.clip((turns - low) / max(high - low, 1e-9), 0, 1)
    return ((1 - share) * plain / factor + share * plain).astype(np.float32)


def _yarn(
    rope: Rope, plain: np.ndarray, factor: float, original: int, numbers: Mapping[str, Any]
) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): as above, by the pair's number."""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(numbers.get("beta_fast", 32)), pair_of(numbers.get("beta_slow", 1))
    if numbers.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    last += 0.001 if first == last else 0
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)
    return (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_amplitude(factor: float, numbers: Mapping[str, Any]) -> float:
    given = numbers.get("attention_factor")
    if given is not None:
        return float(given)

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, of_all = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return grown(mscale) / grown(of_all) if mscale and of_all else grown(1.0)


def angles(
    rope: Rope, at: Positions
) -> tuple[Float[Array, "batch 1 seq pairs"], Float[Array, "batch 1 seq pairs"]]:
    """Cosine and sine, in float32, for the positions ``at``."""
    found = _frequencies(rope)
    turning = jnp.asarray(found.short)
    if found.long is not None:
        longer = at.length[..., None] > found.border
        turning = jnp.where(longer, jnp.asarray(found.long), turning)
    angle = at.index[..., None].astype(jnp.float32) * turning
    cosine, sine = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    if found.amplitude != 1:
        cosine, sine = cosine * found.amplitude, sine * found.amplitude
    return cosine, sine


def rotate(
    x: Float[Array, "batch heads seq head_dim"],
    cosine: Float[Array, "batch 1 seq pairs"],
    sine: Float[Array, "batch 1 seq pairs"],
) -> Float[Array, "batch heads seq head_dim"]:
    """``x`` turned, in float32; what lies behind the pairs stays as it is."""
    pairs = cosine.shape[-1]
    first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*(t.astype(x.dtype) for t in turned), rest], axis=-1)
