"""The command line. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax import cli_completion, cli_doctor, cli_plan, cli_scores, logs
from flexgen_jax._version import __version__
from flexgen_jax.cli_errors import Failure, plain_errors, say, silent
from flexgen_jax.llm_options import DTYPES, Chosen, llm_options
from flexgen_jax.pictures import check_pictures, write_pictures

if TYPE_CHECKING:
    from flexgen_jax.batch import Job, Results
    from flexgen_jax.llm import LLM
    from flexgen_jax.report import Report


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flexgen-jax")
@click.option(
    "--log-level",
    type=click.Choice(logs.LEVELS),
    help="Log events on stderr from this level on. [default: no log, or info with --log-format]",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="json: every line on stderr is a JSON object. [default: text]",
)
def main(log_level: str | None, log_format: logs.Format | None) -> None:
    """High-throughput offline generation for language models larger than the accelerator's memory.

    \b
    Start here:
      flexgen-jax demo                                          a tiny model, everything on disk
      flexgen-jax generate --model facebook/opt-1.3b -i prompts.jsonl -o out.jsonl
      flexgen-jax doctor                                        what this machine can do
    """
    # Until the process ends: what goes wrong is shown after the command's context is closed.
    logs.reset()
    if log_level is not None or log_format is not None:
        logs.set_up(log_level or "info", log_format or "text")


@main.command()
@click.argument("model_and_store", nargs=-1, metavar="[MODEL] STORE")
@click.option("--dummy", metavar="PRESET", help="Random weights of this preset; needs no MODEL.")
@click.option(
    "--dtype", type=DTYPES, help="Of the weights. [default: a weight store's own, or float32]"
)
@click.option(
    "--weight-bits",
    type=click.Choice(["4", "8"]),
    help="Quantise matrices and token table; MODEL may be a weight store then.",
)
@click.option(
    "--group-size",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Elements that share a scale, at most.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def convert(
    model_and_store: tuple[str, ...],
    dummy: str | None,
    dtype: str | None,
    weight_bits: str | None,
    group_size: int,
    seed: int,
    quiet: bool,
) -> None:
    """Convert MODEL (a Hugging Face directory or hub name) into the weight store STORE.

    One tensor is in memory at a time. An interrupted conversion goes on where it stopped when the
    same command is run again.

    \b
    flexgen-jax convert facebook/opt-1.3b opt-1.3b-store --dtype bfloat16
    flexgen-jax convert --dummy facebook/opt-1.3b opt-1.3b-dummy
    flexgen-jax convert opt-1.3b-store opt-1.3b-4bit --weight-bits 4
    """
    with plain_errors():
        from flexgen_jax import checkpoint, progress

        if len(model_and_store) != (2 if dummy is None else 1):
            raise click.UsageError("give either MODEL and STORE, or --dummy PRESET and STORE")
        store = Path(model_and_store[-1])
        tell = silent if quiet else say
        dtype = dtype or checkpoint.stored_dtype(model_and_store[0]) or "float32"
        form: dict[str, Any] = {"dtype": dtype, "group_size": group_size}
        form["weight_bits"] = int(weight_bits) if weight_bits else None
        with progress.transfer("converting", quiet=quiet) as update:
            if dummy is not None:
                path = checkpoint.convert_dummy(
                    dummy, store, **form, seed=seed, progress=update, say=tell
                )
            else:
                path = checkpoint.convert(
                    model_and_store[0], store, **form, progress=update, say=tell
                )
        tell(f"weight store ready: {path}")


@main.command()
@llm_options
@click.option("-i", "--input", "input_path", type=click.Path(path_type=Path), help="JSONL.")
@click.option("-o", "--output", "output_path", type=click.Path(path_type=Path), help="JSONL.")
@click.option(
    "--prompt-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Instead of an input: a block of made-up prompts of N tokens, to measure.",
)
@click.option("--max-tokens", "--gen-len", type=int, default=32, show_default=True)
@click.option(
    "--cut-gen-len", type=int, metavar="N", help="Stop every request after N tokens, to measure."
)
@click.option("--min-tokens", type=int, default=0, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0: all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="For requests without one.")
@click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="Repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option("--logprobs", type=int, help="Return this many likeliest tokens' log-probabilities.")
@click.option("--prompt-logprobs", type=int, help="Likewise, at each token of the prompt.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Perfetto trace here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the timeline here (PNG, SVG).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def generate(
    input_path: Path | None,
    output_path: Path | None,
    prompt_len: int | None,
    cut_gen_len: int | None,
    seed: int,
    trace: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Complete every prompt of a JSONL file.

    Each input line is {"prompt": ...} or {"prompt_token_ids": [...]} with an optional id and
    sampling fields (max_tokens, temperature, top_p, ...), which win over the options here; or an
    OpenAI batch line for /v1/completions. A line that cannot be run gets an error record. The
    exit code is 0 if any line succeeded, 1 if none did, 2 if the job could not start.
    """
    from flexgen_jax.executor import ExecutionError

    with plain_errors():
        from flexgen_jax import batch, measured, progress
        from flexgen_jax.sampling_params import SamplingParams

        chosen = Chosen(options, seed=seed)
        if cut_gen_len is not None:
            options["max_tokens"] = min(options["max_tokens"], cut_gen_len)
        tell = silent if quiet else say
        with contextlib.ExitStack() as stack:
            if prompt_len is not None:
                if input_path is not None:
                    raise Failure("--prompt-len makes the prompts by itself: leave --input out")
                options["ignore_eos"] = True
            elif input_path is None or output_path is None:
                raise Failure("give --input and --output, or --prompt-len to measure")
            elif not input_path.is_file():
                raise Failure(f"no input file {input_path}")
            elif input_path.resolve() == output_path.resolve():
                raise Failure(f"input and output are the same file, {input_path}")
            check_pictures(trace, plot)
            scratch = stack.enter_context(measured.directory(prompt_len))
            defaults = SamplingParams(**options)
            results = stack.enter_context(batch.Results(output_path or scratch / "out.jsonl"))
            with chosen.llm(tell, quiet=quiet) as llm:
                if input_path is None:
                    assert prompt_len is not None
                    input_path = measured.prompts(scratch, llm, prompt_len, defaults)
                job = batch.read_job(llm, input_path, defaults)
                llm.choose_policy(job.requests)
                tell(_before(llm, job))
                with progress.tokens(job.max_new_tokens, quiet=quiet) as advance:
                    try:
                        batch.run_job(llm, job, results, model=chosen.model, progress=advance)
                    except KeyboardInterrupt:
                        raise Failure(f"interrupted: {_kept(results, job)}", code=130) from None
                    except (ExecutionError, batch.JobError) as error:
                        raise Failure(f"{error}. {_kept(results, job)}", code=1) from error
                report = llm.report
        tell(_after(job, report, output_path))
        if report is not None and (trace or plot):
            write_pictures([report.predicted, report.timeline], trace, plot, tell)
        if as_json:
            figures = report.to_json() if report is not None else {"requests": 0}
            click.echo(json.dumps({**figures, "errors": len(job.errors)}, indent=2))
    if job.errors and not job.requests:
        sys.exit(1)


