"""`train.prometheus_file`: a run's figures for node_exporter's textfile collector, hence for Prometheus.

The figures are those of `iomm status`, read from the run's folder, so counters go on over restarts. The
collector reads every file `*.prom` of its folder; a file is replaced as a whole.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self, final

from iomm.evaluation.status import Follower, Status
from iomm.files import write_whole

_log = logging.getLogger(__name__)
STATES = ("running", "done", "stopped", "preempted", "failed")
Sample = tuple[dict[str, str], float | None]  # labels, value; None: not known, left out


@final
class PrometheusFile:
    """Keeps a file of figures while a run lasts. A context manager: writes once more when the run has ended.

    Args:
        file: its path; None: there is none to write, and every method does nothing.
        run_dir: the run's folder; it exists before the first `write`.
    Raises:
        ValueError: the collector would not see such a file, or its folder is not there.
    """

    def __init__(self, file: str | None, run_dir: Path) -> None:
        self._path, self._run_dir = None if file is None else Path(file), run_dir
        self._follower: Follower | None = None
        path = self._path
        if path is not None and (path.suffix != ".prom" or not path.parent.is_dir()):
            raise ValueError(
                f"train.prometheus_file {path} must be a file *.prom in a folder that exists: the one that "
                "node_exporter was given as --collector.textfile.directory."
            )

    def write(self) -> None:
        """Write the figures as they are now. If the disk does not take them, training goes on and a warning
        is logged."""
        if self._path is None:
            return
        self._follower = self._follower or Follower(self._run_dir)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            write_whole(self._path, exposition(self._follower.read()), part=part)
        except OSError as error:
            _log.warning("%s is not written, training goes on: %s", self._path, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._follower is not None:
            self.write()


def exposition(status: Status) -> str:
    """A run's figures in Prometheus' text format, in base units; what is not known is left out."""
    lines: list[str] = []
    for name, kind, text, samples in _metrics(status):
        known = [(labels, value) for labels, value in samples if value is not None]
        if known:
            lines += [f"# HELP iomm_{name} {text}", f"# TYPE iomm_{name} {kind}"]
        for labels, value in known:
            pairs = {"run": status.name, **labels}
            inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in pairs.items())
            lines.append(f"iomm_{name}{{{inner}}} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _metrics(s: Status) -> Iterator[tuple[str, str, str, list[Sample]]]:
    """(name, type, help, samples) of every figure."""

    def one(value: float | None) -> list[Sample]:
        return [({}, value)]

    step_s = None if s.step_ms is None else s.step_ms / 1000
    flops = None if s.tflops is None else s.tflops * 1e12
    checkpoint = None if s.checkpoint is None else int(s.checkpoint.name.removeprefix("step_"))
    states: list[Sample] = [({"state": name}, float(name == s.state)) for name in STATES]
    heldout: list[Sample] = [({"condition": name}, loss) for name, loss in s.heldout.items()]
    yield "state", "gauge", "1 for what the run is doing.", states
    yield "step", "gauge", "Optimizer steps done.", one(s.step)
    yield "steps_planned", "gauge", "Optimizer steps that the run is to do.", one(s.steps)
    yield "loss", "gauge", "Velocity loss of the last logged step.", one(s.loss)
    yield "heldout_loss", "gauge", "Velocity loss on held-out samples, by condition.", heldout
    yield "images_per_second", "gauge", "Training images of all ranks.", one(s.images_per_s)
    yield "step_seconds", "gauge", "Duration of a step, evaluation and saving left out.", one(step_s)
    yield "flops_per_second", "gauge", "Model FLOP/s of all ranks.", one(flops)
    yield "mfu_ratio", "gauge", "Model FLOPs utilisation of the bf16 peak.", one(s.mfu)
    yield "checkpoint_step", "gauge", "Step of the newest complete checkpoint.", one(checkpoint)
    yield "checkpoint_timestamp_seconds", "gauge", "When it was complete.", one(s.checkpoint_at)
    yield "updated_timestamp_seconds", "gauge", "When the run last wrote its state.", one(s.updated)
    yield "skipped_steps_total", "counter", "Steps with a loss or gradient not finite.", one(s.skipped_steps)
    yield "bad_samples_total", "counter", "Samples that could not be used.", one(s.bad_samples)
    yield "restarts_total", "counter", "Launches after the first.", one(s.restarts)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
