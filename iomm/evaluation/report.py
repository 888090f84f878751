"""`iomm report`: one self-contained HTML page a run, readable on a phone and in dark mode, with no network.

What the run did not log is said on the page, never filled in.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from iomm.evaluation import figures
from iomm.evaluation.measured import bench_sections, reconstruction_section
from iomm.evaluation.runlog import Record, RunLog, read_run
from iomm.evaluation.scores import read_reconstruction, read_scores
from iomm.evaluation.status import Follower, rows
from iomm.files import write_whole

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_GRID_STEPS = 10  # steps whose grids are shown: the last, the first and evenly spaced ones between
MAX_GRID_BYTES = 1_500_000  # a larger grid file is shrunk for the page
MAX_GRID_PX = 1600  # longer side of a shrunk grid
MAX_ROWS = 200  # rows of the tables of events and of bad samples


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of generated pictures, as it stands on the page."""

    step: int
    kind: str
    uri: str
    shrunk: bool


def build_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. An older report is replaced only by a whole new one.

    Raises:
        ValueError: `run_dir` is not the folder of a run.
    """
    log = read_run(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, data_uri=svg_uri, plain=plain, fixed=fixed)
    page = environment.get_template(TEMPLATE.name).render(page_content(log))
    out = run_dir / "report.html"
    write_whole(out, page)
    return out


def page_content(log: RunLog) -> dict[str, Any]:
    """Everything the template shows, in the order of the page; None or empty where the run logged nothing."""
    config = log.run.get("config")
    shown, left_out = _shown_steps(sorted(log.grids))
    notes = list(log.notes)
    throughput_rows = _throughput_rows(log.train)
    rebuilt = read_reconstruction(log.folder, notes)
    return {
        "name": log.run.get("name") or log.folder.resolve().name,
        "run": log.run,
        "facts": _facts(log),
        "warnings": _warnings(log),
        "tiles": _tiles(log),
        "status": rows(Follower(log.folder).read()),
        "training": _training_figures(log),
        "heldout": figures.heldout_curve(log.evals) if _has(log.evals, "velocity_loss") else None,
        "heldout_rows": _heldout_rows(log.evals),
        "timestep": _timestep_figure(log.evals),
        "copying": _last(log.evals, "copying"),
        "copying_curve": figures.copying_curve(log.evals) if _has(log.evals, "copying") else None,
        "reconstruction": reconstruction_section(rebuilt) if rebuilt is not None else None,
        "benches": bench_sections(read_scores(log.folder, notes)),
        "grids": [(step, list(_grids(log, step, notes))) for step in reversed(shown)],
        "grids_left_out": left_out,
        "throughput": figures.throughput_curve(log.train) if throughput_rows else None,
        "throughput_rows": throughput_rows,
        "quarantine": log.quarantine[:MAX_ROWS],
        "quarantined": len(log.quarantine),
        "quarantine_reasons": Counter(str(r.get("reason", "?")) for r in log.quarantine).most_common(),
        "events": [e for e in log.events if e.get("event") != "save"][-MAX_ROWS:],
        "event_counts": Counter(str(e.get("event", "?")) for e in log.events).most_common(),
        "config": sorted(_flat(config)) if isinstance(config, dict) else [],
        "versions": sorted(_flat(log.run.get("versions") or {})),
        "notes": notes,
    }


def number(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant digits and grouped thousands; "not logged" for None."""
    if value is None:
        return "not logged"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}" if math.isfinite(value) else str(value)
    return f"{value:.{digits}g}"


def fixed(value: float, best: float) -> str:
    """A score with three digits: 0.523 of 1, 3.21 of 5, 61.4 of 100."""
    return f"{value:.{3 if best <= 1 else 2 if best <= 10 else 1}f}"


def plain(value: Any) -> str:
    """A value of the log in a line: nothing for None, lists and objects without their brackets."""
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items())
    return "" if value is None else str(value)


