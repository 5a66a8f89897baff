"""Commands in processes of their own that start at once.

A process that imports PyTorch and transformers needs five seconds of a core before its first step. These processes are
forked from a server that has imported them and has done nothing else. They run the real command from there on, but for
one thing: Python does not tear down a forked process's interpreter. So some tests start real interpreters all the same.
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

import torch
from conftest import ROOT

TRAIN = ROOT / "train_accelerate.py"
SERVER = multiprocessing.get_context("forkserver")
# A module that is missing here only makes the tests slower. Ours are found where pytest is started from the root.
SERVER.set_forkserver_preload(
    [
        "torch.distributed.run",
        "torch.utils.tensorboard",
        "accelerate.commands.launch",
        "datasets",
        "sklearn.datasets",
        "modeling_ride_bf",
        "data",
        "ride_bf.training.setup",
        "train_accelerate",
    ]
)


def torchrun(processes, *command):
    """A command of torchrun, which forks its processes from its own."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return (*launcher, "--start_method", "fork", "--run_path", *command)


class Command:
    """`python SCRIPT.py ...` or `python -m MODULE ...` in a session that holds all the processes it starts.

    `command` is the path of the script or the name of the module, and then its arguments; `environment` is added to
    that of pytest. Launchers of one run, on several machines, share a barrier, `together`.
    """

    def __init__(self, *command, folder=ROOT, together=None, **environment):
        self._output, output = SERVER.Pipe(duplex=False)
        arguments = ([str(word) for word in command], folder, environment, output, together)
        self._together = together  # its semaphores end with the last reference here
        self._process = SERVER.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        output.close()
        atexit.register(self.signal, signal.SIGKILL)  # a test that fails leaves nothing behind

    def poll(self):
        """The exit code, -N after signal N; None while the first process runs."""
        return self._process.exitcode

    def signal(self, number):
        """Sends a signal to all processes of the session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait_until(self, reached, timeout=120):
        """Waits until `reached()`. Raises AssertionError if the command ends, or `timeout` seconds pass, before."""
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.poll() is None, self.finish()[1]
            assert time.monotonic() < deadline, f"not reached in {timeout} s"
            time.sleep(0.005)

    def finish(self, timeout=240):
        """Waits until the last process of the session has ended. Returns the exit code and what was printed."""
        deadline = time.monotonic() + timeout
        printed = b""
        while wait([self._output], max(0, deadline - time.monotonic())):
            some = os.read(self._output.fileno(), 2**16)
            if not some:
                self._process.join()
                self._output.close()
                atexit.unregister(self.signal)  # the number may be another process's from now on
                return self.poll(), printed.decode()
            printed += some
        raise AssertionError(f"still running after {timeout} s: {printed.decode()}")


def run(*command, **options):
    """Runs a command that must succeed. Returns what it printed."""
    code, printed = Command(*command, **options).finish()
    assert code == 0, printed[-3000:]
    return printed


def _renew_thread_pool():
    """Makes PyTorch replace the pool of threads that a fork does not copy, while one thread alone can ask for it.

    Under FSDP2, autograd starts several threads. In a forked process, two of them may ask at once, and then one finds
    no pool: "Invalid thread pool!" aborts the process. Processes that are not forked cannot get there.
    """
    torch.set_num_threads(torch.get_num_threads())


def _let_none_begin_before_all_are_forked(together):
    """Makes the processes of a launcher wait until it has forked the last of them, and so have those of `together`.

    A launcher keeps the store of the run in a thread, which looks up the name of each process that connects and locks
    glibc's resolver as it does. A process that is forked in that moment inherits the lock, and nobody opens it: its
    first look at a name takes for ever. A launcher that starts new interpreters, as it does for users, is free of this.
    """
    start_processes = torch.multiprocessing.start_processes

    def start_together(fn, *args, **options):
        gate, key = os.pipe()

        def wait_and_run(*arguments):
            os.close(key)
            os.read(gate, 1)  # returns when the launcher, which alone still has the key, closes it
            os.close(gate)
            return fn(*arguments)

        processes = start_processes(wait_and_run, *args, **options)
        if together is not None:
            together.wait(60)
        os.close(key)
        os.close(gate)
        return processes

    torch.multiprocessing.start_processes = start_together


def _run(command, folder, environment, output, together):
    os.setsid()
    _let_none_begin_before_all_are_forked(together)
    os.register_at_fork(after_in_child=_renew_thread_pool)
    _renew_thread_pool()
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        sys.modules.pop(command[0], None)  # else runpy warns that it was imported before
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
