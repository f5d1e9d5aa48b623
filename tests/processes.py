"""Commands in copies of this process, which has imported everything already: they start at once, and may be killed."""

import io
import os
import resource
import signal
import sys

import torch

from command import run_command

SIGNALS = {signal.SIGINT, signal.SIGTERM}


def fork(work):
    """Run work() as a command in a copy of this process. Returns its process id and the file that gets its stderr."""
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the command is ready for them
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(writing)
        return child, open(reading, encoding="utf-8")
    code = 99
    try:
        os.close(reading)
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.stdout = io.StringIO()
        torch.set_num_threads(1)  # OpenMP's threads stayed in the parent, and a copy would wait for them for ever
        run_command(lambda: ready(work))
        code = 0
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def ready(work):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    work()


def end(child, stderr):
    """(exit code, stderr) of a forked command. The code is that of subprocess: negative for a signal."""
    with stderr:
        text = stderr.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def limited(work, nbytes):
    """Run work() where no file can become larger than this, which is like a full disk. Returns as `end` does."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        work()

    return end(*fork(run))


def command(main, *args):
    """A function that runs a command's main with these arguments."""

    def run():
        sys.argv = [main.__module__, *map(str, args)]
        main()

    return run
