"""A run's folder without the training: every weight random, also those that start at zero."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iomm import __version__
from iomm.checkpoint.folder import name_of, write_info
from iomm.checkpoint.streaming import Spec, write_sharded
from iomm.config import Config
from iomm.encoders import Encoders
from iomm.parallel.mesh import start
from iomm.parallel.weights import named_weights
from iomm.system import System

Z_IMAGE: dict[str, Any] = {
    "generator__family": "z_image",
    "generator__double_blocks": 0,
    "generator__single_blocks": 2,
    "generator__refiner_blocks": 1,
    "generator__rope_theta": 256.0,
    "generator__predict": "velocity",
}


def save_random_run(
    config: Config, *, step: int = 7, dtype: torch.dtype = torch.float32, ema: bool = True
) -> Path:
    """A checkpoint with weights and, if asked for, another random set as their EMA; the run's folder."""
    mesh = start(config.parallel)
    system = System(config, Encoders(config, mesh.device).shapes, mesh)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for prefix in ("model.", "ema.") if ema else ("model.",):
        for name, weight in named_weights(system).items():
            scale = 0.5 * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3
            offset = 1.0 if weight.ndim == 1 and not name.endswith("bias") else 0.0
            random = torch.randn(weight.shape, generator=generator) * scale + offset
            tensors[prefix + name] = random.to(dtype)
    checkpoint = config.run_dir / "checkpoints" / name_of(step)
    checkpoint.mkdir(parents=True)
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_sharded(checkpoint, specs, tensors.__getitem__)
    info = {
        "step": step,
        "config": config.to_dict(),
        "extra": {},
        "has_ema": ema,
        "iomm_version": __version__,
    }
    write_info(checkpoint, info)
    return config.run_dir
