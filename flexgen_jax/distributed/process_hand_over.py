"""Hand-over between stages of different processes: collectives over meshes of their devices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexgen_jax.distributed.frames import MessageError
from flexgen_jax.distributed.messages import (
    SAMPLED_NBYTES,
    TOKENS_NBYTES,
    decode_tokens,
    encode_tokens,
)
from flexgen_jax.engine.batch_state import SCORE_CHUNK
from flexgen_jax.engine.hand_over import HandOver
from scheduling.ops import StoreHidden

if TYPE_CHECKING:
    from flexgen_jax.distributed.processes import Processes
    from flexgen_jax.engine.batch_state import BatchState

_AXIS = "stage"


class ProcessHandOver(HandOver):
    """Hidden states go by ``ppermute`` between two stages, tokens by ``all_gather`` to all.

    Every process calls the same collectives in the same order, that of the schedule: all
    hand-overs are one stream where there are several hosts.

    Args:
        devices: Of each stage, in all processes.
        layers: Of each stage.
        width: Of a hidden state. ``dtype``: of it.
    """

    def __init__(
        self,
        processes: Processes,
        devices: Sequence[Any],
        layers: Sequence[range],
        *,
        width: int,
        dtype: str,
    ) -> None:
        self._processes = processes
        self._devices = devices
        self._stage_of = {layer: stage for stage, held in enumerate(layers) for layer in held}
        self._last = len(devices) - 1
        self._width, self._dtype = width, dtype
        # A device of each process, for what all of them get.
        self._speakers = [
            next(d for d in devices if d.process_index == index) for index in range(processes.count)
        ]

    def involves(self, layer: int) -> bool:
        stage = self._stage_of[layer]
        if stage == self._last:
            return True
        ends = self._devices[stage : stage + 2]
        return any(device.process_index == self._processes.index for device in ends)

    def hidden(
        self, op: StoreHidden, arrays: tuple[jax.Array, ...], state: BatchState
    ) -> tuple[jax.Array, ...]:
        stage = self._stage_of[op.layer]
        source, target = self._devices[stage : stage + 2]
        if source.process_index == target.process_index:
            return arrays
        receives = target.process_index == self._processes.index
        if receives:
            arrays = tuple(
                _nothing((*shape, self._width), self._dtype, target) for shape in state.shapes
            )
        try:
            here = target if receives else source
            moved = [_sent(jax.device_put(a, here), source, target) for a in arrays]
            jax.block_until_ready(moved)
        except Exception as error:
            raise self._processes.explained(error) from error
        return tuple(moved) if receives else ()

    def tokens(self, op: StoreHidden, state: BatchState) -> None:
        rows, chunks, sampling = len(state.rows), state.num_score_chunks, state.sampling
        columns = 3 + 2 * max(sampling.num_scores, sampling.features.num_logprobs or 0)
        room = TOKENS_NBYTES + SAMPLED_NBYTES * (1 + chunks)
        room += 4 * columns * (rows + SCORE_CHUNK * chunks)
        said = np.zeros(room, np.uint8)
        source = self._devices[self._last].process_index
        if source == self._processes.index:
            assert state.sampled is not None
            data = encode_tokens(state.sampled, state.scores)
            said[: len(data)] = np.frombuffer(data, np.uint8)
        try:
            heard = np.asarray(_gathered(said, self._speakers, self._processes.index))[source]
        except Exception as error:
            raise self._processes.explained(error) from error
        try:
            state.sampled, state.scores = decode_tokens(heard.tobytes(), rows)
        except MessageError as error:
            raise self._processes.misspoken(source, error) from error


@functools.lru_cache(maxsize=64)
def _nothing(shape: tuple[int, ...], dtype: str, device: Any) -> jax.Array:
    """What a receiver puts in: the shape of what it will get."""
    return jnp.zeros(shape, dtype, device=device)


@functools.lru_cache(maxsize=64)
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    return Mesh(np.array(devices), (_AXIS,))


@functools.lru_cache(maxsize=64)
def _shift(mesh: Mesh) -> Any:
    spec = PartitionSpec(_AXIS)
    return jax.jit(
        jax.shard_map(
            lambda x: jax.lax.ppermute(x, _AXIS, [(0, 1)]),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
    )


def _sent(array: jax.Array, source: Any, target: Any) -> jax.Array:
    """In both processes: from the one device to the other. What comes back is this process's."""
    mesh = _mesh((source, target))
    both = jax.make_array_from_single_device_arrays(
        (2, *array.shape), NamedSharding(mesh, PartitionSpec(_AXIS)), [array[None]]
    )
    return _shift(mesh)(both).addressable_data(0)[0]


@functools.lru_cache(maxsize=64)
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _gathered(mine: np.ndarray, devices: Sequence[Any], index: int) -> jax.Array:
    """In all processes: (processes, n), what each of them has put in."""
    mesh = _mesh(tuple(devices))
    every = jax.make_array_from_single_device_arrays(
        (len(devices), *mine.shape),
        NamedSharding(mesh, PartitionSpec(_AXIS)),
        [jax.device_put(mine[None], devices[index])],
    )
    return _gather(mesh)(every).addressable_data(0)