def svg_uri(svg: str) -> str:
    """A data URI of an SVG text."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _facts(log: RunLog) -> list[tuple[str, str]]:
    """Where the run comes from: started, device, commit, steps, where its weights started."""
    config = log.run.get("config") if isinstance(log.run.get("config"), dict) else {}
    train = (config or {}).get("train") or {}
    last = log.train[-1]["step"] if log.train else None
    planned = train.get("steps")
    steps = f"{number(last)} of {number(planned)}" if planned is not None else number(last)
    facts = [("steps logged", steps)]
    for key in ("started", "device", "world_size", "git"):
        if value := log.run.get(key):
            facts.append((key.replace("_", " "), plain(value)))
    if train.get("init_from"):
        facts.append(("weights from", str(train["init_from"])))
    return facts


def _tiles(log: RunLog) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the figures at the top."""
    tiles = []
    if log.train:
        _, loss = figures.series(log.train, "loss")
        tail = loss[-max(1, len(loss) // 25) :]
        tail = tail[np.isfinite(tail)]
        value = float(tail.mean()) if len(tail) else None
        tiles.append(("training loss", number(value), f"mean of the last {len(tail)} logged"))
    heldout = _last(log.evals, "velocity_loss") or {}
    for name in figures.CONDITIONS:
        if heldout.get(name) is not None:
            remark = _against_null(heldout, name) if name != "null" else "no condition"
            tiles.append((f"held-out, {name}", number(heldout[name]), remark))
    for label, key, unit in (("images/s", "images_per_s", ""), ("step time", "step_ms", " ms")):
        _, values = figures.series(log.train, key)
        if np.isfinite(values).any():
            tiles.append((label, number(float(np.nanmedian(values))) + unit, "median of the logged"))
    return tiles


def _against_null(losses: Record, name: str) -> str:
    null = losses.get("null")
    if not null:
        return "no null condition to compare with"
    change = 100 * (losses[name] - null) / null
    return f"{abs(change):.1f} % {'below' if change < 0 else 'above'} the null condition"


def _warnings(log: RunLog) -> list[str]:
    """What a reader must not miss."""
    out = []
    copying = _last(log.evals, "copying") or {}
    if copying.get("alarm"):
        reason = copying.get("reason") or "pictures match the input beyond what the condition says."
        out.append(f"Copying alarm: {reason}")
    losses = _last(log.evals, "velocity_loss") or {}
    null = losses.get("null")
    for name in ("image", "text"):
        if null is not None and losses.get(name) is not None and losses[name] >= null:
            out.append(f"The {name} condition does not help: its held-out loss is not below the null one.")
    skips = len({e.get("step") for e in log.events if e.get("event") == "nan_skip"})  # resumed: once
    if skips:
        out.append(f"Steps skipped for a loss or gradient that was not finite: {skips}.")
    if log.quarantine:
        out.append(f"Samples that could not be used: {len(log.quarantine)} (see Bad samples).")
    return out


def _training_figures(log: RunLog) -> list[figures.Picture]:
    out = []
    if _has(log.train, "loss"):
        out.append(figures.loss_curve(log.train))
    if _has(log.train, "grad_norm"):
        skipped = [e["step"] for e in log.events if e.get("event") == "nan_skip" and "step" in e]
        out.append(figures.gradient_curve(log.train, skipped))
    return out


def _timestep_figure(evals: list[Record]) -> figures.Picture | None:
    found = [r for r in evals if r.get("by_timestep") and r.get("timesteps")]
    return figures.timestep_curve(found[-1]) if found else None


def _heldout_rows(evals: list[Record]) -> list[tuple[str, float, float | None, str]]:
    """(condition, last loss, lowest loss, last against null) of every condition that was evaluated."""
    last = _last(evals, "velocity_loss") or {}
    rows = []
    for name in figures.CONDITIONS:
        if last.get(name) is not None:
            _, values = figures.series(evals, "velocity_loss", name)
            best = float(np.nanmin(values)) if np.isfinite(values).any() else None
            rows.append((name, last[name], best, "" if name == "null" else _against_null(last, name)))
    return rows


def _throughput_rows(records: list[Record]) -> list[tuple[str, float, str]]:
    """(part, median TFLOP/s, share) of every logged part, and their sum; empty where nothing was counted."""
    logged = {name: figures.series(records, "tflops", name)[1] for name in figures.PARTS}
    medians = {name: float(np.nanmedian(v)) for name, v in logged.items() if np.isfinite(v).any()}
    total = sum(medians.values())
    if not total:
        return []
    return [
        *((name, value, f"{100 * value / total:.1f} %") for name, value in medians.items()),
        ("whole system", total, ""),
    ]


def _grids(log: RunLog, step: int, notes: list[str]) -> Iterator[Grid]:
    for kind, path in sorted(log.grids[step].items(), reverse=True):
        raw, media, shrunk = path.read_bytes(), "image/png", False
        try:
            with Image.open(io.BytesIO(raw)) as image:
                image.load()
                if len(raw) > MAX_GRID_BYTES:
                    small = image.convert("RGB")
                    small.thumbnail((MAX_GRID_PX, MAX_GRID_PX))
                    buffer = io.BytesIO()
                    small.save(buffer, "WEBP", quality=90)
                    raw, media, shrunk = buffer.getvalue(), "image/webp", True
        except OSError as error:
            notes.append(f"samples/{path.name} is not a whole picture and left out ({error}).")
            continue
        uri = f"data:{media};base64,{base64.b64encode(raw).decode()}"
        yield Grid(step=step, kind=kind.replace("_", " "), uri=uri, shrunk=shrunk)


def _shown_steps(steps: list[int]) -> tuple[list[int], int]:
    """At most MAX_GRID_STEPS of `steps`, evenly spaced with both ends, and how many are left out."""
    if len(steps) <= MAX_GRID_STEPS:
        return steps, 0
    picks = {round(i * (len(steps) - 1) / (MAX_GRID_STEPS - 1)) for i in range(MAX_GRID_STEPS)}
    return [steps[i] for i in sorted(picks)], len(steps) - len(picks)


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of a nested dict."""
    if not isinstance(node, dict):
        yield prefix, "not set" if node is None else str(node)
        return
    for key, value in node.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _has(records: list[Record], key: str) -> bool:
    return any(r.get(key) is not None for r in records)


def _last(records: list[Record], key: str) -> Any:
    """The value under `key` of the last record that has one."""
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)
