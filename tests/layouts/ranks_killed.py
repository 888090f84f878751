"""Run on several ranks: a training run whose last rank dies in the middle of writing its second checkpoint.

ranks_killed.py WORLD OUT
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from iomm.checkpoint import saver
from iomm.training.train import train
from tests.layouts.cases import KILLED, KILLED_AT


def die_while_writing(step: int, items: int) -> None:
    """Kill this process when it has written so many tensors of the checkpoint of `step`."""
    write, write_item, left = saver._Save.write, saver.filesystem_async._write_item, items

    def write_and_die(self: Any) -> None:
        if self._info["step"] == step:
            saver.filesystem_async._write_item = count_and_die
        write(self)

    def count_and_die(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_item(*arguments, **options)

    saver._Save.write = write_and_die  # type: ignore[method-assign]


def main() -> None:
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    if int(os.environ["RANK"]) == KILLED.ranks - 1:
        die_while_writing(KILLED_AT, items=3)
    train(KILLED.config(world, out))


if __name__ == "__main__":
    main()
