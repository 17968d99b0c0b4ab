"""The command line. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax import logs
from flexgen_jax._version import __version__
from flexgen_jax.cli import bus_errors, profile_command
from flexgen_jax.cli import checkup as cli_doctor
from flexgen_jax.cli import completion as cli_completion
from flexgen_jax.cli import plan_commands as cli_plan
from flexgen_jax.cli import score_commands as cli_scores
from flexgen_jax.cli import verify_command as cli_verify
from flexgen_jax.cli.chat_options import chat_options, read_chatting
from flexgen_jax.cli.failures import Failure, interrupted, plain_errors, say, silent
from flexgen_jax.cli.job_commands import (
    JobFiles,
    checkpoint_option,
    exit_if_none_succeeded,
    measurable_job_options,
    paths_of,
    print_report,
)
from flexgen_jax.cli.llm_options import DTYPES, Chosen, lengths_option, llm_options
from flexgen_jax.cli.pictures import (
    check_pictures,
    check_replaceable,
    force_option,
    is_picture,
    write_pictures,
)
from flexgen_jax.cli.process_options import joined, process_options
from flexgen_jax.cli.ray_options import OverRay, ray_options
from flexgen_jax.cli.run_batch import HintingCommand, run_batch_of
from flexgen_jax.cli.signals import terminable
from flexgen_jax.cli.suggestions import Suggestions, generation_config_option

if TYPE_CHECKING:
    from flexgen_jax.jobs.open_windows import OpenWindow
    from flexgen_jax.llm import LLM
    from flexgen_jax.planning.blocks import Block


class _Commands(click.Group):
    """Whatever a command is doing when it is interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise interrupted(error) from None


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
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
@click.pass_context
def main(context: click.Context, log_level: str | None, log_format: logs.Format | None) -> None:
    """High-throughput offline generation for language models larger than the accelerator's memory.

    \b
    Start here:
      flexgen-jax demo                                          a tiny model, everything on disk
      flexgen-jax generate --model facebook/opt-1.3b -i prompts.jsonl -o out.jsonl
      flexgen-jax doctor                                        what this machine can do
    """
    # Until the process ends: what goes wrong is shown after the command's context is closed.
    bus_errors.name_the_file()
    logs.reset()
    if log_level is not None or log_format is not None:
        logs.set_up(log_level or "info", log_format or "text")
    else:
        logs.say_nothing()
        context.call_on_close(logs.reset)


