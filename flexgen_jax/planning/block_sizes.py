"""The sizes of a block's ops, from the model, the policy and the placement."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from flexgen_jax.models.attention import prompt_workspace_nbytes
from flexgen_jax.models.family import Config
from flexgen_jax.models.params import (
    expert_numbers,
    loaded_names,
    matmul_flops,
    param_shapes,
    query_flops,
    unit_experts,
    unit_kinds,
    unit_records,
)
from flexgen_jax.models.pieces import positions_per_call, rows_per_call
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.cell_layout import (
    CellRoom,
    cache_format,
    cache_tiers,
    cell_room,
    hidden_name,
    place_hidden,
)
from flexgen_jax.planning.expert_tiles import LARGEST, decode_tile
from flexgen_jax.planning.stage_layout import (
    check_experts,
    groups_of,
    layers_of,
    stage_starts,
    tier_numbers,
)
from scheduling.cache_cells import CacheCell, Cells
from scheduling.layer_weights import LayerWeights
from scheduling.policy import Policy, Split, Tier
from scheduling.sizes import BatchSizes, ExpertSizes, Sizes
from storage.disk import DiskContext

if TYPE_CHECKING:
    from flexgen_jax.weights.weight_format import WeightFormat


def block_sizes(
    block: Block,
    config: Config,
    form: WeightFormat,
    policy: Policy,
    *,
    chunk_positions: int,
    hosts: tuple[int, ...] = (),
) -> Sizes:
    """What the ops of ``block`` move and unpack.

    Args:
        chunk_positions: Of the cache on disk.
        hosts: Of the stages, as a ``Workload`` has them.
    """
    hidden = {c.name: c.tier for c in place_hidden(block, config, form.dtype, policy.hidden).cells}
    itemsize = jnp.dtype(form.dtype).itemsize
    starts = stage_starts(config, policy.num_stages)
    weights = _weights(config, form, policy)

    @functools.cache  # most batches of a block are alike
    def of_batch(
        rows: int, prompt_len: int, capacity: int, num_steps: int, longest: int, tier: Tier
    ) -> BatchSizes:
        return BatchSizes(
            rows=rows,
            prompt_len=prompt_len,
            capacity=capacity,
            num_steps=num_steps,
            hidden_tier=tier,
            hidden_nbytes=rows * config.hidden_size * itemsize,
            workspace=_workspace(rows, longest, config, itemsize),
            routed_nbytes=_routed_nbytes(rows, config, itemsize),
            longest_prompt=longest,
        )

    return Sizes(
        weights=weights.moved,
        dense=_dense(config, form, policy.num_stages),
        batches=tuple(
            of_batch(
                batch.rows,
                batch.prompt_len,
                batch.cache_len,
                batch.num_steps,
                batch.longest_prompt,
                hidden[hidden_name(number)],
            )
            for number, batch in enumerate(block.batches)
        ),
        cache=_cache(block, config, form, policy),
        resident=weights.resident,
        matmul_flops=matmul_flops(config),
        query_flops=query_flops(config),
        hidden_size=config.num_attention_heads * config.head_dim,
        chunk_positions=chunk_positions,
        reads=weights.reads,
        borders={
            first - 1: bool(hosts) and hosts[stage] != hosts[stage - 1]
            for stage, first in enumerate(starts)
            if stage
        },
        windows=_windows(config),
        experts=_experts(config, policy.block_size),
    )


@functools.lru_cache(maxsize=16)
def _windows(config: Config) -> Mapping[int, int]:
    """Of the layers that have one."""
    kinds = enumerate(unit_kinds(config))
    return {layer: kind.window for layer, kind in kinds if kind.window is not None}


@functools.lru_cache(maxsize=256)
def _experts(config: Config, rows: int) -> ExpertSizes | None:
    """Of a policy whose blocks have so many ``rows``."""
    numbers = expert_numbers(config)
    if numbers is None:
        return None
    count, chosen = numbers
    units = {layer: len(own) for layer, own in unit_experts(config).items()}
    tiles = decode_tile(rows, chosen, count), LARGEST
    return ExpertSizes(units=units, count=count, chosen=chosen, tiles=tiles)


def _routed_nbytes(rows: int, config: Config, itemsize: int) -> int:
    """Of one position of all rows: hidden states and inputs, and both again in the pool.

    There the sum is kept in float32.
    """
    if expert_numbers(config) is None:
        return 0
    return rows * config.hidden_size * (3 * itemsize + 4)


@functools.lru_cache(maxsize=256)
def _workspace(of_rows: int, seq: int, config: Config, itemsize: int) -> int:
    """Bytes that the largest computation takes beside its arguments: prefill's, or the head's.

    Of some rows, and of a long prompt some positions, what a layer makes of them, the MLP's width
    foremost, in float32, and attention's scores; of all rows the layer's results: hidden states,
    and queries, keys and values.
    """
    hidden = config.hidden_size
    heads, kv_heads, head_dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    rows = rows_per_call(of_rows, seq)
    some = rows * positions_per_call(seq) * (_widths(config) + hidden) * 4
    scores = prompt_workspace_nbytes(rows, seq, heads, kv_heads, head_dim, itemsize=itemsize)
    attended = rows * seq * heads * head_dim * (4 + itemsize)
    results = of_rows * seq * 2 * (hidden + kv_heads * head_dim) * itemsize
    return max(max(some, scores) + attended + results, 3 * of_rows * config.vocab_size * 4)


@functools.lru_cache(maxsize=64)
def _widths(config: Config) -> int:
    """Of what the matrices of a decoder layer give, all together: of the widest layer."""
    of_units = zip(config.units, unit_kinds(config), strict=True)
    return max(
        sum(r.shape[1] for r in unit_records(config, unit).values() if r.role == "matrix")
        for unit, kind in of_units
        if kind.role == "decoder"
    )


class _Loads(NamedTuple):
    """What the loads of a stage's layers bring, wherever it lies: of each part that is of one
    group and one load (parts,) arrays, and of each load its own.

    Attributes:
        load: (parts,) Its place in the stage.
        group: (parts,) Of the stage.
        nbytes: (parts,)
        files: (parts,) Accesses, if it is on disk.
        dense: Of each load, bytes that it is unpacked to.
        groups: (groups,) Bytes.
    """

    load: np.ndarray
    group: np.ndarray
    nbytes: np.ndarray
    files: np.ndarray
    dense: tuple[int, ...]
    groups: np.ndarray


@functools.lru_cache(maxsize=16)
def _loads(config: Config, form: WeightFormat, num_stages: int) -> tuple[_Loads, ...]:
    """Of each stage."""
    entries, shapes = form.entries(config), param_shapes(config)
    itemsize, found = jnp.dtype(form.dtype).itemsize, []
    stages = zip(groups_of(config, form, num_stages), layers_of(config, num_stages), strict=True)
    for groups, layers in stages:
        group_of = {name: number for number, group in enumerate(groups) for name in group.names}
        rows, dense = [], []
        for place, layer in enumerate(layers):
            names = loaded_names(config, config.units[layer])
            parts: dict[int, tuple[int, int]] = {}
            for stored in form.order(config, names):
                nbytes = entries[stored].nbytes
                before, accesses = parts.get(group_of[stored], (0, 0))
                # Smaller ones stay in the page cache.
                accesses += nbytes >= DiskContext.small_nbytes
                parts[group_of[stored]] = before + nbytes, accesses
            rows += [(place, number, *part) for number, part in parts.items()]
            unpacked = sum(math.prod(shapes[n]) for n in names if form.unpacked(config, n))
            dense.append(itemsize * unpacked)
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        of_load, of_group, sizes, accesses_of = columns
        whole = np.array([group.nbytes for group in groups], np.int64)
        found.append(_Loads(of_load, of_group, sizes, accesses_of, tuple(dense), whole))
    return tuple(found)


@functools.lru_cache(maxsize=16)
def _dense(config: Config, form: WeightFormat, num_stages: int) -> tuple[int, ...]:
    """Of each layer."""
    return tuple(n for of_stage in _loads(config, form, num_stages) for n in of_stage.dense)


class _Weights(NamedTuple):
    """Of each layer what a load moves, and how many files of the disk it reads; of each stage what
    lies where."""

    moved: LayerWeights
    reads: tuple[int, ...]
    resident: tuple[Mapping[Tier, int], ...]


def _weights(config: Config, form: WeightFormat, policy: Policy) -> _Weights:
    check_experts(config, policy)
    experts = policy.experts or policy.weights
    return _weights_of(config, form, policy.weights, experts, policy.num_stages)


@functools.lru_cache(maxsize=512)  # a search asks for the same again and again
def _weights_of(
    config: Config, form: WeightFormat, weights: Split, experts: Split, num_stages: int
) -> _Weights:
    policy = Policy(weights=weights, experts=experts, num_stages=num_stages)
    every = tuple(Tier)
    count = len(every)
    moved: list[np.ndarray] = []
    reads: list[int] = []
    resident = []
    stages = zip(
        _loads(config, form, num_stages),
        tier_numbers(config, form, policy),
        strict=True,
    )
    for loads, of_group in stages:
        of_part = of_group[loads.group]
        many = len(loads.dense)
        # Sums of 64-bit floats are exact up to 2**53 bytes.
        place = loads.load * count + of_part
        nbytes = np.bincount(place, loads.nbytes, many * count).astype(np.int64)
        moved.append(nbytes.reshape(many, count))
        files = np.where(of_part == every.index(Tier.DISK), loads.files, 0)
        reads += np.bincount(loads.load, files, many).astype(np.int64).tolist()
        held = np.bincount(of_group, loads.groups, count).astype(np.int64).tolist()
        resident.append(dict(zip(every, held, strict=True)))
    return _Weights(LayerWeights.of_rows(np.concatenate(moved)), tuple(reads), tuple(resident))


def _cache(block: Block, config: Config, form: WeightFormat, policy: Policy) -> Cells:
    kept = cache_format(policy)
    per_head = sum(kept.position_nbytes(config.head_dim, form.dtype))
    itemsize = jnp.dtype(form.dtype).itemsize

    def cell(rows: int, tier: Tier, room: CellRoom) -> CacheCell:
        sparsity = 1.0 if room.windowed else policy.attention_sparsity
        heads = 2 * rows * config.num_key_value_heads
        hosted = policy.host_attention and tier is not Tier.DEVICE
        # Keys as a whole; of the values the selected ones, which a disk reads whole as well.
        read = (1 + sparsity) / 2 if tier is Tier.HOST else 1.0
        return CacheCell(
            tier=tier,
            position_nbytes=heads * per_head,
            loaded=read,
            hosted=hosted,
            sent=0.0 if hosted else (1 + sparsity) / 2 if sparsity < 1 else 1.0,
            dense_nbytes=heads * config.head_dim * itemsize if kept.bits else 0,
            positions=room.capacity if room.ring else None,
        )

    tiers = cache_tiers(block, config, form.dtype, policy)
    kinds = [
        cell(batch.rows, tier, cell_room(batch, kind))
        for kind in tiers.kinds
        for batch in tiers.batches
        for tier in Tier
    ]
    return Cells(kinds, tiers.codes)
