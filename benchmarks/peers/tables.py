"""The tables of ``compare_peers.py``'s records: medians over the repeats of a go."""

from __future__ import annotations

import statistics
from collections.abc import Callable

Record = dict
Table = Callable[[tuple[str, ...], list[tuple[str, ...]]], str]


def _tools(records: list[Record]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["tool"], r["label"]) for r in records))


def _of(records: list[Record], tool: tuple[str, str]) -> list[Record]:
    return [r for r in records if (r["tool"], r["label"]) == tool]


def _note(records: list[Record]) -> str:
    machine = next(r for r in records if r["kind"] == "machine")
    units = [name for name, there in (("AVX-512", "avx512"), ("AMX", "amx")) if machine[there]]
    runs = [r for r in records if r["kind"] == "run"]
    counts = {(r["workload"], r["tool"], r["label"], r["run"]): 0 for r in runs}
    for r in runs:
        counts[r["workload"], r["tool"], r["label"], r["run"]] += 1
    fewest = min(counts.values())
    times = "one run each" if fewest == 1 else f"medians of at least {fewest} runs"
    return f"{machine['cores']} CPU cores with {' and '.join(units) or 'AVX2'}, {times}"


def _reasons(records: list[Record]) -> str:
    """Of the tools that gave no figure, why not."""
    lines = []
    for tool in _tools([r for r in records if r["kind"] == "skipped"]):
        own = _of(records, tool)
        if not any(r["kind"] == "run" for r in own):
            reason = next(r["reason"] for r in own if r["kind"] == "skipped")
            lines.append(f"- {' '.join(tool)}: {reason.replace('|', '/')}")
    return "\n".join(["Not run:\n", *lines]) if lines else ""


def _questions(
    records: list[Record], agreement: dict[tuple[str, int], Record], table: Table
) -> str:
    rows = []
    for tool in _tools([r for r in records if r["kind"] == "run"]):
        own = [r for r in _of(records, tool) if r["kind"] == "run"]
        rates: dict[str, list[float]] = {}
        for r in own:
            rates.setdefault(r["run"], []).append(r["tokens_per_second"])
        best = max(rates, key=lambda run: statistics.median(rates[run]))
        chosen = next(r for r in own if r["run"] == best)
        same = agreement.get((chosen["answers_file"], chosen["questions"]))
        rows.append(
            (
                *tool,
                f"{statistics.median(rates[best]):.0f}",
                best.partition(" ")[0],
                f"{chosen['generated_tokens']:,}",
                f"{same['same']} of {same['of']}" if same else "",
                f"{max(r['peak_rss_nbytes'] for r in own) / 1e9:.1f} GB",
            )
        )
    rows.sort(key=lambda row: -float(row[2]))
    return table(("", "", "tokens/s", "rows", "tokens", "same answers", "peak memory"), rows)


def _decode(records: list[Record], lengths: str, batches: list[int], table: Table) -> str:
    """Tokens/s of decode steps alone, and of the whole, by batch."""
    prompt, _, new = lengths.partition(" + ")
    rows = []
    for tool in _tools([r for r in records if r["kind"] == "run"]):
        seconds: dict[str, list[float]] = {}
        for r in _of(records, tool):
            if r["kind"] == "run":
                seconds.setdefault(r["run"], []).append(r["seconds"])
        cells = []
        for batch in batches:
            whole = seconds.get(f"{batch} x {lengths}")
            first = seconds.get(f"{batch} x {prompt} + 1")
            if not whole or not first:
                cells.append("")
                continue
            total, prefill = statistics.median(whole), statistics.median(first)
            decode = batch * (int(new) - 1) / max(total - prefill, 1e-3)
            cells.append(f"{decode:.1f} ({batch * int(new) / total:.1f})")
        if any(cells):
            rows.append((*tool, *cells))
    return table(("", "", *(f"{batch} rows" for batch in batches)), rows)


def peers(records: list[Record], table: Table) -> str:
    """All workloads that ``records`` has."""
    parts = []
    agreement = {(r["answers_file"], r["of"]): r for r in records if r["kind"] == "agreement"}
    every = [r for r in records if r.get("workload") == "questions"]
    for count in sorted({r["questions"] for r in every}, reverse=True):
        asked = [r for r in every if r["questions"] == count]
        own = [r for r in records if r["kind"] == "machine" or r in asked]
        parts.append(
            f"SmolLM2-135M-Instruct answers {count} everyday questions, greedily, "
            f"up to its own ends or {asked[0]['max_tokens']} tokens; loading and compiling left "
            f"out ({_note(own)}). Same answers: as "
            "transformers' in float32, token for token. Ours and llama.cpp give the place of a "
            "finished request to the next; of each tool the best of the rows that were tried."
        )
        parts += [_questions(asked, agreement, table), _reasons(asked)]
    for model in dict.fromkeys(r["model"] for r in records if r.get("workload") == "batches"):
        mine = [r for r in records if r.get("workload") == "batches" and r["model"] == model]
        ran = [r["run"] for r in mine if r["kind"] == "run"]
        batches = sorted({int(run.partition(" ")[0]) for run in ran})
        for lengths in dict.fromkeys(run.partition(" x ")[2] for run in ran):
            if not lengths.endswith("+ 1"):
                own = [r for r in records if r["kind"] == "machine" or r in mine]
                parts.append(
                    f"{model} shapes with random weights in memory, {lengths} tokens: tokens/s of "
                    f"decode steps, in brackets of prefill and decode together ({_note(own)})."
                )
                parts.append(_decode(mine, lengths, batches, table))
        parts.append(_reasons(mine))
    parts.append(_limited([r for r in records if r.get("workload") == "memory"], table))
    return "\n\n".join(part for part in parts if part)


def _limited(records: list[Record], table: Table) -> str:
    rows = [
        (
            f"{r['limit_nbytes'] / 2**30:.2g} GiB",
            r["tool"],
            r["label"],
            r["run"],
            f"{r['tokens_per_second']:.2f}" if r["kind"] == "run" else r["reason"][:80],
            f"{r['read_nbytes'] / 1e9:.0f} GB" if "read_nbytes" in r else "",
        )
        for r in records
        if r["kind"] == "skipped" or not r["run"].endswith("+ 1")
    ]
    if not rows:
        return ""
    note = (
        f"{records[0]['model']} shapes with little memory left, page cache included, one run each; "
        "tokens/s of prefill and decode together."
    )
    return f"{note}\n\n{table(('memory', '', '', 'tokens', 'tokens/s', 'read'), rows)}"
