"""What a run notes as it goes: unusable samples, steps that are not finite, metrics, slow ranks, hangs."""

from iomm.parallel.engine import StepResult
from iomm.training.progress import TrainingProgress
from iomm.training.ranklog import log_path
from iomm.training.step import Dealt
from iomm.training.stragglers import compare
from iomm.training.trainer import Trainer, TrainingAborted
from iomm.training.watchdog import Watchdog


def quarantine(t: Trainer, step: int) -> None:
    """List the samples that any rank found unusable since the last time; all ranks call."""
    mine = [t.bad_samples.popleft() for _ in range(len(t.bad_samples))]
    found = [report for reports in t.mesh.gather_objects(mine) for report in reports]
    for report in dict.fromkeys(found):  # ranks of one model-parallel group may have read the same
        t.run.bad_sample(report)
        if t.run.writes or report in mine:
            t.run.event(step, "bad_sample", str(report))
    while t.stalls:
        t.run.event(step, "loader_stall", t.stalls.popleft())


def check_finite(t: Trainer, step: int, result: StepResult, batch: Dealt) -> None:
    """Count skipped steps; too many in a row end the run, with the samples that led there."""
    if not result.skipped:
        t.bad_in_a_row = 0
        return
    t.bad_in_a_row += 1
    keys = [key for samples in batch.batches.values() for key in samples.keys]
    detail = {
        "loss": repr(result.loss),
        "grad_norm": repr(result.grad_norm),
        "in_a_row": t.bad_in_a_row,
        "keys": keys,
    }
    t.run.event(step, "nan_skip", detail)
    limit = t.config.train.abort_after_bad_steps
    if t.bad_in_a_row >= limit:
        t.saver.finish()  # bad steps change no weights: a checkpoint on its way is a good one
        raise TrainingAborted(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite for "
            f"{limit} steps in a row "
            f"(train.abort_after_bad_steps). Last batch on rank {t.mesh.rank}: {', '.join(keys)}. "
            "Lower optimizer.lr, or look at these samples; the last good checkpoint is in "
            f"{t.run.dir / 'checkpoints'}."
        )


def log(t: Trainer, step: int, result: StepResult, throughput: dict[str, object]) -> None:
    """A line of metrics, the run's state and the Prometheus file; all ranks call."""
    finite = not result.skipped
    # Tensor-parallel ranks that do not share the encoders pack the same prefixes: one of them counts.
    counts = t.encoders is not None and (t.config.parallel.encoders == "shared" or t.mesh.tp_rank == 0)
    dropped = int(t.encoders.prefixes.dropped) if t.encoders is not None and counts else 0
    of_ranks = t.mesh.gather_objects((dropped, t.loader.rescued))
    t.state.update(step)
    t.run.log(
        "train",
        step,
        loss=result.loss if finite else None,
        grad_norm=result.grad_norm if finite else None,
        lr=result.lr,
        skipped=t.bad_in_a_row,
        dropped_tokens=sum(tokens for tokens, _ in of_ranks),
        rescued_decodes=sum(files for _, files in of_ranks),
        **throughput,
    )
    t.figures.write()


def compare_ranks(t: Trainer, step: int, screen: TrainingProgress) -> None:
    """Now and then: how long each rank took for its own work, and which one is slow."""
    every = t.config.train.straggler_every_steps
    if every == 0 or step % every:
        return
    record, slow = compare(t.mesh, t.phases.take_seconds(), min(every, step - t.first_step))
    t.run.log("phases", step, **record)
    if slow is not None:
        t.run.event(step, "straggler", vars(slow))
        screen.say(f"step {step}  {slow}")


def profile(t: Trainer, step: int) -> None:
    """Begin or end the profiler's window, if it is due."""
    trace = t.profiler.at(step)
    if trace is not None:
        t.run.event(step, "profile", str(trace))


def watch_over(t: Trainer) -> Watchdog:
    """Watches over this rank's progress until the loop is left."""
    train, rank = t.config.train, t.mesh.rank
    t.engine.while_summing = lambda: t.phases("gradient_sum")
    t.system.on_pass = t.saver.on_progress = t.phases.alive

    def on_hang(reason: str) -> None:
        t.run.event(t.phases.step, "hang", reason)
        t.state.end("failed", max(t.first_step, t.phases.step - 1), reason)

    return Watchdog(
        t.phases,
        log_path(t.run.dir, rank),
        rank,
        timeout_s=train.hang_timeout_s,
        stall_s=train.stall_notice_s,
        reading=lambda: t.loader.readings,
        on_stall=t.stalls.append,
        on_hang=on_hang,
    )
