"""A job: a file of requests in, a file of results out.

Window by window, block by block; what is finished is safe, and the same job goes on from there. A
bad line becomes one error record; the others run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexgen_jax.engine.effects import OnPrefill
from flexgen_jax.engine.executor import ExecutionError
from flexgen_jax.engine.snapshots import Snapshot, Snapshots, are_kept_in
from flexgen_jax.jobs.asked import Asked
from flexgen_jax.jobs.dialects import plain_answer
from flexgen_jax.jobs.job_input import JobError, JobInput
from flexgen_jax.jobs.open_windows import MESSAGES, OpenWindow, OpenWindows
from flexgen_jax.jobs.openai_lines import answer_of
from flexgen_jax.jobs.results import Results
from flexgen_jax.jobs.windows import Task, Windows
from flexgen_jax.models.registry import family_of
from flexgen_jax.planning.blocks import in_turn, last_blocks
from flexgen_jax.planning.window_size import WindowSize
from flexgen_jax.report import Report, Sum
from flexgen_jax.requests.chat import Chat
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.requests.sampling_params import SamplingParams
from scheduling.policy import Policy

if TYPE_CHECKING:
    from flexgen_jax.llm import LLM
    from flexgen_jax.planning.blocks import Block
    from flexgen_jax.requests.request import Request

# Fields of a policy on which the grouping depends, or the last bits of a result.
_POLICY = (
    "device_batch_size",
    "num_device_batches",
    "refill",
    "host_attention",
    "weight_bits",
    "cache_bits",
    "group_size",
    "attention_sparsity",
    "num_stages",
)


def now() -> int:
    """Seconds since 1970; or what ``SOURCE_DATE_EPOCH`` says, to make the same output again."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())


@dataclasses.dataclass(frozen=True)
class Chatting:
    """How a job takes conversations.

    Attributes:
        prompts: Whether a plain line's prompt is what a user says.
        template: As ``Chat.chat_template``.
        to_the_limit: Whether answers of OpenAI's conversations that say no ``max_tokens`` may be as
            long as the model has positions for. ``most``: and have no more new tokens than this.
    """

    prompts: bool = False
    template: str | None = None
    to_the_limit: bool = False
    most: int | None = None


@dataclasses.dataclass(frozen=True)
class Completing:
    """The task of ``generate``.

    Args:
        defaults: What lines leave out.
        model: Its name in answers of OpenAI's form.
        max_length: Of a prompt and its answer, in tokens; None: what the model has positions for.
        begun: When the job was, in seconds since 1970: what its answers say, and its templates.
    """

    llm: LLM
    defaults: SamplingParams
    model: str
    chatting: Chatting = Chatting()
    max_length: int | None = None
    begun: int = dataclasses.field(default_factory=now)

    def request(self, index: int, asked: Asked) -> Request:
        prompt, params = asked.prompt, self.defaults.updated(asked.sampling)
        if self.chatting.prompts and asked.dialect == "plain" and "messages" not in prompt:
            if not isinstance(prompt.get("prompt"), str):
                raise RequestError("with --chat a prompt must be a text: what a user says")
            prompt = {"messages": [{"role": "user", "content": prompt["prompt"]}]}
        given: Mapping[str, Any] | Chat = prompt
        if "messages" in prompt:
            when = datetime.datetime.fromtimestamp(self.begun)
            given = Chat.of(prompt, chat_template=self.chatting.template, now=when)
        longest = asked.sampling.get("max_tokens")
        if asked.dialect == "chat" and self.chatting.to_the_limit and longest is None:
            return self._to_the_limit(index, given, params)
        request = self.llm.request(index, given, params)
        length, more = len(request.token_ids), request.max_tokens
        if self.max_length is not None and length + more > self.max_length:
            raise RequestError(
                f"too long: {length} prompt tokens and max_tokens {more} exceed the "
                f"{self.max_length} tokens of --max-model-len"
            )
        return request

    def _to_the_limit(
        self, index: int, prompt: Mapping[str, Any] | Chat, params: SamplingParams
    ) -> Request:
        least = max(1, params.min_tokens)
        request = self.llm.request(index, prompt, dataclasses.replace(params, max_tokens=least))
        length = len(request.token_ids)
        room = family_of(self.llm.config).room(self.llm.config, length)
        if self.max_length is not None:
            room = min(room, self.max_length)
        if room - length < least:
            raise RequestError(
                f"too long: {length} prompt tokens leave no room in the {room} of --max-model-len"
            )
        longest = min(room - length, self.chatting.most or room)
        params = dataclasses.replace(params, max_tokens=max(least, longest))
        return dataclasses.replace(request, params=params)

    def answer(
        self, asked: Asked, requests: Sequence[Request], outputs: Sequence[RequestOutput]
    ) -> dict[str, Any]:
        if not asked.openai:
            return plain_answer(asked, outputs[0])
        return answer_of(
            asked,
            outputs,
            model=self.model,
            created=self.begun,
            tokenizer=self.llm.tokenizer,
        )

    def at(self, begun: int) -> Completing:
        return dataclasses.replace(self, begun=begun)

    def identity(self) -> dict[str, Any]:
        return completing_identity(
            self.defaults, self.llm.seed, self.model, self.chatting, self.max_length
        )


