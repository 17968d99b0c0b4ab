"""Text to token ids and back, by the tokenizer files that lie beside a model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_jax.requests.chat_templates import ChatTemplates

if TYPE_CHECKING:
    from flexgen_jax.requests.guidance import Guidance


class Tokenizer:
    """A Hugging Face ``tokenizers`` tokenizer; adds OPT's leading ``</s>``.

    Args:
        directory: Of its model's other files, if there are any.

    Attributes:
        chat: The chat templates of its model.
    """

    def __init__(self, backend: Any, directory: Path | None = None) -> None:
        self._backend, self.chat = backend, ChatTemplates(directory)
        self._guidance: dict[tuple[int, tuple[int, ...]], Guidance] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            UnicodeEncodeError: half of a surrogate pair, which is not text.
        """
        text.encode("utf-8")
        return self._backend.encode(text).ids

    def encode_words(self, text: str) -> list[int]:
        """Token ids of ``text`` as it comes in the middle of another: no special tokens are added.

        Raises:
            UnicodeEncodeError: half of a surrogate pair, which is not text.
        """
        text.encode("utf-8")
        return self._backend.encode(text, add_special_tokens=False).ids

    def guidance(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Guidance:
        """What guides answers in a form, of a model with so many logits.

        Raises:
            RequestError: as :class:`Guidance`.
        """
        from flexgen_jax.requests.guidance import Guidance

        key = vocab_size, eos_token_ids
        if key not in self._guidance:
            self._guidance[key] = Guidance(self._backend, *key)
        return self._guidance[key]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the tokenizer's files write it; None: it has none such."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The text of one token; None for an id that the tokenizer does not know."""
        if self._backend.id_to_token(token_id) is None:
            return None
        return self._backend.decode([token_id], skip_special_tokens=False)

    @functools.cached_property
    def texts(self) -> Mapping[int, str]:
        """Of every token, special ones included."""
        ids = sorted(self._backend.get_vocab().values())
        texts = self._backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return dict(zip(ids, texts, strict=True))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of the model at ``directory``; None if it has no tokenizer files.

    Reads ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``, as the OPT repositories
    have them.

    Raises:
        ValueError: tokenizer files that cannot be read; the message names the file.
    """
    from tokenizers import Tokenizer as Backend

    fast = directory / "tokenizer.json"
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    try:
        if fast.exists():
            return Tokenizer(Backend.from_file(str(fast)), directory)
        if vocab.exists() and merges.exists():
            backend = _byte_level_bpe(vocab, merges, directory)
            return Tokenizer(backend, directory)
    except Exception as error:  # the Rust side raises bare Exception
        source = fast if fast.exists() else vocab
        raise ValueError(f"cannot read the tokenizer {source}: {error}") from error
    return None


def _byte_level_bpe(vocab: Path, merges: Path, directory: Path) -> Any:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    settings: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").exists():
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))

    def special(key: str, default: str) -> str:
        value = settings.get(key) or default
        return value["content"] if isinstance(value, dict) else value

    backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    bos = special("bos_token", "</s>")
    names = {bos, special("eos_token", "</s>"), special("pad_token", "<pad>")}
    names.add(special("unk_token", "</s>"))
    known = [n for n in sorted(names) if backend.token_to_id(n) is not None]
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in known])
    if settings.get("add_bos_token", True) and bos in known:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return backend
