"""Ray datasets in, Ray datasets out: ``fg.ray.map_batches``. Needs ``flexgen-jax[ray]``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flexgen_jax.jobs.asked import NO_ANSWER, LineError
from flexgen_jax.jobs.dialects import parse_values, plain_answer
from flexgen_jax.logs import LOGGER
from flexgen_jax.planning.schedule_names import portable
from flexgen_jax.replicas.ray_cluster import Workers, import_ray, missing_model, patient
from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.requests.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ray.data import Dataset

    from flexgen_jax.llm import LLM

__all__ = ["map_batches"]


def map_batches(
    dataset: Dataset,
    *,
    model: str,
    sampling_params: SamplingParams | None = None,
    num_workers: int | None = None,
    batch_size: int = 1024,
    keep: Iterable[str] = (),
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    **llm: Any,
) -> Dataset:
    """Completes every row of a Ray dataset, in workers that each hold an :class:`LLM`.

    Nothing runs until the dataset is read. Ray begins anew a worker that dies, and gives its batch
    to one again; a batch that fails is tried four times (``dataset.context`` is set so). A row that
    cannot be run gets an ``error``, and the others run.

    Args:
        dataset: Its columns are the fields of a line of ``flexgen-jax generate``: ``prompt`` or
            ``prompt_token_ids``, and if need be ``id`` and sampling fields, which win over
            ``sampling_params``; a null is no field. A sampled row without a ``seed`` gets one of
            the ``LLM``'s seed and all its fields: rows that are alike have ids, or come out alike.
        model: A weight store, or a Hugging Face directory or hub name that is converted here, on
            first use. Every machine of the cluster needs the store at the same path.
        sampling_params: What rows leave out.
        num_workers: None: one per GPU of the cluster, or one per machine.
        batch_size: Rows that a worker takes together, sorts by length and cuts into blocks: at
            least as many as a block has.
        keep: Columns that are passed on and are no fields.
        num_cpus: That Ray keeps for a worker; None: an equal share of a machine. ``num_gpus``:
            likewise; None: one, where there are any. ``resources``: likewise, by name.
        llm: The other arguments of :class:`LLM`. With policy ``"auto"`` each worker chooses its own
            by its first batch; give a ``Policy`` for results that are equal to the last bit.

    Returns:
        The dataset with the columns ``text``, ``token_ids``, ``finish_reason``, ``stop_reason``,
        ``cumulative_logprob``, ``logprobs``, ``prompt_logprobs`` (the last two as JSON),
        ``outputs`` (as JSON, in place of the others where ``n`` is above 1) and ``error``
        (``{"type", "message"}``); null where there is nothing to say. The order of rows is Ray's:
        give them ids.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no such model, or arguments out of range.
    """
    ray = import_ray()
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
        raise ValueError(f"sampling_params must be SamplingParams, got {sampling_params!r}")
    workers = Workers(num_workers, num_cpus, num_gpus, dict(resources or {}))
    arguments = {"model": _store(model, llm), **llm}
    if "schedule" in arguments:
        arguments["schedule"] = portable(arguments["schedule"])
    if not ray.is_initialized():
        ray.init()
    settled = workers.settled(LOGGER.warning)
    patient(dataset.context)  # which the datasets made from it share
    return dataset.map_batches(
        _Worker,
        batch_size=batch_size,
        batch_format="pyarrow",
        fn_constructor_args=(
            arguments,
            sampling_params or SamplingParams(),
            tuple(keep),
            settled.beside,
        ),
        compute=ray.data.ActorPoolStrategy(size=settled.count, max_tasks_in_flight_per_actor=1),
        **settled.remote(),
    )


def _store(model: str, llm: Mapping[str, Any]) -> str:
    """Converted once, before the workers begin."""
    from flexgen_jax.weights.checkpoint import GROUP_SIZE, resolve
    from flexgen_jax.weights.dtypes import checked_dtype

    policy = llm.get("policy", "auto")
    return str(
        resolve(
            model,
            dtype=checked_dtype(llm.get("dtype", "auto")),
            weight_bits=getattr(policy, "weight_bits", None),
            group_size=getattr(policy, "group_size", GROUP_SIZE),
            offload_dir=llm.get("offload_dir"),
        )
    )


class _Worker:
    """An ``LLM`` that completes the rows of a table a call."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        defaults: SamplingParams,
        keep: tuple[str, ...],
        beside: int,
    ) -> None:
        from flexgen_jax.llm import LLM
        from flexgen_jax.planning.auto import part_of_this_machine
        from flexgen_jax.weights.checkpoint import is_ready

        if not is_ready(arguments["model"]):
            raise missing_model(arguments["model"])
        limits = {"device_memory", "host_memory"} & arguments.keys()
        if beside > 1 and arguments.get("policy", "auto") == "auto" and not limits:
            arguments = {**arguments, **part_of_this_machine(beside)}
        self._llm: LLM = LLM(**arguments)
        self._defaults, self._keep = defaults, keep

    def __call__(self, table: Any) -> Any:
        rows = table.to_pylist()
        found: list[dict[str, Any]] = [{} for _ in rows]
        requests, asked = [], {}
        for index, row in enumerate(rows):
            values = {k: v for k, v in row.items() if v is not None and k not in self._keep}
            try:
                seed = _seed(self._llm.seed, values)
                wanted = parse_values(values, index)
                if len(wanted.prompts) > 1:
                    raise RequestError("a row has one prompt: make a row of each")
                params = self._defaults.updated(wanted.sampling)
                if params.seed is None:
                    params = dataclasses.replace(params, seed=seed)
                requests.append(self._llm.request(index, wanted.prompt, params))
                asked[index] = wanted
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                kind = error.kind if isinstance(error, LineError) else "invalid_request"
                found[index] = {"error": {"type": kind, "message": str(error)}}
        if requests:
            for request, output in zip(requests, self._llm.run(requests), strict=True):
                found[request.index] = (
                    plain_answer(asked[request.index], output)
                    if output.error is None
                    else {"error": {"type": NO_ANSWER, "message": output.error}}
                )
        return _with(table, found)


def _seed(seed: int, values: Mapping[str, Any]) -> int:
    """For a row that has none of its own: whichever worker, batch and place it has."""
    text = json.dumps([seed, values], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _with(table: Any, found: list[dict[str, Any]]) -> Any:
    """``table`` with the columns of what was found; types are the same whatever that is."""
    import pyarrow as pa

    types = {
        "text": pa.large_string(),
        "token_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "stop_reason": pa.string(),
        "cumulative_logprob": pa.float64(),
        "logprobs": pa.large_string(),
        "prompt_logprobs": pa.large_string(),
        "outputs": pa.large_string(),
        "error": pa.struct([("type", pa.string()), ("message", pa.string())]),
    }
    for name, kind in types.items():
        values = [answer.get(name) for answer in found]
        if name == "outputs" or name.endswith("logprobs"):
            values = [
                None if value is None else json.dumps(value, allow_nan=False) for value in values
            ]
        elif name == "stop_reason":
            values = [None if value is None else str(value) for value in values]
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values, kind))
    return table
