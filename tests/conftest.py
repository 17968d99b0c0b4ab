"""Every test runs with shapes and dtypes checked, and with JAX's strict dtype promotion."""

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

# A shell that runs the tests in the background has Ctrl-C ignored, and some of them send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile a lot and compute little: programs that are made quickly, here and in processes that
# tests start. What bits come of programs as users have them is asked with the fixture `optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# No test may touch the user's own cache of converted models.
os.environ["FLEXGEN_JAX_CACHE"] = "/nonexistent/flexgen-jax-tests-must-pass-offload-dir"

# Nor is any to measure the machine, unless it asks for that.
os.environ["FLEXGEN_JAX_PROFILE"] = "off"

# Programs are kept for this run of the tests only: the same ones are asked for again and again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["FLEXGEN_JAX_PROGRAMS"] = tempfile.mkdtemp(prefix="flexgen-jax-tests-programs-")
_PROGRAMS = Path(os.environ["FLEXGEN_JAX_PROGRAMS"])

# Two runs of a job are the same job: what they answer has no clock in it.
os.environ["SOURCE_DATE_EPOCH"] = "1700000000"

from jaxtyping import install_import_hook

install_import_hook(
    [
        "flexgen_jax.models.attention",
        "flexgen_jax.models.decoding",
        "flexgen_jax.models.layers",
        "flexgen_jax.models.positions",
        "flexgen_jax.models.kv_cache",
        "flexgen_jax.engine.kernels",
        "flexgen_jax.engine.sampling",
    ],
    "beartype.beartype",
)

import jax
import pytest
from hypothesis import settings

from flexgen_jax.machine.kept_programs import keep_programs
from storage.memory import give_back

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 4)  # for pipeline stages

# Workers share theirs without limit. With one, JAX looks through all of them for each new one, half
# a second where there are 6,000, in which nobody else gets any. Processes that tests start have the
# limit of every user; so they share others, which are few.
os.environ["FLEXGEN_JAX_PROGRAMS"] = str(_PROGRAMS / "workers")
keep_programs()
jax.config.update("jax_compilation_cache_max_size", -1)
os.environ["FLEXGEN_JAX_PROGRAMS"] = str(_PROGRAMS / "started")


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


# Machines are shared and noisy: what matters is that the property holds, not how fast it is shown.
settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")


# Compiled programs are kept for the tests that follow, up to so many bytes of a process.
MOST_RESIDENT = 1_000_000_000


@pytest.fixture(autouse=True)
def _programs_do_not_pile_up():
    """A worker that runs many files would hold the programs of all of them."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * 4096 > MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()
        give_back()


_QUICKLY = jax.config.read("jax_disable_most_optimizations")


@pytest.fixture
def optimised():
    """Programs as users have them."""


@pytest.fixture(autouse=True)
def _programs_are_of_one_kind(request):
    """JAX does not tell them apart. Tests that follow one another and want the same share them."""
    quickly = _QUICKLY and "optimised" not in request.fixturenames
    if jax.config.read("jax_disable_most_optimizations") != quickly:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(scope="session")
def chatting_model(tmp_path_factory):
    """The bundled model, as a directory that has a chat template."""
    directory = tmp_path_factory.mktemp("model") / "chatting"
    demo = Path(__file__).parents[1] / "flexgen_jax" / "demo_model"
    shutil.copytree(demo, directory)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def _no_thread_left():
    """An executor that leaks a stream's thread fails the test that leaked it."""
    import threading

    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("flexgen-")]
    assert not left, f"threads left behind: {left}"


@pytest.fixture(scope="session")
def allowing():
    """The memory to allow by name so that policy auto has some bytes to place."""
    from flexgen_jax.planning.auto import PLAN_ERROR
    from scheduling.hardware import RUNTIME_MEMORY

    return lambda nbytes: round((nbytes + RUNTIME_MEMORY) / (1 - PLAN_ERROR))
