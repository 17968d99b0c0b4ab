"""oLLM: layers from disk, the cache on disk."""

from __future__ import annotations

from typing import Any

from peers.job import CannotRun, Generate, by_batches, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import torch

    torch.set_num_threads(job["threads"])
    try:
        import ollm

        model = ollm.AutoInference(job["model"], device="cpu")
    except Exception as error:  # whatever it is, it is the reason that the table gives
        raise CannotRun(f"{type(error).__name__}: {error}") from error
    ends = job["ends"]

    def ask(prompts: list[list[int]], limit: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=limit,
                min_new_tokens=None if ends else limit,
            )
        return out[:, ids.shape[1] :].tolist()

    told = {"versions": {"torch": torch.__version__}}
    return lambda run: (by_batches(run, ends, ask), {}), told


if __name__ == "__main__":
    serve(load)
