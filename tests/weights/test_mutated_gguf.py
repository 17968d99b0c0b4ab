"""Two thousand mutated headers of GGUF."""

import re

import numpy as np
import pytest

from flexgen_jax.weights.gguf_file import GGUFFile
from flexgen_jax.weights.tensor_file import SourceError

gguf = pytest.importorskip("gguf")

STRANGE = [b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", (2**40).to_bytes(8, "little"), b"../../x"]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """All kinds of fields, and a tensor of each kind of place; small, so that reading is quick."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_token_types([3, 1, 1])
    writer.add_chat_template("{{ x }}")
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((3, 32)).astype(np.float32))
    blocks = rng.integers(0, 256, (2, 18), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_mutated_headers(content, tmp_path):
    """Each is read, or refused in one line; and what is read lies inside the file."""
    rng = np.random.default_rng(7)
    end = content.index(b"blk.0.attn_q.weight") + 60
    file, outcomes = tmp_path / "mutant.gguf", {True: 0, False: 0}
    for number in range(2000):
        mutant = bytearray(content)
        for _ in range(1 + number % 3):
            at = int(rng.integers(4, end))
            if number % 2:
                mutant[at] = int(rng.integers(256))
            else:
                piece = STRANGE[int(rng.integers(len(STRANGE)))]
                mutant[at : at + len(piece)] = piece
        file.write_bytes(mutant if number % 10 else mutant[: int(rng.integers(len(content)))])
        said = ""
        try:
            found = GGUFFile(file)
        except SourceError as error:
            said = str(error)
        if said:
            assert re.search(r"mutant\.gguf [^\n]*$", said)
        else:
            size = file.stat().st_size
            assert all(0 <= t.offset <= size - t.nbytes for t in found.tensors.values())
        outcomes[bool(said)] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_counts_that_would_take_for_ever(content, tmp_path):
    """Which the package ``gguf`` would go through, past the end of the file."""
    at = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    file = tmp_path / "mutant.gguf"
    for count, said in ((2**40, "claims to have"), (2**22, "in the midst of its header")):
        file.write_bytes(content[:at] + count.to_bytes(8, "little") + content[at + 8 :])
        with pytest.raises(SourceError, match=said):
            GGUFFile(file)
