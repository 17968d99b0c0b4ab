"""A conversation in the place of a prompt: its messages, and what the chat template is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flexgen_jax.arguments import shown
from flexgen_jax.requests.prompts import RequestError

if TYPE_CHECKING:
    from flexgen_jax.requests.chat_templates import ChatTemplate
    from flexgen_jax.requests.tokenization import Tokenizer

# Beside ``messages``, in a prompt of Python and in a line of a job.
CHAT_FIELDS = (
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "chat_template_kwargs",
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "<<it-goes-on-here>> "
_RESERVED = {"messages", "strftime_now", *CHAT_FIELDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages, in OpenAI's form, and how they become a text.

    Attributes:
        messages: Mappings with ``role`` and ``content``: a text, or a list of parts of
            ``{"type": "text", "text": ...}``.
        add_generation_prompt: End with what begins an answer; None: unless the last message is
            to be continued.
        continue_final_message: The answer continues the last message.
        tools: JSON descriptions of functions that the model may call. ``documents``: what it may
            look up. Some templates show them.
        chat_template: A template, or the name of one of the model's; None: the model's own.
        chat_template_kwargs: What else the template is told, such as ``enable_thinking``.
        now: What the template takes for now; None: when it is rendered.

    Raises:
        RequestError: something of this in a form that no template expects.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    now: datetime | None = None

    def __post_init__(self) -> None:
        messages = self.messages
        if not _are_mappings(messages) or not messages:
            raise RequestError(
                "messages must be a list of at least one object with role and content, got "
                f"{shown(messages)}"
            )
        for message in messages:
            if not isinstance(message.get("role"), str):
                raise RequestError(f"a message needs a role, which is a text: {shown(message)}")
        for name in ("tools", "documents"):
            value = getattr(self, name)
            if value is not None and not _are_mappings(value):
                raise RequestError(f"{name} must be a list of objects, got {shown(value)}")
        for name in ("add_generation_prompt", "continue_final_message"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name[0] == "a"):
                raise RequestError(f"{name} must be true or false, got {shown(value)}")
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt begins a message and continue_final_message continues one: "
                "give one of them"
            )
        more = self.chat_template_kwargs
        if more is not None and not isinstance(more, Mapping):
            raise RequestError(f"chat_template_kwargs must be an object, got {shown(more)}")
        if own := sorted(_RESERVED.intersection(more or {})):
            raise RequestError(f"chat_template_kwargs cannot have {own[0]}: give it beside them")

    @classmethod
    def of(cls, values: Mapping[str, Any], **more: Any) -> Chat:
        """Of ``messages`` and fields beside them, where null means what is usual.

        Raises:
            RequestError: as the class; or an unknown field.
        """
        unknown = sorted(set(values) - {"messages", "chat_template", *CHAT_FIELDS})
        if unknown:
            raise RequestError(
                f"unknown field {', '.join(map(repr, unknown))} beside messages; known: "
                f"chat_template, {', '.join(CHAT_FIELDS)}"
            )
        given = {k: v for k, v in values.items() if v is not None or k == "messages"}
        return cls(**{**given, **more})

    def text(self, tokenizer: Tokenizer) -> str:
        """What the template of the tokenizer's model makes of it, special tokens included.

        Raises:
            RequestError: there is no template, or it refuses this.
        """
        template = tokenizer.chat.chosen(self.chat_template, tools=bool(self.tools))
        begins = self.add_generation_prompt
        if begins is None:
            begins = not self.continue_final_message
        variables = {
            **(self.chat_template_kwargs or {}),
            "tools": None if self.tools is None else list(self.tools),
            "documents": None if self.documents is None else list(self.documents),
            "add_generation_prompt": begins,
        }
        messages = [_message(message, template) for message in self.messages]
        if not self.continue_final_message:
            return template.render(messages, variables, self.now)
        messages[-1]["content"] = _marked(messages[-1].get("content"))
        return _up_to_mark(template.render(messages, variables, self.now))


def _message(message: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """As templates expect it: content in the form that this one takes, arguments as objects.

    What is null is left out, which templates know better; reasoning has all of its names.
    """
    found = {key: value for key, value in message.items() if value is not None}
    reasons = [found[name] for name in _REASONING if name in found]
    if reasons:
        found = {"thinking": reasons[0], **found, "reasoning_content": reasons[0]}
    if "content" in found:
        found["content"] = _content(found["content"], template)
    elif "tool_calls" not in found:
        raise RequestError(f"a message needs content: {shown(message)}")
    calls = found.get("tool_calls")
    if calls is not None:
        if not _are_mappings(calls):
            raise RequestError(f"tool_calls must be a list of objects, got {shown(calls)}")
        found["tool_calls"] = [_call(call) for call in calls]
    return found


def _content(content: Any, template: ChatTemplate) -> Any:
    if isinstance(content, str):
        return content if template.takes_text else [{"type": "text", "text": content}]
    if not _are_mappings(content):
        raise RequestError(f"content must be a text or a list of parts, got {shown(content)}")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                "content may have parts of type 'text' only, each with a text, got "
                f"{shown(dict(part))}"
            )
    if template.takes_parts:
        return [dict(part) for part in content]
    return "\n".join(part["text"] for part in content)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI has the arguments as a text of JSON, templates as an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise RequestError(f"the arguments of a tool call are not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _marked(content: Any) -> Any:
    """``content`` with a mark at its end."""
    if isinstance(content, str):
        return content + _MARK
    if not content:
        raise RequestError("continue_final_message: the last message has no content to continue")
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARK}]


def _up_to_mark(text: str) -> str:
    """``text`` before the mark; a template that strips what is said strips what is kept."""
    place = text.rfind(_MARK.rstrip())
    if place < 0:
        raise RequestError("continue_final_message: the template leaves out the last message")
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


def _are_mappings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
