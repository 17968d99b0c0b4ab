"""Makes the golden of a trained chat model: what transformers answers with SmolLM2-135M-Instruct.

Run by hand, seldom; it needs the model that ``examples/smollm2.py`` makes, torch, transformers and
jinja2, which the test of the golden does not:

    python examples/smollm2.py smollm2-135m
    python tests/goldens/make_smollm2_golden.py smollm2-135m

``smollm2.json`` holds, for each of ``benchmarks/questions.txt``, the text after the chat template,
its token ids, and transformers' greedy answer to it alone in float32, which ends with the
end-of-text token or after ``NEW_TOKENS``; ``min_gap`` is the smallest lead of a winner over the
next. A question with a lead below ``MIN_GAP`` is refused: put another one in its place.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).parent
QUESTIONS = HERE.parent.parent / "benchmarks" / "questions.txt"
NEW_TOKENS = 64
MIN_GAP = 1e-3


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """New tokens, and the smallest lead of a winner over the next."""
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first, second = torch.cat(answer.logits).float().topk(2).values.T
    return answer.sequences[0, len(prompt) :].tolist(), float((first - second).min())


def main(directory: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows, unclear = [], []
    for question in QUESTIONS.read_text(encoding="utf-8").splitlines():
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text)["input_ids"]
        tokens, gap = greedy(model, prompt)
        if gap < MIN_GAP:
            unclear.append(f"{question} (won by {gap:.5f})")
        rows.append(
            {
                "question": question,
                "prompt": text,
                "prompt_token_ids": prompt,
                "token_ids": tokens,
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "min_gap": round(gap, 5),
            }
        )
        print(f"{gap:.5f} {len(prompt)} + {len(tokens)}: {question} {rows[-1]['text']!r}")
    if unclear:
        raise SystemExit("no clear winners, take other questions: " + "; ".join(unclear))
    golden = {
        "made_with": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        "max_tokens": NEW_TOKENS,
        "answers": rows,
    }
    lines = json.dumps(golden, indent=1, ensure_ascii=False)
    short = re.sub(r"\[[\d,\s]*\]", lambda m: re.sub(r"\s+", " ", m[0]), lines)
    short = short.replace("[ ", "[").replace(" ]", "]")
    assert json.loads(short) == golden
    (HERE / "smollm2.json").write_text(short + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} DIRECTORY, which examples/smollm2.py has made")
    main(sys.argv[1])
