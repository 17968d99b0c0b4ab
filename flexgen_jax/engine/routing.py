"""What waits for experts: the tokens of several batches, by the experts that they have chosen.

A layer with experts leaves, for each batch, hidden states and what its router chose
(:class:`~flexgen_jax.models.family.Routed`). The tokens of all batches that go on together are put
into one pool, and each expert multiplies with *tiles* of a fixed number of the pool's rows. So a
row goes through the same program wherever it lies and whatever batches come with it: its bits do
not depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine import kernels
from flexgen_jax.models.family import Config, Params, Routed
from flexgen_jax.planning.expert_tiles import SMALLEST, decode_tile, prompt_tile


class Waiting:
    """The tokens of a batch, or of those who join it, behind a layer's router.

    Args:
        valid: (rows, seq) bool: who is somebody's token; the others choose nothing.
        tile: Rows of a tile.
    """

    def __init__(self, routed: Routed, valid: np.ndarray, tile: int) -> None:
        self.routed: Routed | None = routed
        self.tile, self.shape = tile, routed.hidden.shape
        self._valid = valid

    @property
    def count(self) -> int:
        """Tokens, valid or not."""
        return self._valid.size

    @cached_property
    def chosen(self) -> np.ndarray:
        """(tokens, k) int32: the experts of each token; -1: none. Waits for the router."""
        assert self.routed is not None
        chosen = np.asarray(self.routed.chosen)
        found = np.where(self._valid[..., None], chosen, -1)
        return found.reshape(-1, chosen.shape[-1])

    @cached_property
    def experts(self) -> frozenset[int]:
        """Those that any token has chosen."""
        return frozenset(np.unique(self.chosen).tolist()) - {-1}

    @property
    def nbytes(self) -> int:
        """Of what is kept on the device."""
        return sum(leaf.nbytes for leaf in self.routed or ())

    def release(self) -> None:
        """Its arrays are in a pool now; what was chosen is known."""
        _ = self.chosen
        self.routed = None


def waiting(
    routed: Routed, valid: np.ndarray, *, experts: int, block_size: int, joins: bool = False
) -> Waiting:
    """What a layer's computation leaves.

    Args:
        valid: Of the tokens.
        experts: That there are to choose from.
        block_size: Rows of the policy's blocks.
        joins: They are newcomers'.
    """
    rows, seq, chosen = routed.chosen.shape
    if seq == 1:
        tile = decode_tile(block_size, chosen, experts)
    else:  # newcomers come a few at a time, whatever their prompts' length
        tile = SMALLEST if joins else prompt_tile(rows * seq, chosen, experts)
    return Waiting(routed, valid, tile)


class Tiles(NamedTuple):
    """Which rows of a pool each expert multiplies with.

    Attributes:
        rows: (tiles, tile) int32; beyond the pool where there is none.
        gates: (tiles, tile) float32.
        bounds: (experts + 1,) int32: an expert's tiles are those from its own to the next one's.
    """

    rows: np.ndarray
    gates: np.ndarray
    bounds: np.ndarray


def tiles(
    chosen: np.ndarray, gates: np.ndarray, *, experts: int, tile: int, capacity: int
) -> Tiles:
    """Deals tokens to tiles, each expert's in the order of the tokens.

    Args:
        chosen: (tokens, k) int32; -1: nobody's.
        gates: (tokens, k) float32.
        capacity: Rows of the pool.
    """
    tokens = np.repeat(np.arange(len(chosen), dtype=np.int32), chosen.shape[1])
    of, order = chosen.reshape(-1), np.argsort(chosen.reshape(-1), kind="stable")
    order = order[np.searchsorted(of[order], 0) :]
    of = of[order]
    counts = np.bincount(of, minlength=experts)
    bounds = np.concatenate([[0], np.cumsum(-(-counts // tile))]).astype(np.int32)
    within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    at, place = bounds[of] + within // tile, within % tile
    room = _room(max(1, int(bounds[-1])))
    rows = np.full((room, tile), capacity, np.int32)
    weights = np.zeros((room, tile), np.float32)
    rows[at, place] = tokens[order]
    weights[at, place] = gates.reshape(-1)[order]
    return Tiles(rows, weights, bounds)


def _room(count: int) -> int:
    """At least ``count``, one of a few: each has a program of its own."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 16 and count <= power * 3 // 4 else power


class Pool:
    """Tokens of several batches that a layer's experts compute together.

    Args:
        pieces: Of one size of tiles; they are copied from.
        experts: Of the layer.
    """

    def __init__(self, pieces: Sequence[Waiting], experts: int) -> None:
        self._shapes = [piece.shape for piece in pieces]
        routed = [piece.routed for piece in pieces if piece.routed is not None]
        first = routed[0]
        capacity = _room(sum(piece.count for piece in pieces))
        width = first.hidden.shape[-1]
        device = first.hidden.sharding
        self._total = jnp.zeros((capacity, width), jnp.float32, device=device)
        self._inputs = jnp.zeros((capacity, width), first.inputs.dtype, device=device)
        self._starts = np.cumsum([0, *(piece.count for piece in pieces)])[:-1]
        for made, start in zip(routed, self._starts, strict=True):
            self._total, self._inputs = kernels.into_pool(
                self._total, self._inputs, made.hidden, made.inputs, np.int32(start)
            )
        self._tiles = tiles(
            np.concatenate([piece.chosen for piece in pieces]),
            np.concatenate([_gates(made) for made in routed]),
            experts=experts,
            tile=pieces[0].tile,
            capacity=capacity,
        )

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        return self._total.nbytes + self._inputs.nbytes

    def chose(self, experts: Sequence[int]) -> list[int]:
        """Those of ``experts`` that a token has chosen."""
        bounds = self._tiles.bounds
        return [n for n in experts if bounds[n + 1] > bounds[n]]

    def add(
        self, params: Mapping[int, Params], experts: Sequence[int], config: Config
    ) -> jax.Array:
        """Adds what ``experts`` make of the tokens; returns the computation's marker.

        Args:
            params: Of those that were chosen at least.
            experts: Of a unit: they follow one another.
        """
        some = next(iter(params.values()))  # stands for one that nobody reads
        self._total, marker = kernels.add_experts(
            self._total,
            self._inputs,
            self._tiles.rows,
            self._tiles.gates,
            self._tiles.bounds[experts[0] : experts[-1] + 2],
            tuple(params.get(number, some) for number in experts),
            config=config,
        )
        return marker

    def taken(self, dtype: object) -> list[jax.Array]:
        """The hidden states of each piece, in order."""
        return [
            kernels.out_of_pool(self._total, np.int32(start), shape=shape, dtype=str(dtype))
            for shape, start in zip(self._shapes, self._starts, strict=True)
        ]


def _gates(routed: Routed) -> np.ndarray:
    gates = np.asarray(routed.gates)
    return gates.reshape(-1, gates.shape[-1])
