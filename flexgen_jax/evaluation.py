"""lm-evaluation-harness on an ``LLM``: importing this registers the model ``flexgen-jax``.

All requests of a task are one job, in blocks that read the weights once for many of them. What is
counted is what lm_eval's own ``hf`` model counts: the same tokens, windows and cuts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness cannot be imported ({error}): pip install 'flexgen-jax[eval]'"
    ) from error

from flexgen_jax import progress
from flexgen_jax.llm import LLM
from flexgen_jax.models.family import eos_token_ids
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.scoring import run_scores, sequence_request
from scheduling.policy import Policy, Split
from storage.json_text import read_json

MAX_GEN_TOKS = 256
# Of lm_eval's generation arguments, those that an LLM has, under its names.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("flexgen-jax")
class FlexGenLM(TemplateLM):
    """lm_eval's model ``flexgen-jax``.

    Args:
        pretrained: What ``LLM(model=...)`` takes; or an ``LLM``, which stays open.
        dtype: What is computed with, as ``device_memory``, ``host_memory``, ``offload_dir``,
            ``schedule`` and ``seed`` as ``LLM`` has it.
        percent: FlexGen's six numbers with slashes between, ``"0/100/0/100/0/100"``; None: policy
            ``"auto"``.
        experts_percent: Percent of the experts on the device and on the host, ``"0/100"``; None:
            where the other weights are, or what ``"auto"`` chooses.
        gpu_batch_size: Of the policy; None: what ``batch_size`` says if it is above 1, or ``auto``.
        num_gpu_batches: Likewise.
        batch_size: lm_eval's; 1, its default, and ``"auto"`` leave the choice to the policy.
        max_length: Tokens that are fed at most; None: the model's positions.
        max_gen_toks: New tokens where a task does not say.
        add_bos_token: Whether special tokens are put before a text; None: as the tokenizer does.
        prefix_token_id: What comes before an empty context; None: the tokenizer's first token.
        device: lm_eval's; its default, ``"cuda:0"``, leaves the choice to JAX; another has to be
            what JAX chose.

    Raises:
        ValueError: an argument that cannot be met.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        dtype: Any = "auto",
        percent: str | None = None,
        experts_percent: str | None = None,
        gpu_batch_size: int | None = None,
        num_gpu_batches: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise ValueError("max_batch_size has no meaning here; the policy decides")
        _check_device(device)
        if isinstance(pretrained, LLM):
            self.llm = pretrained
        else:
            size = int(batch_size) if batch_size not in (None, "auto") else 1
            shape = {
                "device_batch_size": gpu_batch_size or (size if size > 1 else None),
                "num_device_batches": num_gpu_batches,
            }
            given = percent, experts_percent
            self.llm = _open(pretrained, dtype, given, shape, options)
        if self.llm.tokenizer is None:
            raise ValueError(f"{self.llm.store} has no tokenizer files, which lm_eval's tasks need")
        self._tokenizer = self.llm.tokenizer
        room = self.llm.config.max_position_embeddings
        self.max_length = room if max_length is None else int(max_length)
        if not 1 < self.max_length <= room:
            raise ValueError(f"max_length must be from 2 to {room}, got {self.max_length}")
        self.max_gen_toks = int(max_gen_toks)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The end of text.

        Raises:
            ValueError: the model has none.
        """
        ids = eos_token_ids(self.llm.config)
        if not ids:
            raise ValueError(
                f"no token ends a text of {self.llm.store}, and none begins one: give "
                "prefix_token_id, which comes before an empty context"
            )
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What comes before an empty context."""
        if self._prefix_token_id is not None:
            return int(self._prefix_token_id)
        named = _special_token(Path(self.llm.store), "bos_token")
        found = None if named is None else self._tokenizer.token_id(named)
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """For the cache of requests."""
        return str(self.llm.store).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it unless told otherwise."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            prefix = self._tokenizer.token(self.prefix_token_id)
            if prefix and string.startswith(prefix):
                add_special_tokens = False  # it is there already
        if add_special_tokens is False:
            return self._tokenizer.encode_words(string)
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: from 1 to "
                    f"max_length, {self.max_length}, can"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            asked.append(sequence_request(self.llm, index, tokens, len(continuation)))
        with progress.count(len(asked), "scoring", "sequences") as bar:
            scores = run_scores(self.llm, asked, progress=bar)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows that do not overlap but for one token of context."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completes contexts, whose beginning is cut off where they are too long."""
        ids = eos_token_ids(self.llm.config)
        eos = self._tokenizer.token(ids[0]) if ids else None
        prompts, params, stops = [], [], []
        for request in requests:
            context, asked = request.args
            fields = normalize_gen_kwargs(asked, self.max_gen_toks)
            until = handle_stop_sequences(fields.pop("until", None), eos=eos)
            most = fields.pop("max_gen_toks")
            if most >= self.max_length:
                raise ValueError(
                    f"max_gen_toks must be less than max_length ({self.max_length}), got {most}"
                )
            prompts.append(self.tok_encode(context)[-(self.max_length - most) :])
            params.append(_sampling(fields, [u for u in until if u and u != eos], most))
            stops.append(until)
        amount = sum(p.max_tokens or 0 for p in params)
        with progress.count(amount, "generating", "tokens") as bar:
            outputs = self.llm.generate(prompts, params, progress=bar)
        texts = []
        for request, output, until in zip(requests, outputs, stops, strict=True):
            text = postprocess_generated_text(output.outputs[0].text, until, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts


def _sampling(fields: dict[str, Any], stop: list[str], max_tokens: int) -> SamplingParams:
    if not fields.pop("do_sample", False):
        fields["temperature"] = 0.0
    unknown = sorted(set(fields) - set(_SAMPLING))
    if unknown:
        raise ValueError(
            f"generation argument {', '.join(unknown)} is not supported; known: until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
        )
    return SamplingParams(max_tokens=max_tokens, stop=tuple(stop), **fields)


def _open(
    model: str,
    dtype: Any,
    given: tuple[str | None, str | None],
    shape: dict[str, int | None],
    options: dict,
) -> LLM:
    known = ("device_memory", "host_memory", "offload_dir", "schedule", "seed")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown model argument {', '.join(unknown)}; see FlexGenLM's docstring")
    fixed: dict[str, Any] = {n: int(value) for n, value in shape.items() if value is not None}
    percent, experts = given
    if experts is not None:
        device, host = _numbers("experts_percent", experts, 2, "two")
        fixed["experts"] = Split.from_percent("experts", device, host)
    if percent is None:
        return LLM(model, dtype=dtype, fixed=fixed, **options)
    policy = Policy.from_percent(*_numbers("percent", percent, 6, "six"), **fixed)
    return LLM(model, dtype=dtype, policy=policy, **options)


def _numbers(name: str, text: str, count: int, word: str) -> list[int]:
    numbers = [int(n) for n in str(text).split("/") if n.strip().isdigit()]
    if len(numbers) != count:
        raise ValueError(f"{name} must be {word} numbers with slashes between, got {text!r}")
    return numbers


def _check_device(device: str | None) -> None:
    import jax

    platform = jax.local_devices()[0].platform
    if device not in (None, "cuda:0", {"gpu": "cuda"}.get(platform, platform)):
        raise ValueError(
            f"device={device}: JAX runs on {platform} here; choose by the variable JAX_PLATFORMS"
        )


def _special_token(directory: Path, name: str) -> str | None:
    """The text of a token that the tokenizer's files name."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / file).is_file():
            try:
                value = read_json(directory / file).get(name)
                found = value["content"] if isinstance(value, dict) else value
            except (OSError, ValueError, AttributeError, KeyError) as error:
                raise ValueError(f"cannot read {directory / file}: {error}") from error
            if found:
                return found
    return None


def main(arguments: Sequence[str]) -> None:
    """lm_eval's command line, with this as its model."""
    from lm_eval.__main__ import cli_evaluate

    command = list(arguments)
    if command[:1] and command[0] not in ("run", "ls", "validate", "-h", "--help"):
        command.insert(0, "run")
    named = any(a == "--model" or a.startswith("--model=") for a in command)
    if command[:1] == ["run"] and not named:
        command[1:1] = ["--model", "flexgen-jax"]
    before, sys.argv = sys.argv, ["flexgen-jax eval", *command]
    run: Callable[[], None] = cli_evaluate
    try:
        run()
    finally:
        sys.argv = before
