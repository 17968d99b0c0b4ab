"""What a schedule has to order: one block of work."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from itertools import pairwise

from scheduling.sizes import Sizes, touched

_NOT_NUMBERS = ("cached_layers", "done", "stages", "hosts", "sizes", "life", "experts")
# Of the experts of a unit so many are to be chosen for it to be loaded before that is known.
_MOST_OF_THEM = 0.9


@dataclasses.dataclass(frozen=True)
class Experts:
    """Layers whose tokens choose what computes them.

    A layer with experts is followed by units of them, which are loaded and freed like layers and
    computed over all batches that have come so far.

    Attributes:
        layers: The units of experts, by number.
        count: Experts of a layer, in all its units.
        chosen: How many of them a token chooses.
    """

    layers: frozenset[int]
    count: int
    chosen: int

    def touched(self, tokens: float) -> float:
        """The share of a layer's experts that any of ``tokens`` chooses, if all are alike."""
        return touched(self.chosen, self.count, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The shape of a block.

    Attributes:
        num_steps: Generated tokens; step 0 is prefill.
        num_layers: Units of the model: embedding, decoder layers, head.
        num_batches: Device batches that share each pass over the weights.
        cached_layers: Layers that keep a KV cache; None: all but the first and the last.
        weight_slots: How many layers' weights may be held at a time: one computing, the others
            loading ahead. ``cache_slots``, ``hidden_slots``: likewise for the cache and the hidden
            states of (layer, batch) cells.
        store_slots: How many results may wait to be stored, of each kind; a computation waits
            until there are fewer.
        device_batch_size: Requests of a batch. Descriptive, as ``prompt_len`` (tokens) is.
        done: The steps of each batch that were done before, and are left out; empty: none.
        stages: The first layer of each pipeline stage: a device with slots and streams of its own
            computes the layers from there to the next.
        num_groups: Groups of batches that go through the stages one behind another, each a pass
            over the weights; as many as there are batches, at most.
        hosts: Of each stage, the number of the machine that it is on; empty: all on one.
        life: Steps that a row takes at most, where rows come and go; None: all.
        experts: Of a model that has some.
        sizes: What its ops move, for cost models; two workloads are equal without them.
    """

    num_steps: int
    num_layers: int
    num_batches: int
    cached_layers: frozenset[int] | None = None
    weight_slots: int = 2
    cache_slots: int = 2
    hidden_slots: int = 2
    store_slots: int = 2
    device_batch_size: int = 1
    prompt_len: int = 1
    done: tuple[int, ...] = ()
    stages: tuple[int, ...] = (0,)
    num_groups: int = 1
    hosts: tuple[int, ...] = ()
    life: int | None = None
    experts: Experts | None = None
    sizes: Sizes | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _NOT_NUMBERS and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"{field.name} must be an integer of at least 1, got {value!r}")
        if self.done and (
            len(self.done) != self.num_batches
            or not all(type(n) is int and 0 <= n <= self.num_steps for n in self.done)
        ):
            raise ValueError(
                f"done must have {self.num_batches} numbers in 0..{self.num_steps}, got {self.done}"
            )
        self._check_stages()
        self._check_experts()
        if self.cached_layers is None:
            return
        try:
            cached = frozenset(self.cached_layers)
        except TypeError:
            cached = None
        if cached is None or not all(type(i) is int for i in cached):
            raise ValueError(
                f"cached_layers must be None or a set of layer numbers, got {self.cached_layers!r}"
            )
        outside = sorted(i for i in cached if not 0 <= i < self.num_layers)
        if outside:
            raise ValueError(f"cached_layers must lie in 0..{self.num_layers - 1}, got {outside}")
        object.__setattr__(self, "cached_layers", cached)

    def _check_stages(self) -> None:
        starts = self.stages
        if not (
            starts
            and starts[0] == 0
            and all(type(n) is int and n < self.num_layers for n in starts)
            and all(a < b for a, b in pairwise(starts))
        ):
            raise ValueError(
                f"stages must be ascending layers from 0 to {self.num_layers - 1}, got {starts}"
            )
        if self.hosts and not (
            len(self.hosts) == len(starts) and all(type(n) is int and n >= 0 for n in self.hosts)
        ):
            raise ValueError(f"hosts must be {len(starts)} numbers from 0 on, got {self.hosts}")

    def _check_experts(self) -> None:
        if self.experts is None:
            return
        layers, last = self.experts.layers, self.num_layers - 1
        wrong = []
        if layers and not 1 < min(layers) <= max(layers) < last:
            wrong = sorted(n for n in layers if not 1 < n < last)
        if wrong or not layers:
            raise ValueError(
                f"experts must be layers behind another and before the last of {self.num_layers}, "
                f"got {wrong or 'none'}"
            )
        apart = sorted(set(self.stages) & self.experts.layers)
        if apart:
            raise ValueError(f"a stage must not begin with experts, as {apart} would")

    @property
    def num_stages(self) -> int:
        """Devices that compute."""
        return len(self.stages)

    def stage_of(self, layer: int) -> int:
        """The stage that computes ``layer``."""
        return bisect.bisect_right(self.stages, layer) - 1

    def layers_of(self, stage: int) -> range:
        """The layers of ``stage``."""
        ends = *self.stages[1:], self.num_layers
        return range(self.stages[stage], ends[stage])

    def host_of(self, stage: int) -> int:
        """The machine that ``stage`` is on."""
        return self.hosts[stage] if self.hosts else 0

    @property
    def several_hosts(self) -> bool:
        """Whether not all stages are on one machine."""
        return len(set(self.hosts)) > 1

    def hands_over(self, layer: int) -> bool:
        """Whether what ``layer`` computes is for another stage: the last layer's tokens are."""
        return self.num_stages > 1 and (layer + 1 in self.stages or layer == self.num_layers - 1)

    def groups(self) -> list[range]:
        """The batches of each group; neighbours, which are alike, are in different ones."""
        count = min(self.num_groups, self.num_batches)
        return [range(first, self.num_batches, count) for first in range(count)]

    @property
    def gen_len(self) -> int:
        """Generated tokens: ``num_steps``."""
        return self.num_steps

    def first_step(self, batch: int) -> int:
        """The step with which ``batch`` begins."""
        return self.done[batch] if self.done else 0

    def has_cache(self, layer: int) -> bool:
        """Whether ``layer`` keeps a KV cache."""
        if self.cached_layers is None:
            return 0 < layer < self.num_layers - 1 and not self.has_experts(layer)
        return layer in self.cached_layers

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer`` is a unit of experts."""
        return self.experts is not None and layer in self.experts.layers

    def gives_hidden(self, layer: int) -> bool:
        """Whether the hidden states are whole behind ``layer``: else its experts come next."""
        return not self.has_experts(layer + 1)

    def router_of(self, layer: int) -> int:
        """The layer whose experts ``layer`` is a unit of."""
        return self._routers[layer]

    @functools.cached_property
    def _routers(self) -> list[int]:
        """Of each layer; a layer may have a hundred units of experts."""
        found: list[int] = []
        for layer in range(self.num_layers):
            found.append(found[-1] if self.has_experts(layer) else layer)
        return found

    def waits_for_choice(self, step: int, batches: Sequence[int]) -> bool:
        """Whether to load experts once it is known which: many will not be chosen."""
        if self.experts is None:
            return False
        tokens = len(batches) * self.device_batch_size * (1 if step else self.prompt_len)
        return self.experts.touched(tokens) < _MOST_OF_THEM
