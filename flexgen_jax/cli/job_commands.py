"""What the commands that run a job share: opening, going on, being stopped, and saying so."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli import interrupts
from flexgen_jax.cli.failures import Failure, interrupted, say, silent

if TYPE_CHECKING:
    from flexgen_jax.jobs.job import Job, JobReport
    from flexgen_jax.jobs.job_input import JobInput
    from flexgen_jax.jobs.open_windows import OpenWindow
    from flexgen_jax.jobs.results import Results
    from flexgen_jax.jobs.windows import Task
    from flexgen_jax.llm import LLM
    from flexgen_jax.planning.blocks import Block
    from flexgen_jax.progress import Bar


def _input(when: str) -> Callable[..., Any]:
    return click.option(
        "-i",
        "--input",
        "--input-file",
        "input_path",
        type=click.Path(path_type=Path),
        metavar="FILE|-",
        help="JSON lines; a text file with a prompt a line (.txt); a JSON list (.json); or a table "
        "whose columns are fields (.csv, .tsv, .parquet). Files may be compressed (.gz, .zst). A "
        f"pipe, or - for the standard input, has JSON lines. [{when}]",
    )


def _output(when: str) -> Callable[..., Any]:
    return click.option(
        "-o",
        "--output",
        "--output-file",
        "output_path",
        type=click.Path(path_type=Path),
        metavar="FILE|-",
        help="JSON lines, compressed if the name ends in .gz or .zst; - is the standard output: "
        f"such a job cannot be resumed. [{when}]",
    )


_OPTIONS = [
    click.option(
        "--restart",
        is_flag=True,
        help="Start over: discard the progress of an unfinished job with this output, and replace "
        "the output of a finished one.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Replace the output (and the files of --trace and --plot) even if flexgen-jax has not "
        "written it.",
    ),
    click.option(
        "--window",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many requests are read, sorted by length and written together, rounded up to "
        "whole blocks. [default: 4096, or 4 blocks a worker]",
    ),
]
NAMES = ("input_path", "output_path", "restart", "force", "window")

checkpoint_option = click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Save the state of a running block (cache, tokens, positions) every N minutes beside the "
    "output, so that a job that was killed resumes within it: for blocks of hours. "
    "[default: never]",
)


def job_options(command: Callable[..., Any], *, when: str = "required") -> Callable[..., Any]:
    """Adds the options; :class:`JobFiles` takes their values.

    Args:
        when: Input and output have to be given.
    """
    for option in reversed([_input(when), _output(when), *_OPTIONS]):
        command = option(command)
    return command


def measurable_job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Likewise, of a command that has ``--prompt-len``."""
    return job_options(command, when="required without --prompt-len")


def paths_of(options: Mapping[str, Any]) -> list[Path]:
    """What a job with these options reads and writes."""
    from flexgen_jax.jobs.beside import Beside
    from flexgen_jax.jobs.job_input import STANDARD

    source, target = options["input_path"], options["output_path"]
    found = [path for path in (source, target) if path not in (None, STANDARD)]
    if target not in (None, STANDARD):
        beside = Beside(target)
        found += [beside.partial, beside.new, beside.ordered, beside.finished]
    return found


def _changed(before: str, now: str) -> str:
    what = f"schedule {now} gives another order than when this job was begun"
    if before != now:
        what = f"this job was begun with schedule {before}, and goes on with {now}"
    return f"{what}: the answers are the same, and the report's figures are of both"


