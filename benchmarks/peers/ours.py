"""flexgen-jax as the peers are run: everything in memory, or policy auto as a user gets it."""

from __future__ import annotations

import sys
from typing import Any

from peers.job import Answers, Generate, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import jax

    import flexgen_jax as fg
    from flexgen_jax.machine.kept_programs import keep_programs

    keep_programs()  # as the command line does
    settings = job["settings"]
    bits, auto = settings.get("weight_bits"), settings.get("auto", False)
    options: dict[str, Any] = {"dtype": job["precision"], "offload_dir": job["scratch"]}

    def policy(rows: int) -> fg.Policy:
        batches = settings.get("num_batches", 1)
        weights = fg.Split(device=0, host=0, disk=100) if settings.get("disk") else fg.Split()
        return fg.Policy(
            device_batch_size=max(1, rows // batches),
            num_device_batches=batches,
            weights=weights,
            weight_bits=bits,
        )

    if auto:
        options |= {"device_memory": settings["memory"]} if "memory" in settings else {}
        llm = fg.LLM(job["model"], policy="auto", **options)
    else:
        llm = fg.LLM(job["model"], policy=policy(1), **options)

    def generate(run: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        if not auto:
            llm.policy = policy(min(run["batch"], len(run["prompts"])))
        params = fg.SamplingParams(
            temperature=0.0,
            max_tokens=run["limit"],
            ignore_eos=not job["ends"],
            stop_token_ids=job["ends"] or None,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in run["prompts"]]
        found = llm.generate(prompts, params, use_tqdm=False)
        report = llm.report
        return [list(one.outputs[0].token_ids) for one in found], {
            # A later run of the same command finds its programs compiled.
            "seconds": round(report.seconds - report.compile_seconds, 3),
            "compile_seconds": round(report.compile_seconds, 3),
            "occupancy": report.occupancy,
            "passes": report.passes,
            "block": [llm.policy.device_batch_size, llm.policy.num_device_batches],
        }

    return generate, {"versions": {"jax": jax.__version__, "python": sys.version.split()[0]}}


if __name__ == "__main__":
    serve(load)
