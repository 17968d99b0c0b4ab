"""Makes the README's tables from ``benchmarks/results.jsonl``.

python benchmarks/tables.py           # rewrites the tables in README.md
python benchmarks/tables.py --check   # exits with 1 if they are not up to date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

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
    note = (
        f"A decode step with all weights on disk, against computing alone and reading alone "
        f"({first['cores']} CPU cores, jax {first['jax']}, side by side, medians of at least "
        f"{min(r['repeats'] for r in records)} runs). Ratio: streamed ÷ the larger of the two."
    )
    header = ("model", "page cache", "compute alone", "read alone", "streamed", "ratio")
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


def render(results: Path) -> str:
    records = [json.loads(line) for line in results.read_text().splitlines()]
    makers = {"stream_weights": streaming, "memory": memory, "startup": startup}
    parts = []
    for name, make in makers.items():
        chosen = [r for r in records if r["benchmark"] == name]
        if chosen:
            parts.append(make(chosen))
    return "\n\n".join(parts)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    tables = render(ROOT / "benchmarks" / "results.jsonl")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    updated = re.sub(pattern, lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text, flags=re.DOTALL)
    if "--check" in sys.argv:
        sys.exit(updated != text and "README.md: run python benchmarks/tables.py")
    readme.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
