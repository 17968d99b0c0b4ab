"""vLLM's offline example ``structured_outputs``: a choice, a regular expression, JSON, a grammar.

python examples/like_vllm/structured_outputs.py [MODEL]
"""

import json
import sys

import flexgen_jax as fg
from flexgen_jax import StructuredOutputsParams

CAR = {
    "type": "object",
    "properties": {
        "brand": {"type": "string", "maxLength": 20},
        "model": {"type": "string", "maxLength": 20},
        "car_type": {"enum": ["sedan", "SUV", "Truck", "Coupe"]},
    },
    "required": ["brand", "model", "car_type"],
    "additionalProperties": False,
}
GRAMMAR = """
start: "SELECT " column " FROM " table " WHERE " column " = " number
column: "col_1" | "col_2"
table: "table_1" | "table_2"
number: "1" | "2"
"""
ASKED = {
    "choice": (
        "Classify this sentiment: vLLM is wonderful!",
        StructuredOutputsParams(choice=["Positive", "Negative"]),
    ),
    "regex": (
        "Generate an email address for Alan Turing, who works in Enigma. End in .com.",
        StructuredOutputsParams(regex=r"[a-z]{1,20}@[a-z]{1,20}\.com"),
    ),
    "json": (
        "Generate a JSON with the brand, model and car_type of the most iconic car from the 90's",
        StructuredOutputsParams(json=CAR),
    ),
    "grammar": (
        "Generate an SQL query to show a column of a table.",
        StructuredOutputsParams(grammar=GRAMMAR),
    ),
}


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct"):
    prompts = [prompt for prompt, _ in ASKED.values()]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=100, structured_outputs=form)
        for _, form in ASKED.values()
    ]
    with fg.LLM(model) as llm:
        outputs = llm.generate(prompts, params)  # of all forms in one batch
    answers = {kind: o.outputs[0].text for kind, o in zip(ASKED, outputs, strict=True)}
    for kind, text in answers.items():
        print(f"{kind}: {text}")
    assert set(json.loads(answers["json"])) == {"brand", "model", "car_type"}


if __name__ == "__main__":
    main(*sys.argv[1:])
