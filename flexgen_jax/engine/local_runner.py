"""Blocks one after another, on the devices of this process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from logging import DEBUG
from pathlib import Path
from typing import Any

import jax

from flexgen_jax.engine.batch_state import Makings
from flexgen_jax.engine.block_run import BlockRun, Counts, Ended, Setting, Since
from flexgen_jax.engine.cells import Cells, WrapStore
from flexgen_jax.engine.effects import OnLogits, OnPrefill, OnTokens, Watch
from flexgen_jax.engine.hand_over import HandOver
from flexgen_jax.engine.layer_loading import LayerLoader
from flexgen_jax.engine.memory_watch import MemoryWatch
from flexgen_jax.engine.pipeline import Rings, Stage
from flexgen_jax.engine.runner import Finished, OnFinished, Runner
from flexgen_jax.engine.snapshots import Snapshot
from flexgen_jax.engine.waiting import More, Waiting
from flexgen_jax.logs import event
from flexgen_jax.models.family import eos_token_ids
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.stage_layout import layers_of, place_stages
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.guidance import Guide
from flexgen_jax.requests.structured_outputs import StructuredOutputsParams
from flexgen_jax.requests.texts import guidance_of, output_of
from scheduling.placement import Placement
from scheduling.policy import Policy, Tier
from storage.disk import DiskContext


class LocalRunner(Runner):
    """Runs the stages whose devices are this process's.

    Args:
        devices: Of all stages.
        seed: For requests that have none of their own.
        scratch: Parent of the directories for what lies on disk while blocks run.
        disk: How the disk tier is read.
        wrap_store: As ``LLM`` takes it.
        memory: Looks at what blocks really take; None: without limits.

    Attributes:
        hand_over: Between the stages; another one where some of them are elsewhere.
    """

    def __init__(
        self,
        devices: Sequence[Any],
        *,
        seed: int,
        scratch: Path,
        disk: DiskContext | None = None,
        wrap_store: WrapStore | None = None,
        memory: MemoryWatch | None = None,
    ) -> None:
        super().__init__()
        index = jax.process_index()
        self._devices = {n: d for n, d in enumerate(devices) if d.process_index == index}
        self.seed, self.hand_over = seed, HandOver()
        self._scratch, self._disk, self._wrap_store = scratch, disk, wrap_store
        self._stages: dict[int, Stage] = {}
        self._memory = memory or MemoryWatch()

    @property
    def stages(self) -> Sequence[int]:
        return list(self._devices)

    def place(self, policy: Policy) -> None:
        config = self.model.config
        placements = place_stages(config, self.model.format, policy)
        layers = layers_of(config, policy.num_stages)
        for number, device in self._devices.items():
            weights = LayerLoader(
                self.model,
                placements[number],
                layers[number],
                device,
                context=self._disk,
                wrap=self._wrap_store,
            )
            self._stages[number] = Stage(device, weights)

    def run(
        self,
        planner: Planner,
        blocks: Sequence[Block],
        on_finished: OnFinished,
        *,
        progress: OnTokens | None = None,
        on_logits: OnLogits | None = None,
        on_prefill: OnPrefill | None = None,
        snapshot_of: Callable[[int], Snapshot] | None = None,
        more: More | None = None,
    ) -> None:
        _log_begun(planner.schedule_name, blocks, planner.placement(blocks))
        begun, tokens = time.perf_counter(), 0
        watch = Watch(progress, on_logits, on_prefill, self._memory.look)
        with self._cells(planner.policy, blocks) as cells:
            for number, block in enumerate(blocks):
                event("block begun", block=number, of=len(blocks), requests=len(block.requests))
                snapshot = snapshot_of(number) if snapshot_of is not None else None
                waiting = Waiting(block.waiting, more if number == len(blocks) - 1 else None)

                def on_part(finished: Finished, number: int = number) -> None:
                    nonlocal tokens
                    tokens += finished.generated_tokens
                    on_finished(number, finished)

                before, lap = tokens, time.perf_counter()
                self._run_block(planner, block, number, waiting, cells, snapshot, watch, on_part)
                seconds = time.perf_counter() - lap
                _log_tokens("block finished", tokens - before, seconds, block=number)
        _log_tokens("run finished", tokens, time.perf_counter() - begun)

    def _cells(self, policy: Policy, blocks: Sequence[Block]) -> Cells:
        return Cells(
            blocks,
            self.model.config,
            self.model.dtype,
            policy,
            self._devices,
            scratch=self._scratch,
            context=self._disk,
            wrap=self._wrap_store,
        )

    def _guide(self, form: StructuredOutputsParams) -> Guide:
        """Of an answer in a form, which a request that has passed its checks asks for."""
        assert self._tokenizer is not None
        return guidance_of(self.model.config, self._tokenizer).guide(form)

    def _run_block(
        self,
        planner: Planner,
        block: Block,
        number: int,
        waiting: Waiting,
        cells: Cells,
        snapshot: Snapshot | None,
        watch: Watch,
        on_part: Callable[[Finished], None],
    ) -> None:
        counts = Counts(
            lambda: (
                sum(stage.weights.disk_bytes for stage in self._stages.values())
                + cells.disk_bytes_read,
                cells.disk_bytes_written,
            )
        )
        workload = planner.workload(block)
        # The same slots for all blocks: making one costs as much as reading a layer. But after a
        # failure something may still be reading them.
        stages = {
            number: dataclasses.replace(stage, rings=stage.rings or Rings(workload))
            for number, stage in self._stages.items()
        }
        for stage in self._stages.values():
            stage.rings = None
        last = stages.get(workload.num_stages - 1)
        makings = Makings(
            self.seed,
            eos_token_ids(self.model.config),
            None if self._tokenizer is None else self._tokenizer.decode,
            None if last is None else last.device,
            self._guide,
        )

        def hand_out(results: list[Generated], since: Since, ended: Ended | None) -> None:
            finished = Finished(
                requests=tuple(result.request for result in results),
                outputs=[output_of(result, self._tokenizer) for result in results],
                peak_bytes=since.peak_bytes,
                process_bytes=self._memory.process_bytes,
                counts=since.counts,
                ended=ended is not None,
            )
            if ended is not None:
                streams = ended.timeline.summary()
                event("streams", level=DEBUG, block=number, streams=streams)
                finished = dataclasses.replace(finished, **ended._asdict())
            on_part(finished)

        setting = Setting(planner, stages, cells, self.hand_over, makings, watch)
        BlockRun(setting, block, number, waiting, counts, hand_out, snapshot)()
        self._stages = stages

    def close(self, error: BaseException | None = None) -> None:
        self._closed = True
        for stage in self._stages.values():
            stage.close()


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
