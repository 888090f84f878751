"""Images into training shards: `iomm shard make` by path.

python tools/make_shards.py photos/ -o shards/
python tools/make_shards.py part-*.parquet old-*.tar -o shards/ --caption-field text
"""

import sys
from collections.abc import Sequence

from iomm import cli


def main(argv: Sequence[str]) -> int:
    """The exit status of `iomm shard make`."""
    return cli.main(["shard", "make", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