def _before(llm: LLM, job: Job) -> str:
    policy = llm.policy
    how = [f"schedule {llm.schedule_name}", f"overlap {'on' if policy.overlap else 'off'}"]
    if policy.host_attention:
        how.append("attention on the host")
    placed = llm.plan(llm.blocks(job.requests))
    return "\n".join(
        [
            f"{len(job.requests)} requests, {len(job.errors)} bad lines; "
            f"blocks of {policy.device_batch_size} x {policy.num_device_batches}, "
            + ", ".join(how),
            *([f"chosen: {llm.why}"] if llm.why else []),
            *(placement.describe(kind) for kind, placement in placed.items() if placement.cells),
        ]
    )


def _after(job: Job, report: Report | None, output_path: Path | None) -> str:
    lines = []
    if report is not None:
        lines.append(
            f"{report.generated_tokens} tokens in {report.seconds:.1f} s: "
            f"{report.tokens_per_second:.1f} tokens/s; "
            f"{report.padding:.0%} of the prompt positions were padding; "
            f"{report.disk_bytes / 1e9:.2f} GB read from disk"
            + (
                f", {report.disk_bytes_written / 1e9:.2f} GB written"
                if report.disk_bytes_written
                else ""
            )
        )
    if report is not None and report.timeline.seconds:
        lines.append(report.beside_prediction())
    for line, record in list(job.errors.items())[:3]:
        lines.append(f"line {line}: {record['error']['message']}")
    if len(job.errors) > 3:
        lines.append(f"and {len(job.errors) - 3} more bad lines: see their records")
    where = output_path or "not kept, --output was not given"
    lines.append(f"{len(job.requests)} succeeded, {len(job.errors)} failed: {where}")
    return "\n".join(lines)


def _kept(results: Results, job: Job) -> str:
    done = len(results) - len(job.errors)
    if done <= 0:
        return "stopped before the first block was finished; nothing was written"
    return (
        f"{done} of {len(job.requests)} requests were finished; "
        f"their results are in {results.partial}"
    )


@main.command()
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where completions, trace and picture go.",
)
@click.option("--max-tokens", type=click.IntRange(1, 256), default=48, show_default=True)
def demo(output_dir: Path, max_tokens: int) -> None:
    """Run a bundled tiny model with all its weights on disk, and show what happened."""
    with plain_errors():
        from flexgen_jax.demo import run_demo

        run_demo(output_dir, max_tokens, say)


for command in (
    cli_scores.score,
    cli_scores.perplexity,
    cli_scores.compare,
    cli_plan.plan,
    cli_plan.simulate,
    cli_plan.profile,
    cli_doctor.doctor,
    cli_completion.completion,
):
    main.add_command(command)
