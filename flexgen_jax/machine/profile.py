"""Measures this machine: disk, links, arithmetic, capacities -> :class:`scheduling.Hardware`.

Every figure is the median of repeats on the shapes of OPT-1.3B, with the very functions that a run
calls. Takes under two minutes and a gigabyte of disk, which is given back. A short profile has
fewer points, a small file and few repeats: some seconds, beside compiling.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine import kernels
from flexgen_jax.engine.unpacking import Dense
from flexgen_jax.machine.operation_costs import operation_costs
from flexgen_jax.models.attention import attend_prompt
from flexgen_jax.models.family import Config, Kind
from flexgen_jax.models.kv_cache import CacheFormat, LayerCache
from flexgen_jax.models.params import nest, unit_kinds, unit_shapes
from flexgen_jax.models.quantization import quantize
from flexgen_jax.models.registry import MEASURED_WITH, preset
from flexgen_jax.planning.byte_sizes import device_memory
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.hardware import Hardware
from storage.device import DeviceSequences
from storage.disk import DiskContext
from storage.disk_sequences import DiskSequences
from storage.memory import aligned_bytes, available_memory
from storage.slots import Slot

_ROWS = (2, 8, 16, 32, 64, 128, 512, 1024)
_SHORT_ROWS = (2, 16, 64, 512)
_MOST_DECODE_ROWS, _PROMPT = 128, 64
_NARROW, _NARROW_REPEATS = "facebook/opt-125m", 5
_WIDTH, _FFN, _HEADS, _HEAD_DIM = 2048, 8192, 32, 64
_FILE_NBYTES, _CALL_NBYTES, _SMALL_NBYTES = 1 << 30, 32 << 20, 64 << 10
SHORT_REPEATS, SHORT_FILE_NBYTES = 2, 128 << 20
_ENOUGH = 1.0  # seconds of one figure's repeats
_STEPS, _RUNS = 16, 3  # of the engine, to time what operations cost beside their work

Say = Callable[[str], None]


def profile(
    directory: Path,
    *,
    dtype: str = "bfloat16",
    repeats: int = 5,
    file_nbytes: int = _FILE_NBYTES,
    short: bool = False,
    say: Say = lambda line: None,
) -> Hardware:
    """Measures the machine, and the disk that ``directory`` is on.

    Args:
        dtype: Of the arithmetic.
        repeats: Of each figure, whose median counts.
        file_nbytes: Of the temporary file that is written and read.
        short: Leave out what can be told from the rest: the cache on disk is as fast as the disk,
            and dequantisation as much faster than the preset's as attending to the cache is.
        say: Told each figure as it comes.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    read, write, cached = disk_speed(directory, repeats, file_nbytes)
    say(f"disk: read {_gb(read)}, write {_gb(write)}, through the page cache {_gb(cached)}")
    read_latency, write_latency = _latencies(directory, repeats, read, write)
    cache_read, cache_write = (
        (read, write) if short else _cells(directory, dtype, repeats, read_latency, write_latency)
    )
    say(
        f"KV cache on disk: read {_gb(cache_read)}, write {_gb(cache_write)}; each access takes "
        f"{read_latency * 1e3:.2f} ms to read, {write_latency * 1e3:.2f} ms to write"
    )
    device = jax.local_devices()[0]
    inward, outward = _links(device, repeats)
    if inward is not None and outward is not None:
        say(f"host to device {_gb(inward)}, device to host {_gb(outward)}")
    points = _layers(_SHORT_ROWS if short else _ROWS, dtype, repeats)
    elementwise = _elementwise(points, dtype, repeats)
    say(
        "decoder layers, GFLOP/s by rows: "
        + ", ".join(f"{rows:.0f}: {rate / 1e9:.0f}" for rows, rate in points)
        + f"; {elementwise * 1e9:.1f} ns a hidden value beside products"
    )
    attention = _attention(dtype, repeats)
    cached_attention = _cached_attention(dtype, repeats, device)
    host = jax.local_devices(backend="cpu")[0]
    hosted = cached_attention if host == device else _cached_attention(dtype, repeats, host)
    if short:
        near = Hardware.preset("laptop" if device.platform == "cpu" else "h200")
        unpacking = near.dequantize * cached_attention / near.cached_attention
    else:
        unpacking = _dequantize(dtype, repeats)
    overhead = _overhead(dtype, repeats)
    runs = min(repeats, _RUNS)
    costs = operation_costs(directory, dtype, overhead, steps=_STEPS, repeats=runs)
    decode = f"{_gb(cached_attention)} of cache, on the host {_gb(hosted)}"
    say(f"attention: prefill {attention / 1e9:.0f} GFLOP/s, decode {decode}")
    say(f"dequantising {_gb(unpacking)}; {overhead * 1e6:.0f} us an op")
    say(
        f"in a run {costs.compute_overhead * 1e6:.0f} us more a computation, "
        f"{costs.load_overhead * 1e6:.0f} us a load, {costs.step_overhead * 1e6:.0f} us a step"
    )
    memory = available_memory()
    shared = device.platform == "cpu"
    name = f"{os.cpu_count()} {_processor()} cores" if shared else device.device_kind
    briefly = ", measured briefly" if short else ""
    return Hardware(
        name=f"{name}, {memory / 1e9:.0f} GB of host memory available, {dtype}{briefly}",
        # On a CPU device and host are one memory: half of it for each.
        device_memory=memory // 2 if shared else device_memory(),
        host_memory=memory // 2 if shared else memory,
        disk=free,
        disk_to_host=read,
        host_to_device=inward,
        device_to_host_cache=outward,
        device_to_host_hidden=outward,
        host_to_disk_cache=cache_write,
        host_to_disk_hidden=write,
        matmul=_products(points, elementwise),
        elementwise=elementwise,
        attention=attention,
        cached_attention=cached_attention,
        host_attention=hosted,
        dequantize=unpacking,
        overhead=overhead,
        disk_to_host_cache=cache_read,
        disk_read_latency=read_latency,
        disk_write_latency=write_latency,
        **costs._asdict(),
        short=short,
    )


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "CPU")


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median time of ``call`` until its results are ready; the first, which compiles, aside.

    Fewer ``repeats`` where they take long: on a machine that others use nothing gets exact.
    """
    jax.block_until_ready(call())
    found: list[float] = []
    while len(found) < repeats and sum(found) < _ENOUGH:
        started = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def disk_speed(directory: Path, repeats: int, nbytes: int) -> tuple[float, float, float]:
    """Bytes per second read and written past the page cache, and read through it."""
    buffer = aligned_bytes(min(_CALL_NBYTES, nbytes), touch=True)
    nbytes -= nbytes % buffer.nbytes
    reads, writes, cached = [], [], []
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-profile-", dir=directory) as scratch:
        file = Path(scratch) / "data"
        for _ in range(max(2, repeats // 2)):
            writes.append(_move(file, os.O_WRONLY | os.O_CREAT, os.pwritev, buffer, nbytes))
            _forget(file)
            reads.append(_move(file, os.O_RDONLY, os.preadv, buffer, nbytes))
            warm = _move(file, os.O_RDONLY, os.preadv, buffer, nbytes, direct=False)
            warm = max(warm, _move(file, os.O_RDONLY, os.preadv, buffer, nbytes, direct=False))
            cached.append(warm)
    return statistics.median(reads), statistics.median(writes), statistics.median(cached)


def _latencies(directory: Path, repeats: int, read: float, write: float) -> tuple[float, float]:
    """Seconds that a small read and a small write take beyond their bytes."""
    buffer = aligned_bytes(_SMALL_NBYTES, touch=True)
    nbytes = 32 * repeats * _SMALL_NBYTES
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-profile-", dir=directory) as scratch:
        file = Path(scratch) / "data"
        speed = _move(file, os.O_WRONLY | os.O_CREAT, os.pwritev, buffer, nbytes)
        writing = _SMALL_NBYTES * (1 / speed - 1 / write)
        _forget(file)
        speed = _move(file, os.O_RDONLY, os.preadv, buffer, nbytes)
        reading = _SMALL_NBYTES * (1 / speed - 1 / read)
    return max(reading, 0.0), max(writing, 0.0)


def _cells(
    directory: Path, dtype: str, repeats: int, read_latency: float, write_latency: float
) -> tuple[float, float]:
    """Bytes per second of the KV cache, read from disk and written, past the page cache.

    As a run does it: in chunks, and from and into the layout that is computed with.
    """
    shape, capacity = (16, _HEADS, 256, _HEAD_DIM), 288
    x = jax.device_put(_normal(*shape, dtype=dtype), jax.local_devices(backend="cpu")[0])
    slot = Slot()
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-profile-", dir=directory) as scratch:
        cells = DiskSequences(Path(scratch), DiskContext(mode="direct"))

        def load() -> None:
            slot.begin(cells.slot_nbytes([2 * x.nbytes * capacity // shape[2]]))
            slot.release(cells.load("cell", slot))

        writing = _seconds(lambda: cells.put("cell", (x, x), capacity), repeats)
        reading = _seconds(load, repeats)
        slot.begin()
        cells.close()
    nbytes = 2 * x.nbytes
    smallest = 1e-9  # of a disk whose accesses take all the time
    return (
        nbytes / max(reading - read_latency, smallest),
        nbytes / max(writing - write_latency, smallest),
    )


def _move(
    file: Path, flags: int, call: Any, buffer: np.ndarray, nbytes: int, *, direct: bool = True
) -> float:
    extra = getattr(os, "O_DIRECT", 0) if direct else 0
    try:
        handle = os.open(file, flags | extra, 0o600)
    except OSError:  # not every file system has direct I/O
        handle = os.open(file, flags, 0o600)
    try:
        started = time.perf_counter()
        for offset in range(0, nbytes, buffer.nbytes):
            if call(handle, [buffer.data], offset) != buffer.nbytes:
                raise OSError(f"{file}: moved less than asked for; is the disk full?")
        if flags & os.O_WRONLY:
            os.fsync(handle)
        return nbytes / (time.perf_counter() - started)
    finally:
        os.close(handle)


def _forget(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _links(device: Any, repeats: int) -> tuple[float | None, float | None]:
    if device.platform == "cpu":
        return None, None
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    here = jax.sharding.SingleDeviceSharding(device)
    array = jax.device_put(np.zeros(256 << 20, np.uint8), pinned)
    on_device = jax.device_put(array, here)
    inward = array.nbytes / _seconds(lambda: jax.device_put(array, here), repeats)
    outward = array.nbytes / _seconds(lambda: jax.device_put(on_device, pinned), repeats)
    return inward, outward


def _normal(*shape: int, dtype: str) -> jax.Array:
    """The same few over and over: how long something takes does not depend on them.

    Made by NumPy, since JAX would compile a program for each shape, longer than all else takes.
    """
    values = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(dtype)
    return jax.device_put(np.resize(values, shape))


def _layers(counts: Sequence[int], dtype: str, repeats: int) -> tuple[tuple[float, float], ...]:
    """Rows, and FLOP per second of a decoder layer of which attention is next to nothing.

    Decode's kernel up to as many rows as a batch may have, prefill's beyond.
    """
    config = preset(MEASURED_WITH)
    params = _layer(config, dtype)  # made once: it is as large as a file that is measured
    return tuple((float(n), _layer_rate(config, params, n, dtype, repeats)) for n in counts)


def _elementwise(points: Sequence[tuple[float, float]], dtype: str, repeats: int) -> float:
    """Seconds a value of the hidden states takes in a layer beside its products.

    Of a narrow layer they are the larger part: what it takes beyond a wide one's rate tells.
    """
    config = preset(_NARROW)
    rows = max(_SHORT_ROWS)
    narrow = _layer_rate(config, _layer(config, dtype), rows, dtype, max(repeats, _NARROW_REPEATS))
    wide = dict(points).get(rows)
    if wide is None:
        return 0.0
    # Seconds a row = FLOP / rate of products + width * elementwise, of both.
    flops, more = _flops(config), _flops(preset(MEASURED_WITH))
    width = config.hidden_size
    found = (flops / narrow - flops / wide) / (width - _WIDTH * flops / more)
    return min(max(found, 0.0), more / wide / _WIDTH / 2)


def _products(
    points: Sequence[tuple[float, float]], elementwise: float
) -> tuple[tuple[float, float], ...]:
    """Rows, and FLOP per second of the products alone."""
    flops = _flops(preset(MEASURED_WITH))
    return tuple((n, flops / (flops / rate - _WIDTH * elementwise)) for n, rate in points)


def _flops(config: Config) -> float:
    """Of a layer's products, a row."""
    shapes = unit_shapes(config, "layer_0")
    return sum(2.0 * math.prod(s) for n, s in shapes.items() if n.endswith(".kernel"))


