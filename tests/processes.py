"""Runs in processes of their own: forks that are killed, and pairs that train together."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import rmfast
from rmfast.commands import main


class Killer:
    """A profile function: kills its process at so many calls (into C too) and returns.

    Only those in the ``watched`` files are counted.
    """

    def __init__(self, watched: Collection[str], at: int) -> None:
        self.watched, self.left = watched, at

    def __call__(self, frame, event, _) -> None:
        if frame.f_code.co_filename in self.watched:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(
    argv: list[str],
    watched: Collection[str],
    log: str | Path | None = None,
    at: int = 0,
    calls: int | None = None,
    first: Callable[[], None] | None = None,
) -> int:
    """A run of ``rmfast`` in another process, whose id is returned.

    Args:
        argv: of the command.
        watched: files whose calls are counted.
        log: file for what it says.
        at: kill it at so many calls.
        calls: pipe for the number of calls, when it is done.
        first: done in the fork before the command.
    """
    gc.freeze()  # what the fork inherits is not looked through for garbage
    child = os.fork()
    if child:
        return child
    file = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT, 0o600)
    if first is not None:
        first()
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    killer = Killer(watched, at)
    sys.setprofile(killer if at or calls is not None else None)
    code = main.main(argv)
    sys.setprofile(None)
    if calls is not None:
        os.write(calls, str(-killer.left).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def status(child: int) -> int:
    """Exit code, or the signal with a minus, as in ``subprocess``."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def launch(module: str, kinds: Collection[str], folder: Path) -> Path:
    """Run a test module's ``worker`` for each kind, in two processes; what they leave is there.

    They are forks of a process that has no threads yet: forks of others may hang.
    """
    alone(f"import processes; processes.in_pairs({module!r}, {list(kinds)!r}, {str(folder)!r})")
    return folder


def alone(code: str, *args: str | Path) -> None:
    """Run Python code in a new process that can import rmfast and the tests' helpers."""
    here, root = Path(__file__).parent, Path(rmfast.__file__).parent.parent
    path = os.pathsep.join([str(here), str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *args], env=env, check=True, timeout=600)


def leave() -> None:
    """End a worker, with all that it holds.

    To free DDP's reducer, the main thread waits, with the GIL, for gloo's thread, which may want
    the GIL to free a tensor: seen to hang, rarely.
    """
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_pairs(module: str, kinds: Collection[str], folder: str) -> None:
    import torch.multiprocessing as mp

    worker = importlib.import_module(module).worker
    gc.freeze()  # as above
    for kind in kinds:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        mp.start_processes(worker, (port, kind, folder), nprocs=2, start_method="fork")
