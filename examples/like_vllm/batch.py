"""vLLM's offline example of a batch file with several endpoints.

    python examples/like_vllm/batch.py [MODEL] [OUTPUT]

Runs what ``vllm run-batch`` would: the command line is the same but for the name. Lines for
``/v1/embeddings`` get an error record; the others are answered.
"""

import json
import subprocess
import sys
from pathlib import Path

INPUT = Path(__file__).parent / "batch.jsonl"


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct", output="batch-answers.jsonl"):
    command = [sys.executable, "-m", "flexgen_jax", "run-batch", "-i", str(INPUT), "-o", output]
    command += ["--model", model, "--max-model-len", "256", "--enforce-eager"]
    subprocess.run(command, check=True)
    for line in Path(output).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        response = record["response"]
        print(record["custom_id"], response["status_code"], json.dumps(response["body"])[:200])


if __name__ == "__main__":
    main(*sys.argv[1:])
