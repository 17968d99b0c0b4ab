"""What a model family supplies, and nothing else in the library knows.

A family is one object of :class:`Family` in one file, found by its ``model_type`` through
:mod:`~flexgen_jax.models.registry`. It says how a ``config.json`` is read and written, which units
the model has, every parameter as one record, and the pure functions around attention. Everything
else derives from that: initialisation, conversion, export, placement, quantisation, bytes, FLOPs.
``docs/families.md`` adds one, start to end.
"""

from __future__ import annotations

import abc
import dataclasses
import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from flexgen_jax.models.packed import Packed
    from flexgen_jax.models.positions import Positions

Params = dict[str, Any]


class ConfigError(ValueError):
    """A ``config.json`` that is missing, malformed, or of a model that cannot be run."""


class Config:
    """The shape of a model, named as in Hugging Face's ``config.json``; lengths are in tokens.

    Each family has a frozen dataclass of its own that derives from it: hashable, since it is a
    static argument of every compiled function.

    Attributes:
        model_type: The registry's key.
        num_key_value_heads: Keys and values have so many heads, a divisor of the queries'.
        head_dim: Elements of a head; times the heads it need not be ``hidden_size``.
        eos_token_id: What ends a text; :func:`eos_token_ids` has them as a tuple.
        units: The layers that a schedule sees, by name.
    """

    if TYPE_CHECKING:  # fields or properties of the dataclasses, as each has it

        @property
        def model_type(self) -> str: ...
        @property
        def vocab_size(self) -> int: ...
        @property
        def hidden_size(self) -> int: ...
        @property
        def num_hidden_layers(self) -> int: ...
        @property
        def num_attention_heads(self) -> int: ...
        @property
        def num_key_value_heads(self) -> int: ...
        @property
        def head_dim(self) -> int: ...
        @property
        def max_position_embeddings(self) -> int: ...
        @property
        def tie_word_embeddings(self) -> bool: ...
        @property
        def num_experts_per_tok(self) -> int: ...  # where layers have experts
        @property
        def eos_token_id(self) -> int | tuple[int, ...] | None: ...
        @property
        def units(self) -> tuple[str, ...]: ...


class Kind(NamedTuple):
    """What makes layers alike: one program serves all units of a kind.

    Attributes:
        role: ``embed``, ``decoder``, ``experts`` or ``head``.
        window: A position attends to so many, itself the last of them; None: to all before it.
        soft_cap: Attention scores ``s`` become ``cap * tanh(s / cap)``; None: they stay.
        variant: What else a family tells its layers apart by; its own business.
        experts: Of a decoder layer: how many experts its tokens choose from, which are units of
            their own behind it; 0: it has none. Of a unit of experts: how many it has.
    """

    role: Literal["embed", "decoder", "experts", "head"]
    window: int | None = None
    soft_cap: float | None = None
    variant: str = ""
    experts: int = 0


class Unit(NamedTuple):
    """A layer that a schedule sees, or some of its experts.

    Attributes:
        experts: Which of its layer's experts it has.
    """

    name: str
    kind: Kind
    experts: tuple[int, ...] = ()


class Routed(NamedTuple):
    """What a decoder layer with experts makes: the experts add to it, each for those who chose it.

    Attributes:
        hidden: What their outputs are added to, times the gates: ``(batch, seq, hidden)``.
        inputs: What they are given: ``(batch, seq, hidden)``.
        gates: The weights of the chosen ones: ``(batch, seq, k)``, float32.
        chosen: Which they are: ``(batch, seq, k)``, int32.
    """

    hidden: Float[Array, "batch seq hidden"]
    inputs: Float[Array, "batch seq hidden"]
    gates: Float[Array, "batch seq k"]
    chosen: Int[Array, "batch seq k"]


class Param(NamedTuple):
    """A parameter before any array exists.

    Attributes:
        shape: A matrix is (n_in, n_out), whatever way it lies in a file; a table (rows, width).
        role: ``matrix``: multiplied with; ``table``: rows are looked up, and a head multiplies with
            it; ``positions``: looked up only; ``norm`` and ``bias``: element by element.
        init: Standard deviation of a matrix or table as it is initialised; the constant value of a
            norm or bias.
        quantized: Stored in codes where weights are quantised.
        exact: Stored in float32, whatever is computed with: a few numbers that much hangs on.
    """

    shape: tuple[int, ...]
    role: Literal["matrix", "table", "positions", "norm", "bias"]
    init: float = 0.02
    quantized: bool = False
    exact: bool = False


