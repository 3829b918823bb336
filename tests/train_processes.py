"""Several processes of one run on this machine, each with its own emulated devices.

    python tests/train_processes.py --processes 2 --devices 4 -- --preset v1.5-pretrain --checkpoint DIR ...

Everything behind `--` goes to `python -m train`. `--kill I` ends process I by SIGKILL after the third step.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(flags: list[str], *, processes: int = 2, devices: int = 4, environment: dict | None = None, **popen):
    """The processes, in their order (`subprocess.Popen`); they find each other at a port that is free now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is most of what these runs do
    xla_flags = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    )  # the last counts
    environment = quick | os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags} | (environment or {})
    return [
        subprocess.Popen(
            [sys.executable, "-m", "train", *map(str, flags), "--coordinator", f"localhost:{port}",
             "--process-id", str(i), "--processes", str(processes)],
            cwd=ROOT, env=environment, **popen,
        )
        for i in range(processes)
    ]  # fmt: skip


def wait_for_steps(output: Path, steps: int, process: subprocess.Popen) -> None:
    """Wait until the run has logged so many steps, or its process has ended."""
    metrics = output / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        time.sleep(0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description="Several processes of one run on this machine.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--kill", type=int, metavar="I")
    args, flags = parser.parse_known_args()
    flags = flags[1:] if flags[:1] == ["--"] else flags
    started = start(flags, processes=args.processes, devices=args.devices)
    if args.kill is not None:
        wait_for_steps(Path(flags[flags.index("--output") + 1]), 3, started[0])
        started[args.kill].send_signal(signal.SIGKILL)
        begun = time.monotonic()
    codes = [process.wait() for process in started]
    if args.kill is not None:
        print(f"the others ended {time.monotonic() - begun:.1f} s after process {args.kill} was killed")
    print(f"exit statuses {codes}")
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main())
