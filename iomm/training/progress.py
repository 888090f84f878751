"""What a person sees while a run goes on: a bar on a terminal, a line every ten seconds in a log file."""

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class TrainingProgress:
    """Bar or lines on standard error. `shown=False` (ranks other than 0) shows nothing."""

    def __init__(self, name: str, first_step: int, steps: int, *, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown, highlight=False)
        self.name, self.steps, self.first_step = name, steps, first_step
        self.started = self.last_line = time.monotonic()
        self._rate = ""
        self.bar: Progress | None = None
        if shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(name, total=steps, completed=first_step, text="")

    def update(self, step: int, loss: float, throughput: dict[str, object] | None) -> None:
        """`step` steps are done. `throughput`: the latest reading of `Stopwatch`, if there is a new one."""
        text = f"loss {loss:.4f}" if math.isfinite(loss) else f"loss {loss} (skipped)"
        if throughput is not None:
            tflops = throughput["tflops"]
            assert isinstance(tflops, dict)
            self._rate = f"  {throughput['images_per_s']} images/s  {sum(tflops.values()):.3g} TFLOP/s"
        text += self._rate
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line >= LINE_EVERY_S or step == self.steps:
            self.last_line = time.monotonic()
            seconds = (self.last_line - self.started) / max(1, step - self.first_step) * (self.steps - step)
            self.console.print(
                f"{self.name}  step {step}/{self.steps}  {text}  ETA {seconds / 60:.1f} min", soft_wrap=True
            )

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, soft_wrap=True, markup=False)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
