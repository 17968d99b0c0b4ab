"""The command line. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from flexgen_jax._version import __version__

if TYPE_CHECKING:
    from flexgen_jax.batch import Job, Results
    from flexgen_jax.llm import LLM
    from flexgen_jax.report import Report
    from scheduling.policy import Policy
    from storage.disk import ReadMode

DTYPES = click.Choice(["float32", "bfloat16"])


class Failure(click.ClickException):
    """One line for a person, and an exit code: 2 for what the user can mend, 1 for the rest."""

    exit_code = 2

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # click declares it for the class


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns expected errors into one line; anything else keeps its traceback."""
    from flexgen_jax.executor import ExecutionError

    try:
        yield
    except ExecutionError as error:
        raise Failure(str(error), code=1) from error
    except (ValueError, ImportError, OSError) as error:
        raise Failure(str(error)) from error


def _say(message: str) -> None:
    click.echo(message, err=True)


def _silent(message: str) -> None:
    """Takes the place of ``_say`` where nothing is to be said."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flexgen-jax")
def main() -> None:
    """High-throughput offline generation for language models larger than the accelerator's memory.

    \b
    Start here:
      flexgen-jax demo                                          a tiny model, everything on disk
      flexgen-jax generate --model facebook/opt-1.3b -i prompts.jsonl -o out.jsonl
    """


@main.command()
@click.argument("model_and_store", nargs=-1, metavar="[MODEL] STORE")
@click.option("--dummy", metavar="PRESET", help="Random weights of this preset; needs no MODEL.")
@click.option("--dtype", type=DTYPES, default="float32", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def convert(
    model_and_store: tuple[str, ...], dummy: str | None, dtype: str, seed: int, quiet: bool
) -> None:
    """Convert MODEL (a Hugging Face directory or hub name) into the weight store STORE.

    One tensor is in memory at a time. An interrupted conversion goes on where it stopped when the
    same command is run again.

    \b
    flexgen-jax convert facebook/opt-1.3b opt-1.3b-store --dtype bfloat16
    flexgen-jax convert --dummy facebook/opt-1.3b opt-1.3b-dummy
    """
    with _plain_errors():
        from flexgen_jax import checkpoint, progress

        if len(model_and_store) != (2 if dummy is None else 1):
            raise click.UsageError("give either MODEL and STORE, or --dummy PRESET and STORE")
        store = Path(model_and_store[-1])
        say = _silent if quiet else _say
        with progress.transfer("converting", quiet=quiet) as update:
            if dummy is not None:
                path = checkpoint.convert_dummy(
                    dummy, store, dtype=dtype, seed=seed, progress=update, say=say
                )
            else:
                path = checkpoint.convert(
                    model_and_store[0], store, dtype=dtype, progress=update, say=say
                )
        say(f"weight store ready: {path}")


def _policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--policy",
            metavar="auto|FILE",
            help="'auto' (the default without --percent), or a JSON file of a policy.",
        ),
        click.option(
            "--percent",
            type=float,
            nargs=6,
            metavar="WD WH CD CH HD HH",
            help="Percent of weights on device, on host; of cache; of hidden. The rest: disk.",
        ),
        click.option(
            "--device-batch-size",
            "--gpu-batch-size",
            type=int,
            help="Requests that one kernel launch sees.",
        ),
        click.option(
            "--num-device-batches",
            "--num-gpu-batches",
            type=int,
            help="Batches of a block: they share each pass over the weights.",
        ),
        click.option(
            "--overlap/--no-overlap", default=None, help="Load while computing. [default: overlap]"
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _policy(
    policy: str | None,
    percent: tuple[float, ...] | None,
    device_batch_size: int | None,
    num_device_batches: int | None,
    overlap: bool | None,
) -> tuple[Policy | Literal["auto"], dict[str, Any]]:
    """The policy that the options name, and what they change of its block shape and overlap."""
    from scheduling.policy import Policy

    given = {
        "device_batch_size": device_batch_size,
        "num_device_batches": num_device_batches,
        "overlap": overlap,
    }
    changes = {k: v for k, v in given.items() if v is not None}
    if percent and policy is not None:
        raise Failure("--policy and --percent exclude each other")
    if percent:
        return Policy.from_percent(*percent), changes
    if policy is None or policy == "auto":
        return "auto", changes
    try:
        return Policy.from_json(json.loads(Path(policy).read_text(encoding="utf-8"))), changes
    except OSError as error:
        raise Failure(f"cannot read the policy {policy}: {error.strerror}") from error


@main.command()
@click.option("--model", required=True, help="A weight store, Hugging Face directory or hub name.")
@click.option(
    "-i", "--input", "input_path", required=True, type=click.Path(path_type=Path), help="JSONL."
)
@click.option(
    "-o", "--output", "output_path", required=True, type=click.Path(path_type=Path), help="JSONL."
)
@_policy_options
@click.option("--schedule", default="zigzag", show_default=True, help="Order of the operations.")
@click.option("--dtype", type=DTYPES, default="float32", show_default=True)
@click.option("--device-memory", metavar="SIZE", help="What 'auto' may use, such as 12GiB.")
@click.option("--host-memory", metavar="SIZE", help="Likewise, in host memory.")
@click.option("--offload-dir", type=click.Path(), help="Where converted models are kept.")
@click.option(
    "--disk-mode",
    type=click.Choice(["auto", "mapped", "direct", "tensorstore"]),
    default="auto",
    show_default=True,
    help="How weights are read from disk: through the page cache, past it, or by TensorStore.",
)
@click.option("--max-tokens", type=int, default=32, show_default=True)
@click.option("--min-tokens", type=int, default=0, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0: all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="For requests without one.")
@click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="Repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option("--logprobs", type=int, help="Return this many likeliest tokens' log-probabilities.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a Perfetto trace here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the timeline here (PNG, SVG).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def generate(
    model: str,
    input_path: Path,
    output_path: Path,
    policy: str | None,
    percent: tuple[float, ...] | None,
    device_batch_size: int | None,
    num_device_batches: int | None,
    overlap: bool | None,
    schedule: str,
    dtype: str,
    device_memory: str | None,
    host_memory: str | None,
    offload_dir: str | None,
    disk_mode: ReadMode,
    seed: int,
    trace: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Complete every prompt of a JSONL file.

    Each input line is {"prompt": ...} or {"prompt_token_ids": [...]} with an optional id and
    sampling fields (max_tokens, temperature, top_p, ...), which win over the options here; or an
    OpenAI batch line for /v1/completions. A line that cannot be run gets an error record. The
    exit code is 0 if any line succeeded, 1 if none did, 2 if the job could not start.
    """
    from flexgen_jax.executor import ExecutionError

    with _plain_errors():
        import dataclasses

        from flexgen_jax import batch, progress
        from flexgen_jax.checkpoint import resolve
        from flexgen_jax.llm import LLM
        from flexgen_jax.sampling_params import SamplingParams
        from storage.disk import DiskContext

        chosen, changes = _policy(policy, percent, device_batch_size, num_device_batches, overlap)
        defaults = SamplingParams(**sampling)
        if not input_path.is_file():
            raise Failure(f"no input file {input_path}")
        say = _silent if quiet else _say
        with batch.Results(output_path) as results:
            with progress.transfer("converting", quiet=quiet) as update:
                store = resolve(
                    model, dtype=dtype, offload_dir=offload_dir, say=say, progress=update
                )
            llm = LLM(
                str(store),
                policy=chosen,
                schedule=schedule,
                device_memory=device_memory,
                host_memory=host_memory,
                dtype=dtype,
                seed=seed,
                disk=DiskContext(mode=disk_mode),
            )
            with llm:
                llm.policy = dataclasses.replace(llm.policy, **changes)
                job = batch.read_job(llm, input_path, defaults)
                say(_before(llm, job))
                with progress.tokens(job.max_new_tokens, quiet=quiet) as advance:
                    try:
                        batch.run_job(llm, job, results, model=model, progress=advance)
                    except KeyboardInterrupt:
                        raise Failure(f"interrupted: {_kept(results, job)}", code=130) from None
                    except ExecutionError as error:
                        raise Failure(f"{error}. {_kept(results, job)}", code=1) from error
                report = llm.report
        say(_after(job, report, output_path))
        if report is not None:
            _write_pictures(report, trace, plot, say)
        if as_json:
            figures = report.to_json() if report is not None else {"requests": 0}
            click.echo(json.dumps({**figures, "errors": len(job.errors)}, indent=2))
    if job.errors and not job.requests:
        sys.exit(1)


