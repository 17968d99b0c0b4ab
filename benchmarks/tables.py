"""Makes the tables of README and docs from ``benchmarks/results.jsonl``.

python benchmarks/tables.py           # rewrites the tables
python benchmarks/tables.py --check   # exits with 1 if they are not up to date
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from peers import tables as peer_tables

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- tables: made by benchmarks/tables.py from benchmarks/results.jsonl -->"
END = "<!-- end of tables -->"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rate(record: dict) -> str:
    """What is mapped and aliased is not read at any rate."""
    cold = record["page_cache"] == "cold"
    return f" ({record['read_gb_per_second']:.1f} GB/s)" if cold else ""


def streaming(records: list[dict]) -> str:
    rows = [
        (
            f"{r['model']}, {r['dtype']}, batch {r['batch']} x {r['num_batches']}",
            r["page_cache"],
            f"{r['compute_seconds']:.2f} s",
            f"{r['read_seconds']:.2f} s" + _rate(r),
            f"{r['streamed_seconds']:.2f} s",
            f"{r['ratio']:.2f}",
        )
        for r in records
    ]
    first = records[0]
    versions = " and ".join(sorted({r["jax"] for r in records}))
    note = (
        f"A decode step with all weights on disk, against computing alone and reading alone "
        f"({first['cores']} CPU cores, jax {versions}, side by side, medians of at least "
        f"{min(r['repeats'] for r in records)} runs). Ratio: streamed ÷ the larger of the two."
    )
    header = ("model", "page cache", "compute alone", "read alone", "streamed", "ratio")
    return f"{note}\n\n{table(header, rows)}"


def refill(records: list[dict]) -> str:
    def job(r: dict) -> str:
        if r["questions"]:
            return f"{r['requests']} everyday questions"
        if r["equal"]:
            prompts = ", prompts alike" if "prompt" in r else ""
            return f"{r['requests']}, {r['equal']} tokens each{prompts}"
        return f"{r['requests']}, mean {r['mean_length']:.0f}, at most {r['limit']}"

    def lies(r: dict) -> str:
        kinds = ("weights", "cache", "hidden")
        on = {tier: [k for k in kinds if r[k] == tier] for tier in ("host", "disk")}
        slow = f" at {r['gb_per_second']} GB/s" if r["gb_per_second"] else ""
        named = [f"{', '.join(held)} on {tier}" for tier, held in on.items() if held]
        return "; ".join(named) + slow if named else "memory"

    rows = [
        (
            f"{r['model']}, {r['dtype']}",
            job(r),
            r["jax"],
            lies(r),
            f"{r['tokens_per_second']['refill']:.1f}",
            f"{r['tokens_per_second']['blocks']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['occupancy']['refill']:.0%} ({r['occupancy']['blocks']:.0%})",
            f"{r['passes_over_ideal']:.2f}",
            f"{r['measured_over_predicted']:.2f}" if r["measured_over_predicted"] else "",
        )
        for r in records
    ]
    first = records[0]
    rows_of = " x ".join(map(str, first["block"]))
    note = (
        f"Requests of log-normal lengths, prompts of 8 to 200 tokens, blocks of {rows_of}: "
        "tokens/s with refill and without, in turns in one process. Occupancy: rows of use ÷ "
        "rows computed, without refill in brackets. Passes over the weights ÷ those of ideal first "
        "come, first served "
        f"({first['cores']} CPU cores with AVX-512)."
    )
    header = (
        "model",
        "requests",
        "jax",
        "on disk",
        "refill",
        "blocks",
        "ratio",
        "occupancy",
        "passes ÷ ideal",
        "measured ÷ predicted",
    )
    return f"{note}\n\n{table(header, rows)}"


def jobs(records: list[dict]) -> str:
    def quarters(r: dict, field: str) -> tuple[float, float]:
        return r[field]["second quarter"], r[field]["last quarter"]

    rows = [
        (
            f"{r['requests']:,}",
            "refill" if r["refill"] else "blocks",
            f"{r['seconds']:.0f} s",
            *(f"{each:.0f}" for each in quarters(r, "requests_per_second")),
            *(f"{each:.2f} GB" for each in quarters(r, "peak_held_gb")),
        )
        for r in records
    ]
    first = records[0]
    note = (
        f"The bundled model, prompts of 1 to 10 words, {first['max_tokens']} new tokens each, "
        f"blocks of {' x '.join(map(str, first['block']))}: requests/s and memory held in the "
        f"second and the last quarter of the job ({first['cores']} CPU cores, jax {first['jax']})."
    )
    header = ("requests", "", "in all", "requests/s", "in the end", "memory", "in the end")
    return f"{note}\n\n{table(header, rows)}"


def experts(records: list[dict]) -> str:
    """Of each model; ours beside what the same block takes in memory, and what reading takes."""
    parts = []
    for model, bits in dict.fromkeys((r["model"], r["weight_bits"]) for r in records):
        own = [r for r in records if r["model"] == model and r["weight_bits"] == bits]
        alone = {_block_of(r): r for r in own if r["kind"] == "compute"}
        runs = [r for r in own if r["kind"] == "run"]
        if not runs:
            continue
        machine = next(r for r in own if r["kind"] == "machine")
        note = (
            f"{model}, {f'{bits} bits' if bits else 'bfloat16'}, {machine['cores']} CPU cores, one "
            "run each. Experts on disk, what all tokens use in memory. Compiling is left out of "
            f"tokens/s. {machine['limit_note'] or ''}"
        ).rstrip()
        header = ("memory", "", "rows", "cache in memory", "tokens", "tokens/s", "prefill")
        header += ("a decode step", "its tokens/s", "compute alone", "I/O alone", "ratio")
        header += ("experts read", "planned")
        rows = [_experts_row(r, alone.get(_block_of(r))) for r in runs]
        parts.append(f"{note}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _block_of(r: dict) -> tuple:
    return tuple(r[n] for n in ("batch", "num_batches", "prompt_len", "gen_len"))


def _experts_row(r: dict, alone: dict | None) -> tuple[str, ...]:
    limit = r["limit_nbytes"]
    computed, read, ratio = "", "", ""
    if "io_alone_seconds" in r:
        read = f"{r['io_alone_seconds']:.1f} s"
    if alone and read:
        computed = f"{alone['seconds']:.1f} s"
        ratio = f"{r['seconds'] / max(alone['seconds'], r['io_alone_seconds']):.2f}"
    shares = ("experts_share", "experts_share_planned")
    # Our first token comes from the prefill, llama.cpp's bench has it in the decode steps.
    step = r["decode_seconds"] / max(1, r["gen_len"] - (r["name"] == "ours"))
    # One prompt for all rows: only the decode steps compare.
    shared = r.get("shared_prompt", False)
    return (
        "all" if limit is None else f"{limit / 2**30:g} GiB",
        r["name"],
        f"{r['batch']} x {r['num_batches']}",
        f"{r.get('cache_percent', 100):g}%",
        f"{r['prompt_len']} + {r['gen_len']}",
        "" if shared else f"{r['tokens_per_second']:.2f}",
        "shared" if shared else f"{r['prefill_seconds']:.1f} s",
        f"{step:.1f} s",
        f"{r['batch'] * r['num_batches'] / step:.2f}",
        computed,
        read,
        ratio,
        *(f"{r[n]:.0%}" if n in r else "" for n in shares),
    )


def experts_read(records: list[dict]) -> str:
    """By the rows of a block."""
    parts = []
    for count, chosen in dict.fromkeys((r["experts"], r["chosen"]) for r in records):
        own = [r for r in records if r["experts"] == count]
        lines = [
            (str(r["rows"]), *(f"{r[n]:.0%}" for n in ("read", "expected", "if_alike")))
            for r in own
        ]
        header = ("rows", "read", "planned", f"1 - (1 - {chosen}/{count})^rows")
        parts.append(f"{chosen} of {count} experts:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def published(records: list[dict]) -> str:
    """Predicted, beside each published figure."""
    rows = []
    for r in records:
        for who, measured in (r["measured"] or {"": None}).items():
            rows.append(
                (
                    f"{r['card']}, {r['host_gb']} GB",
                    r["model"].partition("/")[2],
                    f"{r['prompt_len']:,} + {r['gen_len']}",
                    f"{r['weight_bits']} bits" if r["weight_bits"] else "",
                    "{} x {}".format(*r["block"]),
                    "host" if r["attends_on_host"] else "card",
                    f"{r['predicted']:.1f}{' in decode' if r['decode_alone'] else ''}",
                    f"{r['bound']}, {r['bound_over_time']:.0%}",
                    f"{measured:g}, {who}" if measured else "",
                    f"{r['predicted'] / measured:.2f}" if measured else "",
                    f"{r['planning_seconds']:.0f} s",
                )
            )
    header = ("card, host memory", "model", "tokens", "weights", "block", "attention")
    header += (
        "predicted tokens/s",
        "bound, its share of the time",
        "published",
        "ratio",
        "planned in",
    )
    return table(header, rows)


def long_prompt(records: list[dict]) -> str:
    rows = [
        (
            f"{r['model']}, {r['dtype']}",
            f"{r['prompt_len']:,}",
            f"{r['cache_gb']:.2f} GB",
            f"{r['beyond_weights_and_cache_gb']:.2f} GB",
            f"{r['planned_workspace_gb']:.2f} GB",
            f"{r['prefill_seconds']:.0f} s",
        )
        for r in records
    ]
    note = (
        "One long prompt: peak resident memory beyond the weights and the cache, and what the "
        f"planner counts as workspace ({records[0]['cores']} CPU cores, jax {records[0]['jax']})."
    )
    header = ("model", "prompt tokens", "cache", "beyond", "planned workspace", "prefill")
    return f"{note}\n\n{table(header, rows)}"


def memory(records: list[dict]) -> str:
    rows = [
        (r["command"], f"{r['model']}, {r['dtype']}", f"{r['peak_gb']:.2f} GB") for r in records
    ]
    note = "Peak resident memory with all weights on disk, page cache aside."
    return f"{note}\n\n{table(('command', 'model', 'peak'), rows)}"


def startup(records: list[dict]) -> str:
    rows = [(f"`{r['command']}`", f"{r['beyond_interpreter']:.2f} s") for r in records[1:]]
    return "Start-up, beyond the bare interpreter.\n\n" + table(("", "seconds"), rows)


_NAMES = {"hf": "transformers, in memory", "accelerate": "Accelerate, all on disk"}


def _shares(r: dict) -> str:
    """FlexGen's six numbers in words."""
    if r["percent"] is None:
        return _NAMES[r["name"]]
    parts = []
    for kind, (device, host), bits in zip(
        ("weights", "cache"),
        (r["percent"][:2], r["percent"][2:4]),
        (r.get("weight_bits"), r.get("cache_bits")),
        strict=True,
    ):
        disk = 100 - device - host
        kind = f"{bits}-bit {kind}" if bits else kind
        where = "in memory" if disk == 0 else "on disk" if disk == 100 else f"{disk:g}% on disk"
        parts.append(f"{kind} {where}")
    return "ours, " + ", ".join(parts)


