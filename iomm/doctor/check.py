"""One line of what `iomm doctor` answers."""

from dataclasses import dataclass
from typing import Literal

INSTALL = "pip install -e ."
CUDA_EXTRA = "pip install -e '.[cuda]'"

Status = Literal["info", "ok", "no", "broken"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the answer."""

    section: str
    name: str
    status: Status  # "no": not usable here, which may be all right; "broken": stands in the way of a run
    detail: str
    fix: str = ""  # the command or the change that helps
