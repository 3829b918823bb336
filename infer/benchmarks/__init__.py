"""The benchmarks that LLaVA's papers report: a module for each, scored as the reference scores it."""

import importlib
from collections.abc import Sequence

from infer.benchmarks.benchmark import Benchmark
from llava_jax.console import InputError, shorten

# By name: the module and the class, imported when it is asked for.
BENCHMARKS = {
    "vqav2": "vqav2.VQAv2",
    "vqav2-val": "vqav2.VQAv2Val",
    "gqa": "gqa.GQA",
    "vizwiz": "vizwiz.VizWiz",
    "vizwiz-val": "vizwiz.VizWizVal",
    "scienceqa": "scienceqa.ScienceQA",
    "scienceqa-img": "scienceqa.ScienceQAImages",
    "textvqa": "textvqa.TextVQA",
    "pope": "pope.POPE",
    "mme": "mme.MME",
    "mmbench": "mmbench.MMBench",
    "mmbench-cn": "mmbench.MMBenchCN",
    "seed": "seed.SeedBench",
    "seed-image": "seed.SeedImage",
    "llava-bench-in-the-wild": "llava_bench.LlavaBench",
    "mm-vet": "mm_vet.MMVet",
}
ALL = "all"


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      InputError: there is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {shorten(name)!r}: is not known; known: {', '.join(BENCHMARKS)}")
    module, _, kind = BENCHMARKS[name].partition(".")
    return getattr(importlib.import_module(f"infer.benchmarks.{module}"), kind)()


def find_benchmarks(names: str) -> list[Benchmark]:
    """The benchmarks of a list of names with commas, or `all`.

    Raises:
      InputError: a name is not known, or is there twice.
    """
    chosen: Sequence[str] = list(BENCHMARKS) if names == ALL else names.split(",")
    if len({*chosen}) < len(chosen):
        raise InputError(f"--benchmark {shorten(names)}: names a benchmark twice")
    return [find_benchmark(name) for name in chosen]
