"""All benchmarks by the name that the command line gives them."""

from collections.abc import Sequence
from pathlib import Path

from iomm.evaluation.benches import dpg, geneval, imgedit, wise
from iomm.evaluation.benches.layout import Bench
from iomm.evaluation.benches.summary import Reading

BENCHES: dict[str, Bench] = {
    bench.name: bench for bench in (geneval.GENEVAL, dpg.DPG, wise.WISE, wise.WISE_VERIFIED, imgedit.IMGEDIT)
}


def read_results(name: str, paths: Sequence[Path], questions: Path | None) -> Reading:
    """What the official scorer of a benchmark wrote.

    Args:
        questions: DPG-Bench's CSV, which says what prompt its scorer loses.
    Raises:
        BenchError: files of another form.
        OSError: no such file.
    """
    if name == dpg.DPG.name:
        lost = () if questions is None else dpg.first_prompt(dpg.read_questions(questions))
        return dpg.read_results(paths, lost)
    readers = {
        geneval.GENEVAL.name: geneval.read_results,
        wise.WISE.name: wise.read_results_legacy,
        wise.WISE_VERIFIED.name: wise.read_results_verified,
        imgedit.IMGEDIT.name: imgedit.read_results,
    }
    return readers[name](paths)
