"""Checks that a doctor must survive."""

import os
import signal
import sys
import time

from storage.errors import InputError
from storage.finding import Finding, ok


def well() -> Finding:
    return ok(str(os.getpid()))


def hangs() -> Finding:
    sys.stdout.write("about to hang\n")
    while True:
        time.sleep(1000)


def killed() -> Finding:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def raises() -> Finding:
    raise RuntimeError("a library's error at http://me:secret@host\nwith details")


def explains() -> Finding:
    raise InputError("what it is; what to do")
