"""A run as it is planned: the order of its blocks, what they move, how long they should take.

Knows the model, the policy, the schedule and the machine, but no weights and no device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexgen_jax.arguments import expect
from flexgen_jax.planning.auto import Model, Uniform
from flexgen_jax.planning.blocks import (
    Block,
    Room,
    in_turn,
    long_first,
    make_blocks,
    padded_length,
    rolling_block,
)
from flexgen_jax.planning.cell_layout import place_cache, place_hidden
from flexgen_jax.planning.refilling import BatchPlay, Life, play
from flexgen_jax.planning.stage_layout import experts_of, place_stages, together
from flexgen_jax.requests.request import Request
from scheduling.calibrate import Observation, observations
from scheduling.cost_model import CostModel, bound
from scheduling.hardware import Hardware
from scheduling.ops import Cell, ComputeExperts, LoadChosen, Op
from scheduling.placement import Placement
from scheduling.policy import Policy
from scheduling.reported import naming
from scheduling.schedules import Schedule
from scheduling.simulate import simulate
from scheduling.sizes import CacheCell, Link
from scheduling.timeline import Timeline
from scheduling.transforms import first_n, remaining, serialized, without_idle_barriers
from scheduling.validate import validate
from scheduling.workload import Workload

# Of a long block; what comes after them is alike.
_MOST_PASSES, _OBSERVED_PASSES = 1024, 256
# Tokens of prompts and new ones by which schedules are told apart, and operations at most.
_SAMPLE, _SAMPLE_OPS = (8, 5), 50_000
# Fields of the policy that placing the weights fixes.
_IN_PLACE = ("weights", "experts", "weight_bits", "num_stages")


@dataclasses.dataclass(frozen=True)
class Planner:
    """A model, a policy, a schedule and a machine: what there is to know before a block runs.

    Attributes:
        schedule_name: Of ``schedule``.
        schedule: The order of a block, as if its operations overlap; see :attr:`order`.
        why: Of the policy, where it was searched for.
    """

    model: Model
    policy: Policy
    schedule_name: str
    schedule: Schedule = dataclasses.field(repr=False)
    hardware: Hardware
    why: str | None = None

    @property
    def order(self) -> Schedule:
        """The schedule as the policy has it: with or without overlap."""
        return self.schedule if self.policy.overlap else serialized(self.schedule)

    def blocks(self, requests: Sequence[Request], *, at_once: int = 1) -> list[Block]:
        """How ``requests`` are grouped: with refill, into one block for each that runs at a time.

        Args:
            at_once: So many blocks may run at a time.
        """
        if self.policy.refill:
            order = long_first(requests)
            parts = [order[number::at_once] for number in range(at_once)]
            return [self.rolling(in_turn(part)) for part in parts if part]
        return list(
            make_blocks(
                requests,
                device_batch_size=self.policy.device_batch_size,
                num_device_batches=self.policy.num_device_batches,
            )
        )

    def rolling(self, rows: Sequence[Request], room: Room | None = None) -> Block:
        """A block that begins with the first of ``rows`` and goes on with the others.

        Args:
            room: Of a row, at least.
        """
        return rolling_block(
            rows,
            device_batch_size=self.policy.device_batch_size,
            num_device_batches=self.policy.num_device_batches,
            room=room,
        )

    def workload(self, block: Block) -> Workload:
        """What the schedule has to order, with its sizes."""
        return self.model.workload(block, self.policy)

    @functools.cached_property
    def _checked(self) -> set[Workload]:
        return set()

    def check(self, blocks: Sequence[Block]) -> None:
        """Refuses a wrong schedule before anything runs; most blocks of a job are alike.

        Raises:
            ScheduleError: what is wrong with it.
        """
        for workload in {self.workload(block) for block in blocks} - self._checked:
            with naming(self.schedule_name):
                validate(self.schedule(workload), workload)
            self._checked.add(workload)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the schedule, by how it orders a short block of this policy: hexadecimal.

        Equal for equal orders, whatever the schedule is called.

        Raises:
            ScheduleError: it gives no operations.
        """
        (block,) = self.blocks(Uniform(*_SAMPLE).requests(self.policy.block_size))
        found = hashlib.sha256()
        with naming(self.schedule_name):
            # Wrong ones are refused later, and those that never end, too.
            for op in first_n(self.schedule(self.workload(block)), _SAMPLE_OPS):
                found.update(f"{op}\n".encode())
        return found.hexdigest()

    @functools.cached_property
    def weights(self) -> Placement:
        """Where every weight tensor lies."""
        model = self.model
        return together(place_stages(model.config, model.form(self.policy), self.policy))

    @functools.cached_property
    def _experts(self) -> Placement:
        return experts_of(self.model.config, self.weights)

    def placement(self, blocks: Sequence[Block]) -> dict[str, Placement]:
        """Where weights, cache and hidden states lie: of the block with the largest cache.

        Of a model with experts also where these lie, which are among the weights.
        """
        config, dtype = self.model.config, self.model.dtype
        cache = [place_cache(b, config, dtype, self.policy) for b in blocks]
        hidden = [place_hidden(b, config, dtype, self.policy.hidden) for b in blocks]
        largest = max(range(len(blocks)), key=lambda i: cache[i].nbytes(), default=None)
        empty = Placement(())
        return {
            "weights": self.weights,
            **({"experts": self._experts} if self._experts.cells else {}),
            "cache": empty if largest is None else cache[largest],
            "hidden": empty if largest is None else hidden[largest],
        }

    def runs(
        self, block: Block, lives: Sequence[Life] = (), most_passes: int | None = None
    ) -> list[Workload]:
        """What the schedule has to order, run after run, if requests live so.

        Args:
            lives: Of a rolling block, in the order in which they come; none: all run to their end.
            most_passes: Nothing after these is looked at.
        """
        if block.room is None:
            return [self.workload(block)]
        if not lives:
            lives = [Life(padded_length(len(r.token_ids)), r.max_tokens) for r in block.requests]
        played = play(
            lives,
            device_batch_size=self.policy.device_batch_size,
            num_device_batches=self.policy.num_device_batches,
            most_passes=most_passes,
            most_positions=block.room.positions,
        )
        # A block that began with few requests, or was gone on with, may have had more batches.
        most = max((len(batches) for batches in played.runs), default=0)
        more = (block.batches[0],) * (most - len(block.batches))
        whole = self.workload(Block((*block.batches, *more)))
        return [run_of(batches, whole) for batches in played.runs]

    def traffic(
        self, block: Block, lives: Sequence[Life] = (), passes: int | None = None
    ) -> dict[Link, int]:
        """Bytes that the schedule moves over each link, if requests live as :meth:`runs` takes it.

        Args:
            passes: In all, of a block that is too long to be looked at from end to end.
        """
        total = dict.fromkeys(Link, 0)
        seen = 0
        for run in self.runs(block, lives, _MOST_PASSES):
            assert run.sizes is not None
            seen += run.num_steps - bool(run.done)
            ops = remaining(self.schedule(run), run)
            for link, nbytes in run.sizes.total(ops).items():
                total[link] += nbytes
        if passes is not None and block.room is not None and seen >= _MOST_PASSES:
            return {link: round(nbytes * passes / seen) for link, nbytes in total.items()}
        return total

    def predict(
        self, block: Block, lives: Sequence[Life] = (), passes: int | None = None
    ) -> Timeline:
        """What the simulator expects of ``block``, or of its first ``passes``."""
        parts, begun, steps = [], 0.0, 0
        for run in self.runs(block, lives, passes):
            ops = without_idle_barriers(
                _of_those_who_are_there(remaining(self.order(run), run), run)
            )
            parts.append((begun, simulate(ops, run, self.hardware).later(steps)))
            begun += parts[-1][1].seconds
            steps += run.num_steps - 1
        if len(parts) == 1:
            return parts[0][1]
        return Timeline.concatenate(parts, label="predicted")

    def observe(
        self, block: Block, timeline: Timeline, lives: Sequence[Life] = ()
    ) -> list[Observation]:
        """What each kind of op took in a measured ``timeline``, beside the prediction."""
        run = self.runs(block, lives, _OBSERVED_PASSES)[0]
        return observations(list(self.order(run)), run, self.hardware, timeline)

    def lower_bound(
        self, block: Block, lives: Sequence[Life] = (), passes: int | None = None
    ) -> float:
        """Seconds that any schedule of ``block``, or of its first ``passes``, takes."""
        return sum(
            bound(CostModel(run, self.hardware).lower_bound())[1]
            for run in self.runs(block, lives, passes)
        )


