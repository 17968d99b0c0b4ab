"""Which tokens may come next, where an answer is to have a form: by ``llguidance``.

A grammar is compiled once, whoever asks for it. Each request has a matcher of its own, a copy that
follows what was generated: it can be made anew from the tokens at any time.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.requests.structured_outputs import StructuredOutputsParams, trigger_of

_MOST_GRAMMARS = 256
_WORD = 32  # bits
# On one line: an answer ends with what it says, not with the last of its line breaks.
_JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Guidance:
    """Makes the guides of a model's answers. Several threads may ask.

    Args:
        tokenizer: Of the package ``tokenizers``.
        vocab_size: Of the model's logits, which may be more than the tokenizer has.
        eos_token_ids: Come when the form is complete.

    Raises:
        RequestError: a tokenizer that ``llguidance`` cannot read, or no end of text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        import llguidance

        if not eos_token_ids:
            raise RequestError(
                "this model has no end-of-text token, which structured_outputs needs"
            )
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(eos_token_ids)
            )
        except Exception as error:  # the Rust side raises what it likes
            raise RequestError(
                f"structured_outputs does not work with this model's tokenizer: {error}"
            ) from error
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(str(token.content) for token in added if token.special)
        self._words = -(-vocab_size // _WORD)
        self._made: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, asked: StructuredOutputsParams) -> None:
        """Compiles it, unless it is known.

        Raises:
            RequestError: it cannot be; the message is the compiler's.
        """
        self._matcher(asked)

    def guide(self, asked: StructuredOutputsParams) -> Guide:
        """Of a request that has nothing yet."""
        return Guide(self._matcher(asked).deep_copy(), self._words)

    def _matcher(self, asked: StructuredOutputsParams) -> Any:
        import llguidance

        with self._lock:
            if asked in self._made:
                self._made.move_to_end(asked)
                return self._made[asked]
            try:
                grammar = _grammar(asked, self._special)
                made = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            except Exception as error:
                raise RequestError(f"structured_outputs cannot be compiled: {error}") from error
            if made.is_error():
                why = made.get_error().strip()
                raise RequestError(f"structured_outputs cannot be compiled: {why}")
            self._made[asked] = made
            if len(self._made) > _MOST_GRAMMARS:
                self._made.popitem(last=False)
            return made


def _grammar(asked: StructuredOutputsParams, special: Collection[str]) -> str:
    """As ``llguidance`` has it.

    Args:
        special: Texts of the tokens that are special.
    """
    import llguidance

    if asked.schema is not None:
        return llguidance.LLMatcher.grammar_from_json_schema(asked.schema, defaults=_JSON_FORM)
    if asked.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        texts = " | ".join(
            json.dumps(text, ensure_ascii=False, allow_nan=False) for text in asked.choice
        )
        return llguidance.LLMatcher.grammar_from_lark(f"start: {texts}")
    if asked.structural_tag is not None:
        return _tagged(json.loads(asked.structural_tag), special)
    assert asked.grammar is not None
    return llguidance.grammar_from("grammar", asked.grammar)


def _tagged(tag: Mapping[str, Any], special: Collection[str]) -> str:
    """Text with structures in it. A trigger is a special token, or what comes anywhere in text."""
    from llguidance import StructTag

    tags, triggers = [], tag["triggers"]
    for structure in tag["structures"]:
        schema = structure["schema"]
        schema = json.loads(schema) if isinstance(schema, str) else schema
        tags.append(
            StructTag(
                trigger=trigger_of(structure["begin"], triggers) or "",
                begin=structure["begin"],
                grammar={"x-guidance": _JSON_FORM, **schema},
                end=structure["end"],
            )
        )
    return StructTag.to_grammar(tags, assume_special=any(t in special for t in triggers))


class Guide:
    """Follows one request.

    Attributes:
        words: Of a mask: a bit a token of the vocabulary.
        error: Why it knows no further; None: it does.
    """

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self.words = matcher, words
        self._followed = 0
        self.error: str | None = None

    def follow(self, token_ids: Sequence[int]) -> Any:
        """Goes on to where ``token_ids`` have led; returns the matcher, or None after an error.

        Args:
            token_ids: All that the request has, those that were followed before included.
        """
        new = list(token_ids[self._followed :])
        self._followed = len(token_ids)
        if new:
            self._matcher.consume_tokens(new)
        return None if self.failed() else self._matcher

    def failed(self) -> bool:
        """Whether there is an error now."""
        if self.error is None and self._matcher.is_error():
            why = self._matcher.get_error().strip().partition("\n")[0]
            self.error = f"the form of the answer cannot be followed any further: {why}"
        return self.error is not None


@functools.cache
def _executor() -> Any:
    import llguidance

    return llguidance.LLExecutor()


def masks(guides: Sequence[tuple[int, Guide, Sequence[int]]], rows: int) -> np.ndarray:
    """(rows, words) int32: what may come next in each row, a bit a token; all, where nobody guides.

    Args:
        guides: Row, guide, and the tokens so far, of those that are guided.
    """
    from llguidance.numpy import fill_next_token_bitmask_par

    allowed = np.full((rows, guides[0][1].words), -1, np.int32)
    matchers = []
    for row, guide, token_ids in guides:
        matcher = guide.follow(token_ids)
        if matcher is not None:
            matchers.append((matcher, row))
    if matchers:
        fill_next_token_bitmask_par(_executor(), matchers, allowed)
    for row, guide, _ in guides:
        if guide.failed():
            allowed[row] = 0
    return allowed
