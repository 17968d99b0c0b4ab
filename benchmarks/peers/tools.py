"""What is compared: each tool in each of its precisions, and the files that it wants."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tool:
    """A row of the table.

    Attributes:
        name: The tool's; ``label`` is what tells the rows of a tool apart.
        driver: The module of ``peers`` that runs it.
        environment: Of :data:`peers.environments.PACKAGES`; None: this package's own.
        kind: Of files: ``"hf"``, ``"ct2"`` or ``"gguf"``.
        stored: The precision of the files.
        precision: What the driver is asked to compute in.
        settings: Of the driver.
        workloads: Those that it takes part in.
        after_crash: Settings to try where the driver crashes with its own.
    """

    name: str
    label: str
    driver: str
    environment: str | None
    kind: str
    stored: str
    precision: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    workloads: tuple[str, ...] = ("questions", "batches")
    after_crash: dict[str, Any] | None = None


def _ours(label: str, dtype: str, **more: Any) -> Tool:
    workloads = more.pop("workloads", ("questions", "batches"))
    return Tool("flexgen-jax", label, "ours", None, "hf", dtype, dtype, more, workloads)


def _torch(label: str, dtype: str, **more: Any) -> Tool:
    return Tool(
        "transformers", label, "with_transformers", "transformers", "hf", dtype, dtype, more
    )


def _ct2(label: str, precision: str, **more: Any) -> Tool:
    return Tool(
        "CTranslate2", label, "with_ctranslate2", "ctranslate2", "ct2", precision, precision, more
    )


def _llama(label: str, **more: Any) -> Tool:
    workloads = more.pop("workloads", ("questions", "batches"))
    kind = label.partition(",")[0]
    driver, environment = "with_llama_cpp", "llama.cpp"
    # Its kernels for AMX have been seen to crash: then without the copy that they want.
    retry = {"mapped": True}
    return Tool("llama.cpp", label, driver, environment, "gguf", kind, kind, more, workloads, retry)


_MEMORY = ("memory",)
TOOLS = (
    _torch("float32", "float32"),
    _torch("bfloat16", "bfloat16"),
    _torch("bfloat16, continuous batching", "bfloat16", continuous=True),
    _ct2("float32", "float32"),
    _ct2("int8", "int8"),
    _ct2("int8, two workers", "int8", workers=2),
    _llama("F32"),
    _llama("BF16"),
    _llama("Q8_0"),
    _llama("Q4_0"),
    Tool("vLLM", "bfloat16", "with_vllm", "vllm", "hf", "bfloat16", "bfloat16"),
    Tool("AirLLM", "bfloat16", "with_airllm", "airllm", "hf", "bfloat16", "bfloat16"),
    Tool("oLLM", "bfloat16", "with_ollm", "ollm", "hf", "bfloat16", "bfloat16"),
    _ours("float32", "float32"),
    _ours("bfloat16", "bfloat16"),
    _ours("8 bits", "bfloat16", weight_bits=8),
    _ours("float32, policy auto", "float32", auto=True, workloads=("questions",)),
    _llama("BF16, mapped", mapped=True, workloads=_MEMORY),
    _llama("Q8_0, mapped", mapped=True, workloads=_MEMORY),
    Tool(
        "Accelerate",
        "bfloat16, on disk",
        "with_accelerate",
        "transformers",
        "hf",
        "bfloat16",
        "bfloat16",
        workloads=_MEMORY,
    ),
    _ours("bfloat16, weights on disk", "bfloat16", disk=True, workloads=_MEMORY),
    _ours("8 bits, weights on disk", "bfloat16", disk=True, weight_bits=8, workloads=_MEMORY),
    _ours("bfloat16, policy auto", "bfloat16", auto=True, workloads=_MEMORY),
)
