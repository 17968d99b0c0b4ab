"""vLLM's build for CPUs, where the package index has one that runs here."""

from __future__ import annotations

import os
from typing import Any

from peers.job import Answers, CannotRun, Generate, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    import vllm

    runs = job["runs"] + job["warm"]
    try:
        llm = vllm.LLM(
            job["model"],
            dtype=job["precision"],
            skip_tokenizer_init=True,
            max_model_len=max(max(map(len, r["prompts"])) + r["limit"] for r in runs),
            max_num_seqs=max(r["batch"] for r in runs),
            enable_prefix_caching=False,
        )
    except Exception as error:  # whatever it is, it is the reason that the table gives
        raise CannotRun(f"{type(error).__name__}: {error}") from error

    def generate(run: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=run["limit"],
            ignore_eos=not job["ends"],
            stop_token_ids=job["ends"] or None,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in run["prompts"]]
        found = llm.generate(prompts, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found], {}

    return generate, {"versions": {"vllm": vllm.__version__}}


if __name__ == "__main__":
    serve(load)