def _layer_rate(config: Config, params: Any, rows: int, dtype: str, repeats: int) -> float:
    kind, flops, form = unit_kinds(config)[1], rows * _flops(config), CacheFormat()
    width, heads = config.hidden_size, config.num_attention_heads
    if rows <= _MOST_DECODE_ROWS:
        x = _normal(rows, 1, width, dtype=dtype)
        cache = LayerCache(*(_normal(rows, heads, 32, _HEAD_DIM, dtype=dtype),) * 2)
        padding, position = jnp.zeros(rows, jnp.int32), np.int32(16)
        return flops / _seconds(
            lambda: kernels.decode_layer(
                params, x, cache, position, padding, config=config, kind=kind, form=form
            ),
            repeats,
        )
    batch = rows // _PROMPT
    x, padding = _normal(batch, _PROMPT, width, dtype=dtype), jnp.zeros(batch, jnp.int32)
    return flops / _seconds(
        lambda: kernels.prefill_layer(params, x, padding, config=config, kind=kind, form=form),
        repeats,
    )


def _layer(config: Config, dtype: str) -> Any:
    """The parameters of a decoder layer, matrices the way round that they are stored."""
    form = WeightFormat.usual(dtype)
    names = unit_shapes(config, "layer_0")
    arrays = {n: _normal(*form.array_shape(config, n), dtype=dtype) for n in names}
    return nest({form.array_name(config, n): array for n, array in arrays.items()})["layer_0"]


