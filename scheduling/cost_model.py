"""What each op costs on a machine, and what no schedule can undercut.

An op's work is a sequence of pieces, each on one resource: a link between tiers, or the device's
or the host's arithmetic. A pipeline stage has its own device and its own link to the host's memory;
a host's disk and arithmetic are shared by the stages on it. Ops on different streams that use one
resource at the same time share it; that is the simulator's business. Nothing here knows an order of
ops (paper, section 4.3 and appendix A.3, taken apart into single ops).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from scheduling.alike import Kinds, alike
from scheduling.hardware import Hardware
from scheduling.ops import (
    Attend,
    Barrier,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadWeights,
    Op,
    Project,
    StoreCache,
)
from scheduling.policy import Tier
from scheduling.sizes import Link, Sizes
from scheduling.workload import Workload

DEVICE, HOST = "device compute", "host compute"

Piece = tuple[str, float]


class Term(NamedTuple):
    """A part of an op's work.

    Attributes:
        constant: What of the hardware it is priced by, as ``Hardware.scaled`` takes it.
        resource: What it keeps busy.
        seconds: Alone on it.
    """

    constant: str
    resource: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The costs of a workload's ops.

    Raises:
        ValueError: the workload has no sizes.
    """

    workload: Workload
    hardware: Hardware

    def __post_init__(self) -> None:
        if self.workload.sizes is None:
            raise ValueError("the workload has no sizes: make it with LLM.workload or plan")

    @property
    def sizes(self) -> Sizes:
        """Of the workload."""
        assert self.workload.sizes is not None
        return self.workload.sizes

    def pieces(self, op: Op, *, unpack: bool = False, rest: bool = False) -> tuple[Piece, ...]:
        """(resource, seconds alone on it) of ``op``, one after another; empty: it is no work.

        Args:
            unpack: ``op`` is the first Compute since its layer was loaded, which dequantises it.
            rest: ``op`` is a Compute behind the Project of its cell.
        """
        if isinstance(op, (FreeWeights, Barrier)):
            return ()
        key = self.kinds.of(op), unpack, rest
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._pieces(op, unpack, rest)
        return known

    @functools.cached_property
    def kinds(self) -> Kinds:
        """Which of the ops cost the same: each kind is priced once."""
        return Kinds(self.workload)

    @functools.cached_property
    def _known(self) -> dict[object, tuple[Piece, ...]]:
        return {}

    def _pieces(self, op: Any, unpack: bool, rest: bool) -> tuple[Piece, ...]:
        found: dict[str, float] = {}
        names = self._names[self.workload.stage_of(op.layer)] if self._names else None
        for _, resource, seconds in self.terms(op, unpack=unpack, rest=rest):
            name = resource if names is None else names[resource]
            found[name] = found.get(name, 0.0) + seconds
        return tuple(found.items())

    @functools.cached_property
    def _names(self) -> list[dict[str, str]]:
        """By stage: what its resources are called; empty: by their plain names."""
        w = self.workload
        if w.num_stages == 1:
            return []
        shared = {HOST, Link.DISK_TO_HOST.value, Link.HOST_TO_DISK.value}
        every = [DEVICE, HOST, *(link.value for link in Link)]

        def name(resource: str, stage: int) -> str:
            if resource not in shared:
                return f"{resource} of stage {stage}"
            return f"{resource} of host {w.host_of(stage)}" if w.several_hosts else resource

        return [{r: name(r, stage) for r in every} for stage in range(w.num_stages)]

    def terms(self, op: Op, *, unpack: bool = False, rest: bool = False) -> list[Term]:
        """The same by what of the hardware each part is priced by."""
        batch = getattr(op, "batch", None)
        if batch is not None and getattr(op, "step", 0) >= self.sizes.batches[batch].num_steps:
            return []
        if isinstance(op, Compute):
            return self._compute(op, unpack, rest)
        if isinstance(op, Project):
            return self._project(op, unpack)
        if isinstance(op, Attend):
            return self._attend(op)
        if isinstance(op, ComputeExperts):
            return self._experts(op, unpack)
        kind = "cache" if isinstance(op, (LoadCache, StoreCache)) else "hidden"
        found = []
        for link, nbytes in self.sizes.moved(op).items():
            name = self._constant(link, kind, op)
            rate = getattr(self.hardware, name)
            if rate is None and link is Link.STAGE_TO_STAGE:
                name, rate = "host_to_device", self.hardware.host_to_device
            if rate is not None:
                found.append(Term(name, link.value, nbytes / rate))
                found.append(Term("overhead", link.value, self.hardware.overhead))
            latency = _LATENCIES.get(link)
            if latency is not None and (each := getattr(self.hardware, latency)):
                found.append(Term(latency, link.value, each * self.sizes.accesses(op)))
        if found and self.hardware.load_overhead and isinstance(op, (LoadWeights, LoadChosen)):
            found.append(Term("load_overhead", DEVICE, self.hardware.load_overhead))
        return found

    def _constant(self, link: Link, kind: str, op: Op) -> str:
        """The field of the hardware that prices what ``op`` moves over ``link``."""
        h = self.hardware
        if kind == "cache" and link is Link.DISK_TO_HOST and h.disk_to_host_cache is not None:
            return "disk_to_host_cache"
        if isinstance(op, LoadCache) and link is Link.HOST_TO_DEVICE:
            # What comes from the disk is read into a pinned buffer at once.
            at_home = self.sizes.cache[op.layer, op.batch].tier is Tier.HOST
            if at_home and h.host_to_device_cache is not None:
                return "host_to_device_cache"
        return _CONSTANTS[link, kind]

    def apart(self, op: Project | Attend | Compute) -> bool:
        """Whether the parts of the layer are computed apart; else its Compute does all."""
        cell = self.sizes.cache[op.layer, op.batch]
        return cell.apart and not self.sizes.batches[op.batch].begins(op.step)

    def _project(self, op: Project, unpack: bool) -> list[Term]:
        h, sizes, rows = self.hardware, self.sizes, self.sizes.batches[op.batch].rows
        if not self.apart(op):
            return []
        found = self._overhead()
        if flops := rows * self._query_flops(op.layer):
            found.append(Term(f"matmul@{rows}", DEVICE, flops / h.matmul_rate(rows)))
        if unpack and sizes.dense[op.layer]:
            found.append(Term("dequantize", DEVICE, sizes.dense[op.layer] / h.dequantize))
        return found

    def _query_flops(self, layer: int) -> float:
        return self.sizes.query_flops[layer] if self.sizes.query_flops else 0.0

    def _attend(self, op: Attend) -> list[Term]:
        if not self.apart(op):
            return []
        found = self._attention(op)
        return [*self._overhead(found[0].resource), *found]

    def _attention(self, op: Attend | Compute) -> list[Term]:
        """To the cache."""
        h, sizes, cell = self.hardware, self.sizes, self.sizes.cache[op.layer, op.batch]
        filled = cell.kept(sizes.batches[op.batch].cached(op.step))
        read = filled * (cell.dense_nbytes or cell.position_nbytes)
        # Where the device's memory is the host's, so are its processors.
        where = HOST if cell.hosted and h.host_to_device is not None else DEVICE
        name = "host_attention" if cell.hosted else "cached_attention"
        found = [Term(name, where, read / getattr(h, name))]
        if unpacked := sizes.unpacked(op):
            found.append(Term("dequantize", where, unpacked / h.dequantize))
        return found

    def _compute(self, op: Compute, unpack: bool, rest: bool) -> list[Term]:
        h, sizes = self.hardware, self.sizes
        rest = rest and self.apart(op)
        before = self._query_flops(op.layer) if rest else 0.0
        batch = sizes.batches[op.batch]
        positions = batch.positions(op.step)
        head = op.layer == self.workload.num_layers - 1
        come, length = batch.newcomers(op.step)
        found = self._overhead()
        if op.layer == 0 and h.step_overhead:
            found.append(Term("step_overhead", DEVICE, h.step_overhead))
        for count, each, done in ((batch.rows, positions, before), (come, length, 0.0)):
            rows = count * (1 if head else each)  # logits: of the last position only
            if flops := rows * (sizes.matmul_flops[op.layer] - done):
                found.append(Term(f"matmul@{rows}", DEVICE, flops / h.matmul_rate(rows)))
        if unpack and sizes.dense[op.layer]:
            found.append(Term("dequantize", DEVICE, sizes.dense[op.layer] / h.dequantize))
        if not self.workload.has_cache(op.layer):
            return found
        if h.elementwise:
            values = (batch.rows * positions + come * length) * sizes.hidden_size
            found.append(Term("elementwise", DEVICE, values * h.elementwise))
        begins = batch.begins(op.step)
        prompts = (batch.rows if begins else 0, positions), (come, length)
        window = sizes.windows.get(op.layer, positions + length)
        if pairs := sum(count * each * min(each, window) for count, each in prompts):
            seconds = 4.0 * pairs * sizes.hidden_size / h.attention
            found.append(Term("attention", DEVICE, seconds))
        return found if begins or rest else found + self._attention(op)

    def _overhead(self, where: str = DEVICE) -> list[Term]:
        """Of a computation."""
        h = self.hardware
        found = [Term("overhead", where, h.overhead)]
        if h.compute_overhead:
            found.append(Term("compute_overhead", where, h.compute_overhead))
        return found

    def _experts(self, op: ComputeExperts, unpack: bool) -> list[Term]:
        h, sizes = self.hardware, self.sizes
        assert sizes.experts is not None
        tokens, found = sizes.tokens(op), self._overhead()
        for count, tile in zip(tokens, sizes.experts.tiles, strict=True):
            if count:
                rows = sizes.experts.units[op.layer] * sizes.experts.rows(count, tile)
                flops = rows * sizes.matmul_flops[op.layer]
                found.append(Term(f"matmul@{tile}", DEVICE, flops / h.matmul_rate(tile)))
        if unpack and sizes.dense[op.layer]:
            nbytes = sizes.touched(op) * sizes.dense[op.layer]
            found.append(Term("dequantize", DEVICE, nbytes / h.dequantize))
        return found if sum(tokens) else []

    def lower_bound(self) -> dict[str, float]:
        """Seconds that any schedule of the workload needs of each resource; the largest bounds it.

        A pass over the layers finds at most ``weight_slots`` of a stage's loaded. The cache and
        the hidden states move as every schedule moves them; each cell is computed once.
        """
        w, sizes = self.workload, self.sizes
        total: dict[str, float] = {}

        def add(pieces: tuple[Piece, ...], times: float = 1.0) -> None:
            for resource, seconds in pieces:
                total[resource] = total.get(resource, 0.0) + times * seconds

        kept: dict[tuple[int, str], list[float]] = {}
        first = min(w.first_step(b) for b in range(w.num_batches))
        steps = w.num_steps - first
        self._add_experts(first, add)
        for layer in range(w.num_layers):
            if w.has_experts(layer):
                continue
            load = self.pieces(LoadWeights(0, layer))
            add(load, steps)
            for resource, seconds in load:
                kept.setdefault((w.stage_of(layer), resource), []).append(seconds)
        for (_, resource), each in kept.items():
            spared = sum(sorted(each, reverse=True)[: w.weight_slots])
            total[resource] -= (steps - 1) * spared
        for (layer, of), count in alike(w, self.kinds).items():
            if of is None or w.has_experts(layer):
                continue
            for step in range(w.first_step(of), sizes.batches[of].num_steps):
                add(self.pieces(Compute(step, layer, of)), count)
                if w.has_cache(layer):
                    add(self.pieces(StoreCache(step, layer, of)), count)
                    if step:
                        add(self.pieces(LoadCache(step, layer, of)), count)
        return total

    def _add_experts(self, first: int, add: Callable[[tuple[Piece, ...], float], None]) -> None:
        """Of the units of experts what every schedule loads and computes, step by step."""
        w = self.workload
        units: dict[int, list[int]] = {}  # those that are alike
        for layer in range(w.num_layers):
            if w.has_experts(layer):
                units.setdefault(self.kinds.weights[layer], []).append(layer)
        if not units:
            return
        # Most steps are alike too: by how many tokens they have for the experts.
        steps: dict[tuple[float, float], list[int]] = {}
        for step in range(first, w.num_steps):
            there = self._there(step)
            steps.setdefault(self.sizes.tokens(LoadChosen(step, 0, there)), []).append(step)
        for (step, *others), layers in itertools.product(steps.values(), units.values()):
            for op in LoadChosen, ComputeExperts:
                each = self.pieces(op(step, layers[0], self._there(step)))
                add(each, (1 + len(others)) * len(layers))

    def _there(self, step: int) -> tuple[int, ...]:
        """The batches that have begun by ``step``."""
        batches = range(self.workload.num_batches)
        return tuple(b for b in batches if self.workload.first_step(b) <= step)


_LATENCIES = {Link.DISK_TO_HOST: "disk_read_latency", Link.HOST_TO_DISK: "disk_write_latency"}
_CONSTANTS = {
    (Link.DISK_TO_HOST, "cache"): "disk_to_host",
    (Link.DISK_TO_HOST, "hidden"): "disk_to_host",
    (Link.HOST_TO_DEVICE, "cache"): "host_to_device",
    (Link.HOST_TO_DEVICE, "hidden"): "host_to_device",
    (Link.DEVICE_TO_HOST, "cache"): "device_to_host_cache",
    (Link.DEVICE_TO_HOST, "hidden"): "device_to_host_hidden",
    (Link.HOST_TO_DISK, "cache"): "host_to_disk_cache",
    (Link.HOST_TO_DISK, "hidden"): "host_to_disk_hidden",
    (Link.STAGE_TO_STAGE, "hidden"): "stage_to_stage",
}


def bound(seconds: Mapping[str, float]) -> tuple[str, float]:
    """The resource that bounds, and its seconds."""
    return max(seconds.items(), key=lambda item: item[1], default=("nothing", 0.0))
