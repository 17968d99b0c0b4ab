"""Who is in the rows of one batch of a block, what they have produced, and what its step is.

All rows share a clock: at every step each computes the position in the same *column*. A row sees
the columns from its own start on. So a newcomer's prompt lies in the columns just before now, and
nothing moves when rows change. The columns of a batch have no end; its cells are rings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from flexgen_jax.engine.guiding import Guiding
from flexgen_jax.engine.no_token import why_no_score, why_no_token
from flexgen_jax.engine.row_sampling import RowSampling
from flexgen_jax.engine.sampling import History, Sampled
from flexgen_jax.planning.blocks import Batch, Block, batch_of, padded_rows
from flexgen_jax.planning.capacities import capacity_for, next_capacity
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.guidance import Guide
from flexgen_jax.requests.outputs import Logprob
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.stops import Decode
from flexgen_jax.requests.structured_outputs import StructuredOutputsParams

SCORE_CHUNK = 256  # positions scored at a time: their logits are (positions, vocab)


@dataclasses.dataclass(frozen=True, eq=False)
class Joining:
    """Newcomers, whose prompts are computed beside the others' step.

    Attributes:
        batch: Of them alone.
        rows: (batch.rows,) int32: where each goes; -1: an empty row.
    """

    batch: Batch
    rows: np.ndarray

    def valid(self) -> np.ndarray:
        """(rows, positions) bool: what is a token of a newcomer's prompt."""
        columns = np.arange(self.batch.prompt_len)
        return (columns >= self.batch.padding()[:, None]) & (self.rows >= 0)[:, None]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a batch computes in one step.

    Attributes:
        number: In the schedule.
        column: Of the newest position.
        fresh: The batch begins: whole prompts, of ``prompt_len`` columns.
        capacity: Positions that its cells keep after it, in a rolling block. ``resized``: they
            kept another number before.
        joining: Who comes, into free rows of a batch that goes on.
        last: All its rows will have their last token: what it computes is not read again.
    """

    number: int
    column: int
    fresh: bool
    prompt_len: int = 0
    capacity: int | None = None
    resized: bool = False
    joining: Joining | None = None
    last: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Living:
    """Who is in a row between two steps.

    Attributes:
        token: Its newest, whose position is computed next.
        length: Positions that it has in the cache.
    """

    generated: Generated
    token: int
    length: int

    def to_json(self) -> dict[str, Any]:
        """Plain dicts; the request by its place in the input, and which of its completions."""
        return {
            "request": self.generated.request.key,
            "token": self.token,
            "length": self.length,
            "result": self.generated.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class Makings:
    """What results and batches of a block are made with.

    Attributes:
        seed: For requests that have none of their own.
        eos_token_ids: End a request, unless it ignores them.
        decode: Token ids to text, for stop strings; None: there is no tokenizer.
        sampler: The device that samples; None: it is another process's.
        guide: Makes the guide of an answer in a form; None: there is no tokenizer.
    """

    seed: int
    eos_token_ids: Sequence[int]
    decode: Decode | None = None
    sampler: Any = None
    guide: Callable[[StructuredOutputsParams], Guide] | None = None

    def generated(self, request: Request) -> Generated:
        """Nothing yet."""
        ids = set(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            ids.update(self.eos_token_ids)
        form, guide = request.params.structured_outputs, None
        if form is not None and self.guide is not None and self.sampler is not None:
            guide = self.guide(form)
        return Generated(request, frozenset(ids), self.decode, guide)


class BatchState:
    """The arrays of one batch on its devices, and its requests' results on the host.

    Attributes:
        rows: Who is in each; None: nobody.
        starts: (rows,) int32: the first column of each.
        now: What its step is.
        tokens: What the embedding takes next, on the host: (rows, 1), or whole prompts.
        sampled: The step's tokens; None: not yet, or booked already.
        scores: Of prompts, chunk by chunk.
        left: It goes on no more. ``paused``: not in this run of the schedule. ``over``: nobody
            will come any more.
        num_done: Steps so far.
    """

    def __init__(self, batch: Batch, makings: Makings) -> None:
        self._makings = makings
        self._room = batch.room
        self.sampling = RowSampling(batch.num_steps, makings.seed, makings.sampler)
        self._guiding = Guiding()
        self.rows: list[Generated | None] = [None] * batch.rows
        self.sampled: Sampled | None = None
        self.scores: list[Sampled] = []
        self.left = self.paused = self.over = False
        self.num_done = 0
        self._spoilt: set[int] = set()
        self._padding: dict[Any, jax.Array] = {}
        self._before: Step | None = None  # the step before, while nothing of this one is computed
        self._begin(batch, 0)

    def _begin(self, batch: Batch, number: int) -> None:
        empty = len(self.rows) - len(batch.requests)
        self.rows = [*map(self._makings.generated, batch.requests), *[None] * empty]
        self.tokens = batch.tokens()
        self._spoilt.clear()
        length, capacity = batch.prompt_len, None
        # A later prompt lies before the others' newest column, however long: there are so many.
        column = max(length, batch.longest_prompt) - 1
        if self._room is not None:
            capacity = capacity_for(length + 1, self._room.positions)
        self._rows_changed(batch.padding() + column + 1 - length, batch)
        self.now = Step(number, column, True, length, capacity, last=self._is_last())
        self._newcomers = batch.requests
        self._guiding.begin(self.rows)

    def step(self, newcomers: Sequence[Request] = ()) -> None:
        """Begins the next step; ``newcomers`` take free rows."""
        self._before, number = self.now, self.now.number + 1
        if newcomers and self.num_live == 0:
            self._begin(batch_of(newcomers, len(self.rows), self._room), number)
            return
        column = self.now.column + 1
        self._newcomers = tuple(newcomers)
        joining = self._join(newcomers, column) if newcomers else None
        self._padding.clear()
        capacity = self._capacity_at(column)
        resized = capacity != self.now.capacity
        self.now = Step(number, column, False, 0, capacity, resized, joining, self._is_last())
        self._guiding.begin(self.rows)

    def _capacity_at(self, column: int) -> int | None:
        """What the cells of a rolling block keep with a position in ``column``."""
        if self._room is None:
            return None
        oldest = min(
            start for start, row in zip(self.starts, self.rows, strict=True) if row is not None
        )
        positions, most = column + 1 - int(oldest), self._room.positions
        if self.now.capacity is None:
            return capacity_for(positions, most)
        return next_capacity(self.now.capacity, positions, most)

    def undo_step(self) -> Sequence[Request]:
        """Takes back a step of which nothing was computed; returns who had come with it."""
        if self._before is None:
            return ()
        self.now, self._before = self._before, None
        gone = set(map(id, self._newcomers))
        self.rows = [None if row and id(row.request) in gone else row for row in self.rows]
        return self._newcomers

    def _join(self, newcomers: Sequence[Request], column: int) -> Joining:
        batch = batch_of(newcomers, padded_rows(len(newcomers), len(self.rows)), self._room)
        free = [place for place, row in enumerate(self.rows) if self._is_free(place, row)]
        places = np.full(batch.rows, -1, np.int32)
        places[: len(newcomers)] = free[: len(newcomers)]
        starts = self.starts.copy()
        for place, request in zip(free, newcomers, strict=False):
            self.rows[place] = self._makings.generated(request)
            starts[place] = column + 1 - len(request.token_ids)
        self._rows_changed(starts, batch)
        return Joining(batch, places)

    def _rows_changed(self, starts: np.ndarray, newcomers: Batch | None) -> None:
        self.starts = starts
        self._padding.clear()
        self.sampling.rows_are(self.rows)
        self._wanted = _wanted(newcomers, self.rows)

    def take_over(
        self,
        rows: Sequence[Living | None],
        column: int,
        number: int = 0,
        capacity: int | None = None,
    ) -> None:
        """The batch is between two steps, the one before in ``column``, with ``rows`` in it.

        Args:
            number: Of the step before.
            capacity: That its cells had after it, in a rolling block; None: what they need.
        """
        self.rows = [None if row is None else row.generated for row in rows]
        self.tokens = np.asarray([[row.token if row else 0] for row in rows], np.int32)
        # Nobody has a row for itself: it sees the newest position.
        starts = [column + 1 - (row.length if row else 1) for row in rows]
        self._rows_changed(np.asarray(starts, np.int32), None)
        self.now, self._before = Step(number, column, False, capacity=capacity), None
        if capacity is None:
            self.now = dataclasses.replace(self.now, capacity=self._capacity_at(column))
        self.num_done = max(self.num_done, 1)

    @property
    def living(self) -> list[Living | None]:
        """Who is in each row, between two steps."""
        return [
            None if row is None else Living(row, int(token[-1]), self.now.column + 1 - int(start))
            for row, start, token in zip(self.rows, self.starts, self.tokens, strict=True)
        ]

    def _is_last(self) -> bool:
        return all(
            len(row.token_ids) + 1 >= row.request.max_tokens for row in self.rows if row is not None
        )

    @property
    def num_live(self) -> int:
        """How many rows are somebody's."""
        return sum(row is not None for row in self.rows)

    @property
    def num_free(self) -> int:
        """How many newcomers there is a row for."""
        if self.num_live == 0:
            return len(self.rows)  # the batch begins anew
        return sum(self._is_free(place, row) for place, row in enumerate(self.rows))

    def _is_free(self, place: int, row: Generated | None) -> bool:
        return row is None and place not in self._spoilt

    @property
    def begun(self) -> bool:
        """Whether its first prompts are in the cache."""
        return self.num_done > 0

    @property
    def most_left(self) -> int:
        """Steps that its longest row may still take."""
        return max(
            (r.request.max_tokens - len(r.token_ids) for r in self.rows if r is not None),
            default=0,
        )

    # What is computed

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and positions of the step's hidden states; of newcomers' behind the others'."""
        shapes = [(len(self.rows), self.tokens.shape[1])]
        if self.now.joining is not None:
            shapes.append((self.now.joining.batch.rows, self.now.joining.batch.prompt_len))
        return shapes

    def padding_on(self, device: Any) -> jax.Array:
        """(rows,) int32 on ``device``: the first column of each row; of prompts, among theirs."""
        if device not in self._padding:
            first = self.now.column + 1 - self.now.prompt_len if self.now.fresh else 0
            self._padding[device] = jax.device_put(self.starts - np.int32(first), device)
        return self._padding[device]

    def valid(self) -> np.ndarray:
        """(rows, positions) bool: what of the step's positions is somebody's token."""
        first = self.now.column + 1 - self.tokens.shape[1]
        columns = np.arange(first, self.now.column + 1)
        there = np.asarray([row is not None for row in self.rows])
        found: np.ndarray = (columns >= self.starts[:, None]) & there[:, None]
        return found

    @property
    def steps(self) -> np.ndarray:
        """(rows,) int32: which of its tokens each row is to get."""
        counts = [0 if row is None else len(row.token_ids) for row in self.rows]
        return np.asarray(counts, np.int32)

    def forced(self) -> np.ndarray | None:
        """See :meth:`RowSampling.forced`."""
        return self.sampling.forced(self.rows)

    def history(self) -> History | None:
        """See :meth:`RowSampling.history`."""
        return self.sampling.history(self.rows)

    def allowed(self) -> np.ndarray | None:
        """See :meth:`Guiding.taken`."""
        return self._guiding.taken()

    @property
    def num_score_chunks(self) -> int:
        """How many :meth:`wanted_scores` gives."""
        scores = self.now.fresh or self.now.joining is not None
        return -(-self._wanted.shape[1] // SCORE_CHUNK) if scores else 0

    def computing(self) -> None:
        """The step is under way."""
        self._before = None

    def wanted_scores(self) -> Iterator[np.ndarray]:
        """Rows, positions and next tokens (3, SCORE_CHUNK) whose log-probability is wanted.

        Of the prompts that this step computes, by their rows among these.
        """
        for start in range(0, self.num_score_chunks * SCORE_CHUNK, SCORE_CHUNK):
            chunk = self._wanted[:3, start : start + SCORE_CHUNK]
            yield np.pad(chunk, ((0, 0), (0, SCORE_CHUNK - chunk.shape[1])))

    # What came of it

    def collect(self) -> int:
        """Waits for the tokens of the step, books them; returns how many were wanted."""
        if self.sampled is None:
            return 0
        self._collect_scores()
        sampled = jax.device_get(self.sampled)
        self.sampled = self._before = None
        self.tokens = np.maximum(sampled.token, 0)[:, None]
        count = 0
        for place, row in enumerate(self.rows):
            if row is not None and row.finish_reason is None:
                if (why := why_no_token(sampled, place, len(row.token_ids))) is not None:
                    lost = None if row.guide is None else row.guide.error
                    row.fail(lost or why)
                    self._spoilt.add(place)  # what it has in the cache may be no number, either
                    continue
                count += 1
                row.accept(int(sampled.token[place]))
                wanted = row.request.params.logprobs
                if wanted is not None:
                    row.logprobs.append(_logprobs(sampled, place, wanted))
        self.num_done += 1
        return count

    def _collect_scores(self) -> None:
        if not self.scores:
            return
        scores = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(self.scores))
        self.scores = []
        for i, place in enumerate(self._wanted[3]):
            result = self.rows[place]
            assert result is not None
            wanted = result.request.params.prompt_logprobs or 0
            result.scores.append(_logprobs(scores, i, wanted))
            if (why := why_no_score(scores, i)) is not None:
                result.fail(why)

    def take_finished(self) -> list[Generated]:
        """Those who have got all; their rows are free."""
        finished = [r for r in self.rows if r is not None and r.finish_reason is not None]
        if finished:
            gone = [r is not None and r.finish_reason is not None for r in self.rows]
            self.rows = [None if g else r for g, r in zip(gone, self.rows, strict=True)]
            # Nobody's positions are counted anew: they stay within those of the model.
            self.starts = np.where(gone, self.now.column, self.starts).astype(np.int32)
            self._padding.clear()
        return finished

    # Between two runs of a schedule

    def resume(self, *, anew: bool) -> None:
        """Goes on in another run of the schedule, whose steps may be counted ``anew``."""
        self.paused = False
        if anew:
            self.now = dataclasses.replace(self.now, number=0)

    def to_json(self) -> dict[str, Any]:
        """Between two steps: all that the arrays do not follow from."""
        return {
            "column": self.now.column,
            "capacity": self.now.capacity,
            "number": self.now.number,
            "rows": [row and row.to_json() for row in self.living] if self.begun else None,
            "num_rows": len(self.rows),
        }