def _attention(dtype: str, repeats: int) -> float:
    batch, seq = 4, 256
    x = _normal(batch, _HEADS, seq, _HEAD_DIM, dtype=dtype)
    attend = jax.jit(attend_prompt)
    padding = jnp.zeros(batch, jnp.int32)
    flops = 4 * batch * seq * seq * _HEADS * _HEAD_DIM
    return flops / _seconds(lambda: attend(x, x, x, padding), repeats)


def _cached_attention(dtype: str, repeats: int, device: Any) -> float:
    batch, seq = 16, 288
    x = jax.device_put(_normal(batch, _HEADS, seq, _HEAD_DIM, dtype=dtype), device)
    padding = jax.device_put(np.zeros(batch, np.int32), device)
    one = x[:, :, :1]
    cache, new = LayerCache(x, x), LayerCache(one, one)
    kind = Kind("decoder")
    position = np.int32(seq)
    seconds = _seconds(
        lambda: kernels.attend_cached(one, cache, new, position, padding, kind=kind), repeats
    )
    return 2 * x.nbytes / seconds


def _dequantize(dtype: str, repeats: int) -> float:
    codes = jax.jit(quantize)(_normal(_WIDTH, _FFN, dtype=dtype))
    made = Dense(dtype)
    nbytes = _WIDTH * _FFN * jnp.dtype(dtype).itemsize

    def again() -> Any:
        # A new leaf each time: the same one costs nothing.
        return made.of({"kernel": jax.tree.map(lambda array: array, codes)})

    return nbytes / _seconds(again, repeats)


