"""Two thousand mutated headers of safetensors."""

import json
from pathlib import Path

import numpy as np

from flexgen_jax.weights.safetensors_file import SafetensorsFile
from flexgen_jax.weights.tensor_file import SourceError

GOLDEN = Path(__file__).parent.parent / "goldens" / "pre_norm" / "model.safetensors"
STRANGE = ["-1", "1e400", "[]", "{}", "null", '"../../x"', "18446744073709551615", "[0, 1e30]"]


def test_mutated_headers(tmp_path):
    """Each is read, or refused in one line; and what is read lies inside the file."""
    content, rng = GOLDEN.read_bytes(), np.random.default_rng(11)
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    file, outcomes = tmp_path / "mutant.safetensors", {"read": 0, "refused": 0}
    for number in range(2000):
        mutant = bytearray(header)
        at = int(rng.integers(len(header)))
        if number % 4 == 0:
            mutant[at] ^= 1 << int(rng.integers(8))
        elif number % 4 == 1:  # a digit becomes another one
            places = [i for i, byte in enumerate(mutant) if chr(byte).isdigit()]
            mutant[places[int(rng.integers(len(places)))]] = int(rng.integers(48, 58))
        elif number % 4 == 2:
            values = json.loads(header)
            keys = [key for key in values if key != "__metadata__"]
            entry = values[keys[int(rng.integers(len(keys)))]]
            field = ("dtype", "shape", "data_offsets")[int(rng.integers(3))]
            entry[field] = json.loads(STRANGE[int(rng.integers(len(STRANGE)))])
            mutant = bytearray(json.dumps(values).encode())
        else:
            del mutant[at : at + int(rng.integers(1, 40))]
        said = (0, 2**40, 2**64 - 1, *[len(mutant)] * 3)[int(rng.integers(6))]
        file.write_bytes(said.to_bytes(8, "little") + mutant + data)
        refusal = ""
        try:
            found = SafetensorsFile(file)
        except SourceError as error:
            refusal = str(error)
        if refusal:
            assert "mutant.safetensors" in refusal
            assert "\n" not in refusal
            outcomes["refused"] += 1
            continue
        for entry in found.entries.values():
            nbytes = int(np.prod(entry.shape, dtype=object)) * entry.dtype.itemsize
            assert 0 <= entry.offset <= file.stat().st_size - nbytes
        outcomes["read"] += 1
    assert min(outcomes.values()) > 5, outcomes
