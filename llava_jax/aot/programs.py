"""The compiled programs of this process: how many there have been, and letting them go before there are too many."""

from pathlib import Path

import jax


class _CompileCount:
    """How many functions JAX has compiled in this process."""

    def __init__(self):
        self.n = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_) -> None:
        self.n += event == "/jax/core/compile/backend_compile_duration"


_compiled = _CompileCount()


def compilations() -> int:
    """Functions compiled in this process so far, by JAX's own events; those read from the compilation cache count."""
    return _compiled.n


def memory_maps() -> int:
    """Memory maps of this process; 0 where the system is not Linux."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def map_limit() -> int:
    """Memory maps that Linux allows a process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return 65530


_checked = 0  # compilations when the maps were last counted
_others = 0  # maps that were left when programs were last released: weights, libraries, threads


def limit_programs() -> None:
    """Release all compiled programs if their memory maps fill half of the room that this process has for them.

    For CPUs XLA keeps up to some hundred maps a program, and where Linux refuses another, LLVM ends the process by a
    segmentation fault. JAX itself never releases a program, and the ladders that shapes are rounded up to allow
    thousands. So this is called where a new shape may be compiled, between batches. A program that is wanted again is
    compiled again, or read from the compilation cache. On TPUs and GPUs programs hold next to no maps, and stay.
    """
    global _checked, _others
    if _compiled.n == _checked:
        return
    _checked = _compiled.n
    if memory_maps() > (map_limit() + _others) / 2:
        jax.clear_caches()
        _others = memory_maps()
