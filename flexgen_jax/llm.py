"""The Python API: prompts → blocks → schedule → executor → outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import DEBUG
from pathlib import Path
from typing import Any, Literal

import jax

from flexgen_jax._version import __version__
from flexgen_jax.distributed.process_hand_over import ProcessHandOver
from flexgen_jax.distributed.processes import Processes, process_count
from flexgen_jax.distributed.stage_devices import stage_devices
from flexgen_jax.engine.batch_state import batch_states
from flexgen_jax.engine.block_run import Counts, run_block
from flexgen_jax.engine.cells import Cells, WrapStore
from flexgen_jax.engine.effects import BlockEffects, OnLogits, Watch
from flexgen_jax.engine.hand_over import HandOver
from flexgen_jax.engine.layer_loading import LayerLoader
from flexgen_jax.engine.pipeline import Rings, Stage
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.logs import LOGGER, event
from flexgen_jax.machine.this_machine import this_machine
from flexgen_jax.models.family import Config, eos_token_ids
from flexgen_jax.planning.auto import Auto, Demand, Model, Uniform, kind_of, limits_of_this_machine
from flexgen_jax.planning.blocks import Block, make_blocks
from flexgen_jax.planning.byte_sizes import parse_bytes
from flexgen_jax.planning.cell_layout import place_cache, place_hidden
from flexgen_jax.planning.stage_layout import layers_of, place_stages, stored_names, together
from flexgen_jax.report import Report, Sum
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.outputs import Gathered, RequestOutput
from flexgen_jax.requests.prompts import Prompt, RequestError, as_list
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.texts import encode, make_request, output_of
from flexgen_jax.requests.tokenization import load_tokenizer
from flexgen_jax.scoring import Score, score
from flexgen_jax.streaming import generate_iter
from flexgen_jax.weights.checkpoint import cache_directory, open_store, resolve
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.calibrate import Observation, observations
from scheduling.cost_model import CostModel, bound
from scheduling.hardware import Hardware
from scheduling.ops import Op
from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from scheduling.schedules import SCHEDULES
from scheduling.simulate import simulate
from scheduling.sizes import Link
from scheduling.stages import hosts_of
from scheduling.timeline import Timeline
from scheduling.transforms import serialized
from scheduling.validate import validate
from scheduling.workload import Workload
from storage.disk import DiskContext

Schedule = Callable[[Workload], Iterable[Op]]
OnBlock = Callable[[list[RequestOutput]], None]


# Fields of the policy that placing the weights fixes.
_IN_PLACE = ("weights", "weight_bits", "num_stages")
# What a report keeps of a long job's timeline: about 20 MB, and simulated in seconds.
MAX_SPANS = 100_000


class LLM:
    """A model whose weights may be larger than the device's memory. A context manager.

    Args:
        model: A weight store, a Hugging Face directory, or a hub name. The latter two are
            converted on first use into ``offload_dir`` (or the cache directory), and reused.
        policy: A :class:`Policy` (with ``weight_bits``, a model that is not quantised is quantised
            on first use, and the result kept like a converted model), or ``"auto"``: the one that
            is predicted to be fastest within the memory, searched for when the first requests
            come. Later runs keep its weights where they are, and choose the rest anew.
        schedule: A name of ``SCHEDULES`` or any function from a ``Workload`` to ops.
        device_memory: Bytes, or text such as ``"12GiB"``, that policy ``"auto"`` may use (with
            another it is an error); None: what the machine has. ``host_memory``: likewise.
        offload_dir: Where converted models are kept; None: ``~/.cache/flexgen-jax``.
        dtype: ``"float32"`` or ``"bfloat16"``: of weights, cache and activations.
        seed: For requests that have none of their own.
        disk: How the disk tier is read.
        say: Told in plain words what takes long (a conversion); None: the ``flexgen_jax`` logger.
        hardware: Of this machine, for ``"auto"`` and for predicting every run; None: what
            ``flexgen-jax profile`` has saved, or else the nearest preset.
        fixed: Fields of the policy that ``"auto"`` has to keep, such as ``device_batch_size``.
        allow: Methods that ``"auto"`` may use if they help: ``"host_attention"``,
            ``"weight_bits"``, ``"cache_bits"``, ``"attention_sparsity"``.
        slots: How many slots loads may fill ahead and stores may lag behind: ``weight_slots``,
            ``cache_slots``, ``hidden_slots``, ``store_slots`` of the :class:`Workload`.
        wrap_store: Given (tier, store), returns the store to use: a throttle, a log, faults
            (``storage.wrappers``), for research and tests.

    Raises:
        ValueError: a model, store, policy or schedule that cannot be used; the message says why.
    """

    def __init__(
        self,
        model: str,
        *,
        policy: Policy | Literal["auto"] = "auto",
        schedule: str | Schedule = "zigzag",
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        offload_dir: str | None = None,
        dtype: str = "float32",
        seed: int = 0,
        disk: DiskContext | None = None,
        say: Callable[[str], None] | None = None,
        hardware: Hardware | None = None,
        slots: Mapping[str, int] | None = None,
        wrap_store: WrapStore | None = None,
        fixed: Mapping[str, Any] | None = None,
        allow: Iterable[str] = (),
    ) -> None:
        self.schedule_name, self._schedule = _schedule(schedule)
        limits = parse_bytes(device_memory), parse_bytes(host_memory)
        auto = None
        if policy == "auto":
            auto = Auto(dict(fixed or {}), tuple(allow))
            policy = auto.base
        else:
            if not isinstance(policy, Policy):
                raise ValueError(f"policy must be 'auto' or a Policy, got {policy!r}")
            if fixed or tuple(allow):
                raise ValueError("fixed and allow are for policy='auto'; change the policy instead")
            if limits != (None, None):
                raise ValueError(
                    "device_memory and host_memory are for policy 'auto', which fills memory by "
                    "them; a Policy says itself where everything lies"
                )
        self._devices = self._stage_devices(policy.num_stages)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        if disk is not None and not isinstance(disk, DiskContext):
            raise ValueError(f"disk must be a DiskContext, got {disk!r}")
        self._processes: Processes | None = None
        self._auto = auto
        self._say, self._offload_dir, self._limits = say or _log, offload_dir, limits
        self._dtype = dtype
        self._open(str(model), policy)
        self.config = self._model.config
        layers = layers_of(self.config, policy.num_stages)  # more than layers is better said now
        self.tokenizer = load_tokenizer(self._model.path)
        self.seed = seed
        self.report: Report | None = None
        self._slots = _checked_slots(slots or {})
        self._disk, self._wrap_store = disk, wrap_store
        self.hardware = hardware or this_machine(dtype)
        self._scratch = cache_directory() if offload_dir is None else Path(offload_dir)
        self._stages: dict[int, Stage] = {}
        self._valid: set[Workload] = set()
        self._digests: dict[Workload, bytes] = {}
        self._closed = False
        self._policy: Policy | None = None
        self._why: str | None = None
        self._chosen_for: object = None
        self._hand_over = HandOver()
        self._hosts: tuple[int, ...] = ()
        if policy.num_stages > 1 and process_count() > 1:
            self._join(layers)
        if auto is None:
            self._place(policy)

    def _join(self, layers: list[range]) -> None:
        """Takes its part among the processes that JAX's runtime joins."""
        self._hosts = hosts_of(len(layers), process_count())
        held = [
            [stage for stage, host in enumerate(self._hosts) if host == index]
            for index in range(process_count())
        ]
        names = [
            f"stage {' and '.join(map(str, stages))}, layers {layers[stages[0]].start} to "
            f"{layers[stages[-1]].stop - 1}"
            for stages in held
        ]
        self._processes = Processes(names)
        self._hand_over = ProcessHandOver(
            self._processes,
            self._devices,
            layers,
            width=self.config.hidden_size,
            dtype=self._model.dtype,
        )

    @staticmethod
    def _stage_devices(num_stages: int) -> list[Any]:
        return stage_devices(num_stages)

    def _open(self, model: str, policy: Policy) -> None:
        """Opens the weight store that ``policy`` wants, made if need be."""
        store = resolve(
            model,
            dtype=self._dtype,
            offload_dir=self._offload_dir,
            say=self._say,
            **_weight_format(policy),
        )

        def needed(config: Config, form: WeightFormat) -> set[str]:
            layers = layers_of(config, policy.num_stages)
            here = (i for i, device in enumerate(self._devices) if _is_here(device))
            return stored_names(config, form, (layer for i in here for layer in layers[i]))

        self._model = open_store(store, dtype=self._dtype, needed=needed)
        self.store = self._model.path  # where the weights lie, converted if need be

    def _place(self, policy: Policy) -> None:
        """Puts the weights where ``policy`` wants them."""
        self._policy = dataclasses.replace(policy, weight_bits=self._model.format.bits)
        placements = place_stages(self.config, self._model.format, self._policy)
        self._placement = together(placements)
        self._load(placements)
        event("model opened", store=str(self.store), policy=self._policy.to_json())

    def _load(self, placements: Sequence[Placement]) -> None:
        """Opens the weights of the stages that are here."""
        policy = self.policy
        layers = layers_of(self.config, policy.num_stages)
        for number, device in enumerate(self._devices):
            if not _is_here(device):
                continue
            weights = LayerLoader(
                self._model,
                placements[number],
                layers[number],
                device,
                context=self._disk,
                wrap=self._wrap_store,
            )
            self._stages[number] = Stage(device, weights)

    def choose_policy(self, job: Demand) -> Policy:
        """With ``policy="auto"``, chooses the policy for ``job``; else returns what is in force.

        Args:
            job: Checked requests, or the lengths of a ``Uniform`` job.

        Raises:
            NothingFitsError: no policy fits the memory.
        """
        if self._auto is None:
            return self.policy
        if isinstance(job, Uniform):
            job = job.within(self.config)
        alike = kind_of(job)
        if alike == self._chosen_for:
            return self.policy
        self._chosen_for = alike
        policy, self._why = self._searched(job)
        event("policy chosen", policy=policy.to_json(), why=self._why)
        self._take(policy)
        return self.policy

    def _searched(self, job: Demand) -> tuple[Policy, str]:
        """The best policy here, and why."""
        assert self._auto is not None
        stored = sum(e.nbytes for e in self._model.format.entries(self.config).values())
        found = self._auto.choose(
            self._known(),
            job,
            self.hardware,
            limits_of_this_machine(*self._limits, self._scratch, stored),
            schedule=self._schedule,
            placed=self._policy,
        )
        return found.best.policy, found.why()

    def _take(self, chosen: Policy) -> None:
        """Works by ``chosen``; the weights, if they are in place, are where it has them."""
        if self._policy is not None:
            self._policy = chosen
            return
        if chosen.weight_bits != self._model.format.bits:
            self._open(str(self.store), chosen)
        self._place(chosen)

    @property
    def why(self) -> str | None:
        """Why ``"auto"`` chose the policy, in a line; None: it did not."""
        return self._why

    def _known(self) -> Model:
        chunk = (self._disk or DiskContext()).chunk_positions
        return Model(self.config, self._dtype, self._model.format, self._slots, chunk, self._hosts)

    @property
    def placement(self) -> Placement:
        """Where every weight tensor lies."""
        self._ready()
        return self._placement

    def _ready(self) -> None:
        if self._policy is None:
            self.choose_policy(Uniform())

    @property
    def policy(self) -> Policy:
        """What is in force; setting it ends ``"auto"``.

        ``weights``, ``weight_bits`` and ``num_stages``, which are in place, are fixed. Where
        ``"auto"`` has seen no requests yet, it chooses for prompts of 512 tokens and 32 new ones.
        """
        self._ready()
        assert self._policy is not None
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        now = self.policy
        if _in_place(policy) != _in_place(now):
            raise ValueError("the weights are in place already; make another LLM to move them")
        self._policy, self._auto = policy, None

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others, as plain JSON."""
        manifest = self._model.manifest
        return {
            "source": manifest.source.fingerprint,
            "dtype": manifest.dtype,
            "bits": manifest.weight_bits,
            "group": manifest.weight_group,
        }

    def software(self) -> dict[str, str]:
        """What results depend on beside model, policy and requests: versions, and the device."""
        kind = jax.local_devices()[0].device_kind
        return {"flexgen-jax": __version__, "jax": jax.__version__, "device": kind}

    @property
    def num_replicas(self) -> int:
        """How many blocks run at once."""
        return 1

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int], None] | None = None,
        on_block: OnBlock | None = None,
        on_logits: OnLogits | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; results in the order of ``prompts``.

        Args:
            prompts: Strings, lists of token ids, or dicts with ``prompt`` or ``prompt_token_ids``.
            sampling_params: One for all, or one per prompt; None: the defaults.
            progress: Told the number of new tokens whenever some are booked.
            on_block: Given the results of the prompts that are complete as each block finishes.
            on_logits: Given (step, batch, logits [rows, vocab]) of every head computation.

        Raises:
            RequestError: prompts that cannot be run, all of them named; nothing has run.
            ExecutionError: an op failed.
        """
        prompts = as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(sampling_params)} sampling parameters: "
                "give one for all, or one per prompt"
            )
        requests, problems = [], []
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                requests.append(self.request(index, prompt, params))
            except RequestError as error:
                problems.append(f"prompt {index}: {error}")
        if problems:
            raise RequestError("; ".join(problems))
        return self.run(requests, progress=progress, on_block=on_block, on_logits=on_logits)

    def generate_iter(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        window: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Completes prompts as they come, in their order; holds a window of them at a time.

        For inputs larger than memory: a generator, a file, a Hugging Face dataset (whose column
        must be called ``prompt``, or ``prompt_token_ids``). A window is read when the outputs of
        the one before have been taken, and sorted by length; :attr:`report` covers those that ran.

        Args:
            prompts: As :meth:`generate` takes them.
            sampling_params: One for all, or one per prompt; None: the defaults.
            window: Prompts of a window, rounded up to whole blocks; None: 4096, or four blocks.
            progress: As :meth:`generate` takes it.

        Raises:
            RequestError: a prompt that cannot be run, when the outputs of those before it have been
                taken.
            ExecutionError: an op failed.
        """
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be an integer of at least 1, got {window!r}")
        return generate_iter(self, prompts, sampling_params, window=window, progress=progress)

    def request(
        self, index: int, prompt: Prompt, params: SamplingParams, *, scoring: bool = False
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
    ) -> list[RequestOutput]:
        """Completes checked requests; results in their order. Sets :attr:`report`."""
        self._check_leads()
        self.choose_policy(requests)
        outputs: dict[int, RequestOutput] = {}
        total = self.sum_of_reports()

        def keep(_: int, finished: dict[int, RequestOutput], report: Report) -> None:
            total.add(report)
            outputs.update(finished)
            if on_block is not None:
                on_block(list(finished.values()))

        self.run_blocks(self.blocks(requests), keep, progress=progress, on_logits=on_logits)
        self.report = total.total()
        return [outputs[r.index] for r in requests]

    def run_blocks(
        self,
        blocks: Sequence[Block],
        on_block: Callable[[int, dict[int, RequestOutput], Report], None],
        *,
        progress: Callable[[int], None] | None = None,
        on_logits: OnLogits | None = None,
        snapshot_of: Callable[[int], Snapshot] | None = None,
    ) -> None:
        """Runs ``blocks`` one after another, keeping no results.

        Args:
            on_block: Given the block's place in ``blocks``, the outputs of the requests that are
                complete with it, by their index, and its report, as each finishes.
            progress: As :meth:`generate` takes it, like ``on_logits``.
            snapshot_of: Given a block's place, says where its state is kept while it runs.

        Raises:
            ScheduleError: the schedule is wrong; nothing has run.
            ExecutionError: an op failed.
            StorageError: a snapshot is damaged.
        """
        gathered = Gathered()

        def gather(number: int, outputs: list[RequestOutput], report: Report) -> None:
            finished = {}
            for request, output in zip(blocks[number].requests, outputs, strict=True):
                whole = gathered.add(output, request.params.n)
                if whole is not None:
                    finished[request.index] = whole
            on_block(number, finished, dataclasses.replace(report, requests=len(finished)))

        self.run_each(
            blocks, gather, progress=progress, on_logits=on_logits, snapshot_of=snapshot_of
        )

    def run_each(
        self,
        blocks: Sequence[Block],
        on_block: Callable[[int, list[RequestOutput], Report], None],
        *,
        progress: Callable[[int], None] | None = None,
        on_logits: OnLogits | None = None,
        snapshot_of: Callable[[int], Snapshot] | None = None,
    ) -> None:
        """As :meth:`run_blocks`, but ``on_block`` is given the completions of each block as they
        are, in the order of its requests: of a prompt's several completions those that it has."""
        if self._closed:
            raise ValueError("this LLM is closed; make another one")
        if self._processes is None:
            self._validate(blocks)
            self._run_blocks(blocks, on_block, progress, on_logits, snapshot_of)
            return
        self._check_leads()
        if snapshot_of is not None:
            raise ValueError("the state of a running block cannot be saved over several processes")
        with self._failing_together():
            self._validate(blocks)
            settings = self._settings(blocks) | _in_place(self.policy)
            self._processes.send((settings, self.policy, list(blocks)))
            self._run_blocks(blocks, on_block, progress, on_logits, None)

    @property
    def leads(self) -> bool:
        """Whether requests are given to this process; of several, process 0 only."""
        return self._processes is None or self._processes.leads

    def _check_leads(self) -> None:
        if self._processes is not None and not self.leads:
            raise ValueError(
                f"process {self._processes.index} has no requests of its own: process 0 leads; "
                "call follow()"
            )

    def follow(self) -> None:
        """Computes its stages of what process 0 runs, until that closes its ``LLM``.

        For processes other than 0, where JAX's runtime joins several. All make their ``LLM`` alike.

        Raises:
            ProcessError: another process is lost or has failed.
            ExecutionError: an op failed here; the other processes end, too.
            ValueError: this process leads; or its model, software or settings are not those of
                process 0.
        """
        if self._processes is None or self.leads:
            raise ValueError("there is nobody to follow: this is process 0, or the only one")
        with self._failing_together():
            while (message := self._processes.receive()) is not None:
                theirs, policy, blocks = message
                placed = self._policy or policy
                self._take(policy)
                mine = self._settings(blocks) | _in_place(placed)
                for name, value in theirs.items():
                    if mine[name] != value:
                        raise ValueError(
                            f"{name} is {mine[name]} here and {value} in process 0: start all "
                            "processes with the same model, options and software"
                        )
                self._run_blocks(blocks, _ignore, None, None, None)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What fails here is known to all processes; what failed elsewhere is what is raised."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if self._processes is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            self._processes.fail("interrupted" if stopped else str(error) or type(error).__name__)

    def _settings(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """What has to be the same in all processes."""
        orders = hashlib.sha256()
        for block in blocks:
            orders.update(self._digest_of_order(self._workload(block)))
        return {
            "the software": f"flexgen-jax {__version__}, jax {jax.__version__}",
            "the model": self.identity(),
            "the seed": self.seed,
            "the schedule": f"{self.schedule_name} ({orders.hexdigest()[:8]})",
        }

    def _digest_of_order(self, workload: Workload) -> bytes:
        if workload not in self._digests:
            found = hashlib.sha256()
            for op in self._order()(workload):
                found.update(repr(op).encode())
            self._digests[workload] = found.digest()
        return self._digests[workload]

    def _validate(self, blocks: Sequence[Block]) -> None:
        """Refuses a bad schedule before anything runs; most blocks of a job are alike."""
        for workload in {self._workload(block) for block in blocks} - self._valid:
            validate(self._schedule(workload), workload)
            self._valid.add(workload)

    def _run_blocks(
        self,
        blocks: Sequence[Block],
        on_block: Callable[[int, list[RequestOutput], Report], None],
        progress: Callable[[int], None] | None,
        on_logits: OnLogits | None,
        snapshot_of: Callable[[int], Snapshot] | None,
    ) -> None:
        _log_begun(self.schedule_name, blocks, self.plan(blocks))
        begun, tokens = time.perf_counter(), 0
        with self._cells(blocks) as cells:
            for number, block in enumerate(blocks):
                event("block begun", block=number, of=len(blocks), requests=len(block.requests))
                counts = Counts(
                    lambda: (
                        sum(stage.weights.disk_bytes for stage in self._stages.values())
                        + cells.disk_bytes_read,
                        cells.disk_bytes_written,
                    )
                )
                snapshot = snapshot_of(number) if snapshot_of is not None else None
                results, timeline, held = self._run_block(
                    block, number, cells, counts, snapshot, progress, on_logits
                )
                made = sum(len(result.token_ids) for result in results)
                tokens += made
                _log_tokens("block finished", made, timeline.seconds, block=number)
                event("streams", level=DEBUG, block=number, streams=timeline.summary())
                report = Report(
                    policy=self.policy,
                    placement=self.plan([block]),
                    schedule=self.schedule_name,
                    requests=len(block.requests),
                    blocks=1,
                    batches=len(block.batches),
                    prompt_tokens=sum(len(r.token_ids) for r in block.requests),
                    padded_tokens=sum(b.rows * b.prompt_len for b in block.batches),
                    generated_tokens=made,
                    peak_bytes=held,
                    moved=self.traffic([block]),
                    timeline=timeline,
                    hardware=self.hardware.name,
                    predict=functools.partial(self.predict, block),
                    observe=functools.partial(self._observe, block, timeline),
                    lower_bound=functools.partial(self._lower_bound, block),
                    why=self._why,
                    **counts(),
                )
                on_block(number, [output_of(result, self.tokenizer) for result in results], report)
        _log_tokens("run finished", tokens, time.perf_counter() - begun)

    def sum_of_reports(self) -> Sum:
        """Of nothing yet; takes the reports of :meth:`run_blocks`."""
        empty = Report.empty(
            self.policy, self.plan([]), self.schedule_name, self.hardware.name, self._why
        )
        return Sum(empty, MAX_SPANS)

    def blocks(self, requests: Sequence[Request]) -> list[Block]:
        """How ``requests`` would be grouped under the policy."""
        return list(
            make_blocks(
                requests,
                device_batch_size=self.policy.device_batch_size,
                num_device_batches=self.policy.num_device_batches,
            )
        )

    def plan(self, blocks: Sequence[Block]) -> dict[str, Placement]:
        """Where weights, cache and hidden states lie: of the block with the largest cache."""
        config, dtype = self.config, self._model.dtype
        cache = [place_cache(b, config, dtype, self.policy) for b in blocks]
        hidden = [place_hidden(b, config, dtype, self.policy.hidden) for b in blocks]
        largest = max(range(len(blocks)), key=lambda i: cache[i].nbytes(), default=None)
        empty = Placement(())
        return {
            "weights": self.placement,
            "cache": empty if largest is None else cache[largest],
            "hidden": empty if largest is None else hidden[largest],
        }

    def predict(self, block: Block) -> Timeline:
        """What the simulator expects of ``block``."""
        workload = self._workload(block)
        return simulate(self._order()(workload), workload, self.hardware)

    def _observe(self, block: Block, timeline: Timeline) -> list[Observation]:
        workload = self._workload(block)
        return observations(list(self._order()(workload)), workload, self.hardware, timeline)

    def _lower_bound(self, block: Block) -> float:
        return bound(CostModel(self._workload(block), self.hardware).lower_bound())[1]

    def _order(self) -> Schedule:
        return self._schedule if self.policy.overlap else serialized(self._schedule)

    def traffic(self, blocks: Sequence[Block]) -> dict[Link, int]:
        """Bytes that the schedule moves over each link, if every request runs to its end."""
        total = dict.fromkeys(Link, 0)
        for block in blocks:
            workload = self._workload(block)
            assert workload.sizes is not None
            for link, nbytes in workload.sizes.total(self._schedule(workload)).items():
                total[link] += nbytes
        return total

    def _cells(self, blocks: Sequence[Block]) -> Cells:
        return Cells(
            blocks,
            self.config,
            self._model.dtype,
            self.policy,
            {number: stage.device for number, stage in self._stages.items()},
            scratch=self._scratch,
            context=self._disk,
            wrap=self._wrap_store,
        )

    def _workload(self, block: Block) -> Workload:
        return self._known().workload(block, self.policy)

    def _run_block(
        self,
        block: Block,
        number: int,
        cells: Cells,
        counts: Counts,
        snapshot: Snapshot | None,
        progress: Callable[[int], None] | None,
        on_logits: OnLogits | None,
    ) -> tuple[list[Generated], Timeline, Mapping[Tier, int]]:
        workload = self._workload(block)
        # The same slots for all blocks: making one costs as much as reading a layer. But after a
        # failure something may still be reading them.
        stages = {
            number: dataclasses.replace(stage, rings=stage.rings or Rings(workload))
            for number, stage in self._stages.items()
        }
        for stage in self._stages.values():
            stage.rings = None
        last = stages.get(workload.num_stages - 1)
        states = batch_states(
            block,
            self.seed,
            eos_token_ids(self.config),
            None if self.tokenizer is None else self.tokenizer.decode,
            None if last is None else last.device,
        )
        effects = BlockEffects(
            states, number, workload, stages, cells, self._hand_over, Watch(progress, on_logits)
        )
        timeline = run_block(self._order(), workload, effects, counts, snapshot)
        self._stages = stages
        results = list(effects.results())
        effects.close()
        return results, timeline, effects.peak_bytes

    def close(self) -> None:
        """Gives back the weights' memory and file handles."""
        if not self._closed and self._processes is not None:
            self._processes.close()
        self._closed = True
        for stage in self._stages.values():
            stage.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
        self.close()


def _in_place(policy: Policy) -> dict[str, Any]:
    """What of it cannot change, by name."""
    return {f"the policy's {name}": getattr(policy, name) for name in _IN_PLACE}


def _is_here(device: Any) -> bool:
    return device is not None and bool(device.process_index == jax.process_index())


def _ignore(*_: object) -> None:
    """Results are process 0's."""


def _log(message: str) -> None:
    # A conversion takes minutes and gigabytes: to be seen without any logging set up.
    LOGGER.warning(message)


def _log_begun(schedule: str, blocks: Sequence[Block], placement: Mapping[str, Placement]) -> None:
    requests = sum(len(block.requests) for block in blocks)
    event("run begun", schedule=schedule, requests=requests, blocks=len(blocks))
    for kind, placed in placement.items():
        if placed.cells:
            shares = {tier.value: placed.nbytes(tier) for tier in Tier}
            event("placement", kind=kind, nbytes=shares)


def _log_tokens(what: str, tokens: int, seconds: float, **fields: Any) -> None:
    rate = tokens / seconds if seconds > 0 else 0.0
    event(what, **fields, tokens=tokens, seconds=seconds, tokens_per_second=rate)


def _schedule(schedule: str | Schedule) -> tuple[str, Schedule]:
    if callable(schedule):
        return getattr(schedule, "__name__", "schedule"), schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule {schedule!r}; known: {', '.join(sorted(SCHEDULES))}")
    return schedule, SCHEDULES[schedule]


def _weight_format(policy: Policy) -> dict[str, Any]:
    return {"weight_bits": policy.weight_bits, "group_size": policy.group_size}


def _checked_slots(slots: Mapping[str, Any]) -> dict[str, int]:
    names = [f.name for f in dataclasses.fields(Workload) if f.name.endswith("_slots")]
    for name in slots:
        if name not in names:
            raise ValueError(f"no slots {name!r}; known: {', '.join(names)}")
    Workload(num_steps=1, num_layers=1, num_batches=1, **slots)  # checks the numbers
    return dict(slots)