def matrix(n_in: int, n_out: int, init: float = 0.02) -> Param:
    """What is multiplied with."""
    return Param((n_in, n_out), "matrix", init, quantized=True)


def table(rows: int, width: int, init: float = 0.02) -> Param:
    """A row for each token."""
    return Param((rows, width), "table", init, quantized=True)


def norm(width: int, init: float = 1.0) -> Param:
    """What a norm is scaled by."""
    return Param((width,), "norm", init)


def bias(width: int) -> Param:
    """What is added."""
    return Param((width,), "bias", 0.0)


class Source(NamedTuple):
    """Where a parameter lies in a published checkpoint (PyTorch's names and orientation).

    Attributes:
        key: The tensor's name; it begins with the first of the family's ``prefixes``, where it has
            one.
        transposed: The tensor is the parameter's transpose, as PyTorch's linear layers have it.
        rows: Of a fused tensor, the first and the last but one row that are this parameter; None:
            all of it.
        expert: Of a tensor that has something of all experts, whose it is along the first axis;
            None: it has no such axis.
    """

    key: str
    transposed: bool = False
    rows: tuple[int, int] | None = None
    expert: int | None = None


class Family(abc.ABC):
    """A model family. Stateless: whatever differs between its models is in their configs.

    Attributes:
        model_types: Its values of ``model_type`` in ``config.json``.
        presets: Hub name -> config, of the published sizes.
        published_as: The ``quantization_config`` that its presets are published with; empty: none.
        prefixes: What its tensors' names begin with: the first in :meth:`source`, any of them in a
            checkpoint.
    """

    model_types: tuple[str, ...]
    presets: Mapping[str, Config]
    published_as: Mapping[str, Any] = MappingProxyType({})
    prefixes: tuple[str, ...] = ("model.", "")

    @abc.abstractmethod
    def read(self, values: Mapping[str, Any]) -> Config:
        """The config of a ``config.json``, as transformers 4 or 5 writes it.

        Raises:
            ConfigError: a value out of range, or one that asks for what is not there.
        """

    @abc.abstractmethod
    def write(self, config: Any) -> dict[str, Any]:
        """A ``config.json`` that transformers, and :meth:`read`, read as ``config``."""

    def named(self, name: str) -> Config | None:
        """The preset ``name``: a hub name, or what stands behind its slash."""
        wanted = name.lower()
        for known, config in self.presets.items():
            if wanted in (known.lower(), known.lower().rpartition("/")[2]):
                return config
        return None

    def kind(self, config: Any, index: int) -> Kind:
        """Of decoder layer ``index``."""
        return Kind("decoder")

    def units(self, config: Any) -> tuple[Unit, ...]:
        """The layers that a schedule sees: ``embed``, ``layer_0`` ..., ``head``.

        The experts of ``layer_0`` follow it as ``layer_0_experts_0`` ...
        """
        found = [Unit("embed", Kind("embed"))]
        for index in range(config.num_hidden_layers):
            kind, name = self.kind(config, index), f"layer_{index}"
            found.append(Unit(name, kind))
            if kind.experts:
                some = self.experts_per_unit(config)
                for number, first in enumerate(range(0, kind.experts, some)):
                    own = tuple(range(first, min(first + some, kind.experts)))
                    few = Kind("experts", experts=len(own))
                    found.append(Unit(f"{name}_experts_{number}", few, own))
        return (*found, Unit("head", Kind("head")))

    def experts_per_unit(self, config: Any) -> int:
        """How many experts are loaded together: a divisor of their number, if it has one."""
        raise NotImplementedError(f"{type(self).__name__} has no experts")

    @abc.abstractmethod
    def params(self, config: Any, unit: Unit) -> dict[str, Param]:
        """What ``unit`` owns, ``module.leaf`` -> record; ``kernel`` is the leaf of a matrix.

        The token table is ``tokens`` of ``embed``; a head that is not tied has ``tokens``, too.
        """

    def borrows(self, config: Any, unit: Unit) -> tuple[str, ...]:
        """Flat names of what ``unit`` needs of other units: a tied head the token table."""
        tied = unit.kind.role == "head" and config.tie_word_embeddings
        return ("embed.tokens",) if tied else ()

    @abc.abstractmethod
    def source(self, config: Any, name: str) -> Source:
        """Where the parameter with the flat name ``name`` lies in a published checkpoint."""

    def room(self, config: Any, prompt_len: int) -> int:
        """Positions that a sequence with such a prompt may take, new tokens included."""
        most: int = config.max_position_embeddings
        return most

    def ignored(self, config: Any, key: str) -> bool:
        """Whether a checkpoint's tensor is one that nobody needs."""
        return key.endswith("rotary_emb.inv_freq")

    @abc.abstractmethod
    def embed(
        self, params: Params, rows: Float[Array, "batch seq embed"], at: Positions, config: Any
    ) -> Float[Array, "batch seq hidden"]:
        """Hidden states of the token table's ``rows``."""

    @abc.abstractmethod
    def before_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        at: Positions,
        config: Any,
        kind: Kind,
    ) -> tuple[
        Float[Array, "batch heads seq head_dim"],
        Float[Array, "batch kv_heads seq head_dim"],
        Float[Array, "batch kv_heads seq head_dim"],
    ]:
        """The scaled query, the key and the value."""

    def sinks(self, params: Params) -> Float[Array, " heads"] | None:
        """Of a decoder layer: each head's score without a value, which takes a share of the
        softmax; None: it has none."""
        return None

    @abc.abstractmethod
    def after_attention(
        self,
        params: Params,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
        config: Any,
        kind: Kind,
    ) -> Float[Array, "batch seq hidden"] | Routed:
        """The rest of a decoder layer: from the hidden states that it began with to the next.

        Of a layer with experts: all but what they do.
        """

    def expert(
        self, params: Params, inputs: Float[Array, "rows hidden"], config: Any
    ) -> Float[Array, "rows hidden"]:
        """One expert, of ``Routed.inputs`` of those that chose it, whatever their places.

        Args:
            params: Its own: ``expert_3.gate.kernel`` of a unit is ``params["gate"]["kernel"]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no experts")

    @abc.abstractmethod
    def head(
        self,
        params: Params,
        table: Float[Array, "vocab embed"] | Packed,
        hidden: Float[Array, "*dims hidden"],
        config: Any,
    ) -> Float[Array, "*dims vocab"]:
        """Logits (float32); ``table`` is the head's own or the one it borrows."""


