"""A checkpoint of ours as a conversion sees it: its settings, and its weights one by one."""

from pathlib import Path
from typing import final

from torch import Tensor

from iomm.checkpoint.folder import CheckpointError, check_files, find, read_info
from iomm.checkpoint.hf_layout import ADAPTER_PREFIX, GENERATOR_PREFIX
from iomm.checkpoint.name_table import Shape
from iomm.checkpoint.names import family_table
from iomm.checkpoint.streaming import ShardedReader, Spec
from iomm.config import Config


@final
class RunWeights:
    """The trained weights in a checkpoint, by their name in the `System`.

    Args:
        path: a run's folder (its newest checkpoint) or one checkpoint.
        ema: the averaged weights instead of the last ones. Weights that are not trained have no average.
    Raises:
        CheckpointError: none there, damaged, not of the architecture in its own settings, or without EMA.
    """

    def __init__(self, path: Path, *, ema: bool) -> None:
        self.checkpoint = find(path)
        self.info = read_info(self.checkpoint)
        check_files(self.info)
        if ema and not self.info.has_ema:
            raise CheckpointError(
                f"checkpoint {self.checkpoint} has no EMA (optimizer.ema_decay was null, or the weights were "
                "imported). Use the last weights with --raw."
            )
        self.config = Config.from_dict(self.info.config)
        self.table = family_table(self.config.generator)
        self._reader = ShardedReader(self.checkpoint)
        names = [n.removeprefix("model.") for n in self._reader.specs if n.startswith("model.")]
        self._stored = {
            name: f"ema.{name}" if ema and f"ema.{name}" in self._reader.specs else f"model.{name}"
            for name in names
        }
        self.adapter = {
            name.removeprefix(ADAPTER_PREFIX): self.spec(name)
            for name in sorted(names)
            if name.startswith(ADAPTER_PREFIX)
        }
        problems = compare(
            "checkpoint",
            {n[len(GENERATOR_PREFIX) :]: self.spec(n).shape for n in names if n.startswith(GENERATOR_PREFIX)},
            self.table.ours,
        )
        if problems:
            raise CheckpointError("\n".join([f"{self.checkpoint} does not fit its own settings:", *problems]))

    def spec(self, name: str) -> Spec:
        return self._reader.specs[self._stored[name]]

    def get(self, name: str) -> Tensor:
        return self._reader.get(self._stored[name])

    def their_specs(self) -> dict[str, Spec]:
        """The stock class's tensors, as they come out of this checkpoint."""
        return {
            name: Spec(shape, self.spec(GENERATOR_PREFIX + self.table.needs_ours(name)[0]).dtype)
            for name, shape in self.table.theirs.items()
        }

    def theirs(self, name: str) -> Tensor:
        """One tensor of the stock class."""
        return self.table.to_theirs(name, lambda ours: self.get(GENERATOR_PREFIX + ours))


def compare(where: str, found: dict[str, Shape], wanted: dict[str, Shape]) -> list[str]:
    """Every tensor that is missing, too much or of another shape; one line each."""
    missing = [f"  {where} misses {name} {wanted[name]}" for name in wanted if name not in found]
    extra = [f"  {where} has {name} {found[name]}, which does not belong" for name in found.keys() - wanted]
    wrong = [
        f"  {where} has {name} of shape {found[name]}, which must be {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    return missing + sorted(extra) + wrong