def _overhead(dtype: str, repeats: int) -> float:
    """Seconds that a decoder layer takes which has next to nothing to compute.

    One of many, each with the results of the one before, and with a cell that it adds to.
    """
    count, rows, heads, positions = 32, 16, 2, 32
    config: Any = dataclasses.replace(
        cast(Any, preset(MEASURED_WITH)),
        hidden_size=heads * _HEAD_DIM,
        word_embed_proj_dim=heads * _HEAD_DIM,
        num_attention_heads=heads,
        ffn_dim=_HEAD_DIM,
    )
    params, kind, form = _layer(config, dtype), unit_kinds(config)[1], CacheFormat()
    x, padding = _normal(rows, 1, config.hidden_size, dtype=dtype), jnp.zeros(rows, jnp.int32)
    cells, slot = DeviceSequences(), Slot()
    cell = (_normal(rows, heads, positions, _HEAD_DIM, dtype=dtype),) * 2
    cells.put("cell", cell, positions, length=positions, ring=True)

    def layers() -> jax.Array:
        hidden = x
        for _ in range(count):
            cache, position = LayerCache(*cells.load("cell", slot)), np.int32(positions)
            hidden, new, _ = kernels.decode_layer(
                params, hidden, cache, position, padding, config=config, kind=kind, form=form
            )
            cells.append("cell", jax.tree.leaves(new))
        return hidden

    return _seconds(layers, 2 * repeats) / count
