"""OPT's logits are the same bits as before, where before was recorded for this machine."""

import json
import runpy
from pathlib import Path

import pytest

MAKE = runpy.run_path(str(Path(__file__).parent / "goldens" / "make_bits.py"))
KNOWN = json.loads(MAKE["FILE"].read_text(encoding="utf-8")).get(MAKE["platform"]())


@pytest.mark.skipif(KNOWN is None, reason="no bits were recorded on this version and processor")
@pytest.mark.parametrize("case", MAKE["CASES"])
@pytest.mark.usefixtures("optimised")
def test_the_logits_are_the_same_bits_as_before(case, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path))
    if case not in KNOWN:
        pytest.skip("not recorded on this version and processor")
    assert MAKE["digest"](case) == KNOWN[case]
