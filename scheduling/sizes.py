"""What the ops of a workload move over each link, and what computing has to unpack.

The sizes come from whoever knows the model; quantisation, sparse attention and attention on the
host are differences of size here, not cases.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from scheduling.cache_cells import CacheCell, Cells
from scheduling.layer_weights import LayerWeights
from scheduling.ops import (
    Attend,
    Compute,
    ComputeExperts,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Op,
    StoreCache,
    StoreHidden,
)
from scheduling.policy import Tier


class Link(enum.Enum):
    """A way between two tiers, or two devices. What goes from disk to device takes two of them."""

    DISK_TO_HOST = "disk to host"
    HOST_TO_DEVICE = "host to device"
    DEVICE_TO_HOST = "device to host"
    HOST_TO_DISK = "host to disk"
    STAGE_TO_STAGE = "stage to stage"

    __hash__ = object.__hash__  # members are singletons; the enum's own is slow in Python


Moved = dict[Link, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Of a model with experts.

    Attributes:
        units: Layer -> how many experts it is a unit of.
        count: Of a layer, in all its units.
        chosen: How many of them a token chooses.
        tiles: Rows that an expert multiplies with at a time: of decode steps, and of prompts.
    """

    units: Mapping[int, int]
    count: int
    chosen: int
    tiles: tuple[int, int]

    def touched(self, tokens: float) -> float:
        """The share of the experts that any of ``tokens`` chooses, if all are alike."""
        return touched(self.chosen, self.count, tokens)

    def rows(self, tokens: float, tile: int) -> float:
        """Rows that an expert multiplies with, if ``tokens`` choose: whole tiles, on average."""
        mean = tokens * self.chosen / self.count
        if mean > 64 * tile:
            return mean + tile / 2
        # Tiles of a Poisson number: one for each multiple of ``tile`` that it exceeds.
        tiles, below, each = 0.0, 0.0, math.exp(-mean) if mean < 700 else 0.0
        if each == 0.0:
            return mean + tile / 2
        for number in range(math.ceil(mean + 12 * math.sqrt(mean) + 12)):
            if number % tile == 0:
                tiles += 1.0 - below - each
            below += each
            each *= mean / (number + 1)
        return tiles * tile


