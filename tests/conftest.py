"""Eight emulated devices for all tests, which share compiled programs; the order of tests; fixtures.

Functions and constants that tests share are in `helpers.py`, `training.py` and `torch_models.py`.
"""

import atexit
import importlib.metadata
import os
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks for a bucket's type through gRPC, which no test serves
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the same for pytest's workers, and for commands that tests run
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Most of the time goes into compiling programs that run once, so XLA optimizes little, as in JAX's own tests: the step
# of a tiny model compiles in a third of the time. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests run what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O0")  # TPU programs too: same FLOPs and traffic, memory to 2 %
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # newer releases have no such choice
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import gc
import importlib.util

import jax
import pytest

from llava_jax.aot.programs import map_limit, memory_maps
from llava_jax.console import run_main

pytest.register_assert_rewrite("helpers", "training", "torch_models")

# The parity tests run the PyTorch models of transformers; where torch has no CPU build they are not collected.
HAVE_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore_glob = [] if HAVE_TORCH else ["parity/*"]


def pytest_collection_modifyitems(items):
    """Last what loads the compiler for TPUs: JAX's profiler crashes in a process that has it but no TPU."""
    items.sort(key=lambda item: item.get_closest_marker("tpu_compile") is not None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, a module's tests are run by one worker, which compiles their programs once; those of modules that have
    some for TPUs are given out one by one, in the order above."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = nodeid.partition("::")[0]
            return nodeid if "tpu_compile" in (config.rootpath / module).read_text() else module

    config.option.loadscopereorder = False
    return ByModule(config, log)


def pytest_report_header(config):
    return f"jax {jax.__version__}, {len(jax.devices())} devices" + (
        "" if HAVE_TORCH else "; no torch: parity/ left out"
    )


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
    """After modules compiled programs are released if there are many: on CPUs each keeps some hundred memory maps, of
    which Linux allows a process 65,530, and the suite in one process would need more."""
    yield
    if memory_maps() > map_limit() / 4:
        jax.clear_caches()
        gc.collect()  # executables that the module's own fixtures held


@pytest.fixture(autouse=True)
def _libtpu_knows_its_flags(request, monkeypatch):
    """It reads XLA's flags when it is loaded, and ends the process at one that it does not know."""
    if request.node.get_closest_marker("tpu_compile"):
        monkeypatch.delenv("XLA_FLAGS")


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run a command's `main` as `python -m` would: (exit status, standard output, standard error)."""

    def run(main, *args):
        monkeypatch.setattr("sys.argv", ["prog", *map(str, args)])
        monkeypatch.setattr("llava_jax.console._end_at_once", sys.exit)  # it would end the tests as well
        with pytest.raises(SystemExit) as stopped:
            run_main(main)
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run