@main.command()
@click.argument("model_and_store", nargs=-1, metavar="[MODEL] STORE")
@click.option(
    "--dummy",
    metavar="PRESET",
    help="Make random weights of this preset; no MODEL is given then. [default: none]",
)
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    show_default=True,
    help="Dtype of the stored weights. auto: bfloat16 for weights of 16 bits, float32 for others.",
)
@click.option(
    "--weight-bits",
    type=click.Choice(["4", "8"]),
    help="Quantise matrices and the token table; MODEL may be a weight store then. [default: no]",
)
@click.option(
    "--group-size",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="The most elements that share a scale.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random weights of --dummy."
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
def convert(
    model_and_store: tuple[str, ...],
    dummy: str | None,
    dtype: str,
    weight_bits: str | None,
    group_size: int,
    seed: int,
    quiet: bool,
) -> None:
    """Convert MODEL (a Hugging Face directory or hub name) into the weight store STORE.

    One tensor is in memory at a time. Run the same command again to resume an interrupted
    conversion.

    \b
    flexgen-jax convert facebook/opt-1.3b opt-1.3b-store --dtype bfloat16
    flexgen-jax convert --dummy facebook/opt-1.3b opt-1.3b-dummy
    flexgen-jax convert opt-1.3b-store opt-1.3b-4bit --weight-bits 4
    """
    with plain_errors():
        from flexgen_jax import progress
        from flexgen_jax.weights import checkpoint

        if len(model_and_store) != (2 if dummy is None else 1):
            raise click.UsageError("give either MODEL and STORE, or --dummy PRESET and STORE")
        store = Path(model_and_store[-1])
        tell = silent if quiet else say
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
@click.argument("model")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    show_default=True,
    help="Dtype of the weights that are written. auto: the model's.",
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="The most bytes of a file, unless a single tensor has more.",
)
@click.option(
    "--offload-dir",
    type=click.Path(),
    help="Where a converted model is kept. [default: the cache directory]",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
def export(
    model: str,
    directory: Path,
    dtype: str,
    max_shard_size: str,
    offload_dir: str | None,
    quiet: bool,
) -> None:
    """Write MODEL (a weight store, or what convert takes) as the Hugging Face directory DIRECTORY.

    Quantised weights are written as the numbers that their codes stand for.

    \b
    flexgen-jax export opt-1.3b-store opt-1.3b-hf
    """
    with plain_errors():
        from flexgen_jax import progress
        from flexgen_jax.planning.byte_sizes import parse_bytes
        from flexgen_jax.weights.exporting import export as write

        tell = silent if quiet else say
        with progress.transfer("exporting", quiet=quiet) as update:
            path = write(
                model,
                directory,
                dtype=dtype,
                max_shard_nbytes=parse_bytes(max_shard_size) or 0,
                offload_dir=offload_dir,
                progress=update,
                say=tell,
            )
        tell(f"Hugging Face directory ready: {path}")


@main.command(cls=HintingCommand)
@llm_options
@lengths_option
@measurable_job_options
@checkpoint_option
@process_options
@ray_options
@click.option(
    "--prompt-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure a block of made-up prompts of N tokens, instead of running an input. [default: "
    "none]",
)
@click.option(
    "--max-tokens",
    "--gen-len",
    type=int,
    default=32,
    show_default=True,
    help="The most new tokens of a request.",
)
@click.option(
    "--cut-gen-len",
    type=int,
    metavar="N",
    help="Stop every request after N tokens, to measure. [default: never]",
)
@click.option(
    "--min-tokens",
    type=int,
    default=0,
    show_default=True,
    help="The fewest new tokens of a request.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="How random the choice of tokens is; 0 takes the likeliest.",
)
@click.option(
    "--top-k",
    type=int,
    default=0,
    show_default=True,
    help="Draw among so many of the likeliest tokens; 0: among all.",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Draw among the likeliest tokens that together have this probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Leave out tokens less likely than this share of the likeliest.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the requests that have none of their own.",
)
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=int,
    multiple=True,
    help="A token id that ends a request; repeatable. [default: the end-of-text token only]",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="A text that ends a request and is left out of its answer; repeatable. [default: none]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1, tokens of the prompt and of the output become less likely.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Above 0, tokens that the output has become less likely.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Above 0, tokens become less likely each time that the output has them.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option(
    "--logprobs",
    type=int,
    help="Return the log-probabilities of the chosen and so many of the likeliest tokens. "
    "[default: none]",
)
@click.option(
    "--prompt-logprobs",
    type=int,
    help="Return the log-probabilities of each token of the prompt and of so many of the "
    "likeliest. [default: none]",
)
@generation_config_option
@chat_options
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write a Perfetto trace to this file. [default: none]",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw the timeline to this file (.png, .svg). [default: none]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def generate(
    prompt_len: int | None,
    cut_gen_len: int | None,
    seed: int,
    trace: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Complete every prompt of a file.

    Each input line is {"prompt": ...} or {"prompt_token_ids": [...]} with an optional id and
    sampling fields (max_tokens, temperature, top_p, ...), which win over the options here; or
    {"messages": [...]}, which the model's chat template makes a prompt of; or an OpenAI batch line
    for /v1/completions or /v1/chat/completions; or, in a .txt file, a prompt. A line that cannot be
    run gets an error record.

    Results are safe as soon as their blocks finish: after Ctrl-C, a kill or a failure the same
    command resumes the job, and the output is the same as if nothing had happened.

    The exit code is 0 if any line succeeded, 1 if none did or the run failed midway, 2 if the job
    could not start, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with plain_errors(), terminable(), contextlib.ExitStack() as stack:
        from flexgen_jax.distributed.processes import process_count
        from flexgen_jax.jobs import measured
        from flexgen_jax.jobs.job import (
            Completing,
            completing_identity,
            recorded_policy,
        )
        from flexgen_jax.requests.sampling_params import SamplingParams

        chosen = Chosen(options, seed=seed)
        served = options.pop("served_model_name", None) or chosen.model
        max_length = options.pop("max_model_len", None)
        to_the_limit = options.pop("chats_to_the_limit", False)
        chatting = dataclasses.replace(read_chatting(options), to_the_limit=to_the_limit)
        excluded = {
            "--trace or --plot": trace is not None or plot is not None,
            "--checkpoint-minutes": options["checkpoint_minutes"] is not None,
            "--coordinator": options["coordinator"] is not None,
            "--distributed": options["distributed"],
            "--output -": str(options["output_path"]) == "-",
        }
        over_ray = OverRay(options, excluded)
        leads = stack.enter_context(joined(options, chosen))
        suggestions = Suggestions(
            options, frozenset({"max_tokens"} if cut_gen_len is not None else ())
        )
        if cut_gen_len is not None:
            options["max_tokens"] = min(options["max_tokens"], cut_gen_len)
        tell = silent if quiet else say
        if not leads:
            with chosen.llm(tell, quiet=True) as llm:
                llm.follow()
            return
        if prompt_len is not None:
            if options["input_path"] is not None:
                raise Failure("--prompt-len makes up the prompts: leave out --input")
            options["ignore_eos"] = True
        elif options["input_path"] is None or options["output_path"] is None:
            raise Failure("give --input and --output, or --prompt-len to measure")
        check_pictures(trace, plot, *paths_of(options), force=options["force"])
        with measured.directory(prompt_len) as scratch:

            def made(llm: LLM) -> Path:
                assert prompt_len is not None
                return measured.prompts(scratch, llm, prompt_len, defaults)

            files = JobFiles(
                options,
                as_json=as_json,
                quiet=quiet,
                made=made if prompt_len is not None else None,
                scratch=scratch,
            )
            defaults = SamplingParams(**options)
            with files:
                task_known = completing_identity(defaults, seed, served, chatting, max_length)
                known = {**suggestions.known(task_known), **chosen.identity()}
                if files.is_complete(known) and process_count() == 1:
                    if trace or plot:
                        tell("nothing ran, so there is no --trace or --plot")
                    files.say_complete(as_json=as_json)
                    return
                recorded = recorded_policy(files.results)
                with over_ray.llm(chosen, tell, quiet=quiet, recorded=recorded) as llm:
                    if suggestions.wanted:
                        defaults, most = suggestions.over(defaults, llm.store, chats=to_the_limit)
                        chatting = dataclasses.replace(chatting, most=most)
                    task = Completing(llm, defaults, served, chatting, max_length)
                    done = files.run(
                        llm, task, ("generating", "tokens"), lambda *about: _before(llm, *about)
                    )
        tell(files.summary(done))
        if trace or plot:
            write_pictures([done.report.predicted, done.report.timeline], trace, plot, tell)
        if as_json:
            print_report(done)
    exit_if_none_succeeded(done, quiet=quiet)


