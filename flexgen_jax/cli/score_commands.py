"""The commands that score: ``score``, ``perplexity``, ``compare``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli.failures import Failure, plain_errors, say, silent
from flexgen_jax.cli.job_commands import JobFiles, exit_if_none_succeeded, job_options, print_report
from flexgen_jax.cli.llm_options import Chosen, llm_options
from flexgen_jax.cli.signals import terminable

if TYPE_CHECKING:
    from flexgen_jax.compare import Compared
    from flexgen_jax.jobs.open_windows import OpenWindow
    from flexgen_jax.planning.blocks import Block

_QUIET = click.option("--quiet", is_flag=True, help="Print errors only.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout.")
_TEXT = click.option(
    "--text",
    "text_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file, UTF-8.",
)


@click.command()
@llm_options
@job_options
@_JSON
@_QUIET
def score(as_json: bool, quiet: bool, **options: Any) -> None:
    """Score continuations: how likely each is after its prompt.

    Each input line is {"prompt": ..., "continuation": ...} or {"prompt_token_ids": [...],
    "continuation_token_ids": [...]}, with an optional id. It is answered by {"id", "logprob" (of
    the whole continuation, natural log), "token_ids", "logprobs", "is_greedy"}; a line that cannot
    be scored gets an error record. One pass over the weights serves a whole block: take many
    batches.
    """
    with plain_errors(), terminable():
        from flexgen_jax.jobs.job import recorded_policy
        from flexgen_jax.jobs.score_job import Scoring, scoring_identity

        tell = silent if quiet else say
        chosen = _prefill_only(Chosen(options))
        with JobFiles(options, as_json=as_json, quiet=quiet) as files:
            known = {**scoring_identity(chosen.model), **chosen.identity()}
            if files.is_complete(known):
                files.say_complete(as_json=as_json)
                return
            recorded = recorded_policy(files.results)
            with chosen.llm(tell, quiet=quiet, recorded=recorded) as llm:
                done = files.run(llm, Scoring(llm, chosen.model), ("scoring", "sequences"), _before)
        tell(files.summary(done))
        if as_json:
            print_report(done)
    exit_if_none_succeeded(done, quiet=quiet)


def _before(window: OpenWindow, blocks: Sequence[Block], whole: bool) -> str:
    first = "" if whole else "of the first window: "
    return f"{first}{len(window.requests)} sequences, {len(window.errors)} bad lines"


@click.command()
@llm_options
@_TEXT
@click.option("--context", type=int, help="Tokens of a window. [default: all the model takes]")
@click.option("--stride", type=int, help="How far the window moves. [default: half of it]")
@_JSON
@_QUIET
def perplexity(
    text_path: Path,
    context: int | None,
    stride: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """The perplexity of a text under a sliding window; each token is scored once."""
    with plain_errors():
        from flexgen_jax import progress, scoring

        chosen = _prefill_only(Chosen(options))
        with chosen.llm(silent if quiet else say, quiet=quiet) as llm:
            tokens = llm.encode(_read(text_path))
            windows = scoring.count_windows(llm, tokens, context, stride)
            with progress.count(windows, "scoring", "windows", quiet=quiet) as advance:
                found = scoring.perplexity(
                    llm, tokens, context=context, stride=stride, progress=advance
                )
    if as_json:
        figures = {
            "perplexity": found.perplexity,
            "logprob": found.logprob,
            "num_tokens": found.num_tokens,
        }
        click.echo(json.dumps(figures, indent=2, allow_nan=False))
    else:
        click.echo(f"perplexity {found.perplexity:.4f} over {found.num_tokens} tokens")


@click.command()
@llm_options
@_TEXT
@click.option("--context", type=int, default=256, show_default=True, help="Tokens of a window.")
@click.option(
    "--prompt-len", type=int, help="Tokens of a window that are prefilled. [default: half of them]"
)
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    help="Windows of the text that are used. [default: all]",
)
@_JSON
@_QUIET
def compare(
    text_path: Path,
    context: int,
    prompt_len: int | None,
    max_windows: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """What compression costs and saves: perplexity, distance from full precision, bytes, speed.

    The text goes through the decode steps token by token, so that its cache is kept as generating
    keeps it. Full precision is held against each of --weight-bits, --cache-bits and
    --attention-sparsity by itself, and all of them together.
    """
    with plain_errors():
        from flexgen_jax import progress
        from flexgen_jax.compare import compare as run
        from flexgen_jax.compare import ways_to_compress

        tell = silent if quiet else say
        chosen = Chosen(options)
        ways = ways_to_compress(**chosen.compression)
        if len(ways) == 1:
            raise Failure(
                "nothing to compare: give --weight-bits, --cache-bits or --attention-sparsity"
            )
        with progress.count(None, "comparing", "tokens", quiet=quiet) as advance:
            rows = run(
                lambda **fields: chosen.llm(tell, quiet=True, **fields),
                _read(text_path),
                ways,
                context=context,
                prompt_len=prompt_len,
                max_windows=max_windows,
                progress=advance,
            )
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows], indent=2, allow_nan=False))
    else:
        click.echo(_table(rows))


def _prefill_only(chosen: Chosen) -> Chosen:
    """Refuses what would change nothing."""
    asked = chosen.compression
    if asked["cache_bits"] is not None or asked["attention_sparsity"] not in (None, 1.0):
        raise Failure(
            "a score is one prefill, which keeps no cache: --cache-bits and --attention-sparsity "
            "change nothing here; 'compare' measures what they cost"
        )
    return chosen


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{path} is not UTF-8 text: {error}") from error


def _table(rows: Sequence[Compared]) -> str:
    first = rows[0]
    links = [link for link in first.bytes_per_token if any(r.bytes_per_token[link] for r in rows)]
    columns: list[tuple[str, Callable[[Compared], str]]] = [
        ("", lambda r: r.name),
        ("perplexity", lambda r: f"{r.perplexity:.3f}"),
        ("against full", lambda r: f"{r.perplexity / first.perplexity - 1:+.2%}"),
        ("KL, nats", lambda r: f"{r.kl_divergence:.4f}"),
        ("same top token", lambda r: f"{r.top1_agreement:.1%}"),
        ("weights", lambda r: f"{r.weight_nbytes / 1e6:.1f} MB"),
        ("cache", lambda r: f"{r.cache_nbytes / 1e6:.1f} MB"),
        *((f"{link}, a token", _per_token(link)) for link in links),
        ("tokens/s", lambda r: f"{r.tokens_per_second:.0f}"),
    ]
    cells = [[name for name, _ in columns]] + [[show(row) for _, show in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _per_token(link: str) -> Callable[[Compared], str]:
    return lambda row: f"{row.bytes_per_token[link] / 1e3:.1f} kB"