def _before(llm: LLM, job: Job) -> str:
    policy = llm.policy
    return (
        f"{len(job.requests)} requests, {len(job.errors)} bad lines; "
        f"blocks of {policy.device_batch_size} x {policy.num_device_batches}, "
        f"schedule {llm.schedule_name}, overlap {'on' if policy.overlap else 'off'}\n"
        f"{llm.placement.describe('weights')}"
    )


def _after(job: Job, report: Report | None, output_path: Path) -> str:
    lines = []
    if report is not None:
        lines.append(
            f"{report.generated_tokens} tokens in {report.seconds:.1f} s: "
            f"{report.tokens_per_second:.1f} tokens/s; "
            f"{report.padding:.0%} of the prompt positions were padding; "
            f"{report.disk_bytes / 1e9:.2f} GB read from disk"
        )
    lines.append(f"{len(job.requests)} succeeded, {len(job.errors)} failed: {output_path}")
    return "\n".join(lines)


def _kept(results: Results, job: Job) -> str:
    done = len(results) - len(job.errors)
    if done <= 0:
        return "stopped before the first block was finished; nothing was written"
    return (
        f"{done} of {len(job.requests)} requests were finished; "
        f"their results are in {results.partial}"
    )


def _write_pictures(
    report: Report, trace: Path | None, plot: Path | None, say: Callable[[str], None]
) -> None:
    if trace is not None:
        from scheduling.timeline import write_trace

        write_trace(trace, report.timeline)
        say(f"trace (open it at ui.perfetto.dev): {trace}")
    if plot is not None:
        from scheduling.plot import plot as draw

        draw(report.timeline, plot)
        say(f"timeline: {plot}")


@main.command()
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where completions, trace and picture go.",
)
@click.option("--max-tokens", type=int, default=48, show_default=True)
def demo(output_dir: Path, max_tokens: int) -> None:
    """Run a bundled tiny model with all its weights on disk, and show what happened."""
    with _plain_errors():
        from flexgen_jax.demo import run_demo

        run_demo(output_dir, max_tokens, _say)