main.add_command(run_batch_of(generate))


def _before(llm: LLM, window: OpenWindow, blocks: list[Block], whole: bool) -> str:
    from flexgen_jax.planning.planner import described

    planner, policy = llm.planner, llm.policy
    how = [f"schedule {planner.schedule_name}", f"overlap {'on' if policy.overlap else 'off'}"]
    if policy.host_attention:
        how.append("attention on the host")
    first = "" if whole else "of the first window: "
    return "\n".join(
        [
            f"{first}{len(window.requests)} requests, {len(window.errors)} bad lines; "
            f"blocks of {policy.device_batch_size} x {policy.num_device_batches}, "
            + ", ".join(how),
            *([f"chosen: {llm.why}"] if llm.why else []),
            *described(planner.placement(blocks)),
        ]
    )


@main.command()
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where completions, trace and picture go.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 256),
    default=48,
    show_default=True,
    help="The most new tokens of a prompt.",
)
@force_option
def demo(output_dir: Path, max_tokens: int, force: bool) -> None:
    """Run a bundled tiny model with all its weights on disk, and show what happened."""
    with plain_errors():
        from flexgen_jax.demo import PICTURES, run_demo

        for name in PICTURES:
            check_replaceable(output_dir / name, is_picture, force=force)
        run_demo(output_dir, max_tokens, say, force=force)


@main.command(
    "eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def evaluate(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness on a model here: ARGUMENTS are lm_eval's own.

    The model is flexgen-jax unless they say otherwise. Needs pip install 'flexgen-jax[eval]'.

    \b
    flexgen-jax eval --model_args pretrained=facebook/opt-1.3b --tasks lambada_openai
    """
    with plain_errors():
        from flexgen_jax.evaluation import main as run

        run(arguments)


for command in (
    cli_scores.score,
    cli_scores.perplexity,
    cli_scores.compare,
    cli_plan.plan,
    cli_plan.simulate,
    profile_command.profile,
    cli_doctor.doctor,
    cli_verify.verify,
    cli_completion.completion,
):
    main.add_command(command)
