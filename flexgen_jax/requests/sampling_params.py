"""What a request asks for, in vLLM's names and with its defaults. Knows no array."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from flexgen_jax.arguments import is_int
from flexgen_jax.requests.structured_outputs import StructuredOutputsParams, without_aliases

MAX_LOGPROBS = 20
MAX_STOPS, MAX_BIASES = 64, 1024
MAX_SAMPLES = 1024
# Beyond these nothing changes any more, and numbers overflow.
MAX_TEMPERATURE = 1e6
MAX_TOP_K = 2**31 - 1


_SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize")
# What NumPy's numbers become, which JSON does not know.
_INTEGERS = ("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "n", "prompt_logprobs")
_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    Attributes:
        temperature: 0 is greedy; above, logits are divided by it before drawing.
        top_k: Draw among the k likeliest tokens; 0 or -1: all.
        top_p: Draw among the likeliest tokens that together reach this probability, in (0, 1].
        min_p: Leave out tokens less likely than this share of the likeliest one's, in [0, 1].
        seed: Of this request's random stream; None: derived from the seed of the call (see
            ``LLM``) and the request's place in the input.
        stop_token_ids: Token ids that end the request, beside the model's end-of-text token. The
            token that ends a request is the last of ``token_ids`` and is not part of ``text``.
        stop: Texts that end the request, also where they come across several tokens; ``text`` ends
            before the first of them. Needs a tokenizer.
        repetition_penalty: Divides the logits of tokens that prompt or output have had, if they are
            positive, and multiplies the others: above 1 discourages, below encourages.
        presence_penalty: Taken off the logits of tokens that the output has had, in [-2, 2].
        frequency_penalty: Likewise, as often as it has had them.
        logit_bias: Token id -> what is added to its logit.
        allowed_token_ids: The only tokens that may come, at least one; None: all may. The
            end-of-text token is one of them only if it is named.
        bad_words: Words that are never generated, as the tokenizer writes them, at the beginning of
            a text or after a space: the last token of each cannot come after the ones before it.
            Longer words may have their letters. White space bans every token that holds it; spaces
            only those that are white space. Needs a tokenizer.
        structured_outputs: The form of the answer, or a mapping with its fields: only tokens that
            fit it are chosen, and it ends when it is complete. Needs a tokenizer.
        ignore_eos: Go on after the model's end-of-text token.
        max_tokens: Most tokens to generate, at least 1; None: as many as the model has positions
            for.
        min_tokens: Tokens to generate before a stop token may be chosen, and before a stop string
            counts: one that is complete by then neither ends the request nor cuts its text.
        skip_special_tokens: Leave special tokens out of ``text``.
        include_stop_str_in_output: ``text`` ends with the stop string that ended it, or with the
            text of the token.
        detokenize: Make a ``text`` of the tokens; False: it stays empty.
        n: How many completions of the prompt, each drawn by itself; above 1 only with a
            ``temperature`` above 0. The first is what ``n=1`` gives.
        logprobs: Return the log-probabilities of the chosen and this many likeliest tokens.
        prompt_logprobs: Likewise, at each position of the prompt.
        max_new_tokens: Hugging Face's name of ``max_tokens``.
        do_sample: Hugging Face's switch; False means ``temperature=0``.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    max_new_tokens: dataclasses.InitVar[int | None] = None
    do_sample: dataclasses.InitVar[bool | None] = None

    def __post_init__(self, max_new_tokens: int | None, do_sample: bool | None) -> None:
        if max_new_tokens is not None:
            if self.max_tokens not in (type(self).max_tokens, max_new_tokens):
                raise ValueError(
                    f"max_tokens={self.max_tokens} and max_new_tokens={max_new_tokens} are two "
                    "names of one thing; give one"
                )
            object.__setattr__(self, "max_tokens", max_new_tokens)
        if do_sample is not None:
            _require(isinstance(do_sample, bool), "do_sample", "true or false", do_sample)
            if not do_sample:
                object.__setattr__(self, "temperature", 0.0)
            elif self.temperature == 0:
                raise ValueError("do_sample=True contradicts temperature=0 (greedy)")
        self._check_ranges()
        for name in _INTEGERS + _NUMBERS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float)):
                object.__setattr__(self, name, (int if name in _INTEGERS else float)(value))
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids or ())))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(map(int, self.allowed_token_ids)))
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        object.__setattr__(self, "bad_words", _texts("bad_words", self.bad_words))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        self._check_form()

    def _check_ranges(self) -> None:
        number = _is_number
        _require(
            number(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE,
            "temperature",
            f"a number from 0 to {MAX_TEMPERATURE:g}",
            self.temperature,
        )
        _require(
            is_int(self.top_k) and -1 <= self.top_k <= MAX_TOP_K,
            "top_k",
            f"an integer from -1 to {MAX_TOP_K}",
            self.top_k,
        )
        _require(
            number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p
        )
        _require(
            number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number in [0, 1]", self.min_p
        )
        _require(
            is_int(self.n) and 1 <= self.n <= MAX_SAMPLES,
            "n",
            f"an integer from 1 to {MAX_SAMPLES}",
            self.n,
        )
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} completions of greedy decoding are all the same; give a temperature "
                "above 0, or n=1"
            )
        _require(self.seed is None or is_int(self.seed), "seed", "an integer or null", self.seed)
        for name in _SWITCHES:
            value = getattr(self, name)
            _require(isinstance(value, bool), name, "true or false", value)
        if self.stop and not self.detokenize:
            raise ValueError("stop needs the text: give detokenize=True, or stop_token_ids")
        most = self.max_tokens
        _require(
            most is None or (is_int(most) and most >= 1),
            "max_tokens",
            "an integer of at least 1",
            most,
        )
        _require(
            is_int(self.min_tokens)
            and 0 <= self.min_tokens <= (MAX_TOP_K if most is None else most),
            "min_tokens",
            f"an integer from 0 to max_tokens ({most})",
            self.min_tokens,
        )
        ids = self.stop_token_ids
        _require(ids is None or _are_ids(ids), "stop_token_ids", "a list of token ids", ids)
        only = self.allowed_token_ids
        _require(
            only is None or (_are_ids(only) and len(only) > 0),
            "allowed_token_ids",
            "a list of at least one token id, or null for all",
            only,
        )
        penalty = self.repetition_penalty
        _require(
            number(penalty) and 0 < penalty <= MAX_TEMPERATURE,
            "repetition_penalty",
            "a number above 0",
            penalty,
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(number(value) and -2 <= value <= 2, name, "a number from -2 to 2", value)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(
                count is None or (is_int(count) and 0 <= count <= MAX_LOGPROBS),
                name,
                f"null or an integer from 0 to {MAX_LOGPROBS}",
                count,
            )

    def _check_form(self) -> None:
        if self.structured_outputs is None:
            return
        form = StructuredOutputsParams.of(self.structured_outputs)
        object.__setattr__(self, "structured_outputs", form)
        if self.ignore_eos:
            raise ValueError(
                "structured_outputs ends an answer with the end-of-text token, and ignore_eos goes "
                "on after it: give one of them"
            )

    def updated(self, values: Mapping[str, Any]) -> SamplingParams:
        """A copy with ``values`` (as read from a JSON line) in place.

        Raises:
            ValueError: an unknown field, by name, or a value out of range.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = without_aliases(values)
        if "structured_outputs" in values:
            own["structured_outputs"] = None
        unknown = sorted(set(values) - set(own) - {"max_new_tokens", "do_sample"})
        if unknown:
            raise ValueError(
                f"unknown sampling field {', '.join(map(repr, unknown))}; "
                f"known: {', '.join(sorted(own))}"
            )
        if values.get("max_new_tokens") is not None and "max_tokens" not in values:
            own["max_tokens"] = type(self).max_tokens
        if values.get("do_sample") and "temperature" not in values and own["temperature"] == 0:
            own["temperature"] = type(self).temperature
        # null means "the default" in the JSON dialects this reads
        given = {k: v for k, v in values.items() if v is not None or own.get(k, 0) is None}
        return SamplingParams(**{**own, **given})


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, or several."""
    texts = [value] if isinstance(value, str) else value if value is not None else []
    _require(
        isinstance(texts, (list, tuple))
        and len(texts) <= MAX_STOPS
        and all(isinstance(t, str) and t for t in texts),
        name,
        f"a text that is not empty, or a list of at most {MAX_STOPS}",
        value,
    )
    return tuple(texts)


def _biases(value: Any) -> dict[int, float]:
    """JSON has texts for keys."""
    expected = f"an object of at most {MAX_BIASES} token ids and numbers from -100 to 100"
    _require(value is None or isinstance(value, Mapping), "logit_bias", expected, value)
    found = {}
    for key, bias in (value or {}).items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        fits = is_int(token) and token >= 0 and _is_number(bias) and -100 <= bias <= 100
        _require(fits, "logit_bias", expected, value)
        found[int(token)] = float(bias)
    _require(len(found) <= MAX_BIASES, "logit_bias", expected, value)
    return found


def _are_ids(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(is_int(i) and i >= 0 for i in value)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
