"""A child that hangs on input 0 and dies of input 1, to try the watchdog on. Imports nothing heavy."""

import faulthandler
import os
import signal
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace


def serve(pipe: Connection, _seed: int, _decode: str, _folder: str, errors: str) -> None:
    """In the place of `watch._serve`."""
    with open(errors, "wb", buffering=0) as said:
        faulthandler.enable(said)
        pipe.send("ready")
        while True:
            number = pipe.recv()
            if number == 0:
                wait_for_ever()
            if number == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            pipe.send(SimpleNamespace(number=number, died=None, grown=False))


def wait_for_ever() -> None:
    """Until the process is killed."""
    threading.Event().wait()
