"""oLLM: layers from disk, the cache on disk."""

from __future__ import annotations

from typing import Any

from peers.job import Answers, CannotRun, Generate, cut, in_batches, serve


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import torch

    torch.set_num_threads(job["threads"])
    try:
        import ollm

        model = ollm.AutoInference(job["model"], device="cpu")
    except Exception as error:  # whatever it is, it is the reason that the table gives
        raise CannotRun(f"{type(error).__name__}: {error}") from error
    ends = job["ends"]

    def generate(run: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        answers: Answers = [[] for _ in run["prompts"]]
        for rows in in_batches(run):
            ids = torch.tensor([run["prompts"][i] for i in rows])
            with torch.inference_mode():
                out = model.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=run["limit"],
                    min_new_tokens=None if ends else run["limit"],
                )
            for row, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = cut(tokens, ends)
        return answers, {}

    return generate, {"versions": {"torch": torch.__version__}}


if __name__ == "__main__":
    serve(load)