def _wanted(batch: Batch | None, rows: Sequence[Generated | None]) -> np.ndarray:
    """(4, n) int32: every row of ``batch``, position and next token that a request wants scored,
    and the request's place among ``rows``."""
    found = [np.zeros((4, 0), np.int32)]
    places = {id(row.request): place for place, row in enumerate(rows) if row is not None}
    for number, request in enumerate(() if batch is None else batch.requests):
        if request.scored is not None:
            tokens = np.asarray(request.scored, np.int32)
            (index,) = np.nonzero(tokens >= 0)
            assert batch is not None
            position = index + batch.prompt_len - len(tokens)
            here = [np.full(len(index), n) for n in (number, places[id(request)])]
            found.append(np.stack([here[0], position, tokens[index], here[1]]))
    return np.concatenate(found, axis=1).astype(np.int32)


def _logprobs(sampled: Sampled, row: int, wanted: int) -> dict[int, Logprob]:
    found = {
        int(i): Logprob(float(p), rank)
        for rank, (i, p) in enumerate(
            zip(sampled.top_ids[row, :wanted], sampled.top_logprobs[row, :wanted], strict=True), 1
        )
        if p > -np.inf  # what cannot come is not likely
    }
    token = int(sampled.token[row])
    found.setdefault(token, Logprob(float(sampled.logprob[row]), int(sampled.rank[row])))
    return found


def batch_states(block: Block, makings: Makings) -> list[BatchState]:
    """Of each batch of ``block``."""
    return [BatchState(batch, makings) for batch in block.batches]
