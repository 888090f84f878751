"""The training loop, the same for both stages, one laptop core and many nodes.

Stage 1 has `data.mix_ratio = 1` (images only); stage 2 mixes in pairs and names stage 1 in `train.init_from`.
"""

import contextlib
import functools
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from iomm.checkpoint import sharded
from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.ranks import on_rank_0
from iomm.checkpoint.saver import Saver
from iomm.config import Config
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader, global_batch_indices
from iomm.encoders import Encoders
from iomm.parallel.agreement import require_agreement
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh, start
from iomm.system import System, build
from iomm.training import notes
from iomm.training.phases import Phases
from iomm.training.profiler import ProfileWindow
from iomm.training.progress import TrainingProgress
from iomm.training.prometheus import PrometheusFile
from iomm.training.recovery import begins, naming_lost_ranks, resume
from iomm.training.run import Run
from iomm.training.state import StateFile
from iomm.training.step import Dealt, StepInputs
from iomm.training.stop import StopSignal, tell_launcher
from iomm.training.throughput import FlopCount, Stopwatch
from iomm.training.trainer import Outcome, Trainer
from iomm.training.watch import Watch


def train(config: Config) -> Outcome:
    """Train `config` to its last step, from its own latest checkpoint if there is one.

    Returns:
        the outcome; a run that was asked to stop has saved.
    Raises:
        ValueError, FileNotFoundError: settings, shards or weights that do not fit, before anything is written
            over.
        CheckpointError: the last checkpoint could not be written.
        RankLost: another rank, or the way to it, is gone.
        Superseded: another launch has taken over the run's folder.
        TrainingAborted: too many NaN steps in a row.
    """
    require_agreement(config)
    mesh = start(config.parallel)
    figures = PrometheusFile(config.train.prometheus_file if mesh.rank == 0 else None, config.run_dir)
    # Everything that can be wrong with the settings shows here, before the run's folder is touched.
    global_batch_indices(
        0, config.train.global_batch_images, config.train.micro_batch_images, mesh.dp_rank, mesh.dp_size
    )
    encoding = mesh.is_first_stage or config.parallel.encoders == "shared"
    encoders = Encoders(config, mesh.device) if encoding else None
    shapes = mesh.broadcast_object(encoders.shapes if encoders is not None else None)
    system = build(config, shapes, mesh, encoders)
    checkpoints = config.run_dir / "checkpoints"
    if begins(checkpoints, mesh) and config.train.init_from is not None:
        _init_weights(config, system, mesh)
    engine = Engine(system, system.backend_config, config.optimizer, config.train, config.parallel, mesh)
    resumed = resume(checkpoints, engine, config, mesh)
    with contextlib.ExitStack() as stack:
        bad_samples: deque[BadSampleReport] = deque()
        loader = Loader.of_run(
            config,
            on_bad=bad_samples.append,
            token_px=shapes.token_px,
            tokenize=encoders.mllm.tokenize if encoders is not None else None,
            on_sample=encoders.read_ahead if encoders is not None else None,
        )
        loader.check_micro_batch(config.train.micro_batch_images * mesh.dp_size)
        system.check_sizes(loader.sizes_px)
        stack.enter_context(figures)
        run = stack.enter_context(Run(config, mesh))
        state = stack.enter_context(
            StateFile(run.dir, resumed.step, resumed.path, writes=run.writes, lease=run.lease)
        )
        watch = None
        if mesh.is_first_stage and encoders is not None:
            watch = Watch.prepare(config, encoders, loader, mesh)
        trainer = Trainer(
            config=config,
            mesh=mesh,
            run=run,
            state=state,
            encoders=encoders,
            system=system,
            engine=engine,
            inputs=StepInputs(system, encoders, mesh),
            saver=Saver(
                checkpoints,
                config.train.keep_last,
                mesh,
                background=config.train.async_save,
                lease=run.lease,
            ),
            loader=loader,
            watch=watch,
            first_step=resumed.step,
            bad_samples=bad_samples,
            phases=Phases(mesh.device),
            profiler=stack.enter_context(
                ProfileWindow(config.train.profile_steps, run.dir, mesh.rank, mesh.device)
            ),
            figures=figures,
        )
        stop = stack.enter_context(StopSignal())
        screen = stack.enter_context(
            TrainingProgress(config.name, resumed.step, config.train.steps, shown=mesh.rank == 0)
        )
        for damage in resumed.damaged:
            run.event(resumed.step, "checkpoint_damaged", damage)
            screen.say(damage)
        if resumed.path is not None:
            run.event(resumed.step, "resume", str(resumed.path))
        if resumed.changed:
            run.event(resumed.step, "settings_changed", list(resumed.changed))
            screen.say(f"settings that the checkpoint had otherwise: {'; '.join(resumed.changed)}")
        stack.enter_context(notes.watch_over(trainer))
        stack.enter_context(naming_lost_ranks(mesh, trainer.phases))
        return _loop(trainer, stop, screen)


