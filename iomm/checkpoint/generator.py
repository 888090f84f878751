"""Open a checkpoint to generate from: its own configuration, encoders and weights, no optimizer."""

from dataclasses import replace
from pathlib import Path

from iomm.checkpoint.sharded import find, load_weights, read_info
from iomm.config import Config, Fp8Config, ParallelConfig
from iomm.encoders import Encoders
from iomm.parallel.mesh import start
from iomm.system import System, build


def open_generator(path: Path, *, ema: bool) -> tuple[Config, Encoders, System]:
    """The generator of a run's newest checkpoint, or of one checkpoint, in evaluation mode.

    Args:
        path: a run's folder or a checkpoint's.
        ema: the averaged weights instead of the last ones; a run that kept no average has only the last ones.
    Raises:
        CheckpointError: no checkpoint, a damaged one, or no EMA in it.
        FileNotFoundError: the MLLM or autoencoder that it was trained with is no longer where it was.
    """
    checkpoint = find(path)
    config = Config.from_dict(read_info(checkpoint).config)
    # Whole, in this process and in the compute precision, whatever the layout that it was trained in.
    parallel = ParallelConfig(backend=config.parallel.backend)
    # Without the run's feature cache, which may be on another machine: no picture is in it.
    data = replace(config.data, cache_dir=None)
    config = replace(config, parallel=parallel, fp8=Fp8Config(), data=data)
    mesh = start(config.parallel)
    encoders = Encoders(config, mesh.device)
    system = build(config, encoders.shapes, mesh).eval().requires_grad_(False)
    load_weights(checkpoint, system, ema=ema, mesh=mesh)
    return config, encoders, system
