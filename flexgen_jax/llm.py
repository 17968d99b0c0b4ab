"""The Python API: prompts → blocks → schedule → executor → outputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexgen_jax.arguments import PATHS, expect, expect_callable, expect_names, is_int
from flexgen_jax.distributed.process_runner import runner_of
from flexgen_jax.engine.callbacks import Callbacks
from flexgen_jax.engine.cells import WrapStore
from flexgen_jax.engine.effects import OnLogits, OnPrefill
from flexgen_jax.engine.executor import ExecutionError
from flexgen_jax.engine.memory_watch import MemoryWatch
from flexgen_jax.engine.runner import Finished, Runner
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.engine.waiting import More
from flexgen_jax.logs import LOGGER
from flexgen_jax.placed_model import Asked, PlacedModel
from flexgen_jax.planning.auto import Auto, Demand
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.byte_sizes import parse_bytes
from flexgen_jax.planning.lengths import Lengths
from flexgen_jax.planning.memory_need import MemoryLimits
from flexgen_jax.planning.planner import Planner, checked_slots
from flexgen_jax.planning.schedule_names import named_schedule
from flexgen_jax.progress import of_call
from flexgen_jax.report import Report, Sum
from flexgen_jax.requests.chat import Chat
from flexgen_jax.requests.generation_config import default_params
from flexgen_jax.requests.outputs import Gathered, RequestOutput
from flexgen_jax.requests.pairs import check_on_error, failed_output, pairs, pairs_as_they_come
from flexgen_jax.requests.prompts import OnError, Prompt, RequestError, made_of_each
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.texts import encode, make_request
from flexgen_jax.requests.tokenization import Tokenizer
from flexgen_jax.requests.unanswered import answered
from flexgen_jax.scoring import Score, score
from flexgen_jax.streaming import generate_iter
from flexgen_jax.weights.checkpoint import cache_directory
from flexgen_jax.weights.dtypes import checked_dtype
from scheduling.hardware import Hardware
from scheduling.limits import Limits
from scheduling.placement import Placement
from scheduling.policy import Policy
from scheduling.schedules import Schedule
from storage.disk import DiskContext

OnBlock = Callable[[list[RequestOutput]], None]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model whose weights may be larger than the device's memory. A context manager.

    Args:
        model: A weight store, a Hugging Face directory, or a hub name. Safetensors are used where
            they lie; other files are converted on first use into ``offload_dir`` (or the cache
            directory), and reused.
        policy: A :class:`Policy` (with ``weight_bits``, a model that is not quantised is quantised
            on first use, and the result kept like a converted model), or ``"auto"``: the one that
            is predicted to be fastest within the memory, searched for when the first requests
            come. Later runs keep its weights where they are, and choose the rest anew.
        schedule: A name of ``SCHEDULES`` or of an installed package's entry point, ``FILE.py:NAME``
            for a function of a file, any function from a ``Workload`` to ops, or a pair of the name
            that reports give it and the function.
        device_memory: Bytes, or text such as ``"12GiB"``, that may be taken of the device's
            memory; None: no limit, and policy ``"auto"`` goes by what the machine has.
            ``host_memory``: likewise the resident memory of the process, with all that Python and
            compiled programs take. On a CPU both are one memory, and ``device_memory`` is all of
            it, or else ``host_memory``. What would take more is not begun, and what turns out to
            take more ends.
        offload_dir: Where converted models are kept; None: ``~/.cache/flexgen-jax``.
        dtype: What is computed with and kept in the cache: ``"float32"`` or ``"bfloat16"``, by
            name or as a NumPy or JAX type; ``"auto"``: bfloat16 for weights of 16 bits, float32
            for others. Weights in place stay in the bytes they were published in.
        seed: For sampled requests that have none of their own. The first call of ``generate`` (or
            ``chat``, ``generate_iter``) draws from it, each later one from a fresh seed derived
            from it, which ``report.seed`` names: an ``LLM`` with that one repeats the call.
        generation_config: Where the sampling parameters of calls without any come from:
            ``"auto"``, the model's ``generation_config.json``; a directory with such a file; or
            ``"vllm"``, the defaults of ``SamplingParams``.
        disk: How the disk tier is read.
        say: Called with a message before slow steps (a conversion); None: the ``flexgen_jax``
            logger.
        hardware: Of this machine, for ``"auto"`` and for predicting every run; None: what
            ``flexgen-jax profile`` has saved, or else what is measured now.
        profile: Whether a machine of which no profile is saved is measured briefly, and the
            profile saved; ``False``, or ``FLEXGEN_JAX_PROFILE=off`` in the environment: predictions
            are those of the nearest preset.
        fixed: Fields of the policy that ``"auto"`` has to keep, such as ``device_batch_size``.
        allow: Methods that ``"auto"`` may use if they help, though results may change slightly:
            ``"weight_bits"``, ``"cache_bits"``, ``"attention_sparsity"``. ``"host_attention"``
            need not be named: greedy tokens stay the same.
        forbid: ``"host_attention"``: ``"auto"`` is not to use it all the same.
        lengths: New tokens of requests like those to come, which ``"auto"`` chooses for:
            numbers, or the path of a file with a number a line or of a job's output; None: every
            request is expected to run to its limit.
        slots: How many slots loads may fill ahead and stores may lag behind: ``weight_slots``,
            ``cache_slots``, ``hidden_slots``, ``store_slots`` of the :class:`Workload`.
        wrap_store: Given (tier, store), returns the store to use: a throttle, a log, faults
            (``storage.wrappers``), for research and tests.
        runner: What runs the blocks; None: this process's devices, or those of all processes that
            JAX's runtime joins. Another one is not told ``seed``, ``disk`` and ``wrap_store``.

    Attributes:
        config: The model's.
        report: Of the last run; None: there was none.
        runner: What runs the blocks.

    Raises:
        ValueError: a model, store, policy or schedule that cannot be used; the message says why.
    """

    def __init__(
        self,
        model: str,
        *,
        policy: Policy | Literal["auto"] = "auto",
        schedule: str | Schedule | tuple[str, Schedule] = "zigzag",
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        offload_dir: str | None = None,
        dtype: Any = "auto",
        seed: int = 0,
        generation_config: str = "auto",
        disk: DiskContext | None = None,
        say: Callable[[str], None] | None = None,
        hardware: Hardware | None = None,
        profile: bool = True,
        slots: Mapping[str, int] | None = None,
        wrap_store: WrapStore | None = None,
        fixed: Mapping[str, Any] | None = None,
        allow: Iterable[str] = (),
        forbid: Iterable[str] = (),
        lengths: Lengths | str | os.PathLike[str] | Iterable[int] | None = None,
        runner: Runner | None = None,
    ) -> None:
        expect("model", model, PATHS, "a path or a hub name (save_params makes one of parameters)")
        expect("offload_dir", offload_dir, PATHS, "a path", optional=True)
        expect("hardware", hardware, Hardware, "a Hardware (Hardware.preset)", optional=True)
        expect("slots", slots, Mapping, "a dict", optional=True)
        expect("fixed", fixed, Mapping, "a dict of a policy's fields", optional=True)
        expect("disk", disk, DiskContext, "a DiskContext", optional=True)
        expect("runner", runner, Runner, "a Runner", optional=True)
        expect("profile", profile, bool, "True or False")
        expect_names("allow", allow)
        expect_names("forbid", forbid)
        for name, function in (("say", say), ("wrap_store", wrap_store)):
            expect_callable(name, function)
        base, auto = Auto.asked(policy, fixed, allow, forbid)
        memory = MemoryLimits(parse_bytes(device_memory), parse_bytes(host_memory))
        if auto is None and lengths is not None:
            raise ValueError(
                "lengths are for policy 'auto', which chooses by them; leave them out, or give "
                "them to plan(), which predicts any policy"
            )
        expect("generation_config", generation_config, PATHS, "'auto', 'vllm' or a directory")
        if not is_int(seed) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        asked = Asked(
            dtype=checked_dtype(dtype),
            offload_dir=offload_dir,
            scratch=cache_directory() if offload_dir is None else Path(offload_dir),
            memory=memory,
            schedule=named_schedule(schedule),
            slots=checked_slots(slots or {}),
            chunk_positions=(disk or DiskContext()).chunk_positions,
            hardware=hardware,
            say=say or _log,
            lengths=None if lengths is None else Lengths.of(lengths),
            profile=profile,
        )
        self.seed, self._calls = int(seed), 0
        self.report: Report | None = None
        self.runner = runner or runner_of(
            base.num_stages,
            seed=self.seed,
            scratch=asked.scratch,
            disk=disk,
            wrap_store=wrap_store,
            memory=MemoryWatch(memory),
        )
        self._placed = PlacedModel(self.runner, str(model), base, auto, asked)
        self.config = self.runner.model.config
        self._defaults = default_params(generation_config, self.store)

    @property
    def store(self) -> Path:
        """Where the weights lie, converted if need be."""
        return self._placed.store

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: the model has no files of one."""
        return self._placed.tokenizer

    def get_tokenizer(self) -> Tokenizer | None:
        """:attr:`tokenizer`, under vLLM's name."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of calls without any: of the model's ``generation_config.json``."""
        return self._defaults

    @property
    def hardware(self) -> Hardware:
        """What predictions are made for."""
        return self._placed.hardware

    @property
    def limits(self) -> Limits:
        """What policy ``"auto"`` may take of the memory and of the disk."""
        return self._placed.limits

    @property
    def planner(self) -> Planner:
        """What is known of a run before it begins: its order, its bytes, its seconds."""
        return self._placed.planner

    @property
    def placement(self) -> Placement:
        """Where every weight tensor lies."""
        return self.planner.weights

    @property
    def policy(self) -> Policy:
        """What is in force; setting it ends ``"auto"``.

        ``weights``, ``weight_bits`` and ``num_stages``, which are in place, are fixed. Where
        ``"auto"`` has seen no requests yet, it chooses for prompts of 512 tokens and 32 new ones.
        """
        return self.planner.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._placed.change(policy)

    @property
    def why(self) -> str | None:
        """Why ``"auto"`` chose the policy, in a line; None: it did not."""
        return self._placed.why

    def choose_policy(self, job: Demand) -> Policy:
        """With ``policy="auto"``, chooses the policy for ``job``; else returns what is in force.

        Args:
            job: Checked requests, or the lengths of a ``Uniform`` job.

        Raises:
            NothingFitsError: no policy fits the memory.
        """
        return self._placed.choose(job)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int], None] | None = None,
        on_block: OnBlock | None = None,
        on_logits: OnLogits | None = None,
        on_error: OnError = "raise",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; results in the order of ``prompts``.

        Args:
            prompts: Strings, lists of token ids, or dicts with ``prompt``, ``prompt_token_ids`` or
                ``messages``, which :meth:`chat` explains, and nothing else.
            sampling_params: One for all, or one per prompt; None: the defaults.
            progress: Told the number of new tokens whenever some are booked.
            on_block: Given the results of prompts as they are complete: of those that have finished
                since the last time, or without refill with each block.
            on_logits: Given (step, batch, logits [rows, vocab]) of every head computation.
            on_error: ``"record"``: a prompt that cannot be run, or has no answer, gets a result
                whose ``error`` says why, as a bad line of a job does, and the others run.
            use_tqdm: Show a progress bar on the standard error, if that is a terminal and no
                ``progress`` is given. The name is vLLM's.

        Raises:
            RequestError: prompts that cannot be run, all of them named; nothing has run.
            NoAnswerError: some have no answer (a model whose logits are not numbers); its
                ``outputs`` are those of all.
            ExecutionError: an op failed.

        What ``progress``, ``on_block`` or ``on_logits`` raise ends the run, and is raised.
        """
        check_on_error(on_error)
        expect("use_tqdm", use_tqdm, bool, "True or False")
        each = pairs(prompts, self._defaults if sampling_params is None else sampling_params)
        seed = self._next_seed()
        failed: dict[int, RequestOutput] = {}

        def made(index: int, pair: tuple[Prompt, SamplingParams]) -> Request | None:
            try:
                return self.request(index, *pair)
            except RequestError as error:
                if on_error == "raise":
                    raise
                failed[index] = failed_output(index, pair[0], error)
                return None

        requests = [_seeded(r, seed) for r in made_of_each(each, made) if r is not None]
        most = sum(r.max_tokens * r.params.n for r in requests)
        with of_call(most, wanted=use_tqdm and progress is None) as (bar, on_prefill):
            outputs = self.run(
                requests,
                progress=progress or bar,
                on_block=on_block,
                on_logits=on_logits,
                on_prefill=on_prefill,
            )
        assert self.report is not None
        self.report = dataclasses.replace(self.report, seed=seed)
        if on_error == "raise":
            return answered(outputs)
        ran = iter(outputs)
        return [failed[index] if index in failed else next(ran) for index in range(len(each))]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
        on_block: OnBlock | None = None,
        on_error: OnError = "raise",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers every conversation; results in the order of ``messages``.

        The model's chat template makes a text of each, as in transformers and vLLM; the text, with
        the special tokens that the template puts there and no others, is the prompt.

        Args:
            messages: A conversation, or several: a list of ``{"role": ..., "content": ...}`` each.
            sampling_params: As :meth:`generate` takes them, like ``progress``, ``on_block``,
                ``on_error`` and ``use_tqdm``.
            add_generation_prompt: End the prompt with what begins an answer; None: unless
                ``continue_final_message``.
            continue_final_message: The answer continues the last message.
            tools: JSON descriptions of functions, which some templates show the model.
            documents: Likewise, what it may look up.
            chat_template: A Jinja template, or the name of one of the model's; None: its own.
            chat_template_kwargs: What else the template is told, such as ``enable_thinking``.

        Raises:
            RequestError: a model without a template, or conversations that cannot be run, all of
                them named; nothing has run.
            NoAnswerError, ExecutionError: as :meth:`generate`.
        """
        one = isinstance(messages, Sequence) and isinstance(next(iter(messages), None), Mapping)
        common = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        prompts = [{"messages": each, **common} for each in ([messages] if one else messages)]
        return self.generate(
            prompts,
            sampling_params,
            progress=progress,
            on_block=on_block,
            on_error=on_error,
            use_tqdm=use_tqdm,
        )

    def generate_iter(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        window: int | None = None,
        progress: Callable[[int], None] | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[RequestOutput]:
        """Completes prompts as they come, in their order; holds a window of them at a time.

        For inputs larger than memory: a generator, a file, a Hugging Face dataset (with a column
        ``prompt``, or ``prompt_token_ids``, and no other). A window is read when the outputs of
        the one before have been taken, and sorted by length; :attr:`report` covers those that ran.

        Args:
            prompts: As :meth:`generate` takes them.
            sampling_params: One for all, or one per prompt; None: the defaults.
            window: Prompts of a window, rounded up to whole blocks; None: 4096, or four blocks.
            progress: As :meth:`generate` takes it, like ``on_error``.

        Raises:
            RequestError: a prompt that cannot be run, or has no answer, when the outputs of those
                before it have been taken.
            ExecutionError: an op failed.
        """
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be an integer of at least 1, got {window!r}")
        check_on_error(on_error)
        expect_callable("progress", progress)
        each = pairs_as_they_come(
            prompts, self._defaults if sampling_params is None else sampling_params
        )
        return generate_iter(
            self,
            each,
            window=window,
            progress=progress,
            on_error=on_error,
            seed=self._next_seed(),
        )

    def _next_seed(self) -> int:
        """Of a call: the first one's is the ``LLM``'s own."""
        number, self._calls = self._calls, self._calls + 1
        if number == 0:
            return self.seed
        words = np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(1, np.uint64)
        return int(words[0]) >> 1

    def request(
        self, index: int, prompt: Prompt | Chat, params: SamplingParams, *, scoring: bool = False
    ) -> Request:
        """Checks one prompt against the model and makes a :class:`Request` of it.

        Args:
            scoring: Only the prompt is of interest: new tokens need no positions.

        Raises:
            RequestError: what is wrong with it.
        """
        return make_request(
            index, prompt, params, config=self.config, tokenizer=self.tokenizer, scoring=scoring
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens included.

        Raises:
            RequestError: no tokenizer, or no text.
        """
        return encode(text, self.tokenizer)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """How likely each continuation is after its prompt: one prefill, no new tokens.

        A block reads the weights once for all its sequences, and keeps no cache: with
        ``num_device_batches`` in the hundreds, once for thousands. Prefill attends in full
        precision whatever ``cache_bits`` and ``attention_sparsity`` are.

        Args:
            prompts: As :meth:`generate` takes them. A text and its continuation are tokenised as
                one text, so that the border falls where the tokenizer puts it.
            continuations: Likewise, of the same kind.
            progress: Told how many sequences were scored, batch by batch.

        Raises:
            RequestError: what cannot be scored, all of it named; nothing has run.
            NoAnswerError: some have no answer, as :meth:`generate` has it.
            ExecutionError: an op failed.
        """
        return score(self, prompts, continuations, progress=progress)

    def run(
        self,
        requests: Sequence[Request],
        *,
        progress: Callable[[int], None] | None = None,
        on_block: OnBlock | None = None,
        on_logits: OnLogits | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> list[RequestOutput]:
        """Completes checked requests; results in their order. Sets :attr:`report`.

        Those that have no answer say so in ``error``.
        """
        self.runner.check()
        self.choose_policy(requests)
        outputs: dict[int, RequestOutput] = {}
        total = Sum.of(self.planner)

        def keep(_: int, finished: dict[int, RequestOutput], report: Report) -> None:
            total.add(report)
            outputs.update(finished)
            if on_block is not None and finished:
                on_block(list(finished.values()))

        blocks = self.planner.blocks(requests)
        self.run_blocks(blocks, keep, progress=progress, on_logits=on_logits, on_prefill=on_prefill)
        self.report = total.total()
        return [outputs[r.index] for r in requests]

    def run_blocks(
        self,
        blocks: Sequence[Block],
        on_block: Callable[[int, dict[int, RequestOutput], Report], None],
        *,
        progress: Callable[[int], None] | None = None,
        on_logits: OnLogits | None = None,
        on_prefill: OnPrefill | None = None,
        snapshot_of: Callable[[int], Snapshot] | None = None,
        more: More | None = None,
    ) -> None:
        """Runs ``blocks`` one after another, keeping no results.

        Args:
            on_block: Given the block's place in ``blocks``, the outputs of the requests that are
                complete with it, by their index, and its report, as each finishes; of a rolling
                block several times, with what has come since the last.
            progress: As :meth:`generate` takes it, like ``on_logits``.
            on_prefill: As a ``Runner`` takes it.
            snapshot_of: Given a block's place, says where its state is kept while it runs.
            more: Gives the rows that come after those of a single rolling block
                (``planning.blocks.in_turn``), some at a time; None: no more.

        Raises:
            ScheduleError: the schedule is wrong; nothing has run.
            MemoryLimitError: more memory would be taken than is allowed; nothing has run.
            ExecutionError: an op failed, or more memory was taken than is allowed.
            StorageError: a snapshot is damaged.
        """
        self.runner.check()
        expect_callable("progress", progress)
        expect_callable("on_logits", on_logits)
        planner = self.planner
        planner.check(blocks)
        self._placed.check_memory(blocks)
        gathered = Gathered()

        def gather(number: int, done: Finished) -> None:
            whole = {}
            for request, output in zip(done.requests, done.outputs, strict=True):
                complete = gathered.add(output, request.params.n)
                if complete is not None:
                    whole[request.index] = complete
            report = Report.of_block(planner, blocks[number], done)
            failed = sum(output.error is not None for output in whole.values())
            counted = dataclasses.replace(report, requests=len(whole), failed=failed)
            on_block(number, whole, counted)

        callbacks = Callbacks()
        try:
            self.runner.run(
                planner,
                blocks,
                gather,
                progress=callbacks.noted(progress),
                on_logits=callbacks.noted(on_logits),
                on_prefill=callbacks.noted(on_prefill),
                snapshot_of=snapshot_of,
                more=more,
            )
        except ExecutionError:
            if not callbacks.failed:
                raise
        # Out of the handler: the two errors would hold each other, and with them all that ran.
        callbacks.raise_noted()

    @property
    def leads(self) -> bool:
        """Whether requests are given to this process; of several, process 0 only."""
        return self.runner.leads

    def follow(self) -> None:
        """Computes its stages of what process 0 runs, until that closes its ``LLM``.

        For processes other than 0, where JAX's runtime joins several. All make their ``LLM`` alike.

        Raises:
            ProcessError: another process is lost or has failed.
            ExecutionError: an op failed here; the other processes end, too.
            ValueError: this process leads; or its model, software or settings are not those of
                process 0.
        """
        self.runner.follow(self._placed.take)

    def close(self) -> None:
        """Gives back the weights' memory and file handles."""
        self.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.runner.close(error)


def _seeded(request: Request, seed: int) -> Request:
    return dataclasses.replace(request, seed=seed)


def _log(message: str) -> None:
    # A conversion takes minutes and gigabytes: to be seen without any logging set up.
    LOGGER.warning(message)