def described(placement: Mapping[str, Placement]) -> list[str]:
    """Lines for a person: where everything lies."""
    names = {"experts": "of these, experts"}
    return [
        placed.describe(names.get(kind, kind)) for kind, placed in placement.items() if placed.cells
    ]


def _of_those_who_are_there(ops: Iterable[Op], run: Workload) -> Iterator[Op]:
    """Without what batches that have left would have to do."""
    sizes = run.sizes
    assert sizes is not None
    for op in ops:
        if isinstance(op, (LoadChosen, ComputeExperts)):
            there = tuple(b for b in op.batches if op.step < sizes.batches[b].num_steps)
            if there:
                yield dataclasses.replace(op, batches=there)
        elif not isinstance(op, Cell) or op.step < sizes.batches[op.batch].num_steps:
            yield op


def run_of(batches: Sequence[BatchPlay], whole: Workload) -> Workload:
    """A run of the schedule of a block that was played: its batches, with who comes when.

    Args:
        whole: The block, as if all began together and ran to their limits.
    """
    sizes = whole.sizes
    assert sizes is not None
    count = len(batches)
    shares = [
        len(batch.rows) / of_batch.rows
        for batch, of_batch in zip(batches, sizes.batches, strict=False)
    ]
    each = tuple(
        dataclasses.replace(
            of_batch,
            rows=len(batch.rows),
            hidden_nbytes=round(share * of_batch.hidden_nbytes),
            routed_nbytes=round(share * of_batch.routed_nbytes),
            prompt_len=batch.prompt_len if batch.cached is None else batch.cached,
            num_steps=batch.num_steps,
            begun=tuple(batch.begun),
            joined=tuple(batch.joined),
            resized=tuple(batch.resized),
        )
        for batch, of_batch, share in zip(batches, sizes.batches, shares, strict=False)
    )
    cells = {
        place: cell if shares[place[1]] == 1 else _of_rows(cell, shares[place[1]])
        for place, cell in sizes.cache.items()
        if place[1] < count
    }
    return dataclasses.replace(
        whole,
        num_steps=max(batch.num_steps for batch in batches),
        num_batches=count,
        done=() if batches[0].cached is None else (1,) * count,
        life=whole.num_steps,
        sizes=dataclasses.replace(sizes, batches=each, cache=cells),
    )


def _of_rows(cell: CacheCell, share: float) -> CacheCell:
    """Of that share of the rows."""
    return dataclasses.replace(
        cell,
        position_nbytes=round(share * cell.position_nbytes),
        dense_nbytes=round(share * cell.dense_nbytes),
    )


def in_place(policy: Policy) -> dict[str, Any]:
    """What of a policy cannot change once the weights are in place, by name."""
    return {f"the policy's {name}": getattr(policy, name) for name in _IN_PLACE}


def checked_slots(slots: Mapping[str, Any]) -> dict[str, int]:
    """``slots`` of a :class:`Workload`, by name.

    Raises:
        ValueError: an unknown name, or a number that cannot be.
    """
    expect("slots", slots, Mapping, "a dict")
    names = [f.name for f in dataclasses.fields(Workload) if f.name.endswith("_slots")]
    for name in slots:
        if name not in names:
            raise ValueError(f"no slots {name!r}; known: {', '.join(names)}")
    Workload(num_steps=1, num_layers=1, num_batches=1, **slots)  # checks the numbers
    return dict(slots)