def _times(records: list[dict]) -> str:
    fewest = min(r["repeats"] for r in records)
    return "one run" if fewest == 1 else f"medians of at least {fewest} runs"


def offload(records: list[dict]) -> str:
    parts = []
    chosen = [r for r in records if r["kind"] == "summary"]
    for key in dict.fromkeys((r["preset"], r["prompt_len"], r["gen_len"]) for r in chosen):
        rows = [
            (
                "all" if r["limit_nbytes"] is None else f"{r['limit_nbytes'] / (1 << 30):g} GiB",
                _shares(r),
                f"{r['batch']} x {r['num_batches']}",
                f"{r['tokens_per_second']:.1f}",
                f"{r['prefill_seconds']:.0f} + {r['decode_seconds']:.0f} s",
                f"{r['read_nbytes'] / 1e9:.0f} GB",
                f"{r['disk_bytes_per_second'] / 1e9:.1f} GB/s",
            )
            for r in chosen
            if (r["preset"], r["prompt_len"], r["gen_len"]) == key
        ]
        preset, prompt_len, gen_len = key
        header = ("memory", "", "block", "tokens/s", "prefill + decode", "read", "disk beside it")
        note = (
            f"{preset} shapes in bfloat16, {prompt_len} prompt tokens, {gen_len} generated, 2 CPU "
            "cores; memory includes the page cache. Rows with the same memory "
            "limit ran side by side, on shared "
            f"cores; {_times(chosen)} each."
        )
        parts.append(f"{note}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def growth(records: list[dict]) -> str:
    chosen = sorted((r for r in records if r["kind"] == "summary"), key=lambda r: r["num_batches"])
    rows = [
        (
            str(r["num_batches"]),
            f"{r['tokens_per_second']:.1f}",
            f"{r['seconds']:.1f} s",
            f"{r['compute_alone_seconds']:.1f} s",
            f"{r['io_alone_seconds']:.1f} s",
            f"{r['ratio']:.2f}",
        )
        for r in chosen
    ]
    header = ("batches", "tokens/s", "block", "compute alone", "reading alone", "ratio")
    first = chosen[0]
    note = (
        f"{first['preset']} shapes in bfloat16, all weights on disk and read past the page cache, "
        f"cache in memory, {first['prompt_len']} prompt tokens, {first['gen_len']} generated, "
        f"batches of {first['batch']}, 2 CPU cores; {_times(chosen)} each. Ratio: the block ÷ the "
        "larger of the two."
    )
    return f"{note}\n\n{table(header, rows)}"


def quality(records: list[dict]) -> str:
    first = records[0]
    rows = [
        (
            r["name"],
            f"{r['perplexity']:.2f}",
            f"{r['perplexity'] / first['perplexity'] - 1:+.2%}",
            f"{r['kl_divergence']:.4f}",
            f"{r['top1_agreement']:.1%}",
            f"{r['weight_nbytes'] / 1e6:.1f} MB",
            f"{r['cache_nbytes'] / 1e6:.1f} MB",
            f"{r['bytes_per_token']['disk to host'] / 1e3:.0f} kB",
            f"{r['bytes_per_token']['host to disk'] / 1e3:.1f} kB",
        )
        for r in records
    ]
    header = ("", "perplexity", "", "KL, nats", "same top token", "weights", "cache")
    header += ("read a token", "written a token")
    note = (
        f"The bundled model in float32 on its held-out text, windows of {first['context']} tokens "
        "of which the second half is scored; weights and cache on disk."
    )
    return f"{note}\n\n{table(header, rows)}"


def compressed_speed(records: list[dict]) -> str:
    chosen = [r for r in records if r["kind"] == "summary"]
    rows = [
        (
            f"{r['throttle'] / 1e9:.1f} GB/s" if r["throttle"] else "as it is",
            _shares(r),
            f"{r['decode_seconds']:.1f} s",
            f"{r['prefill_seconds']:.1f} s",
            f"{r['read_nbytes'] / 1e9:.1f} GB",
            f"{r['disk_bytes_per_second'] / 1e9:.1f} GB/s",
        )
        for r in chosen
    ]
    first = chosen[0]
    note = (
        f"{first['preset']} shapes in bfloat16, {first['prompt_len']} prompt tokens, "
        f"{first['gen_len']} generated, batches of {first['batch']}, 2 CPU cores, read past the "
        f"page cache; {_times(chosen)} each."
    )
    header = ("disk", "", "decode", "prefill", "read", "disk beside it")
    return f"{note}\n\n{table(header, rows)}"


def _ratio(predicted: float, measured: float | None) -> str:
    """What is measured as 0.01 may be anything from 0.005 to 0.015."""
    if measured is None:
        return ""
    if measured >= 0.1:
        return f"{predicted / measured:.2f}"
    return f"{predicted / (measured + 0.005):.1f} to {predicted / (measured - 0.005):.1f}"


def paper(records: list[dict]) -> str:
    rows = [
        (
            r["model"],
            r["what"],
            f"{r['block'][0]} x {r['block'][1]}",
            f"{r['predicted']['tokens_per_second']:.{3 if (r['measured'] or 1) < 0.1 else 2}f}",
            "" if r["measured"] is None else f"{r['measured']:.2f}",
            _ratio(r["predicted"]["tokens_per_second"], r["measured"]),
            r["bound"],
            f"{r['lower_bound_seconds'] / r['predicted']['seconds']:.0%}",
        )
        for r in sorted(records, key=lambda r: (float(r["model"][4:-1]), r["measured"] is not None))
    ]
    note = (
        "Predicted for the paper's policies on its T4, 512 prompt and 32 new tokens, beside the "
        "tokens/s that it measured."
    )
    header = ("model", "", "block", "predicted", "measured", "ratio", "bound by", "bound ÷ time")
    return f"{note}\n\n{table(header, rows)}"


def resident(records: list[dict]) -> str:
    near = sum(abs(r["planned_bytes"] / r["peak_bytes"] - 1) <= 0.1 for r in records)
    rows = [
        (
            r["model"],
            r["case"],
            f"{r['block'][0]} x {r['block'][1]}",
            f"{r['placed_bytes'] / 1e6:.0f} MB",
            f"{r['planned_bytes'] / 1e6:.0f} MB",
            f"{r['peak_bytes'] / 1e6:.0f} MB",
            f"{r['planned_bytes'] / r['peak_bytes']:.2f}",
        )
        for r in records
    ]
    note = (
        "Resident memory of a process that runs a block in float32, as planned before and at its "
        "highest by the kernel's count (`VmHWM`), with Python, its libraries and compiled "
        "programs, without pages of the weights' files; and of that what weights, cache, hidden "
        "states and buffers are planned to take. A process for each, disk read past the page "
        f"cache. Within 10%: {near} of {len(records)}."
    )
    header = ("model", "policy", "block", "placed", "planned", "peak", "planned ÷ peak")
    return f"{note}\n\n{table(header, rows)}"


def predict(records: list[dict]) -> str:
    old = [r for r in records if not r.get("new")]
    first = (
        f"Blocks on 2 CPU cores in bfloat16, predicted from a profile made before and measured "
        f"(medians of at least {min(r.get('repeat', 1) for r in old)} runs after one that "
        f"compiles). {_nearness(old)}"
    )
    parts = [first, _predicted_beside(old)]
    new = [r for r in records if r.get("new")]
    if new:
        parts.append(
            "Combinations that were added later to see whether the model holds for them, one run "
            f"after one that compiles, with Python {new[0]['python']}. {_nearness(new)}"
        )
        parts.append(_predicted_beside(new))
    return "\n\n".join(parts)


def _nearness(records: list[dict]) -> str:
    ratios = [r["predicted_seconds"] / r["measured_seconds"] for r in records]
    near, nearer = (sum(abs(ratio - 1) <= most for ratio in ratios) for most in (0.25, 0.1))
    return f"Within 25%: {near} of {len(ratios)}; within 10%: {nearer}."


def _predicted_beside(records: list[dict]) -> str:
    rows = [
        (
            r["preset"].partition("/")[2],
            r["policy"],
            r["order"],
            f"{r['throttle'] / 1e9:.1f} GB/s" if r["throttle"] else "as it is",
            f"{r['predicted_seconds']:.2f} s",
            f"{r['measured_seconds']:.2f} s",
            f"{r['predicted_seconds'] / r['measured_seconds']:.2f}",
        )
        for r in records
    ]
    header = (
        "model",
        "policy",
        "schedule",
        "disk of the weights",
        "predicted",
        "measured",
        "ratio",
    )
    return table(header, rows)


def auto(records: list[dict]) -> str:
    rows = [
        (
            r["preset"].partition("/")[2],
            f"{r['prompt_len']} + {r['gen_len']}",
            str(r["requests"]),
            f"{r['memory'] / 1e9:.2f} GB",
            f"{r['auto']['tokens_per_second']:.1f}",
            r["auto"]["policy"],
            f"{r['best']['tokens_per_second']:.1f}",
            r["best"]["policy"],
            str(r["tried"]),
            f"{r['auto']['tokens_per_second'] / r['best']['tokens_per_second']:.2f}",
        )
        for r in records
    ]
    note = (
        "Tokens/s of policy auto beside the best of a sweep of policies that fit the same memory, "
        "measured in one go on 2 CPU cores in bfloat16."
    )
    header = ("model", "tokens", "requests", "memory", "auto", "", "best of sweep", "", "tried")
    return f"{note}\n\n{table((*header, 'auto ÷ best'), rows)}"


def search_grid(records: list[dict]) -> str:
    """Of cases that something is known to fit; of each that auto does not win, both policies."""
    known = sorted((r for r in records if r["ratio"] is not None), key=lambda r: r["ratio"])
    ratios = [r["ratio"] for r in known]
    below = [r for r in known if r["ratio"] < 1]
    note = (
        f"What policy auto is predicted to reach, over the best of a grid and its neighbours: "
        f"{len(known)} cases, worst {ratios[0]:.3f}, median {statistics.median(ratios):.3f}, "
        f"{len(below)} below 1."
    )
    if not below:
        return note
    note += (
        " Those, with the shares on device / host / disk of weights (w), cache (c), hidden states "
        "(h) and experts (e); *: attention on the host."
    )
    rows = [
        (
            r["model"].rpartition("/")[2],
            r["machine"],
            f"{r['prompt_len']} + {r['gen_len']}",
            f"{r['auto']['tokens_per_second']:.3g}",
            _placed(r["auto"]["policy"]),
            f"{r['best']['tokens_per_second']:.3g}",
            _placed(r["best"]["policy"]),
            f"{r['ratio']:.4f}",
        )
        for r in below
    ]
    header = ("model", "machine", "tokens", "auto", "", "best of the grid", "", "auto ÷ best")
    return f"{note}\n\n{table(header, rows)}"


def _placed(policy: dict) -> str:
    """A policy's block, and where things are that are not on the device."""
    shape = f"{policy.get('device_batch_size', 8)} x {policy.get('num_device_batches', 4)}"
    parts = [shape + "*" * policy.get("host_attention", False)]
    for kind in ("weights", "cache", "hidden", "experts"):
        if kind in policy:
            parts.append(f"{kind[0]} " + "/".join(f"{n:g}" for n in policy[kind].values()))
    return ", ".join(parts)


def stages(records: list[dict]) -> str:
    on_paper = [
        (
            r["model"],
            f"{r['block'][0]} x {r['block'][1]}",
            f"{r['tokens_per_second']:.3g}",
            f"{r['measured']:g}",
            f"{r['tokens_per_second'] / r['measured']:.2f}",
            r["bound"],
        )
        for r in records
        if r["kind"] == "paper"
    ]
    first = "The paper's four T4s, a machine each: predicted beside the tokens/s that it measured."
    header = ("model", "block", "predicted", "measured", "ratio", "bound by")
    parts = [first, table(header, on_paper)]
    parts.append(
        "One to 64 such machines, 512 prompt and 32 new tokens; batches of 16, two for each stage, "
        "the rest as policy auto chooses. Bound: of what is busiest, by how much of the time it "
        "cannot but be busy."
    )
    scaled = [r for r in records if r["kind"] == "scaling"]
    alone = {r["model"]: r["tokens_per_second"] for r in scaled if r["stages"] == 1}
    rows = [
        (
            r["model"],
            str(r["stages"]),
            f"{r['tokens_per_second']:.3g}",
            f"{r['tokens_per_second'] / alone[r['model']]:.1f}",
            _thirds(r["weights"]),
            _thirds(r["cache"]),
            f"{r['bound']}, {r['bound_over_time']:.0%}",
        )
        for r in scaled
    ]
    header = ("model", "stages", "tokens/s", "times one", "weights", "cache", "bound by")
    return "\n\n".join([*parts, table(header, rows)])


def _thirds(shares: list[float]) -> str:
    return " / ".join(f"{share:.0f}" for share in shares)


def peers(records: list[dict]) -> str:
    return peer_tables.peers(records, table)


TARGETS: dict[str, dict[str, Callable[[list[dict]], str]]] = {
    "README.md": {
        "peers": peers,
        "refill": refill,
        "offload": offload,
        "stream_weights": streaming,
        "memory": memory,
        "long_prompt": long_prompt,
        "startup": startup,
    },
    "docs/jobs.md": {"jobs": jobs},
    "docs/throughput.md": {"growth": growth},
    "docs/experts.md": {"experts": experts, "experts_read": experts_read, "published": published},
    "docs/scaling.md": {"stages": stages},
    "docs/planning.md": {
        "paper": paper,
        "predict": predict,
        "auto": auto,
        "search_grid": search_grid,
        "resident": resident,
    },
    "docs/compression.md": {"quality": quality, "compressed": compressed_speed},
}


def updated(target: str, results: Path) -> str:
    """The text of ``target`` with its tables made anew."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    parts = []
    for name, make in TARGETS[target].items():
        chosen = [r for r in records if r["benchmark"] == name]
        if chosen:
            parts.append(make(chosen))
    tables = "\n\n".join(parts)
    text = (ROOT / target).read_text(encoding="utf-8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text, flags=re.DOTALL)


def main() -> None:
    stale = []
    for target in TARGETS:
        text = updated(target, ROOT / "benchmarks" / "results.jsonl")
        if "--check" not in sys.argv:
            (ROOT / target).write_text(text, encoding="utf-8")
        elif text != (ROOT / target).read_text(encoding="utf-8"):
            stale.append(target)
    sys.exit(f"{', '.join(stale)}: run python benchmarks/tables.py" if stale else 0)


if __name__ == "__main__":
    main()
