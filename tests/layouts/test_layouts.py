"""Every layout gives the numbers of one process, and checkpoints move between all of them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iomm.checkpoint.folder import INFO_FILE, latest, name_of
from iomm.checkpoint.streaming import ShardedReader
from iomm.parallel.mesh import Mesh
from iomm.training.train import train
from tests.layouts import cases
from tests.layouts.cases import ALONE, EVERY, JOBS, KILLED, KILLED_AT, KILLED_EVERY, STEPS, Run, launches
from tests.layouts.ranks_layout import do
from tests.small_run import events

pytestmark = [pytest.mark.parallel, pytest.mark.multi, pytest.mark.slow, pytest.mark.timeout(1800)]
# A key's bias adds the same to all scores of a query, which the softmax takes away again: its gradient is
# rounding and nothing else, and Adam makes steps of it.
ROUNDING = "conditioner.adapter.key.bias"
SCRIPT = Path(__file__).parent / "ranks_layout.py"


def _ids(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


class Results:
    """What runs left in their folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self, run: Run) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by step."""
        lines = (self.folder / run.folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"}

    def order(self, run: Run) -> list[list[int]]:
        """Sample indices of each step, as the ranks took them, put together."""
        by_place: dict[int, list[list[list[int]]]] = {}
        for record in self._draws(run):
            place, _ = record["place"]
            assert by_place.setdefault(place, record["order"]) == record["order"]
        steps = zip(*(by_place[place] for place in sorted(by_place)), strict=True)
        return [[i for micro in zip(*ranks, strict=True) for part in micro for i in part] for ranks in steps]

    def draws(self, run: Run) -> dict[str, str]:
        """A digest of every number that any rank drew for a sample."""
        out: dict[str, str] = {}
        for record in self._draws(run):
            for key, found in record["draws"].items():
                assert out.setdefault(key, found) == found, key
        return out

    @functools.cache  # noqa: B019  one object a session
    def tensors(self, run: Run, step: int = STEPS) -> dict[str, Tensor]:
        """Weights, averages and optimizer state, whole."""
        reader = ShardedReader(self.folder / run.folder / "checkpoints" / name_of(step))
        return {name: reader.get(name) for name in reader.specs}

    def _draws(self, run: Run) -> list[dict]:  # type: ignore[type-arg]
        files = sorted((self.folder / run.folder).glob("draws_*.json"))
        assert len(files) == run.ranks
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="session")
def results(
    world: Path, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., str]
) -> Results:
    """All runs, in as few launches as their order allows."""
    out = tmp_path_factory.mktemp("layouts")
    for ranks, runs in launches(EVERY):
        if ranks == 1:
            for run in runs:
                do(run, world, out)
        else:
            torchrun(SCRIPT, world, out, *_ids(runs), ranks=ranks, timeout_s=900)
    return Results(out)


def check_steps(results: Results, run: Run) -> None:
    found, wanted = results.steps(run), results.steps(ALONE[run.job])
    first = cases.SAVE_EVERY + 1 if run.start else 1
    assert sorted(found) == list(range(first, STEPS + 1))
    for step, numbers in found.items():
        assert numbers == pytest.approx(wanted[step], rel=JOBS[run.job].tolerance, abs=0), f"step {step}"


def check_tensors(results: Results, run: Run) -> None:
    compare(results.tensors(run), results.tensors(ALONE[run.job]), JOBS[run.job].tolerance)


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        if name.endswith(ROUNDING):
            continue
        bound = tolerance * tensor.abs().max().item()
        assert (found[name] - tensor).abs().max().item() <= bound, name


@pytest.mark.parametrize("run", cases.FROM_SCRATCH, ids=_ids(cases.FROM_SCRATCH))
def test_a_layout_gives_the_losses_gradient_norms_and_weights_of_one_process(
    results: Results, run: Run
) -> None:
    check_steps(results, run)
    check_tensors(results, run)


@pytest.mark.parametrize("run", cases.VARIATIONS, ids=_ids(cases.VARIATIONS))
def test_recomputation_micro_batches_and_background_saves_change_no_number(
    results: Results, run: Run
) -> None:
    check_steps(results, run)
    check_tensors(results, run)


@pytest.mark.parametrize("run", cases.MOVED, ids=_ids(cases.MOVED))
def test_a_checkpoint_goes_on_in_another_layout_as_if_nothing_had_happened(
    results: Results, run: Run
) -> None:
    check_steps(results, run)
    check_tensors(results, run)


@pytest.mark.parametrize("run", cases.RESUMED, ids=_ids(cases.RESUMED))
def test_a_run_resumed_in_its_own_layout_is_bit_identical(results: Results, run: Run) -> None:
    assert run.start is not None
    found, straight = results.steps(run), results.steps(run.start)
    assert found == {step: straight[step] for step in range(cases.SAVE_EVERY + 1, STEPS + 1)}
    tensors, wanted = results.tensors(run), results.tensors(run.start)
    assert tensors.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(tensors[name], tensor)] == []


@pytest.mark.parametrize("run", cases.FROM_SCRATCH, ids=_ids(cases.FROM_SCRATCH))
def test_samples_masks_noise_and_timesteps_are_the_same_in_every_layout(results: Results, run: Run) -> None:
    alone = ALONE[run.job]
    assert results.order(run) == results.order(alone)
    draws = results.draws(run)
    assert {key.split()[0] for key in draws} == {"NOISE", "TIMESTEP", "MASK", "NULL"}
    assert draws == results.draws(alone)


def test_training_moves_the_weights_so_that_equal_numbers_mean_something(results: Results) -> None:
    for run in ALONE.values():
        before, after = results.tensors(run, cases.SAVE_EVERY), results.tensors(run)
        still = [n for n in after if n.startswith("model.") and torch.equal(before[n], after[n])]
        assert not still, still
        losses = [loss for loss, _ in results.steps(run).values()]
        assert len(set(losses)) == STEPS


def test_a_rank_killed_while_a_checkpoint_is_written_leaves_the_last_one_to_go_on_from(
    results: Results, world: Path, tmp_path: Path, mesh: Mesh, torchrun: Callable[..., str]
) -> None:
    """Two pipeline ranks go on as one process."""
    torchrun(SCRIPT.with_name("ranks_killed.py"), world, tmp_path, ranks=KILLED.ranks, fails=True)
    config = KILLED.config(world, tmp_path)
    checkpoints = config.run_dir / "checkpoints"
    half, good = checkpoints / f".tmp_{name_of(KILLED_AT)}", checkpoints / name_of(KILLED_EVERY)
    assert not (half / INFO_FILE).exists()  # a rank that outlived the other may have removed all of it
    assert latest(checkpoints) == good
    parallel = dataclasses.replace(config.parallel, pp=1)
    train(dataclasses.replace(config, parallel=parallel))
    assert [e["detail"] for e in events(config.run_dir, "resume")] == [str(good)]
    assert not half.exists() and latest(checkpoints) == checkpoints / name_of(STEPS)
    resumed, alone = Results(tmp_path), ALONE[KILLED.job]
    found, wanted = resumed.steps(KILLED), results.steps(alone)
    tolerance = JOBS[KILLED.job].tolerance
    assert {s: pytest.approx(n, rel=tolerance, abs=0) for s, n in found.items()} == wanted
    compare(resumed.tensors(KILLED), results.tensors(alone), tolerance)
