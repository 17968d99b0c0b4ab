"""The command ``run-batch``: ``generate`` under the name, options and defaults of vLLM's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from flexgen_jax.cli.failures import Failure, say, silent

# vLLM's options that have no meaning here: why. True: they take a value.
IGNORED: dict[str, tuple[bool, str]] = {
    "--gpu-memory-utilization": (True, "--device-memory says how much 'auto' may use"),
    "--swap-space": (True, "what does not fit in memory lies below --offload-dir"),
    "--enforce-eager": (False, "programs are always compiled"),
    "--trust-remote-code": (False, "code that comes with a model is never run"),
    "--disable-log-stats": (False, "figures are printed at the end"),
    "--disable-log-requests": (False, "requests are not logged"),
    "--enable-prefix-caching": (False, "every prompt is computed for itself"),
    "--no-enable-prefix-caching": (False, "every prompt is computed for itself"),
    "--enable-chunked-prefill": (False, "prompts are cut as suits the machine"),
    "--max-num-batched-tokens": (True, "prompts are cut as suits the machine"),
    "--block-size": (True, "the cache has no pages"),
    "--load-format": (True, "weights of every known format are recognised"),
    "--guided-decoding-backend": (True, "it is always llguidance"),
}
# Options of other programs: what to give here instead.
ELSEWHERE = {
    "--quantization": "give --weight-bits 4 or 8",
    "--kv-cache-dtype": "give --cache-bits 4 or 8",
    "--cpu-offload-gb": "weights go to host memory and disk by themselves, or by --percent",
    "--data-parallel-size": "give --ray, which runs a model in each worker",
    "--enable-lora": "merge the adapter into the model",
    "--tokenizer": "the tokenizer is the model's: put its files beside the weights",
    "--revision": "give a directory with that revision as --model",
    "--speculative-config": "there is no speculative decoding",
    "--max-new-tokens": "give --max-tokens",
    "--do-sample": "give a --temperature above 0",
    "--num-return-sequences": "give n in the lines",
    "--torch-dtype": "give --dtype",
    "--device-map": "weights are placed by themselves, or by --percent",
    "--batch-size": "give --device-batch-size and --num-device-batches",
    "--load-in-4bit": "give --weight-bits 4",
    "--load-in-8bit": "give --weight-bits 8",
}
_DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "half": "bfloat16",
    "float16": "bfloat16",
}


class HintingCommand(click.Command):
    """Says of an option of another program what to give instead."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = ELSEWHERE.get(error.option_name)
            if hint is None:
                raise  # click names the nearest
            raise click.UsageError(f"No such option: {error.option_name}: {hint}", ctx) from error


class RunBatch(HintingCommand):
    """Options may have underscores in the place of hyphens, as vLLM's may."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*map(_hyphened, args)])


def _hyphened(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


_OPTIONS = [
    click.Option(
        ["--served-model-name"],
        multiple=True,
        metavar="NAME",
        help="The model's name in the answers. [default: --model]",
    ),
    click.Option(
        ["--max-model-len"],
        metavar="N|auto",
        help="The most tokens of a prompt and its answer. [default: the model's positions]",
    ),
    click.Option(
        ["--max-num-seqs"],
        type=click.IntRange(min=1),
        metavar="N",
        help="The same as --device-batch-size. [default: what 'auto' chooses, or 8]",
    ),
    click.Option(
        ["--tensor-parallel-size", "-tp"],
        type=click.IntRange(min=1),
        metavar="N",
        help="So many devices, which the layers are pipelined over, as with --stages. [default: 1]",
    ),
    click.Option(
        ["--pipeline-parallel-size", "-pp"],
        type=click.IntRange(min=1),
        metavar="N",
        help="The same as --stages. [default: 1]",
    ),
]


def _destination(option: str) -> str:
    return "ignored_" + option.strip("-").replace("-", "_")


def run_batch_of(generate: click.Command) -> click.Command:
    """The command: with the options of ``generate``, and vLLM's."""
    dtype = click.Option(
        ["--dtype"],
        type=click.Choice(list(_DTYPES)),
        help="Dtype of the computation; half is bfloat16 here. auto: bfloat16 for weights of 16 "
        "bits, float32 for others. [default: auto]",
    )
    params = [dtype if p.name == "dtype" else copy.copy(p) for p in generate.params]
    ignored = [
        click.Option(
            [option, _destination(option)],
            is_flag=not takes_value,
            metavar="X" if takes_value else None,
            help=f"Ignored: {why}.",
        )
        for option, (takes_value, why) in IGNORED.items()
    ]
    assert generate.callback is not None
    run: Callable[..., Any] = generate.callback
    return RunBatch(
        "run-batch",
        params=[*params, *_OPTIONS, *ignored],
        callback=click.pass_context(lambda context, **options: _run(context, run, options)),
        help="Run a file of OpenAI batch lines, as 'vllm run-batch' does.\n\nThe same as generate, "
        "with OpenAI's defaults: 16 tokens, of a conversation as many as the model has positions "
        "for; temperature 1; what the model's generation_config.json suggests goes before these. "
        "Options of vLLM's that have no meaning here are accepted; a line "
        "says why they are ignored.",
        context_settings={
            "default_map": {"max_tokens": 16, "temperature": 1.0, "generation_config": "auto"}
        },
    )


def _run(context: click.Context, run: Callable[..., Any], options: dict[str, Any]) -> Any:
    tell = silent if options["quiet"] else say
    for option, (_, why) in IGNORED.items():
        if options.pop(_destination(option)) not in (None, False):
            tell(f"ignoring {option}: {why}")
    if options["dtype"] in ("half", "float16"):
        tell(f"--dtype {options['dtype']}: computing in bfloat16, which does not overflow")
    options["dtype"] = _DTYPES[options["dtype"] or "auto"]
    sequences = options.pop("max_num_seqs")
    _same(options, "device_batch_size", "--device-batch-size", {"--max-num-seqs": sequences})
    wide, long = options.pop("tensor_parallel_size"), options.pop("pipeline_parallel_size")
    devices = None
    if (wide, long) != (None, None):
        devices = (wide or 1) * (long or 1)
    if (wide or 1) > 1:
        tell(f"--tensor-parallel-size {wide}: layers are pipelined over {devices} devices")
    given = {"--tensor-parallel-size and --pipeline-parallel-size": devices}
    _same(options, "num_stages", "--stages", given)
    source = context.get_parameter_source("max_tokens")
    options["served_model_name"] = (*options["served_model_name"], None)[0]
    options["max_model_len"] = _length(options["max_model_len"])
    options["chats_to_the_limit"] = source is not ParameterSource.COMMANDLINE
    return run(**options)


def _same(options: dict[str, Any], name: str, ours: str, theirs: dict[str, int | None]) -> None:
    """Takes vLLM's value of ``ours``."""
    ((option, value),) = theirs.items()
    if value is None:
        return
    if options[name] not in (None, value):
        raise Failure(f"{ours} {options[name]} and {option} {value} are one thing: give one")
    options[name] = value


def _length(text: str | None) -> int | None:
    """As vLLM reads it: 4096, 4k (thousands), 4K (of 1024), auto."""
    if text is None or text in ("auto", "-1"):
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in "kKmM" else (text, "")
    scale = {"": 1, "k": 1000, "K": 1024, "m": 1_000_000, "M": 1 << 20}[unit]
    try:
        tokens = int(float(number) * scale)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise Failure(f"--max-model-len must be a number of tokens or auto, got {text!r}")
    return tokens
