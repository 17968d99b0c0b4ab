"""transformers with Accelerate's disk offload: each layer is read for each step of a batch."""

from __future__ import annotations

from typing import Any

from peers.job import Generate, serve
from peers.with_transformers import static


def load(job: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    import accelerate
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=getattr(torch, job["precision"]),
        device_map={"": "disk"},
        offload_folder=job["scratch"],
    ).eval()
    model.generation_config = transformers.GenerationConfig()
    # The head gets a strided slice of the prefill's last positions. With Accelerate's weights torch
    # 2.13 then copies them once per request: gigabytes, seconds. Peers run at their best: not here.
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    versions = {"torch": torch.__version__, "accelerate": accelerate.__version__}
    return static(model, job["ends"]), {"versions": versions}


if __name__ == "__main__":
    serve(load)
