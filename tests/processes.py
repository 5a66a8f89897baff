"""Commands in processes of their own, which start at once.

A process that imports PyTorch and transformers anew needs five seconds of a core before its first step. These are
forked from a server that has imported them, and has done nothing else. Everything after the imports is as in a shell.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing.connection import wait

SERVER = multiprocessing.get_context("forkserver")
# What is not preloaded is only slower. Our names are found from the root, where pytest is started.
SERVER.set_forkserver_preload(
    [
        "torch.distributed.run",
        "torch.utils.tensorboard",
        "accelerate.commands.launch",
        "datasets",
        "sklearn.datasets",
        "modeling_ride_bf",
        "data",
        "train_accelerate",
    ]
)
# torchrun's own processes: forked, not started, so that they need no imports either.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--start_method", "fork", "--run_path")


def _run(command, folder, environment, output):
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.chdir(folder)
    os.environ.update(environment)
    run, *sys.argv = map(str, (command[0], *command))
    if run.endswith(".py"):
        runpy.run_path(run, run_name="__main__")
    else:
        runpy.run_module(run, run_name="__main__", alter_sys=True)


class Command:
    """`python SCRIPT.py ...` or `python -m MODULE ...`, in a session with all the processes that it starts.

    `command` is the script's path or the module's name, and its arguments; `environment` comes on top of pytest's.
    """

    def __init__(self, *command, folder, **environment):
        self._output, output = SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=_run, args=(command, folder, environment, output))
        self._process.start()
        output.close()
        atexit.register(self.signal, signal.SIGKILL)

    def poll(self):
        """The exit code, None while it runs, -N after signal N."""
        return self._process.exitcode

    def signal(self, number):
        """Sends a signal to all its processes, if one is there still."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def communicate(self, timeout=120):
        """Waits until its last process has ended. Returns the exit code and what was printed."""
        deadline = time.monotonic() + timeout
        printed = b""
        while wait([self._output], max(0, deadline - time.monotonic())):
            some = os.read(self._output.fileno(), 2**16)
            if not some:
                self._process.join()
                return self.poll(), printed.decode()
            printed += some
        raise TimeoutError(f"still running after {timeout} s:\n{printed.decode()}")
