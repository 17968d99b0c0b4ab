"""A model's chat templates: what they are, and how one makes a text of messages.

Rendered as transformers renders them (its ``apply_chat_template``): Jinja in a sandbox, with what
templates count on there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from flexgen_jax.arguments import shown
from flexgen_jax.requests.prompts import RequestError
from storage.json_text import read_json

_FILE, _CONFIG, _SPECIAL = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_PROBE = "flexgen-probe"


def templates_in(directory: Path) -> dict[str, str]:
    """Name -> template of the model at ``directory``; where there is one, it is ``default``.

    ``chat_template.jinja`` wins over ``tokenizer_config.json``, as in transformers.

    Raises:
        ValueError: files that cannot be read; the message names the file.
    """
    found: dict[str, str] = {}
    given = _read(directory / _CONFIG).get("chat_template")
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        try:
            found = {str(item["name"]): str(item["template"]) for item in given}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{directory / _CONFIG}: chat_template is neither a text nor a list of names and "
                "templates"
            ) from error
    if (directory / _FILE).is_file():
        try:
            found["default"] = (directory / _FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {directory / _FILE}: {error}") from error
    return found


def special_tokens_in(directory: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like, as far as the model's files name them."""
    found: dict[str, str] = {}
    for name in (_SPECIAL, _CONFIG):
        values = _read(directory / name)
        for kind in _TOKENS:
            token = values.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[f"{kind}_token"] = token
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"cannot read {path}: expected a JSON object")
    return values


class ChatTemplates:
    """Those of the model at ``directory``; its files are read when they are first needed."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """Name -> template.

        Raises:
            ValueError: as :func:`templates_in`.
        """
        return {} if self._directory is None else templates_in(self._directory)

    @functools.cached_property
    def _tokens(self) -> dict[str, str]:
        return {} if self._directory is None else special_tokens_in(self._directory)

    def chosen(self, asked: str | None, *, tools: bool) -> ChatTemplate:
        """The template to use, by transformers' rules.

        Args:
            asked: A template, or the name of one of the model's; None: the model's own.
            tools: Whether there are any: then ``tool_use`` is taken, if there is such a one.

        Raises:
            RequestError: the model has none, or not this one; or it is no template.
        """
        try:
            texts, tokens = self.texts, self._tokens
        except ValueError as error:
            raise RequestError(str(error)) from error
        if asked is not None:
            text = texts.get(asked, asked)
            if "{" not in text:
                known = f"the model's are {', '.join(texts)}" if texts else "the model has none"
                raise RequestError(
                    f"chat_template {shown(asked)} is neither a Jinja template nor the name of "
                    f"one; {known}"
                )
            return _compiled(text, tuple(tokens.items()))
        name = "tool_use" if tools and "tool_use" in texts else "default"
        if name in texts:
            return _compiled(texts[name], tuple(tokens.items()))
        if texts:
            raise RequestError(
                f"the model has no default chat template; name one of {', '.join(texts)} with "
                "chat_template"
            )
        raise RequestError(
            "this model has no chat template (no chat_template.jinja, and no chat_template in "
            "tokenizer_config.json): it was not trained to chat; give a prompt instead of "
            "messages, or a template with chat_template (--chat-template)"
        )


class ChatTemplate:
    """One template, compiled.

    Args:
        variables: What it is given beside the messages.

    Raises:
        RequestError: it is no Jinja template.
    """

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        import jinja2

        self._variables = variables
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template cannot be used: {error}") from error

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message may be a text. Some take lists of parts only."""
        return not self._shows([{"type": "text", "text": _PROBE}]) or self._shows(_PROBE)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether it may be a list of parts. Some would print the list."""
        return self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        message = {"role": "user", "content": content}
        try:
            text = self.render([message], {"add_generation_prompt": False}, None)
        except RequestError:
            return False
        return _PROBE in text and "[{" not in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        now: datetime | None,
    ) -> str:
        """The text of ``messages``.

        Args:
            variables: As ``add_generation_prompt``, ``tools``, ``documents``.
            now: What the template takes for now, if it asks; None: now.

        Raises:
            RequestError: the template refuses them, or fails.
        """

        def strftime_now(form: str) -> str:
            return (datetime.now() if now is None else now).strftime(form)

        given = {"tools": None, "documents": None, **self._variables, **variables}
        try:
            return self._template.render(messages=messages, strftime_now=strftime_now, **given)
        except Exception as error:  # a program of somebody else's: it may raise anything
            raise RequestError(f"the chat template refuses the messages: {error}") from error


@functools.lru_cache(maxsize=16)
def _compiled(text: str, variables: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(text, dict(variables))


@functools.cache
def _environment() -> Any:
    """As transformers sets it up: what templates on the hub are written for."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what the assistant says, for training; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """Jinja's own would write ``<`` and the like as HTML wants them."""
    dumps: Callable[..., str] = json.dumps
    return dumps(value, ensure_ascii=ensure_ascii, **form)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
