"""The environment of processes that load a model: the worker's, the evaluator's, and what they say to their parent.

Importing anything of this package changes no environment: a parent makes that of its child, and a process that somebody
started by hand completes its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.language.say import spoken

ERROR_MARK = "onebase: error: "
"""What comes after it on stderr is for the person; the parent shows it as its own error."""
WATCH = "ONEBASE_DIE_WITH_RUNNER"
"""Set for a worker that is to end when its stdin does."""
LANGUAGE = "ONEBASE_LANG"
"""What a child tells a person is in this language: the one that its parent was asked for."""
QUIET = {
    # Nothing leaves this machine unasked, and libraries speak of errors alone.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
NUMPY = {
    # Its matrices are small here, and OpenBLAS's threads spin for each other: bootstraps took five times as long.
    "OPENBLAS_NUM_THREADS": "1",
}
EVERYWHERE = {
    **QUIET,
    **NUMPY,
    # Threads that wait do not spin: two cores would spin for each other.
    "OMP_WAIT_POLICY": "passive",
    # Seconds that torch's launcher of several processes waits for them after Ctrl-C. Left to itself it kills them after
    # 30, and a step before the checkpoint may take longer; a second Ctrl-C still kills at once.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600",
}
CPU_ENVIRONMENT = {
    # glibc keeps the large blocks that training frees and asks for again at every step; returning them to the kernel
    # makes a step 1.4 times as long (scripts/bench_malloc.py, 2 cores, AMD EPYC).
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
BUSY = 10
"""Percent of the processor in use by others, above which this is not the only thing that runs."""
GPU_ENVIRONMENT = {
    # Batches of unequal length leave holes in CUDA memory that no later batch fits; segments that grow leave none.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names under which torch takes the allocator's settings; with one of them set, they are the person's own."""


def make_environment() -> dict[str, str]:
    """Of a child that loads a model. What the person has set counts."""
    own = any(name in os.environ for name in ALLOCATORS)
    gpu = {} if own else GPU_ENVIRONMENT
    return {**EVERYWHERE, **(gpu if _has_gpu() else CPU_ENVIRONMENT), **os.environ, LANGUAGE: spoken()}


def spin_if_idle(count: int) -> dict[str, str]:
    """Threads that sleep between two products take long to wake. Where nothing else runs they look so often for work
    before they sleep; beside other work they would take the cores from it. It counts for more than OMP_WAIT_POLICY,
    which by now says passive whoever set it."""
    import psutil

    return {"GOMP_SPINCOUNT": str(count)} if psutil.cpu_percent(interval=0.5) < BUSY else {}


def complete_own(defaults: dict[str, str]) -> None:
    """For the main program of a process, before any library reads its environment."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the process as an error does, so that what was begun is ended and
    nothing temporary is left."""
    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        caught = []  # no other thread may set a handler

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: the second would cut the tidying short
        raise SystemExit(128 + number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