class JobFiles:
    """What the options say about a job's input and output. A context manager.

    Entering opens both, so that a wrong path is said before a model is loaded.

    Args:
        options: By name, as click gives them; those that are a job's are taken out.
        made: Makes an input where none was given; ``scratch`` takes an output likewise.

    Raises:
        JobError: one of them cannot be used, or another job is using it.
    """

    def __init__(
        self,
        options: dict[str, Any],
        *,
        as_json: bool,
        quiet: bool,
        made: Callable[[LLM], Path] | None = None,
        scratch: Path | None = None,
    ) -> None:
        from flexgen_jax.jobs.beside import Beside
        from flexgen_jax.jobs.job_input import STANDARD

        values = {name: options.pop(name) for name in NAMES}
        self.input_path: Path | None = values["input_path"]
        self.output_path: Path | None = values["output_path"]
        if made is None and (self.input_path is None or self.output_path is None):
            raise Failure("give --input and --output")
        if self.output_path == STANDARD and as_json:
            raise Failure("--output - and --json both want the standard output: give a file")
        if self.output_path == STANDARD and values["restart"]:
            raise Failure("--restart: of a job that writes to the standard output nothing is kept")
        if self.output_path is not None and self.output_path != STANDARD:
            beside = Beside(self.output_path)
            if self.input_path is not None and self.input_path != STANDARD:
                beside.check_input(self.input_path)
        self._made, self._scratch = made, scratch
        self._restart, self._force = values["restart"], values["force"]
        self._window = values["window"]
        minutes = options.pop("checkpoint_minutes", None)
        self._checkpoint_seconds = None if minutes is None else 60 * minutes
        if minutes is not None and self.output_path in (None, STANDARD):
            raise Failure("--checkpoint-minutes: checkpoints lie beside the output: give a file")
        self._quiet = quiet
        self._tell = silent if quiet else say
        self._stack = contextlib.ExitStack()
        self._source: JobInput | None = None
        self._identity: Mapping[str, Any] | None = None

    def __enter__(self) -> JobFiles:
        from flexgen_jax.engine.snapshots import check_place
        from flexgen_jax.jobs.job import check_same
        from flexgen_jax.jobs.job_input import STANDARD, JobInput
        from flexgen_jax.jobs.results import results

        with contextlib.ExitStack() as stack:
            if self.input_path is not None:
                self._source = stack.enter_context(JobInput(self.input_path))
                if self.input_path == STANDARD and sys.stdin.isatty():
                    self._tell("reading JSON lines from the terminal; Ctrl-D ends them")
            output = self.output_path or (self._scratch or Path()) / "out.jsonl"
            opened = results(output, restart=self._restart, force=self._force)
            self.results: Results = stack.enter_context(opened)
            interrupts.on_end(lambda: opened.__exit__(None, None, None))
            if self._checkpoint_seconds is not None and self.results.snapshots is not None:
                check_place(self.results.snapshots)
            if self._source is not None:
                self._source.check_rows()
                self._identity = self._source.identity()
                check_same(self.results, {"input": self._identity})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_complete(self, known: Mapping[str, Any]) -> bool:
        """Whether this very job is finished already, which is said then; asked before a model.

        Args:
            known: Of what tells jobs apart, what there is without the model.

        Raises:
            JobError: the output is that of another job, finished or not.
        """
        from flexgen_jax.jobs.job import check_same_as_far_as_known, check_stream
        from flexgen_jax.jobs.job_input import JobError

        check_same_as_far_as_known(self.results, known)
        if self.results.finished and self._made is not None:
            raise JobError(
                f"{self.output_path} is complete already; give another output, or --restart to "
                "replace it"
            )
        if self.results.finished and self._source is not None:
            check_stream(self._source, self.results)
        return self.results.finished

    def say_complete(self, *, as_json: bool) -> None:
        """What there is of a job that was finished before. Exits with 1 if no request succeeded."""
        position = self.results.position
        sums = dict(position.sums or {})
        failed = sums.get("failed", 0)
        succeeded, errors = position.requests - failed, position.errors + failed
        self._tell(
            f"already complete: {succeeded} succeeded, {errors} failed: {self.output_path}; "
            "--restart runs it again"
        )
        if as_json:
            print_json({**sums, "complete": True, "requests": succeeded, "errors": errors})
        if errors and not succeeded:
            sys.exit(1)

    def run(
        self, llm: LLM, task: Task, what: tuple[str, str], describe: Callable[..., str]
    ) -> JobReport:
        """Runs what is left of the job.

        Args:
            what: What is done and counted, for the progress bar.
            describe: Given the first window, its blocks and whether it is the last one, says what
                is about to run.

        Raises:
            Failure: it ended before its end; the message says what is kept.
        """
        from flexgen_jax import progress
        from flexgen_jax.distributed.processes import ProcessError
        from flexgen_jax.engine.compiling import Beginning
        from flexgen_jax.engine.executor import ExecutionError
        from flexgen_jax.jobs.job import Job, JobError
        from flexgen_jax.jobs.job_input import JobInput
        from flexgen_jax.planning.window_size import WindowSize
        from storage.store import StorageError

        source = self._source
        if source is None:
            assert self._made is not None
            source = self._stack.enter_context(JobInput(self._made(llm)))
        if self.results.header is None:
            self._choose_policy(llm, task)
        replicas = llm.runner.num_replicas
        window_size = WindowSize.of(llm.policy.block_size, self._window, replicas=replicas)
        job = Job(
            llm,
            task,
            source,
            self.results,
            window_size=window_size,
            input_identity=self._identity,
            checkpoint_seconds=self._checkpoint_seconds,
        )
        if self.results.finished:
            self._tell("already complete; --restart runs it again")
        elif self.results.header is not None:
            self._tell(f"resuming: {self.results.requests_finished} already finished")
            if job.schedule_before is not None:
                self._tell(_changed(job.schedule_before, llm.planner.schedule_name))
        first = Beginning()
        with progress.count(None, *what, first=first, quiet=self._quiet) as bar:
            expected = _Expected(source, bar, self.results.position.line, job)

            def on_window(window: OpenWindow, blocks: list[Block], left: list[int]) -> None:
                if expected.windows == 0:
                    self._tell(describe(window, blocks, source.share_read == 1))
                amount = sum(r.max_tokens for k in left for r in blocks[k].requests)
                expected.add(amount, window.last_line)

            try:
                with interrupts.orderly():
                    return job.run(
                        progress=expected.advance,
                        on_window=on_window,
                        on_prefill=first.prefilled,
                    )
            except KeyboardInterrupt as error:
                raise interrupted(error, self._kept()) from None
            except (ExecutionError, JobError, ProcessError, StorageError) as error:
                early = isinstance(error, StorageError) and not self.results.requests_finished
                raise Failure(f"{error}; {self._kept()}", code=2 if early else 1) from error

    def _choose_policy(self, llm: LLM, task: Task) -> None:
        """Of policy auto, by the first requests: once, so that all windows are grouped alike."""
        from flexgen_jax import progress
        from flexgen_jax.jobs.job_input import JobError, JobInput
        from flexgen_jax.jobs.windows import Windows
        from flexgen_jax.planning.window_size import WindowSize

        if self.input_path is None or self._source is None or self._source.is_stream:
            return  # an input that can be read once
        first = None
        with (
            contextlib.suppress(JobError),  # is said when the job comes to it
            JobInput(self.input_path) as source,
            Windows(source, task, WindowSize.of(1)) as windows,
        ):
            first = next(iter(windows), None)
        with progress.doing("loading the model", quiet=self._quiet):
            llm.policy = llm.choose_policy(first.requests if first is not None else [])

    def _kept(self) -> str:
        from flexgen_jax.engine.snapshots import are_kept_in
        from flexgen_jax.jobs.job_input import STANDARD

        done = self.results.requests_finished
        if self.output_path is None:
            return "nothing was to be kept"
        if self.output_path == STANDARD:
            return (
                f"{done} lines were written; a job that writes to the standard output cannot be "
                "resumed"
            )
        snapshots = self.results.snapshots
        if not done and snapshots is not None and are_kept_in(snapshots):
            return (
                f"no request is finished yet; the state of the running block is kept beside "
                f"{self.output_path}; run the same command again to resume"
            )
        if not done:
            return "stopped before the first result; nothing was kept"
        return (
            f"{done} requests are finished and kept beside {self.output_path}; run the same "
            "command again to resume"
        )

    def summary(self, done: JobReport) -> str:
        """What came of the job, in a few lines."""
        report, lines = done.report, []
        if report.generated_tokens:
            lines.append(
                f"{report.generated_tokens} tokens in {report.seconds:.1f} s: "
                f"{report.tokens_per_second:.1f} tokens/s; "
                f"{report.padding:.0%} of the prompt positions were padding, "
                f"{report.occupancy:.0%} of the computed rows of use; "
                f"{report.disk_bytes / 1e9:.2f} GB read from disk"
                + (
                    f", {report.disk_bytes_written / 1e9:.2f} GB written"
                    if report.disk_bytes_written
                    else ""
                )
            )
        if report.timeline.seconds:
            lines.append(report.beside_prediction())
        lines.extend(done.messages)
        if done.errors > len(done.messages):
            lines.append(f"and {done.errors - len(done.messages)} more errors: see their records")
        where = str(self.output_path or "not kept, --output was not given")
        where = "standard output" if where == "-" else where
        lines.append(f"{done.requests} succeeded, {done.errors} failed: {where}")
        return "\n".join(lines)


