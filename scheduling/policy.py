"""The choices that shape a run: the block, and where the three kinds of tensors lie."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from collections.abc import Mapping
from typing import Any


class Tier(enum.Enum):
    """Where a tensor lives."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    __hash__ = object.__hash__  # members are singletons; the enum's own is slow in Python


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Shares of one kind of tensor per tier, in percent, summing to 100.

    Raises:
        ValueError: a share outside [0, 100], or another sum.
    """

    device: float = 100
    host: float = 0
    disk: float = 0

    def __post_init__(self) -> None:
        for tier, share in self.shares().items():
            if not (_is_number(share) and 0 <= share <= 100):
                raise ValueError(f"{tier.value} must be a percentage in [0, 100], got {share!r}")
        total = sum(self.shares().values())
        if not math.isclose(total, 100, abs_tol=1e-6):
            raise ValueError(
                f"the shares must sum to 100, got device {self.device} + host {self.host} + "
                f"disk {self.disk} = {total}"
            )

    @classmethod
    def from_percent(cls, name: str, device: float, host: float) -> Split:
        """Two of FlexGen's numbers; the rest is on disk.

        Args:
            name: Of what is placed, for messages.

        Raises:
            ValueError: shares that exceed 100 or leave [0, 100], with the name.
        """
        disk = 100 - device - host
        if disk < -1e-6:
            raise ValueError(
                f"{name}: {device} percent on the device and {host} on the host exceed 100"
            )
        try:
            # 100 - 64.4 - 35.6 is a little less than nothing
            return cls(device=device, host=host, disk=max(disk, 0))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def shares(self) -> dict[Tier, float]:
        """Percent by tier."""
        return {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.DISK: self.disk}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Block shape, placement and methods of a run (paper, section 4.2).

    Attributes:
        device_batch_size: Requests that one kernel launch sees.
        num_device_batches: Such batches in a block; they share each pass over the weights.
        weights: Where weights lie. ``cache``: the KV cache. ``hidden``: activations between layers.
        experts: Where the experts of a sparse model lie; None: where the other weights do.
        overlap: Load and store while computing.
        host_attention: Compute attention next to the cache on the host.
        weight_bits: 4 or 8: group-wise quantised weights. ``cache_bits``: the cache likewise.
        group_size: The most elements that share a scale, where anything is quantised.
        attention_sparsity: Share of the cached positions attended, in (0, 1].
        num_stages: Devices that the layers are pipelined over.
        num_groups: Of the batches of a block, which go through the stages one group behind
            another, each a pass over the weights; None: as many as there are stages, or, where all
            weights lie on the devices, batches.
        refill: Requests that wait take the places of those that have finished, while the others go
            on; and those who are left in the end are put together into fewer batches. False: a
            block begins and ends with the same requests, as in the paper.

    Raises:
        ValueError: a value out of range.
    """

    device_batch_size: int = 8
    num_device_batches: int = 4
    weights: Split = Split()
    cache: Split = Split()
    hidden: Split = Split()
    experts: Split | None = None
    overlap: bool = True
    host_attention: bool = False
    weight_bits: int | None = None
    cache_bits: int | None = None
    group_size: int = 64
    attention_sparsity: float = 1.0
    num_stages: int = 1
    num_groups: int | None = None
    refill: bool = True

    def __post_init__(self) -> None:
        for name in ("device_batch_size", "num_device_batches", "num_stages", "num_groups"):
            value = getattr(self, name)
            if name == "num_groups" and value is None:
                continue
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))  # NumPy's integers are no JSON
        for name in ("weights", "cache", "hidden", "experts"):
            if name == "experts" and self.experts is None:
                continue
            if not isinstance(getattr(self, name), Split):
                raise ValueError(
                    f"{name} must be a Split(device=, host=, disk=), got {getattr(self, name)!r}"
                )
        for name in ("overlap", "host_attention", "refill"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("weight_bits", "cache_bits"):
            bits = getattr(self, name)
            if bits is not None and not (_is_int(bits) and bits in (4, 8)):
                raise ValueError(f"{name} must be None, 4 or 8, got {bits!r}")
        if not _is_int(self.group_size) or self.group_size < 2:
            raise ValueError(
                f"group_size must be an integer of at least 2, got {self.group_size!r}"
            )
        sparsity = self.attention_sparsity
        if not (_is_number(sparsity) and 0 < sparsity <= 1):
            raise ValueError(f"attention_sparsity must be a number in (0, 1], got {sparsity!r}")

    @property
    def block_size(self) -> int:
        """Requests of a block."""
        return self.device_batch_size * self.num_device_batches

    @property
    def groups(self) -> int:
        """``num_groups``, chosen where it is None."""
        if self.num_groups is not None:
            return self.num_groups
        placed = [self.weights] if self.experts is None else [self.weights, self.experts]
        if self.num_stages > 1 and all(split.device == 100 for split in placed):
            return max(self.num_stages, self.num_device_batches)
        return self.num_stages

    @classmethod
    def from_percent(
        cls, wd: float, wh: float, cd: float, ch: float, hd: float, hh: float, **choices: Any
    ) -> Policy:
        """FlexGen's six numbers: weights, cache, hidden on device and on host; the rest on disk.

        Raises:
            ValueError: shares that exceed 100 or leave [0, 100], with their name.
        """
        return cls(
            weights=Split.from_percent("weights", wd, wh),
            cache=Split.from_percent("cache", cd, ch),
            hidden=Split.from_percent("hidden", hd, hh),
            **choices,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain nested dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Policy:
        """The inverse of :meth:`to_json`; fields that are left out keep their defaults.

        Raises:
            ValueError: an unknown field, by name, or a value out of range.
        """
        given = dict(_known(cls, values))
        for name in ("weights", "cache", "hidden", "experts"):
            if given.get(name) is not None:
                given[name] = Split(**_known(Split, given[name]))
        return cls(**given)


def _known(cls: Any, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"expected a JSON object of {cls.__name__} fields, got {values!r}")
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(
            f"unknown {cls.__name__} field {', '.join(map(repr, unknown))}; "
            f"known: {', '.join(names)}"
        )
    return values
