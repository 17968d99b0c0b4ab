"""The package stands alone: it neither needs nor loads JAX, the others, or what draws."""

import subprocess
import sys
from pathlib import Path

import scheduling

ROOT = Path(scheduling.__file__).parents[1]
CODE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jax", "jaxlib", "flexgen_jax", "storage", "tensorstore"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import scheduling

workload = scheduling.Workload(num_steps=2, num_layers=3, num_batches=2)
for schedule in scheduling.SCHEDULES.values():
    scheduling.validate(schedule(workload), workload)
import scheduling.plot
print(*sorted({"matplotlib", "scipy", "jax"} & set(sys.modules)), "done")
"""


def test_it_works_where_jax_cannot_be_imported_and_loads_nothing_heavy():
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["done"]


def test_public_names():
    assert sorted(scheduling.__all__) == sorted(set(scheduling.__all__))
    for name in scheduling.__all__:
        assert hasattr(scheduling, name)
