"""What a machine can do: bandwidths, compute rates, capacities. JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _positive(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


# Of a process on a CPU that has run a model of one family, measured.
RUNTIME_MEMORY = 0.33e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine. Bandwidths are bytes per second; None: there is nothing to move (device and
    host are the same memory).

    Attributes:
        name: For people.
        device_memory, host_memory, disk: Bytes that a run may take.
        disk_to_host, host_to_device: Bandwidths inwards.
        device_to_host_cache, device_to_host_hidden, host_to_disk_cache, host_to_disk_hidden:
            Outwards; the KV cache moves in smaller pieces than hidden states.
        matmul: (rows, FLOP per second) of matrix products, by rising rows; between two the rate is
            interpolated, with fewer rows it falls in proportion, and with more it stays.
        elementwise: Seconds that each value of the hidden states takes in a layer beside its
            products: norms, activations, residuals. It is what makes narrow layers slow.
        attention: FLOP per second of attention in prefill.
        cached_attention: Bytes of cache per second that a decode step attends to on the device;
            ``host_attention``: on the host.
        dequantize: Bytes of dense arrays per second that unpacking codes makes.
        overhead: Seconds that any op takes beside its work.
        compute_overhead: Seconds that a computation takes on top of that in a run, whose streams
            are threads. ``load_overhead``: seconds of computing that a load of weights takes away.
        step_overhead: Seconds that each step of a batch takes on the host beside its layers:
            sampling, booking the tokens, looking them up.
        host_to_device_cache: Bandwidth for a KV cache that lies in host memory, where that has to
            be brought into a pinned buffer first; None: that of ``host_to_device``.
        disk_to_host_cache: Bandwidth of reading the KV cache, which is brought into another layout
            on the way; None: that of ``disk_to_host``.
        disk_read_latency, disk_write_latency: Seconds that each access takes beside its bytes.
        stage_to_stage: Bandwidth from one pipeline stage's device to the next's; None: that of
            ``host_to_device``, and nothing where there is none.
        runtime_memory: Bytes of host memory that the process takes beside what a run has it keep:
            Python, its libraries, and the programs that XLA compiles.
        short: Whether it was measured briefly, before a first run.

    Raises:
        ValueError: a value that is not positive, or points out of order.
    """

    name: str
    device_memory: float
    host_memory: float
    disk: float
    disk_to_host: float
    host_to_device: float | None
    device_to_host_cache: float | None
    device_to_host_hidden: float | None
    host_to_disk_cache: float
    host_to_disk_hidden: float
    matmul: tuple[tuple[float, float], ...]
    attention: float
    cached_attention: float
    host_attention: float
    dequantize: float
    overhead: float = 0.0
    host_to_device_cache: float | None = None
    disk_to_host_cache: float | None = None
    disk_read_latency: float = 0.0
    disk_write_latency: float = 0.0
    stage_to_stage: float | None = None
    compute_overhead: float = 0.0
    load_overhead: float = 0.0
    step_overhead: float = 0.0
    elementwise: float = 0.0
    runtime_memory: float = RUNTIME_MEMORY
    short: bool = False

    def __post_init__(self) -> None:
        optional = (
            "host_to_device",
            "device_to_host_cache",
            "device_to_host_hidden",
            "host_to_device_cache",
            "disk_to_host_cache",
            "stage_to_stage",
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _CHECKED_APART or (field.name in optional and value is None):
                continue
            may_be_none = field.name in FIXED or field.name == "runtime_memory"
            if not (_positive(value) or (may_be_none and value == 0)):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
        if not isinstance(self.short, bool):
            raise ValueError(f"short must be true or false, got {self.short!r}")
        points = tuple((float(rows), float(rate)) for rows, rate in self.matmul)
        rows = [r for r, _ in points]
        if not points or rows != sorted(set(rows)) or not all(map(_positive, sum(points, ()))):
            raise ValueError(
                f"matmul must be (rows, FLOP/s) points by rising rows, got {self.matmul!r}"
            )
        object.__setattr__(self, "matmul", points)

    def matmul_rate(self, rows: float) -> float:
        """FLOP per second of products with ``rows`` rows."""
        first, last = self.matmul[0], self.matmul[-1]
        if rows <= first[0]:
            return first[1] * rows / first[0]
        if rows >= last[0]:
            return last[1]
        for (a, low), (b, high) in zip(self.matmul, self.matmul[1:], strict=False):
            if rows <= b:
                share = math.log(rows / a) / math.log(b / a)
                return low ** (1 - share) * high**share
        raise AssertionError

    def scaled(self, factors: Mapping[str, float]) -> Hardware:
        """The machine on which what a constant prices takes ``factor`` times as long.

        Args:
            factors: By the name of a bandwidth or rate, or ``matmul@ROWS``: products with so many
                rows; or of ``FIXED``. A link that is not there stays so.

        Raises:
            ValueError: no such constant, or a factor that is not positive.
        """
        changes: dict[str, Any] = {}
        points = dict(self.matmul)
        for name, factor in factors.items():
            if not _positive(factor):
                raise ValueError(f"the factor of {name} must be a positive number, got {factor!r}")
            kind, _, rows = name.partition("@")
            if kind == "matmul" and rows:
                points[float(rows)] = self.matmul_rate(float(rows)) / factor
            elif name in FIXED:
                changes[name] = getattr(self, name) * factor
            elif name in RATES:
                rate = getattr(self, name)
                changes[name] = None if rate is None else rate / factor
            else:
                known = ", ".join((*RATES, *FIXED, "matmul@ROWS"))
                raise ValueError(f"no constant {name!r}; known: {known}")
        return dataclasses.replace(self, **changes, matmul=tuple(sorted(points.items())))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Hardware:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: an unknown or missing field, by name, or a value out of range.
        """
        names = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(names))
        missing = sorted(name for name, needed in names.items() if needed and name not in values)
        if unknown or missing:
            raise ValueError(
                f"hardware: unknown {', '.join(unknown) or 'nothing'}, "
                f"missing {', '.join(missing) or 'nothing'}"
            )
        return cls(**{**values, "matmul": tuple(tuple(p) for p in values["matmul"])})

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """A machine by name.

        Raises:
            ValueError: no such preset; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"no hardware {name!r}; presets: {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def load(cls, name: str) -> Hardware:
        """A preset, or a JSON file.

        Raises:
            ValueError: neither, or a file that is not what :meth:`to_json` makes.
        """
        if name in PRESETS:
            return PRESETS[name]
        try:
            return cls.from_json(json.loads(Path(name).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(
                f"no hardware {name!r}: neither a preset ({', '.join(sorted(PRESETS))}) nor a file "
                f"that can be read ({error.strerror})"
            ) from error
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{name} is not a hardware file: {error}") from error


_CHECKED_APART = ("name", "matmul", "short")
# Seconds that something takes however little it moves; may be 0.
FIXED = (
    "overhead",
    "compute_overhead",
    "load_overhead",
    "step_overhead",
    "elementwise",
    "disk_read_latency",
    "disk_write_latency",
)
RATES = (
    "disk_to_host",
    "disk_to_host_cache",
    "host_to_device",
    "host_to_device_cache",
    "device_to_host_cache",
    "device_to_host_hidden",
    "host_to_disk_cache",
    "host_to_disk_hidden",
    "stage_to_stage",
    "attention",
    "cached_attention",
    "host_attention",
    "dequantize",
)

_GB = 1e9
_T = 1e12

PRESETS: Mapping[str, Hardware] = {
    # The paper's machine, with the constants that its cost model fitted, but for two. The disk
    # reads at the 2 GB/s of the paper's table 1: at the fitted 0.473 its own 175B policy would take
    # four times longer than it measured. And decode's 4.3 TFLOP/s are reached at the batch at which
    # reading 16-bit weights at the T4's 300 GB/s takes as long. Cached attention is the fitted rate
    # of batched products in decode, where one FLOP reads one byte of 16-bit cache. A cache in host
    # memory is copied into a pinned buffer first; 4 GB/s for both copies, and dequantisation, are
    # guesses that fit the rows of its ablation that depend on them.
    "t4": Hardware(
        name="NVIDIA T4, 208 GB host memory, NVMe SSD (FlexGen, ICML 2023)",
        device_memory=16 * _GB,
        host_memory=208 * _GB,
        disk=1500 * _GB,
        disk_to_host=2.0 * _GB,
        host_to_device=12.89 * _GB,
        device_to_host_cache=0.97 * _GB,
        device_to_host_hidden=4.82 * _GB,
        host_to_disk_cache=0.746 * _GB,
        host_to_disk_hidden=2.015 * _GB,
        matmul=((14, 4.3 * _T), (1024, 21.24 * _T)),
        attention=9.97 * _T,
        cached_attention=79 * _GB,
        host_attention=12.3 * _GB,
        dequantize=30 * _GB,
        overhead=1e-4,
        host_to_device_cache=4 * _GB,
    ),
    # Two cores of a Zen 4 laptop or server, measured in bfloat16 by this project's benchmarks.
    "laptop": Hardware(
        name="2 Zen 4 cores, 24 GB memory, NVMe SSD",
        device_memory=12 * _GB,
        host_memory=12 * _GB,
        disk=200 * _GB,
        disk_to_host=1.1 * _GB,
        host_to_device=None,
        device_to_host_cache=None,
        device_to_host_hidden=None,
        host_to_disk_cache=0.8 * _GB,
        host_to_disk_hidden=0.8 * _GB,
        matmul=((2, 20e9), (8, 72e9), (32, 184e9), (128, 280e9), (512, 330e9)),
        attention=100e9,
        cached_attention=10 * _GB,
        host_attention=10 * _GB,
        dequantize=5 * _GB,
        overhead=2e-4,
    ),
    # NVIDIA's data sheet of the RTX A5000: 24 GB of GDDR6 at 768 GB/s, PCIe 4.0 x16. Of its tensor
    # cores less than it has: half of what the smaller RTX A4000's data sheet gives (153.4 TFLOP/s
    # with sparsity, so 76.7 dense); 16 rows are bound by reading at 80% of the memory's rate, and
    # cached attention reads at half of it. The PCIe link, two channels of DDR4-3200 (51.2 GB/s) and
    # an NVMe drive of PCIe 4.0 (6 of 7 GB/s, as the H200's here) at what such parts usually reach.
    "a5000": Hardware(
        name="NVIDIA RTX A5000 24 GB, PCIe 4.0, 64 GB host memory, NVMe SSD",
        device_memory=24 * _GB,
        host_memory=64 * _GB,
        disk=2000 * _GB,
        disk_to_host=6 * _GB,
        host_to_device=24 * _GB,
        device_to_host_cache=24 * _GB,
        device_to_host_hidden=24 * _GB,
        host_to_disk_cache=4 * _GB,
        host_to_disk_hidden=4 * _GB,
        matmul=((16, 10 * _T), (256, 36 * _T), (4096, 38 * _T)),
        attention=20 * _T,
        cached_attention=380 * _GB,
        host_attention=40 * _GB,
        dequantize=190 * _GB,
        overhead=5e-5,
    ),
    # NVIDIA's data sheet of the H200 (dense bfloat16, HBM3e), half of each as a rule; PCIe 5.0 x16
    # and a PCIe 4.0 NVMe drive at what such links usually reach.
    "h200": Hardware(
        name="NVIDIA H200 141 GB, PCIe 5.0, 1 TB host memory, NVMe SSD",
        device_memory=141 * _GB,
        host_memory=1000 * _GB,
        disk=8000 * _GB,
        disk_to_host=6 * _GB,
        host_to_device=50 * _GB,
        device_to_host_cache=50 * _GB,
        device_to_host_hidden=50 * _GB,
        host_to_disk_cache=4 * _GB,
        host_to_disk_hidden=4 * _GB,
        matmul=((16, 30 * _T), (256, 300 * _T), (4096, 495 * _T)),
        attention=300 * _T,
        cached_attention=2400 * _GB,
        host_attention=150 * _GB,
        dequantize=1200 * _GB,
        overhead=5e-5,
    ),
}
