"""Eight emulated devices for all tests, which share compiled programs; golden data of the reference implementation
under `golden/`."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
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

import contextlib
import functools
import gc
import importlib.util
import json
import random
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

from infer.engine import Engine
from llava_jax.aot.programs import map_limit, memory_maps
from llava_jax.checkpoints import checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError
from llava_jax.data import images, splice
from llava_jax.data.prompts import encode_conversation
from llava_jax.data.templates import get_template
from llava_jax.sharding.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("v1-linear-llama", "v1.5-llama", "v1.6-mistral", "v1.6-spatial-llama")
QUESTION = "Is there any person in this photo?"

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


def user_environment() -> dict[str, str]:
    """For commands that are run as users run them: programs in full, on one device."""
    ours = ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def golden_json(name: str):
    return json.loads((GOLDEN / name).read_text())


@functools.cache
def one_device():
    return make_mesh({}, jax.devices()[:1])


@functools.cache
def load_golden(name: str):
    """A golden checkpoint read directly: (checkpoint, parameters on one device)."""
    found = checkpoint.open_checkpoint(GOLDEN / "checkpoints" / name)
    return found, found.load(one_device(), np.float32)


@functools.cache
def golden_engine(name: str) -> Engine:
    found, params = load_golden(name)
    return Engine(params, found.config, found.tokenizer, one_device())


def make_row(conversation, pictures, template: str, config: LlavaConfig, tokenizer) -> splice.Row:
    """A training row from a conversation and the paths of its pictures."""
    ids, labels = encode_conversation(conversation, get_template(template), tokenizer, config, images=len(pictures))
    opened = [images.open_image(path) for path in pictures]
    places = tuple(images.layout(image.size, config) for image in opened)
    tiles = tuple(images.tiles(image, place, config) for image, place in zip(opened, places, strict=True))
    return splice.Row(ids, places, tiles, labels)


def write_checkpoint(directory: Path, tensors: dict, like: str, **config_changes) -> Path:
    """A checkpoint directory: given tensors, a golden checkpoint's config and tokenizer."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / "checkpoints" / like).iterdir():
        if file.suffix in (".json", ".model") and not file.name.startswith("expected"):
            shutil.copy(file, directory)
    tower = directory / "vision_tower"  # its configuration, not its weights
    tower.mkdir(exist_ok=True)
    for file in (GOLDEN / "checkpoints" / like / "vision_tower").glob("*.json"):
        shutil.copy(file, tower)
    config = json.loads((directory / "config.json").read_text()) | config_changes
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / "model.safetensors")
    return directory


def golden_tensors(name: str, part: str = ".") -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(GOLDEN / "checkpoints" / name / part / "model.safetensors")


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run a command's `main` as `python -m` would: (exit status, standard output, standard error)."""

    def run(main, *args):
        from llava_jax.console import run_main

        monkeypatch.setattr("sys.argv", ["prog", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            run_main(main)
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@contextlib.contextmanager
def files_of_at_most(size: int):
    """While it lasts no file grows beyond so many bytes: what a full disk does, as anybody may have it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def damage(data: bytes, pick: random.Random) -> bytes:
    """A few bytes changed, put in or cut off."""
    data = bytearray(data)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at, what = pick.randrange(len(data)), pick.random()
        if what < 0.7:
            data[at] = pick.randrange(256)
        elif what < 0.85:
            data[at:at] = pick.randbytes(pick.randrange(9))
        else:
            del data[at : at + pick.choice([1, 8, len(data)])]
        if not data:
            return b""
    return bytes(data)


def read_damaged(File, whole: Path) -> tuple[int, int]:
    """Damage a file of tensors in 3000 ways: how often it is read, and how often refused in one line."""
    data, path, pick = whole.read_bytes(), whole.with_stem("damaged"), random.Random(0)
    read = refused = 0
    for _ in range(3000):
        path.write_bytes(damage(data, pick))
        try:
            file = File(path)
            for name, (dtype, shape, *_) in file.tensors.items():
                assert np.prod(shape) * dtype.itemsize <= path.stat().st_size
                file.read(name)
            read += 1
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    return read, refused
