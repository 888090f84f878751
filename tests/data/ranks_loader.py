"""One rank that loads and is killed: `python ranks_loader.py SHARDS FIRST MICRO RANK RANKS`.

It prints what each step shows, a line of JSON, and goes on when it is told so.
"""

import json
import sys

from tests.data.test_resume import open_loader, settings_for, steps_of


def main(shards: str, first: int, micro: int, rank: int, ranks: int) -> None:
    for step in steps_of(open_loader(settings_for(shards)), first, micro, rank, ranks):
        sys.stdout.write(json.dumps(step) + "\n")
        sys.stdout.flush()
        sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:]))
