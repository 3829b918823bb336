"""Compiled programs of this process: count them, and release them before they use too many memory maps."""

from pathlib import Path

import jax


class _CompileCount:
    """The number of functions that JAX has compiled in this process."""

    def __init__(self):
        self.n = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_) -> None:
        self.n += event == "/jax/core/compile/backend_compile_duration"


_compiled = _CompileCount()


def compilations() -> int:
    """Functions compiled in this process so far, by JAX's events, which include reads from the compilation cache."""
    return _compiled.n


def memory_maps() -> int:
    """The number of memory maps of this process; 0 on systems other than Linux."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def map_limit() -> int:
    """The number of memory maps that Linux allows a process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return 65530


_checked_at = 0  # compilations at the last count of maps
_other_maps = 0  # maps left after the last release of programs: weights, libraries, threads


def limit_programs() -> None:
    """Release all compiled programs if their memory maps take half of those available to this process.

    On CPUs XLA keeps up to a few hundred maps per program, and when Linux refuses another, LLVM crashes the process
    with a segmentation fault. JAX never releases a program, and the ladders of shapes allow thousands. So callers call
    this between batches, where a new shape may be compiled. A program needed later is compiled again, or read from the
    compilation cache. On TPUs and GPUs programs hold almost no maps, and are kept.
    """
    global _checked_at, _other_maps
    if _compiled.n == _checked_at:
        return
    _checked_at = _compiled.n
    if memory_maps() > (map_limit() + _other_maps) / 2:
        jax.clear_caches()
        _other_maps = memory_maps()
