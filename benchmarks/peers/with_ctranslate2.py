"""CTranslate2 on the CPU: its own rebatching by length; finished requests leave their batch."""

from __future__ import annotations

from typing import Any

from peers.job import Answers, Generate, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import ctranslate2

    workers = job["settings"].get("workers", 1)
    generator = ctranslate2.Generator(
        job["model"],
        device="cpu",
        compute_type=job["precision"],
        inter_threads=workers,
        intra_threads=max(1, job["threads"] // workers),
    )
    ends = job["ends"]

    def generate(run: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        found = generator.generate_batch(
            [[str(token) for token in prompt] for prompt in run["prompts"]],
            max_batch_size=run["batch"],
            sampling_topk=1,
            max_length=run["limit"],
            min_length=0 if ends else run["limit"],
            include_prompt_in_result=False,
            end_token=ends or None,
            return_end_token=True,
        )
        return [list(one.sequences_ids[0]) for one in found], {}

    told = {"versions": {"ctranslate2": ctranslate2.__version__}, "workers": workers}
    return generate, told


if __name__ == "__main__":
    serve(load)