def print_report(done: JobReport) -> None:
    """As JSON on the standard output."""
    print_json(done.to_json())


def print_json(values: Mapping[str, Any]) -> None:
    """Likewise."""
    click.echo(json.dumps(values, indent=2, allow_nan=False))


def exit_if_none_succeeded(done: JobReport, *, quiet: bool) -> None:
    """With what is wrong, where no summary has said it."""
    if done.errors and not done.requests:
        if quiet:
            of_one = f" ({done.messages[0]})" if done.messages else ""
            raise Failure(f"none of the {done.errors} lines has an answer{of_one}", code=1)
        sys.exit(1)


class _Expected:
    """How much there will be to do in all: by how far the input has been read for so much, and by
    what requests turn out to have of the new tokens that they may have.

    Args:
        skipped: Lines that an earlier process has finished.
    """

    def __init__(self, source: JobInput, bar: Bar, skipped: int, job: Job) -> None:
        self._source, self._bar, self._skipped, self._job = source, bar, skipped, job
        self._amount = self._done = self._finished_before = 0
        self._begun, self._share_read = 0.0, source.share_read
        self.windows = 0

    def add(self, amount: int, last_line: int) -> None:
        """So much there is to do at most in the window that ends with ``last_line``."""
        self._share_read = share = self._source.share_read
        if self.windows == 0:
            self._finished_before = self._job.limit_tokens
            if share is not None:
                self._begun = share * self._skipped / last_line
        self.windows += 1
        self._amount += amount
        self._show()

    def advance(self, more: int) -> None:
        """So much more is done."""
        self._done += more
        self._bar(more)
        self._show()

    def _show(self) -> None:
        share = self._share_read
        if share is None:
            self._bar.expect(None)
            return
        # Short ones finish first: what the others have so far counts as well.
        limits = self._job.limit_tokens - self._finished_before
        total = self._amount * (min(1.0, self._done / limits) if limits else 1.0)
        exactly = share == 1 and round(total) == self._amount
        if share < 1:
            total *= (1 - self._begun) / (share - self._begun)
        self._bar.expect(max(self._done, round(total)), exactly=exactly)