def touched(chosen: int, count: int, tokens: float) -> float:
    """The share of ``count`` experts that any of ``tokens`` chooses, each so many of them."""
    return 1.0 - (1.0 - chosen / count) ** tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """One batch of a block.

    Attributes:
        rows: Requests, empty rows included.
        prompt_len: Positions of prefill.
        capacity: Positions that there is room for in its cache.
        num_steps: Its own, at most the workload's.
        hidden_tier: Where its hidden states lie between layers.
        hidden_nbytes: Of one position of all its rows.
        workspace: Bytes that computing it takes beside what is kept, at most.
        routed_nbytes: Of one position of all its rows, what waits for experts on the device.
        stride: Decode steps that one stands for: itself, but in estimates.
        begun: (step, positions) where it begins anew, with other prompts in all its rows.
        joined: (step, rows, positions of each) where newcomers' prompts are computed beside the
            others' step.
        resized: (step, positions) where its cells begin to have another capacity, of which all is
            read; empty: they have their whole capacity, of which what is filled is read.
        longest_prompt: Positions of the longest prompt that may come; 0: that of the prefill.
        standing: Positions in its cache at any decode step, on average, where rows come and go
            and few steps stand for many; None: those of the steps so far.
    """

    rows: int
    prompt_len: int
    capacity: int
    num_steps: int
    hidden_tier: Tier
    hidden_nbytes: int
    workspace: int = 0
    routed_nbytes: int = 0
    stride: float = 1.0
    begun: tuple[tuple[int, int], ...] = ()
    joined: tuple[tuple[int, int, int], ...] = ()
    resized: tuple[tuple[int, int], ...] = ()
    longest_prompt: int = 0
    standing: int | None = None

    @property
    def largest_hidden_nbytes(self) -> int:
        """Of all the positions that a step may compute."""
        return self.hidden_nbytes * max(self.prompt_len, self.longest_prompt)

    @functools.cached_property
    def _begun(self) -> dict[int, int]:
        return {0: self.prompt_len, **dict(self.begun)}

    @functools.cached_property
    def _joined(self) -> dict[int, tuple[int, int]]:
        return {step: (rows, positions) for step, rows, positions in self.joined}

    def begins(self, step: int) -> bool:
        """Whether ``step`` computes whole prompts."""
        return step in self._begun

    def cached(self, step: int) -> int:
        """Positions in the cache that are read when ``step`` begins; a ring keeps the last ones."""
        if self.resized and step not in self._begun:
            return self.resized[bisect.bisect_right(self._since, step) - 1][1]
        return self.appended(step)

    def appended(self, step: int) -> int:
        """Positions so far when ``step`` begins."""
        if step in self._begun:
            return 0
        if self.standing is not None:
            return self.standing
        if not self.begun:
            return self.prompt_len + int((step - 0.5) * self.stride)
        begun = max(s for s in self._begun if s < step)
        return self._begun[begun] + step - begun - 1

    def columns(self, step: int) -> int:
        """Positions so far when ``step`` begins, with those that a longer prompt would take."""
        begun = self._begun[max(s for s in self._begun if s < step)]
        return self.appended(step) + max(0, self.longest_prompt - begun)

    @functools.cached_property
    def _since(self) -> list[int]:
        return [step for step, _ in self.resized]

    def moves(self, step: int) -> bool:
        """Whether ``step`` leaves its cells with another capacity: what is kept moves."""
        return not self.begins(step) and step + 1 in self._since

    def positions(self, step: int) -> int:
        """Positions that ``step`` computes of each row; newcomers come on top."""
        return self._begun.get(step, 1)

    def newcomers(self, step: int) -> tuple[int, int]:
        """How many rows come with ``step``, and the positions of each."""
        return self._joined.get(step, (0, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What there is to move, in bytes.

    Attributes:
        weights: Per layer, tier -> bytes that a load moves, as they are stored.
        dense: Per layer, bytes of the arrays that are made of stored codes, once per load.
        batches: The batches of the block.
        cache: (layer, batch) -> its cell.
        resident: Bytes of weights per tier, of each stage.
        matmul_flops: Per layer, FLOP of its matrix products per position.
        query_flops: Of these, per layer, what comes before attention; empty: nothing.
        hidden_size: Width of a query or a key, over all heads: attention's FLOP are four times it
            per pair of positions.
        chunk_positions: What the cache on disk is written and read by; newer positions wait in
            host memory.
        reads: Per layer, how many accesses of the disk a load is; empty: none.
        borders: Layers whose hidden states the next stage takes: whether on another host.
        windows: Layer -> positions that each position of it attends to; no entry: all before it.
        experts: Of a model that has some; ``matmul_flops`` of their layers are of one expert and a
            position that chose it.
    """

    weights: Sequence[Mapping[Tier, int]]
    dense: tuple[int, ...]
    batches: tuple[BatchSizes, ...]
    cache: Mapping[tuple[int, int], CacheCell]
    resident: tuple[Mapping[Tier, int], ...]
    matmul_flops: tuple[float, ...]
    hidden_size: int
    chunk_positions: int = 1
    query_flops: tuple[float, ...] = ()
    reads: tuple[int, ...] = ()
    borders: Mapping[int, bool] = dataclasses.field(default_factory=dict)
    windows: Mapping[int, int] = dataclasses.field(default_factory=dict)
    experts: ExpertSizes | None = None

    @functools.cached_property
    def cells(self) -> Cells:
        """:attr:`cache` by kinds."""
        return Cells.of(self.cache, len(self.weights), len(self.batches))

    @functools.cached_property
    def loads(self) -> LayerWeights:
        """:attr:`weights` by kinds."""
        return LayerWeights.of(self.weights)

    def tokens(self, op: LoadChosen | ComputeExperts) -> tuple[float, float]:
        """Positions that choose: those that ``op``'s batches decode, and those of prompts."""
        decoded = prompts = 0.0
        for batch in (self.batches[number] for number in op.batches):
            if op.step >= batch.num_steps:
                continue
            come, length = batch.newcomers(op.step)
            prompts += come * length
            if batch.begins(op.step):
                prompts += batch.rows * batch.positions(op.step)
            else:
                decoded += batch.rows
        return decoded, prompts

    def touched(self, op: LoadChosen | ComputeExperts) -> float:
        """The share of a unit's experts that is computed with."""
        assert self.experts is not None
        return self.experts.touched(sum(self.tokens(op)))

    def accesses(self, op: Op) -> int:
        """How often ``op`` accesses the disk: a cell is one file."""
        if isinstance(op, LoadWeights):
            return self.reads[op.layer] if self.reads else 0
        if isinstance(op, LoadChosen):
            return round(self.touched(op) * self.reads[op.layer]) if self.reads else 0
        moved = self.moved(op)
        return int(Link.DISK_TO_HOST in moved or Link.HOST_TO_DISK in moved)

    def moved(self, op: Op) -> Moved:
        """Bytes that ``op`` moves, by link; links that it does not use are left out."""
        match op:
            case LoadWeights():
                return _inward(self.weights[op.layer])
            case LoadChosen():
                share = self.touched(op)
                moved = _inward(self.weights[op.layer])
                return _links({link: round(share * nbytes) for link, nbytes in moved.items()})
            case LoadCache() if op.step and (op.layer, op.batch) in self.cache:
                cell, batch = self.cache[op.layer, op.batch], self.batches[op.batch]
                filled = cell.kept(batch.cached(op.step))
                whole = self._whole(filled) if cell.tier is Tier.DISK else filled
                if batch.resized:
                    # A ring that has gone round is read as a whole, else what is written of it.
                    columns = batch.columns(op.step)
                    whole = filled if columns >= filled else self._whole(columns)
                return _links(
                    {
                        Link.DISK_TO_HOST: _if(cell.tier is Tier.DISK, cell, whole, cell.loaded),
                        Link.HOST_TO_DEVICE: _if(
                            cell.tier is not Tier.DEVICE, cell, filled, cell.sent
                        ),
                    }
                )
            case StoreCache() if (op.layer, op.batch) in self.cache:
                cell, batch = self.cache[op.layer, op.batch], self.batches[op.batch]
                if op.step + 1 >= batch.num_steps:
                    return {}  # nobody will read it
                # Of newcomers, whole prompts of some rows.
                come, length = batch.newcomers(op.step)
                new = cell.kept(batch.positions(op.step)) + come / batch.rows * cell.kept(length)
                read, written = self._on_disk(cell, batch, op.step)
                return _links(
                    {
                        Link.DISK_TO_HOST: _if(cell.tier is Tier.DISK, cell, read),
                        Link.DEVICE_TO_HOST: _if(cell.tier is not Tier.DEVICE, cell, new),
                        Link.HOST_TO_DISK: _if(cell.tier is Tier.DISK, cell, written),
                    }
                )
            case LoadHidden() | StoreHidden():
                return self._hidden(op)
            case _:
                return {}

    def buffered(self, cell: CacheCell) -> int:
        """Bytes of host memory in which a cell on disk collects a chunk."""
        return cell.position_nbytes * self.chunk_positions if cell.tier is Tier.DISK else 0

    def _on_disk(self, cell: CacheCell, batch: BatchSizes, step: int) -> tuple[int, int]:
        """Positions that storing what ``step`` has made reads and writes, if the cell is there."""
        new, filled = cell.kept(batch.positions(step)), batch.appended(step)
        later = cell.kept(batch.cached(step + 1)) if batch.resized else 0
        if batch.resized and batch.begins(step):
            return 0, min(later, self._whole(batch.columns(step + 1)))
        read = written = 0
        if batch.moves(step):
            read, written = cell.kept(batch.cached(step)), later
        come, length = batch.newcomers(step)
        if come:  # the chunks of all rows
            written += self._whole(cell.kept(length))
        if step and (batch.stride > 1 or batch.standing is not None):
            return read, written + new  # on average
        return read, written + self._whole(filled + new) - self._whole(filled)

    def _whole(self, positions: int) -> int:
        return positions // self.chunk_positions * self.chunk_positions

    def _hidden(self, op: LoadHidden | StoreHidden) -> Moved:
        batch = self.batches[op.batch]
        edge = 0 if isinstance(op, LoadHidden) else len(self.weights) - 1
        if op.layer == edge:  # tokens, which a step begins and ends with
            return {}
        come, length = batch.newcomers(op.step)
        positions = batch.positions(op.step) + come * length / batch.rows
        nbytes = round(positions * batch.hidden_nbytes)
        where = {batch.hidden_tier: nbytes}
        if isinstance(op, LoadHidden):
            return _inward(where)
        far = self.borders.get(op.layer)
        if far is None:
            return _outward(where)
        # Memory that both stages reach needs no other way.
        near = batch.hidden_tier is not Tier.DEVICE and not far
        return _outward(where) | ({} if near else {Link.STAGE_TO_STAGE: nbytes})

    def unpacked(self, op: Op) -> int:
        """Bytes of cache that computing ``op`` unpacks; its weights come on top, once per load."""
        if not isinstance(op, (Attend, Compute)) or not op.step:
            return 0
        cell = self.cache.get((op.layer, op.batch))
        if cell is None:
            return 0
        return cell.dense_nbytes * cell.kept(self.batches[op.batch].cached(op.step))

    def total(self, ops: Iterable[Op]) -> Moved:
        """Bytes that ``ops`` move in all, by link; an op of a batch that has left moves none."""
        total = dict.fromkeys(Link, 0)
        for op in ops:
            batch = getattr(op, "batch", None)
            step = getattr(op, "step", 0)
            if batch is None or step < self.batches[batch].num_steps:
                for link, nbytes in self.moved(op).items():
                    total[link] += nbytes
        return total


def _if(there: bool, cell: CacheCell, positions: float, share: float = 1.0) -> int:
    return round(positions * cell.position_nbytes * share) if there else 0


def _links(moved: Moved) -> Moved:
    return {link: nbytes for link, nbytes in moved.items() if nbytes}


def _inward(where: Mapping[Tier, int]) -> Moved:
    disk, host = where.get(Tier.DISK, 0), where.get(Tier.HOST, 0)
    return _links({Link.DISK_TO_HOST: disk, Link.HOST_TO_DEVICE: disk + host})


def _outward(where: Mapping[Tier, int]) -> Moved:
    disk, host = where.get(Tier.DISK, 0), where.get(Tier.HOST, 0)
    return _links({Link.DEVICE_TO_HOST: disk + host, Link.HOST_TO_DISK: disk})
