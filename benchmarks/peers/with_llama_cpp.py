"""llama.cpp through its Python binding: continuous batching of as many sequences as a batch has.

As its server does: free sequences are given to the prompts that wait, which are computed together;
then all sequences take a step. Greedy.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

from peers.job import Answers, CannotRun, Generate, serve

_BATCH = 2048  # tokens of a call; its own default
_kept: list[Any] = []  # what C code calls must not be collected


class _Context:
    """A context of ``rows`` sequences with ``room`` positions each."""

    def __init__(self, lib: Any, model: Any, rows: int, room: int, threads: int) -> None:
        import numpy as np

        self._lib, self._np = lib, np
        params = lib.llama_context_default_params()
        params.n_ctx = rows * -(-room // 256) * 256  # a sequence has a multiple of 256
        params.n_seq_max = rows
        params.n_batch = _BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise CannotRun(f"llama.cpp makes no context of {rows} sequences")
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.memory = lib.llama_get_memory(self.context)
        self._batch = lib.llama_batch_init(max(_BATCH, rows), 0, 1)

    def step(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes (token, position, sequence, wanted)s; the likeliest next tokens."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := self._lib.llama_decode(self.context, batch):
            raise CannotRun(f"llama_decode returned {status}")
        count = sum(wanted for *_, wanted in entries)
        if not count:
            return []
        logits = ctypes.cast(
            self._lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float)
        )
        table = self._np.ctypeslib.as_array(logits, (count, self._vocab))
        return table.argmax(-1).tolist()

    def free(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self.context)


def _prefill(context: _Context, placed: list[tuple[int, list[int]]]) -> list[int]:
    """Computes whole prompts, as many tokens a call as it takes; the first token of each."""
    entries = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in placed
        for position, token in enumerate(prompt)
    ]
    firsts: list[int] = []
    for begin in range(0, len(entries), _BATCH):
        firsts += context.step(entries[begin : begin + _BATCH])
    return firsts


def _answers(context: _Context, run: dict[str, Any], ends: set[int]) -> Answers:
    prompts = run["prompts"]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    free = list(range(run["batch"]))
    answers: Answers = [[] for _ in prompts]
    live: dict[int, int] = {}  # the request of a sequence

    def take(sequences: list[int], tokens: list[int]) -> None:
        for sequence, token in zip(sequences, tokens, strict=True):
            answer = answers[live[sequence]]
            answer.append(token)
            if token in ends or len(answer) == run["limit"]:
                del live[sequence]
                context.free(sequence)
                free.append(sequence)

    while waiting or live:
        placed = {free.pop(): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
        if placed:
            live |= placed
            firsts = _prefill(context, [(s, prompts[i]) for s, i in placed.items()])
            take([*placed], firsts)
        rows = [*live]
        if rows:
            entries = [
                (answers[live[s]][-1], len(prompts[live[s]]) + len(answers[live[s]]) - 1, s, True)
                for s in rows
            ]
            take(rows, context.step(entries))
    return answers


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import llama_cpp
    from llama_cpp import llama_cpp as lib

    lib.llama_backend_init()
    _kept.append(lib.llama_log_callback(lambda level, text, data: None))
    lib.llama_log_set(_kept[0], ctypes.c_void_p(0))
    params = lib.llama_model_default_params()
    # Weights in the layout of its fastest kernels, a copy of them all, unless they are mapped.
    params.use_extra_bufts = not job["settings"].get("mapped", False)
    model = lib.llama_model_load_from_file(job["model"].encode(), params)
    if not model:
        raise CannotRun("llama.cpp does not load the model")

    def generate(run: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        room = max(map(len, run["prompts"])) + run["limit"]
        context = _Context(lib, model, run["batch"], room, job["threads"])
        try:
            return _answers(context, run, set(job["ends"])), {}
        finally:
            context.close()

    info = lib.llama_print_system_info().decode()
    return generate, {"versions": {"llama-cpp-python": llama_cpp.__version__}, "system": info}


if __name__ == "__main__":
    serve(load)
