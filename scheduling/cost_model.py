"""What each op costs on a machine, and what no schedule can undercut.

An op's work is a sequence of pieces, each on one resource: a link between tiers, or the device's
or the host's arithmetic. Ops on different streams that use one resource at the same time share it;
that is the simulator's business. Nothing here knows an order of ops (paper, section 4.3 and
appendix A.3, taken apart into single ops).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from scheduling.hardware import Hardware
from scheduling.ops import Compute, LoadCache, LoadWeights, Op, StoreCache
from scheduling.policy import Tier
from scheduling.sizes import Link, Sizes
from scheduling.workload import Workload

DEVICE, HOST = "device compute", "host compute"

Piece = tuple[str, float]


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

    def pieces(self, op: Op, *, unpack: bool = False) -> tuple[Piece, ...]:
        """(resource, seconds alone on it) of ``op``, one after another; empty: it is no work.

        Args:
            unpack: ``op`` is the first Compute since its layer was loaded, which dequantises it.
        """
        if isinstance(op, Compute):
            return self._compute(op, unpack)
        batch = getattr(op, "batch", None)
        if batch is not None and getattr(op, "step", 0) >= self.sizes.batches[batch].num_steps:
            return ()
        kind = "cache" if isinstance(op, (LoadCache, StoreCache)) else "hidden"
        return tuple(
            (link.value, nbytes / rate + self.hardware.overhead)
            for link, nbytes in self.sizes.moved(op).items()
            if (rate := self._rate(link, kind)) is not None
        )

    def _rate(self, link: Link, kind: str) -> float | None:
        h = self.hardware
        match link:
            case Link.DISK_TO_HOST:
                return h.disk_to_host
            case Link.HOST_TO_DEVICE:
                return h.host_to_device
            case Link.DEVICE_TO_HOST:
                return h.device_to_host_cache if kind == "cache" else h.device_to_host_hidden
            case Link.HOST_TO_DISK:
                return h.host_to_disk_cache if kind == "cache" else h.host_to_disk_hidden

    def _compute(self, op: Compute, unpack: bool) -> tuple[Piece, ...]:
        h, sizes = self.hardware, self.sizes
        batch = sizes.batches[op.batch]
        if op.step >= batch.num_steps:
            return ()
        positions = batch.positions(op.step)
        head = op.layer == self.workload.num_layers - 1
        rows = batch.rows * (1 if head else positions)  # logits: of the last position only
        flops = rows * sizes.matmul_flops[op.layer]
        device = h.overhead + (flops / h.matmul_rate(rows) if flops else 0.0)
        if unpack:
            device += sizes.dense[op.layer] / h.dequantize
        host = 0.0
        if self.workload.has_cache(op.layer):
            if op.step == 0:
                pairs = batch.rows * positions * positions
                device += 4.0 * pairs * sizes.hidden_size / h.attention
            else:
                cell = sizes.cache[op.layer, op.batch]
                read = batch.cached(op.step) * (cell.dense_nbytes or cell.position_nbytes)
                unpacked = sizes.unpacked(op) / h.dequantize
                if cell.hosted:
                    host = read / h.host_attention + unpacked
                else:
                    device += read / h.cached_attention + unpacked
        return ((DEVICE, device), (HOST, host)) if host else ((DEVICE, device),)

    def peak_nbytes(self) -> dict[Tier, int]:
        """The most that lies in each tier: weights, cache, hidden states; on the device the slots.

        The slots of the weights hold what is read from disk, and what comes from the host if that
        has to move; of the dense copies there is one for the layers and one for the head, and one
        of a cell of the cache.
        """
        w, sizes = self.workload, self.sizes
        peak = {tier: sizes.resident.get(tier, 0) for tier in Tier}
        cells: list[int] = []
        for (_, number), cell in sizes.cache.items():
            batch = sizes.batches[number]
            nbytes = cell.position_nbytes * batch.capacity
            peak[cell.tier] += nbytes
            host_moves = self.hardware.host_to_device is not None and cell.sent > 0
            if cell.tier is Tier.DISK or (cell.tier is Tier.HOST and host_moves):
                cells.append(nbytes)
        hidden = [b.hidden_nbytes * b.prompt_len for b in sizes.batches]
        for batch, nbytes in zip(sizes.batches, hidden, strict=True):
            peak[batch.hidden_tier] += nbytes
        shared = self.hardware.host_to_device is None
        moved = sorted(
            (
                by.get(Tier.DISK, 0) + (0 if shared else by.get(Tier.HOST, 0))
                for by in sizes.weights
            ),
            reverse=True,
        )
        away = [
            nbytes
            for batch, nbytes in zip(sizes.batches, hidden, strict=True)
            if batch.hidden_tier is Tier.DISK or (batch.hidden_tier is Tier.HOST and not shared)
        ]
        slots = w.weight_slots * moved[0] + w.hidden_slots * max(away, default=0)
        slots += w.cache_slots * max(cells, default=0)
        unpacked = max(
            (
                c.dense_nbytes * sizes.batches[number].capacity
                for (_, number), c in sizes.cache.items()
            ),
            default=0,
        )
        peak[Tier.DEVICE] += slots + max(sizes.dense[:-1], default=0) + sizes.dense[-1] + unpacked
        return peak
        return peak

    def lower_bound(self) -> dict[str, float]:
        """Seconds that any schedule of the workload needs of each resource; the largest bounds it.

        A pass over the layers finds at most ``weight_slots`` of them loaded. The cache and the
        hidden states move as every schedule moves them; each cell is computed once.
        """
        w, sizes = self.workload, self.sizes
        total: dict[str, float] = {}

        def add(pieces: tuple[Piece, ...], times: float = 1.0) -> None:
            for resource, seconds in pieces:
                total[resource] = total.get(resource, 0.0) + times * seconds

        loads = [self.pieces(LoadWeights(0, layer)) for layer in range(w.num_layers)]
        kept: dict[str, list[float]] = {}
        for load in loads:
            add(load, w.num_steps)
            for resource, seconds in load:
                kept.setdefault(resource, []).append(seconds)
        for resource, each in kept.items():
            spared = sum(sorted(each, reverse=True)[: w.weight_slots])
            total[resource] -= (w.num_steps - 1) * spared
        for number, batch in enumerate(sizes.batches):
            for step in range(batch.num_steps):
                for layer in range(w.num_layers):
                    add(self.pieces(Compute(step, layer, number)))
                    if w.has_cache(layer):
                        add(self.pieces(StoreCache(step, layer, number)))
                        if step:
                            add(self.pieces(LoadCache(step, layer, number)))
        return total


def bound(seconds: Mapping[str, float]) -> tuple[str, float]:
    """The resource that bounds, and its seconds."""
    return max(seconds.items(), key=lambda item: item[1], default=("nothing", 0.0))
