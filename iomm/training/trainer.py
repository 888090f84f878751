"""What the training loop works with, and how a run ends."""

import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from iomm.checkpoint.saver import Saver
from iomm.config import Config
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader
from iomm.encoders import Encoders
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh
from iomm.system import System
from iomm.training.phases import Phases
from iomm.training.profiler import ProfileWindow
from iomm.training.prometheus import PrometheusFile
from iomm.training.run import Run
from iomm.training.state import StateFile
from iomm.training.step import StepInputs
from iomm.training.watch import Watch


class TrainingAborted(RuntimeError):
    """The run cannot go on; its last checkpoint is good."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many steps, and by which signal if it was stopped."""

    run_dir: Path
    step: int
    stopped_by: signal.Signals | None = None


@dataclass
class Trainer:
    """What the loop works with."""

    config: Config
    mesh: Mesh
    run: Run
    state: StateFile
    encoders: Encoders | None  # on ranks that encode
    system: System
    engine: Engine
    inputs: StepInputs
    saver: Saver
    loader: Loader
    watch: Watch | None  # on the first stage, if there are held-out samples
    first_step: int
    bad_samples: deque[BadSampleReport]  # filled by the loader's threads
    phases: Phases
    profiler: ProfileWindow
    figures: PrometheusFile
    stalls: deque[str] = field(default_factory=deque)  # filled by the watchdog's thread
    bad_in_a_row: int = 0