def completing_identity(
    defaults: SamplingParams,
    seed: int,
    model: str,
    chatting: Chatting = Chatting(),
    max_length: int | None = None,
) -> dict[str, Any]:
    """Of the task of ``generate``: known before there is a model."""
    params = dataclasses.asdict(defaults)
    task = {"kind": "generate", "model": model, **params, "seed": seed}
    if chatting.prompts:
        task["chat"] = True
    if chatting.to_the_limit:
        task["chats to the limit"] = True
        if chatting.most is not None:
            task["chats at most"] = chatting.most
    if max_length is not None:
        task["max model len"] = max_length
    if chatting.template is not None:
        task["chat template"] = hashlib.sha256(chatting.template.encode()).hexdigest()
    return {"task": task}


@dataclasses.dataclass(frozen=True)
class JobReport:
    """What a job did, earlier processes included.

    Attributes:
        requests: How many lines have an answer. ``errors``: how many have an error.
        messages: What is wrong with the first of these; of those that were run, in this process.
        report: Figures; its ``requests`` are those of the finished blocks.
    """

    requests: int
    errors: int
    messages: tuple[str, ...]
    report: Report

    def to_json(self) -> dict[str, Any]:
        return {**self.report.to_json(), "errors": self.errors}


OnWindow = Callable[[OpenWindow, "list[Block]", list[int]], None]


