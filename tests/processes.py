"""Real processes that start in no time: forked from a server that has imported torch and the scripts before.

Four seconds of imports is what a start of `python SCRIPT.py` costs; this one then runs the same
main(parse_args(...)).
"""
import atexit
import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from unittest import mock

import torch

TESTS = Path(__file__).resolve().parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["processes", "torch._dynamo", "mdeq_cifar", "mdeq_imagenet"])


@atexit.register
def kill_what_a_failed_test_left():
    """Python would wait for it, as for one of two processes whose other one has died."""
    for process in multiprocessing.active_children():
        process.kill()


class Forked(fork.Process):
    """work(*args) in a process group of its own, with these environment variables; it prints to `log`.

    Has what the tests use of subprocess.Popen: pid, poll, wait.
    """

    def __init__(self, log, work, *args, **environment):
        super().__init__()
        self.log, self.work, self.args, self.environment = str(log), work, args, environment
        self.start_method = multiprocessing.get_start_method()
        with mock.patch.dict(os.environ, ENVIRONMENT):      # of the server: the first start starts it, too
            self.start()

    def run(self):
        os.setsid()
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out, stream.fileno())
            stream.reconfigure(line_buffering=True)
        # of its own workers: not "forkserver"
        multiprocessing.set_start_method(self.start_method, force=True)
        os.environ.update(self.environment)
        torch.set_num_threads(1)
        self.work(*self.args)

    def poll(self):
        return self.exitcode

    def wait(self, timeout=120):
        self.join(timeout)
        assert self.exitcode is not None, f"still runs after {timeout} s"
        return self.exitcode

    def finish(self):
        """Waits for the end, which must be a good one."""
        assert self.wait() == 0, Path(self.log).read_text()[-3000:]


def pair(log, work, *args):
    """work(*args) in two processes, which find of torchrun's environment what init_process needs."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Forked(log, work, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                   LOCAL_WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(2)]


def script(module, *flags):
    """The work of `python MODULE.py FLAGS`."""
    module = importlib.import_module(module)
    module.main(module.parse_args([str(flag) for flag in flags]))