def _loop(t: Trainer, stop: StopSignal, screen: TrainingProgress) -> Outcome:
    settings, phase = t.config.train, t.phases
    flops, watch, batches, inputs = _flops(t), Stopwatch(), _batches(t), t.inputs
    if _was_cut_off(t):
        with phase("evaluate"):
            _evaluate(t, t.first_step, screen, last=t.first_step == settings.steps)
    for step in range(t.first_step + 1, settings.steps + 1):
        phase.step = step
        notes.profile(t, step)
        with phase("batch"):
            batch = next(batches)
        with phase("encode"):
            micro_batches = inputs.encode(batch)
        with phase("step"):  # forward and backward of every micro-batch, gradient sum, clip, update, EMA
            before = functools.partial(inputs.conditions, micro_batches)
            result = t.engine.step(inputs.forward, micro_batches, before)
        watch.step(flops(batch.sizes_px) if flops else None)
        with phase("log"):
            logged = step == settings.steps or step % settings.log_every_steps == 0
            if logged or result.skipped:
                notes.quarantine(t, step)
            notes.check_finite(t, step, result, batch)
            throughput = watch.read(settings.global_batch_images) if logged else None
            if throughput is not None:
                notes.log(t, step, result, throughput)
            notes.compare_ranks(t, step, screen)
            screen.update(step, result.loss, throughput)
            stopped = t.mesh.largest(stop.number)  # all ranks stop, also those that no signal reached
        last = bool(stopped) or step == settings.steps
        # First: nothing that an evaluation does may cost the steps before it.
        with watch.pause(), phase("save"):
            _saving(t, step, screen, t.saver.poll, last=False)
            if last or step % settings.save_every_steps == 0:
                _save(t, step, screen, last=last)
        if stopped and step < settings.steps:
            return _stop(t, step, signal.Signals(stopped))
        with watch.pause(), phase("evaluate"):
            _evaluate(t, step, screen, last=step == settings.steps)
    t.state.end("done", settings.steps)
    return Outcome(t.run.dir, settings.steps)


def _stop(t: Trainer, step: int, by: signal.Signals) -> Outcome:
    """Leave after a step and its checkpoint, because signal `by` asked for it."""
    notes.quarantine(t, step)
    t.run.event(step, "stop", by.name)
    t.state.end("preempted" if by == signal.SIGUSR1 else "stopped", step, by.name)
    return Outcome(t.run.dir, step, by)