def eos_token_ids(config: Config) -> tuple[int, ...]:
    """The tokens that end a text: none, one or several."""
    ids = config.eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def read_token_ids(values: Mapping[str, Any], name: str, default: Any, vocab: int) -> Any:
    """An entry of ``config.json`` or ``generation_config.json`` that names tokens.

    Returns:
        A token id, a tuple of several, or None for ``null``.

    Raises:
        ConfigError: neither.
    """
    found = values.get(name, default)
    if found is None:
        return None
    several = found if isinstance(found, (list, tuple)) else [found]
    for token in several:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ConfigError(
                f"{name} must be a token id, a list of them or null, got {reprlib.repr(found)}"
            )
        if not 0 <= token < vocab:
            raise ConfigError(
                f"{name} {reprlib.repr(token)} is outside the vocabulary (0 to {vocab - 1}); give "
                "ids of the model's tokens, or null where no token ends a text"
            )
    if not several:
        raise ConfigError(f"{name} is an empty list; give null where no token ends a text")
    return several[0] if len(several) == 1 else tuple(several)


def positive(config: Any, *names: str) -> None:
    """Refuses fields that are not positive integers.

    Raises:
        ConfigError: names the first.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value!r}")


def stays_small(config: Any) -> None:
    """Refuses sizes that no model has: what is derived from them takes memory, or minutes.

    Raises:
        ConfigError: names the field.
    """
    for field in dataclasses.fields(config):
        most = 1024 if field.name == "num_hidden_layers" else 1 << 31
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            raise ConfigError(f"{field.name} {value} is more than any model has (at most {most})")
