"""High-throughput offline generation for language models larger than the accelerator's memory.

Public names are imported when first used, so that ``import flexgen_jax`` is quick. They are listed
three times: for type checkers, for editors, and for importing; a test keeps the lists equal.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexgen_jax import _siblings
from flexgen_jax._version import __version__

_siblings.check()

if TYPE_CHECKING:
    from flexgen_jax import ray as ray
    from flexgen_jax.distributed.processes import ProcessError, initialize
    from flexgen_jax.engine.executor import ExecutionError
    from flexgen_jax.llm import LLM
    from flexgen_jax.models import opt as opt
    from flexgen_jax.models.opt import OPTConfig
    from flexgen_jax.models.registry import load_config
    from flexgen_jax.planning.lengths import Lengths
    from flexgen_jax.planning.memory_need import MemoryLimitError
    from flexgen_jax.planning.plan_tables import PlanRow, plan_machines, plan_sweep
    from flexgen_jax.planning.plans import Plan, plan
    from flexgen_jax.report import Report
    from flexgen_jax.requests.outputs import CompletionOutput, Logprob, RequestOutput
    from flexgen_jax.requests.prompts import RequestError
    from flexgen_jax.requests.sampling_params import SamplingParams
    from flexgen_jax.requests.structured_outputs import StructuredOutputsParams
    from flexgen_jax.requests.unanswered import NoAnswerError
    from flexgen_jax.scoring import Perplexity, Score, perplexity
    from flexgen_jax.weights.checkpoint import convert, convert_dummy, open_store
    from flexgen_jax.weights.exporting import export
    from flexgen_jax.weights.pytrees import load_params, save_params
    from scheduling.hardware import Hardware
    from scheduling.policy import Policy, Split, Tier
    from scheduling.registered import SCHEDULES
    from scheduling.simulate import simulate
    from scheduling.timeline import Timeline, write_trace
    from scheduling.validate import ScheduleError, validate
    from scheduling.workload import Workload
    from storage.disk import DiskContext

__all__ = [
    "LLM",
    "SCHEDULES",
    "CompletionOutput",
    "DiskContext",
    "ExecutionError",
    "Hardware",
    "Lengths",
    "Logprob",
    "MemoryLimitError",
    "NoAnswerError",
    "OPTConfig",
    "Perplexity",
    "Plan",
    "PlanRow",
    "Policy",
    "ProcessError",
    "Report",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ScheduleError",
    "Score",
    "Split",
    "StructuredOutputsParams",
    "Tier",
    "Timeline",
    "Workload",
    "__version__",
    "convert",
    "convert_dummy",
    "export",
    "initialize",
    "load_config",
    "load_params",
    "open_store",
    "perplexity",
    "plan",
    "plan_machines",
    "plan_sweep",
    "save_params",
    "simulate",
    "validate",
    "write_trace",
]

# Where each of them is from.
_HOME = {
    "convert": "flexgen_jax.weights.checkpoint",
    "export": "flexgen_jax.weights.exporting",
    "convert_dummy": "flexgen_jax.weights.checkpoint",
    "open_store": "flexgen_jax.weights.checkpoint",
    "OPTConfig": "flexgen_jax.models.opt",
    "load_config": "flexgen_jax.models.registry",
    "load_params": "flexgen_jax.weights.pytrees",
    "save_params": "flexgen_jax.weights.pytrees",
    "ExecutionError": "flexgen_jax.engine.executor",
    "LLM": "flexgen_jax.llm",
    "RequestError": "flexgen_jax.requests.prompts",
    "NoAnswerError": "flexgen_jax.requests.unanswered",
    "CompletionOutput": "flexgen_jax.requests.outputs",
    "Logprob": "flexgen_jax.requests.outputs",
    "RequestOutput": "flexgen_jax.requests.outputs",
    "Lengths": "flexgen_jax.planning.lengths",
    "MemoryLimitError": "flexgen_jax.planning.memory_need",
    "Plan": "flexgen_jax.planning.plans",
    "plan": "flexgen_jax.planning.plans",
    "Hardware": "scheduling.hardware",
    "PlanRow": "flexgen_jax.planning.plan_tables",
    "plan_machines": "flexgen_jax.planning.plan_tables",
    "plan_sweep": "flexgen_jax.planning.plan_tables",
    "simulate": "scheduling.simulate",
    "Report": "flexgen_jax.report",
    "ProcessError": "flexgen_jax.distributed.processes",
    "initialize": "flexgen_jax.distributed.processes",
    "SamplingParams": "flexgen_jax.requests.sampling_params",
    "StructuredOutputsParams": "flexgen_jax.requests.structured_outputs",
    "Perplexity": "flexgen_jax.scoring",
    "Score": "flexgen_jax.scoring",
    "perplexity": "flexgen_jax.scoring",
    "Policy": "scheduling.policy",
    "Split": "scheduling.policy",
    "Tier": "scheduling.policy",
    "SCHEDULES": "scheduling.registered",
    "Timeline": "scheduling.timeline",
    "write_trace": "scheduling.timeline",
    "ScheduleError": "scheduling.validate",
    "validate": "scheduling.validate",
    "Workload": "scheduling.workload",
    "DiskContext": "storage.disk",
}
# What is public as a whole.
_FILES = {"opt": "flexgen_jax.models.opt", "ray": "flexgen_jax.ray"}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return importlib.import_module(_FILES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'flexgen_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
