"""transformers on the CPU: batches of requests of about one length, or its continuous batching."""

from __future__ import annotations

from typing import Any

from peers.job import Answers, CannotRun, Generate, by_batches, cut, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["precision"])
    ).eval()
    # The model's own settings (a repetition penalty, sampling) are no part of the comparison.
    model.generation_config = transformers.GenerationConfig()
    told = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    continuous = job["settings"].get("continuous", False)
    return (_continuous if continuous else static)(model, job["ends"]), told


def static(model: Any, ends: list[int]) -> Generate:
    """Batches of requests of about one length, each until the last of them has ended."""
    import torch

    def ask(prompts: list[list[int]], limit: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=limit,
                min_new_tokens=None if ends else limit,
                eos_token_id=ends or None,
                pad_token_id=0,
            )
        return out[:, width:].tolist()

    return lambda run: (by_batches(run, ends, ask), {})


def _continuous(model: Any, ends: list[int]) -> Generate:
    import transformers

    if not hasattr(model, "generate_batch"):
        raise CannotRun("this version of transformers has no generate_batch")

    def generate(run: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=run["limit"],
            eos_token_id=ends or -1,
            pad_token_id=0,
        )
        # Left alone it takes nine tenths of the memory for its cache.
        room = max(map(len, run["prompts"])) + run["limit"]
        batching = transformers.ContinuousBatchingConfig(
            num_blocks=run["batch"] * -(-room // 256) + 1,
            max_requests_per_batch=run["batch"],
            max_batch_tokens=2048,
        )
        try:
            found = model.generate_batch(
                run["prompts"], generation_config=config, continuous_batching_config=batching
            )
        except Exception as error:  # whatever it is, it is the reason that the table gives
            raise CannotRun(f"generate_batch: {type(error).__name__}: {error}") from error
        if len(found) != len(run["prompts"]):
            raise CannotRun(f"generate_batch answered {len(found)} of {len(run['prompts'])}")
        # Request ids are numbered in order: req_0, req_1, ...
        ordered = sorted(found.values(), key=lambda o: int(o.request_id.rpartition("_")[2]))
        return [cut(list(o.generated_tokens), ends) for o in ordered], {}

    return generate


if __name__ == "__main__":
    serve(load)
