"""AirLLM: a layer at a time from disk for each step of one batch."""

from __future__ import annotations

from typing import Any

from peers.job import CannotRun, Generate, by_batches, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import torch

    try:
        import airllm

        torch.set_num_threads(job["threads"])
        model = airllm.AutoModel.from_pretrained(job["model"], device="cpu")
    except Exception as error:  # whatever it is, it is the reason that the table gives
        raise CannotRun(f"{type(error).__name__}: {error}") from error
    ends = job["ends"]

    def ask(prompts: list[list[int]], limit: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        try:
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    max_new_tokens=limit,
                    min_new_tokens=None if ends else limit,
                    do_sample=False,
                    use_cache=True,
                )
        except Exception as error:
            raise CannotRun(f"generate: {type(error).__name__}: {error}") from error
        return out[:, ids.shape[1] :].tolist()

    told = {"versions": {"torch": torch.__version__}}
    return lambda run: (by_batches(run, ends, ask), {}), told


if __name__ == "__main__":
    serve(load)
