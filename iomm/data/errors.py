"""What is said about a sample that cannot be used."""

from dataclasses import dataclass


class BadSample(ValueError):
    """One sample's bytes cannot be used; the run goes on without it.

    A damaged shard is not a bad sample: it raises an ordinary `ValueError` when the shard is opened.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BadSampleReport:
    """A bad sample with its place, for the log and the run's report."""

    shard: str  # path of the tar file
    key: str  # the sample key in that shard
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r} skipped: {self.reason}"