class Job:
    """A job that has not run yet, or not to its end.

    Args:
        source: Opened. ``results``: entered.
        window_size: Of a window; None: what is usual.
        checkpoint_seconds: How often the state of a running block is saved beside the output, to
            go on inside it; None: never.

    Raises:
        JobError: ``results`` are those of another job; the message says what differs.
        StorageError: checkpoints would lie where something else is.
    """

    def __init__(
        self,
        llm: LLM,
        task: Task,
        source: JobInput,
        results: Results,
        *,
        window_size: WindowSize | None = None,
        input_identity: Mapping[str, Any] | None = None,
        checkpoint_seconds: float | None = None,
    ) -> None:
        if checkpoint_seconds is not None and results.snapshots is None:
            raise JobError("checkpoints lie beside the output: give an output file")
        begun = int((results.header or {}).get("begun", now()))
        self._llm, self._task, self._source = llm, task.at(begun), source
        self._results = results
        self._window_size = window_size or WindowSize.of(llm.policy.block_size)
        identity = {
            **input_identity_of(source, input_identity),
            **task.identity(),
            **_machinery(llm, self._window_size),
        }
        check_same(results, identity)
        schedule = {"name": llm.planner.schedule_name, "order": llm.planner.fingerprint}
        before = (results.header or {}).get("schedule", schedule)
        self._schedule_before = None if before["order"] == schedule["order"] else before["name"]
        self._header = {
            "identity": identity,
            "policy": llm.policy.to_json(),
            "schedule": schedule,
            "begun": begun,
        }
        self._total = Sum.of(llm.planner)
        self._failures: list[str] = []  # of this process
        # What an earlier process has left is gone on from, even if nothing more is to be saved.
        self._snapshots: Snapshots | None = None
        if results.snapshots is not None and (checkpoint_seconds or are_kept_in(results.snapshots)):
            seconds = math.inf if checkpoint_seconds is None else checkpoint_seconds
            self._snapshots = Snapshots(results.snapshots, seconds)
        if results.position.sums is not None:
            self._total.add_sums(results.position.sums)

    @property
    def schedule_before(self) -> str | None:
        """The name of the schedule that it was begun with, if that ordered operations differently.

        The answers are the same, but the figures are then those of both.
        """
        return self._schedule_before

    @property
    def limit_tokens(self) -> int:
        """What the limits of those that are finished so far allow, in earlier processes, too."""
        return self._total.sums()["limit_tokens"]

    def run(
        self,
        *,
        progress: Callable[[int], None] | None = None,
        on_window: OnWindow | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> JobReport:
        """Runs what is left. Sets the LLM's ``report``.

        Args:
            progress: Told how many new tokens were booked.
            on_window: Told what is about to run: a window, its blocks, and which of them are left.
            on_prefill: As a ``Runner`` takes it.

        Raises:
            JobError: input or output failed; what is finished is kept.
            ExecutionError: an op failed; likewise.
        """
        results, position = self._results, self._results.position
        if results.finished:
            check_stream(self._source, results)
        if not results.done:
            if results.header is None:
                results.begin(self._header)
            windows = Windows(
                self._source,
                self._task,
                self._window_size,
                number=position.windows,
                index=position.requests,
            )
            with contextlib.closing(windows):
                windows.skip(position.line, position.digest)
                for sums in results.unsummed:
                    self._total.add_sums(sums)
                self._open = OpenWindows(windows, self._task, results, self._total, self._failures)
                if self._llm.policy.refill and self._llm.runner.takes_more:
                    self._run_rolling(progress, on_window, on_prefill)
                else:
                    while (window := self._open.next()) is not None:
                        self._run_window(window, progress, on_window, on_prefill)
        results.finish()
        report = dataclasses.replace(self._total.total(), seed=self._llm.seed)
        self._llm.report = report
        position, failed = results.position, report.failed
        messages = (*position.messages, *self._failures)[:MESSAGES]
        return JobReport(position.requests - failed, position.errors + failed, messages, report)

    def _run_window(
        self,
        window: OpenWindow,
        progress: Callable[[int], None] | None,
        on_window: OnWindow | None,
        on_prefill: OnPrefill | None,
    ) -> None:
        """Block by block; the next window begins when this one is done."""
        replicas = self._llm.runner.num_replicas
        refill = self._llm.policy.refill
        # Without refill a block is run with all its requests, as if it were for the first time.
        requests = window.unfinished if refill else window.requests
        blocks = self._llm.planner.blocks(requests, at_once=replicas)
        unfinished = {request.index for request in window.unfinished}
        last = last_blocks(blocks)
        of_last: dict[int, set[int]] = {}
        for number, block in enumerate(blocks):
            of_last.setdefault(last[number], set()).update(r.index for r in block.requests)
        left = [n for n in range(len(blocks)) if of_last[last[n]] & unfinished]
        if on_window is not None:
            on_window(window, blocks, left)
        part = _Part(self._open, self._llm)

        def keep(place: int, finished: dict[int, RequestOutput], report: Report) -> None:
            number = left[place]
            part.add(finished, report)
            # Blocks that share a request count when it is complete, as one.
            if last[number] == number:
                part.keep()
                if self._snapshots is not None:
                    self._snapshots.clear()

        def snapshot_of(place: int) -> Snapshot:
            assert self._snapshots is not None
            return self._snapshots.of(window=window.number, block=left[place])

        if left:
            self._llm.run_blocks(
                [blocks[number] for number in left],
                keep,
                progress=progress,
                on_prefill=on_prefill,
                snapshot_of=None if self._snapshots is None else snapshot_of,
            )
        self._open.end()

    def _run_rolling(
        self,
        progress: Callable[[int], None] | None,
        on_window: OnWindow | None,
        on_prefill: OnPrefill | None,
    ) -> None:
        """One block for all: requests of the next window enter as the last of this one leave."""
        planner = self._llm.planner

        def more() -> list[Request] | None:
            while (window := self._open.next()) is not None:
                rows = in_turn(window.unfinished)
                blocks = [planner.rolling(rows)] if rows else []
                if on_window is not None:
                    on_window(window, blocks, list(range(len(blocks))))
                if rows:
                    return rows
            return None

        rows = more()
        part = _Part(self._open, self._llm)

        def keep(place: int, finished: dict[int, RequestOutput], report: Report) -> None:
            part.add(finished, report)
            part.keep()
            self._open.end()

        def snapshot_of(place: int) -> Snapshot:
            assert self._snapshots is not None
            return self._snapshots.of(rolling=True)

        if rows is not None:
            try:
                self._llm.run_blocks(
                    [planner.rolling(rows)],
                    keep,
                    progress=progress,
                    on_prefill=on_prefill,
                    snapshot_of=None if self._snapshots is None else snapshot_of,
                    more=more,
                )
            except ExecutionError as error:
                if isinstance(error.__cause__, JobError):  # of reading more, amid an op
                    raise error.__cause__ from None
                raise
        self._open.end()
        if self._snapshots is not None:
            self._snapshots.clear()


class _Part:
    """Finished requests that are not kept yet, and what they took."""

    def __init__(self, windows: OpenWindows, llm: LLM) -> None:
        self._windows, self._llm = windows, llm
        self._lap = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._finished: dict[int, RequestOutput] = {}
        self._sums = Sum.of(self._llm.planner)

    def add(self, finished: Mapping[int, RequestOutput], report: Report) -> None:
        """Takes what has come."""
        # With the reading and writing between the blocks: what a job really takes. The report
        # may know of more: of an earlier process that began the block.
        now = time.perf_counter()
        seconds, self._lap = max(report.seconds, now - self._lap), now
        report = dataclasses.replace(report, seconds=seconds)
        self._windows.total.add(report)
        self._sums.add_sums(report.sums())
        self._finished.update(finished)

    def keep(self) -> None:
        """Makes it safe."""
        self._windows.keep(self._finished, self._sums.sums())
        self._clear()


def input_identity_of(source: JobInput, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ``check_same`` compares of the input; reads all of it, unless it is ``known``."""
    return {"input": source.identity() if known is None else dict(known)}


def policy_identity(policy: Policy | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What ``check_same`` compares of a policy; None: of policy auto what ``changes`` has."""
    if policy is None:
        return {name: changes[name] for name in _POLICY if name in changes}
    return {name: getattr(policy, name) for name in _POLICY}


def _machinery(llm: LLM, window_size: WindowSize) -> dict[str, Any]:
    policy = policy_identity(llm.policy, {})
    if llm.policy.host_attention:  # then where the cache lies is where it is computed with
        policy["cache"] = dataclasses.asdict(llm.policy.cache)
    return {
        "weights": llm.runner.identity(),
        "tokenizer": {"files": llm.runner.model.tokenizer_digest()},
        "policy": policy,
        "window": {
            "requests": window_size.requests,
            "bytes": window_size.nbytes,
            "lines": window_size.lines,
        },
        "software": llm.runner.software(),
    }


def check_same(results: Results, identity: Mapping[str, Any]) -> None:
    """Refuses to go on with a job that was another one, as far as ``identity`` tells.

    Raises:
        JobError: with what differs.
    """
    _refuse(results, identity, partly=False)


def check_same_as_far_as_known(results: Results, identity: Mapping[str, Any]) -> None:
    """Likewise, by parts of which ``identity`` need not have every entry."""
    _refuse(results, identity, partly=True)


def check_stream(source: JobInput, results: Results) -> None:
    """Refuses a stream that is not what a finished job has read; reads all of it.

    Raises:
        JobError: it says something else.
    """
    if not source.is_stream:
        return  # compared by its identity
    number, digest = 0, ""
    for line in source.lines():
        number, digest = line.number, source.digest
    if (number, digest) != (results.position.line, results.position.digest):
        raise JobError(
            "this output is complete, from a job with another input; give another output, or "
            "--restart to replace it"
        )


def _refuse(results: Results, identity: Mapping[str, Any], *, partly: bool) -> None:
    if results.header is None:
        return
    found = _differences(results.header["identity"], identity, partly)
    if not found:
        return
    if results.finished:
        raise JobError(
            "this output is complete, from a job with different settings: "
            + "; ".join(found)
            + ". Give another output, or --restart to replace it"
        )
    raise JobError(
        "an unfinished job with this output was started with different settings: "
        + "; ".join(found)
        + ". Use those settings to resume it, or start over with --restart"
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], partly: bool) -> list[str]:
    found = []
    for part, values in now.items():
        then = before.get(part, {})
        # As JSON has them: the header has been through it.
        values = json.loads(json.dumps(values))
        for name in values if partly else dict.fromkeys((*then, *values)):
            old, new = then.get(name), values.get(name)
            if old != new:
                # A task's are the names of options, but for which command it is.
                whose = f"{part} {name}" if part != "task" else {"kind": "command"}.get(name, name)
                found.append(f"{whose} was {_shown(old)}, is now {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def recorded_policy(results: Results) -> Policy | None:
    """The policy that an unfinished job was begun with.

    Raises:
        JobError: the job's journal does not say.
    """
    if results.header is None:
        return None
    try:
        return Policy.from_json(results.header["policy"])
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"the unfinished job with this output has no policy ({error}); start over with "
            "--restart"
        ) from error
