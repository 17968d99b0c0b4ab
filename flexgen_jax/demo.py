"""The demo: the bundled tiny model, every weight on disk, and what happened while it ran."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

PICTURES = ("timeline.json", "timeline.png")


def run_demo(
    output_dir: Path, max_tokens: int, say: Callable[[str], None], *, force: bool = False
) -> None:
    """Completes the bundled prompts; writes completions, trace and picture to ``output_dir``.

    Args:
        force: Replace completions even if they are not a job's.
    """
    import flexgen_jax as fg
    from flexgen_jax import progress
    from flexgen_jax.jobs.job import Completing, Job
    from flexgen_jax.jobs.job_input import JobInput
    from flexgen_jax.jobs.results import FileResults

    output_dir.mkdir(parents=True, exist_ok=True)
    completions = output_dir / "completions.jsonl"
    files = resources.files("flexgen_jax") / "demo_model"
    policy = fg.Policy(
        device_batch_size=4, num_device_batches=3, weights=fg.Split(device=0, disk=100)
    )
    # The demo converts the model anew each time: it is part of what there is to see. Its directory
    # is a temporary one, on whose disk no later run may be: nothing is to be measured there.
    with (
        resources.as_file(files) as model,
        tempfile.TemporaryDirectory(prefix="flexgen-jax-demo-") as offload,
        JobInput(model / "prompts.jsonl") as source,
        FileResults(completions, restart=True, force=force) as results,
        fg.LLM(str(model), policy=policy, offload_dir=offload, say=say, profile=False) as llm,
    ):
        defaults = fg.SamplingParams(max_tokens=max_tokens, temperature=0.7, top_k=40)
        job = Job(llm, Completing(llm, defaults, "demo"), source, results)
        say(llm.placement.describe("weights"))
        with progress.count(None, "generating", "tokens") as bar:
            report = job.run(
                progress=bar,
                on_window=lambda window, *_: bar.expect(max_tokens * len(window.requests)),
            ).report
    for line in completions.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        say(f"\n[{record['id']}] {record['prompt']}>>>{record['text']}")
    say(
        f"\n{report.generated_tokens} tokens in {report.seconds:.1f} s "
        f"({report.compilations} programs compiled in that time): "
        f"{report.tokens_per_second:.1f} tokens/s; {report.disk_bytes / 1e6:.0f} MB read from disk"
    )
    trace, picture = (output_dir / name for name in PICTURES)
    fg.write_trace(trace, report.timeline)
    say(f"completions: {completions}\ntrace (open it at ui.perfetto.dev): {trace}")
    try:
        from scheduling.plot import plot

        plot(report.timeline, picture)
        say(f"timeline: {picture}")
    except ImportError as error:
        say(f"no picture: {error}")