def _batches(t: Trainer) -> Iterator[Dealt]:
    """The micro-batches of each step from the first to the last; those that this rank encodes are decoded
    ahead."""
    train, mesh = t.config.train, t.mesh
    sizes = (train.global_batch_images, train.micro_batch_images, mesh.dp_rank, mesh.dp_size)

    def steps() -> Iterator[list[list[int]]]:
        return (global_batch_indices(step, *sizes) for step in range(t.first_step, train.steps))

    def own(indices: list[list[int]]) -> list[int]:
        return [number for number in range(len(indices)) if t.inputs.encodes(number)]

    decoded = t.loader.stream(indices[number] for indices in steps() for number in own(indices))
    for indices in steps():
        sizes_px = [t.loader.size_px(samples[0]) for samples in indices]
        yield Dealt(indices, sizes_px, {number: next(decoded) for number in own(indices)})


def _flops(t: Trainer) -> FlopCount | None:
    """Counted on the rank that logs."""
    if t.mesh.rank != 0 or t.encoders is None:
        return None
    return FlopCount(t.config, t.system, t.encoders)


def _init_weights(config: Config, system: System, mesh: Mesh) -> None:
    """Start from another run's weights: its EMA if it kept one."""
    assert config.train.init_from is not None
    source = on_rank_0(mesh, lambda: sharded.find(Path(str(config.train.init_from))))
    sharded.load_weights(source, system, config=config, ema=sharded.read_info(source).has_ema, mesh=mesh)


def _evaluate(t: Trainer, step: int, screen: TrainingProgress, *, last: bool) -> None:
    """Held-out losses and grids, with the EMA weights if there are any."""
    evaluates, paints = _due(t, step, last=last)
    if not (evaluates or paints):
        return
    averaged = t.engine.ema.swapped_in() if t.engine.ema is not None else contextlib.nullcontext()
    with averaged, t.system.conducting() as conducts:
        if not conducts or t.watch is None:
            return
        if evaluates:
            screen.say(f"step {step}  " + t.watch.evaluate(t.system, t.run, step, last=last))
        if paints:
            t.watch.paint(t.system, t.run, step)


def _due(t: Trainer, step: int, *, last: bool) -> tuple[bool, bool]:
    """Whether held-out losses, and whether grids, are due after a step."""
    train, any_heldout = t.config.train, bool(t.config.data.heldout)
    evaluates, paints = (
        last or step % every == 0 for every in (train.eval_every_steps, train.sample_every_steps)
    )
    return any_heldout and evaluates, any_heldout and paints


def _was_cut_off(t: Trainer) -> bool:
    """Whether the run ended between the checkpoint that it goes on from and that step's evaluation; all ranks
    call."""

    def look() -> bool:
        step = t.first_step
        evaluates, paints = _due(t, step, last=step == t.config.train.steps)
        return step > 0 and (
            (evaluates and not t.run.evaluated(step)) or (paints and not t.run.painted(step))
        )

    return on_rank_0(t.mesh, look)


def _save(t: Trainer, step: int, screen: TrainingProgress, *, last: bool) -> None:
    """Write a checkpoint, or begin to. A failure (full disk) ends the run only if it was to be the last
    one."""
    if t.encoders is not None:
        try:
            t.encoders.flush_caches()
        except OSError as error:  # it stays in memory, and the next flush tries again
            t.run.event(step, "cache_not_written", str(error))
            screen.say(f"step {step}  feature cache not written, training goes on: {error}")
    _saving(t, step, screen, t.saver.finish, last=False)
    _saving(t, step, screen, lambda: t.saver.save(step, t.engine, t.config, extra={}), last=last)
    if last:
        _saving(t, step, screen, t.saver.finish, last=True)


def _saving(
    t: Trainer, step: int, screen: TrainingProgress, action: Callable[[], Path | None], *, last: bool
) -> None:
    """Do something about a checkpoint, and note what came of it."""
    try:
        path = action()
    except CheckpointError as error:
        t.run.event(step, "save_failed", str(error))
        if last:
            raise
        screen.say(f"step {step}  checkpoint not written, training goes on: {error}")
    else:
        if path is not None:
            t.run.event(step, "save", str(path))
            t.state.saved(path)
            tell_launcher("saved")
