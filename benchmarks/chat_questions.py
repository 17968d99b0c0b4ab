"""Everyday questions from templates, for chat models; the same for every tool."""

from __future__ import annotations

import numpy as np

_PLACES = ("a small town", "Rome", "the sea", "the mountains", "Japan", "a farm", "space")
_THINGS = ("bread", "rain", "a bicycle", "the moon", "tea", "gravity", "a bank", "a friend")
_THINGS += ("snow", "a violin", "chess", "a volcano", "soap", "a bridge", "sleep", "honey")
_PATTERNS = (
    "Describe life in {place} in two sentences.",
    "What should I pack for a week in {place}?",
    "Write a haiku about {thing}.",
    "How does {thing} work? Explain it to a child.",
    "Give me three facts about {thing}.",
    "What is the best time to visit {place}?",
    "Yes or no: have you ever seen {thing}?",
    "Name one thing that people in {place} eat for breakfast.",
    "Why do people like {thing}?",
    "Tell me a short story about {thing} in {place}.",
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # of SmolLM2


def questions(count: int, seed: int = 0) -> list[str]:
    """``count`` different ones in the chat format of SmolLM2."""
    texts = [p.format(place=a, thing=b) for a in _PLACES for b in _THINGS for p in _PATTERNS]
    texts = list(dict.fromkeys(texts))
    draw = np.random.default_rng(seed)
    return [CHAT.format(texts[i]) for i in draw.permutation(len(texts))[:count]]
