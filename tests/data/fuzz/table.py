"""Many inputs by kind: what became of them, and which are not accounted for."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.data.fuzz import kinds
from tests.data.fuzz.trial import OUTCOMES
from tests.data.fuzz.watch import Ran

ROUTES = ("make", "index", "load", "load by index", "dali")


@dataclass
class Table:
    """Counts by kind; `bad`: what is not accounted for."""

    seed: int
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # kind, route, outcome
    inputs: dict[str, set[int]] = field(default_factory=dict)
    peak_bytes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    bad: list[tuple[str, Ran]] = field(default_factory=list)
    held_bytes: int = 0

    def add(self, ran: Ran, decode: str) -> None:
        """Count an input."""
        kind = kinds.kind_of(ran.number)
        self.inputs.setdefault(kind, set()).add(ran.number)
        for route, verdict in ran.verdicts.items():
            self.counts[kind, decode if decode == "dali" else route, verdict.outcome] += 1
        self.peak_bytes[kind] = max(self.peak_bytes[kind], ran.peak_bytes)
        self.held_bytes = max(self.held_bytes, ran.held_bytes)
        self.seconds[kind] = max(self.seconds.get(kind, 0.0), ran.seconds)
        if ran.problems:
            self.bad.append((decode, ran))

    def text(self) -> str:
        """The table: of each route the inputs used, rejected, refused as a whole, and left alone by rule."""
        head = f"{'kind':26}{'inputs':>7}" + "".join(f"{route:>18}" for route in ROUTES)
        lines = [f"seed {self.seed}; by route: {' / '.join(OUTCOMES)}", f"{head}{'MiB':>6}{'s':>6}{'bad':>5}"]
        unaccounted = Counter(kinds.kind_of(ran.number) for _, ran in self.bad)
        for kind, numbers in self.inputs.items():
            cells = "".join(f"{self._cell(kind, route):>18}" for route in ROUTES)
            peak, slowest = self.peak_bytes[kind] >> 20, self.seconds[kind]
            lines.append(f"{kind:26}{len(numbers):7}{cells}{peak:6}{slowest:6.1f}{unaccounted[kind]:5}")
        total = sum(map(len, self.inputs.values()))
        bad = len({ran.number for _, ran in self.bad})
        lines.append(
            f"{total} inputs, {bad} unaccounted for; the process grew by {self.held_bytes >> 20} MiB"
        )
        return "\n".join(lines) + "\n"

    def _cell(self, kind: str, route: str) -> str:
        found = [self.counts[kind, route, outcome] for outcome in OUTCOMES]
        return " / ".join(map(str, found)) if any(found) else "-"

    def keep_bad(self, folder: Path) -> None:
        """Write the inputs that are not accounted for, each to a folder of its own, with what is wrong."""
        for decode, ran in self.bad:
            place = folder / f"{ran.number}-{decode}"
            (place / "input").mkdir(parents=True)
            kinds.build(self.seed, ran.number, place / "input")
            what = {
                "seed": self.seed,
                "number": ran.number,
                "kind": kinds.kind_of(ran.number),
                "what": ran.what,
                "decode": decode,
                "problems": ran.problems,
            }
            (place / "problems.json").write_text(json.dumps(what, indent=1))
