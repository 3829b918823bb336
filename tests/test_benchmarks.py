"""A benchmark that is for accelerators runs on a small model, so that it runs where time is dear."""

import importlib.util
import sys

import jax
import pytest

from helpers import ROOT
from llava_jax import config as c
from llava_jax.data.splice import TEXT
from llava_jax.sharding.mesh import make_mesh
from train.config import PRESETS

BENCHMARKS = ROOT / "benchmarks"
CONFIG = PRESETS["v1.6-finetune"].replace(tune="lora", lora_rank=4, dtype="float32")


@pytest.fixture
def bench(monkeypatch):
    """`benchmarks/train.py`, whose name is a package's here."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    spec = importlib.util.spec_from_file_location("bench_train", BENCHMARKS / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_is_measured(bench, monkeypatch):
    monkeypatch.setattr(bench.devices, "matmul_peak", lambda dtype: 1e9)
    found = bench.measure(c.tiny(), CONFIG, rows=1, length=128, tiles=5, steps=1)
    assert 5 < found["loss"] < 8  # of 512 tokens that are alike: 6.2
    assert found["share"] == pytest.approx(found["model_flops"] / found["seconds"] / jax.device_count() / 1e9)
    assert found["layers"] == 2


def test_rows_are_full(bench):
    batch = bench.full_rows(c.tiny(), rows=2, length=128, tiles=5)
    assert batch.tiles.shape == (2, 5, 28, 28, 3)
    assert (batch.feature_rows[:, :80] >= 0).all() and (batch.feature_rows[:, 80:] == TEXT).all()
    assert batch.feature_rows.max() == 79


def test_as_many_layers_as_fit(bench, monkeypatch):
    """Those of a model with many for which there is as much memory as its step of four layers needs, and a byte."""
    model = bench.with_layers(c.tiny(), 40)
    asked = CONFIG.replace(tune="projector"), make_mesh({}, jax.devices()[:1]), 1, 128, 5
    assert bench.layers_that_fit(model, *asked) == 40  # a CPU does not say how much there is
    peaks, memory = [], bench.tpu.memory
    monkeypatch.setattr(bench.tpu, "memory", lambda compiled: peaks.append(memory(compiled)) or peaks[-1])
    monkeypatch.setattr(
        bench.devices,
        "memory_limit",
        lambda: 10**9 if len(peaks) < 2 else int(peaks[1].peak / bench.MEMORY_FRACTION) + 1,
    )
    assert bench.layers_that_fit(model, *asked) == 40
    assert bench.layers_that_fit(model, *asked) == 4
