"""What a run needs, how long it takes and what it costs: `iomm plan` by path.

python tools/plan_run.py --preset b --gpus 64 --gpu h800 --layout auto --images 110e6
python tools/plan_run.py examples/configs/b_stage1.py --gpus 8 --mask-mode drop --cache vae
"""

import sys
from collections.abc import Sequence

from iomm import cli


def main(argv: Sequence[str]) -> int:
    """The exit status of `iomm plan`."""
    return cli.main(["plan", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
