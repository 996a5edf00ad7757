"""A server in a process of its own, for the tests that ask it."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def serving(*arguments, code=None):
    """The address of a server; `code`: what runs in place of the command line."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "refimpl", "serve", "--port", "0", *arguments))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line + process.stderr.read()
            yield found[0], process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=20)
