"""Whether a folder in the Hugging Face layout and a run hold the same model: every tensor by its hash, every
module by its output on fixed inputs.

Nothing of the folder's own code runs: its classes are diffusers' and those that this package ships.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm.autoencoder import open_codec
from iomm.checkpoint.folder import find, read_info
from iomm.checkpoint.hf_layout import ADAPTER_PREFIX, GENERATOR_PREFIX, Manifest
from iomm.checkpoint.hf_run import RunWeights
from iomm.checkpoint.names import FAMILIES
from iomm.checkpoint.portable import pipeline
from iomm.checkpoint.portable.query_adapter import QueryAdapter
from iomm.checkpoint.streaming import Get, SafetensorsReader, Spec, raw_bytes
from iomm.conditioning.conditioner import Conditioner
from iomm.config import Config, ParallelConfig
from iomm.flow.path import grid_positions
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import start
from iomm.random import Stream, normal

# Relative to the largest value; both sides compute in fp32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ModuleReport:
    """One module of the folder against its counterpart in the run."""

    module: str
    tensors: int
    differing: list[str]  # tensors whose hashes differ
    hashes: dict[str, tuple[str, str]]  # name in the folder -> SHA-256 there, and of the run's
    output_difference: float | None  # largest, relative to the largest value; None: not computed

    @property
    def equal(self) -> bool:
        close = self.output_difference is None or self.output_difference <= TOLERANCE
        return not self.differing and close


@dataclass(frozen=True)
class ParityReport:
    """`verify`'s answer."""

    folder: str
    checkpoint: str
    weights: str
    modules: list[ModuleReport] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return all(module.equal for module in self.modules)

    def text(self) -> str:
        """A table for the terminal."""
        lines = [f"{self.folder}  against  {self.checkpoint} ({self.weights})"]
        lines.append(f"{'module':<15}{'tensors':>8}{'differing':>11}{'output difference':>20}")
        for m in self.modules:
            output = "not computed" if m.output_difference is None else f"{m.output_difference:.1e}"
            lines.append(f"{m.module:<15}{m.tensors:>8}{len(m.differing):>11}{output:>20}")
            lines += [f"  differs: {name}" for name in m.differing]
        return "\n".join([*lines, "equal" if self.equal else "NOT EQUAL"]) + "\n"


def verify(folder: Path, run: Path, *, ema: bool | None = None, outputs: bool = True) -> ParityReport:
    """Compare a folder with a run, and write the report beside the folder as NAME.verify.json.

    Args:
        ema: the run's averaged weights or its last ones; None: those that the folder says it has.
        outputs: compare outputs too, which takes a whole module's memory twice.
    Raises:
        CheckpointError: one of them is missing, damaged or of another architecture.
    """
    manifest = Manifest.read(folder)
    if ema is None:
        ema = manifest is not None and manifest.weights == "ema" and read_info(find(run)).has_ema
    weights = RunWeights(run, ema=ema)
    dtype = getattr(torch, manifest.dtype) if manifest is not None and manifest.dtype else None
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    modules = [
        _report(
            "transformer",
            SafetensorsReader(transformer),
            weights.their_specs(),
            weights.theirs,
            dtype,
            lambda: _transformer_difference(transformer, weights) if outputs else None,
        )
    ]
    adapter = folder / "query_adapter"
    if adapter.is_dir():
        ours: Get = lambda name: weights.get(ADAPTER_PREFIX + name)  # noqa: E731
        difference = lambda: _adapter_difference(adapter, weights) if outputs else None  # noqa: E731
        modules.append(
            _report("query adapter", SafetensorsReader(adapter), weights.adapter, ours, dtype, difference)
        )
    if (folder / "vae" / "config.json").is_file():
        modules.append(_vae_report(folder / "vae", weights.config, outputs=outputs))
    report = ParityReport(str(folder), str(weights.checkpoint), "EMA" if ema else "raw", modules)
    data = {"equal": report.equal, "tolerance": TOLERANCE, **asdict(report)}
    folder.absolute().with_name(f"{folder.absolute().name}.verify.json").write_text(
        json.dumps(data, indent=1) + "\n"
    )
    return report


def _report(
    module: str,
    theirs: SafetensorsReader,
    specs: dict[str, Spec],
    ours: Get,
    dtype: torch.dtype | None,
    output_difference: Callable[[], float | None],
) -> ModuleReport:
    hashes = {}
    for name in sorted(theirs.specs.keys() | specs.keys()):
        left = tensor_hash(theirs.get(name)) if name in theirs.specs else "missing"
        right = tensor_hash(ours(name).to(dtype)) if name in specs else "missing"
        hashes[name] = (left, right)
    differing = [name for name, (left, right) in hashes.items() if left != right]
    return ModuleReport(module, len(hashes), differing, hashes, output_difference())


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _inputs(samples: int, *shape: int) -> Tensor:
    """Fixed fp32 inputs (B, *shape)."""
    numbers = normal(0, Stream.SAMPLE, torch.arange(samples), torch.Size(shape).numel())
    return numbers.view(samples, *shape)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    largest = max(ours.abs().max().item(), torch.finfo(torch.float32).tiny)
    return (ours - theirs).abs().max().item() / largest


def _fill(module: nn.Module, get: Get) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(get(name))


@torch.no_grad()
def _transformer_difference(folder: Path, weights: RunWeights) -> float:
    """Both in fp32 on the CPU; only one of them is in memory at a time."""
    import diffusers

    from iomm.model.mmdit import unvaried_inputs
    from iomm.system import FAMILIES as GENERATORS

    generator, patch = weights.config.generator, weights.config.codec.patch
    x, condition = _inputs(2, 16, generator.token_channels), _inputs(2, 5, generator.condition_width)
    t_B = torch.tensor([0.25, 0.75])
    guidance = generator.guidance_value if generator.guidance_embedding else None
    stock: Any = getattr(diffusers, FAMILIES[generator.family].their_class)
    model = stock.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
    )
    theirs = pipeline.predict(model, x, t_B, condition, patch, guidance)
    del model
    mesh = start(ParallelConfig())
    backend = transformer_config(
        generator.hidden_size, generator.heads, torch.float32, mesh, ParallelConfig()
    )
    ours = GENERATORS[generator.family](generator, Layers(backend, mesh))
    _fill(ours, lambda name: weights.get(GENERATOR_PREFIX + name))
    out = ours(x, t_B, condition, grid_positions(4, 4), **unvaried_inputs(generator, 2, x.device))
    return _relative(out, theirs)


@torch.no_grad()
def _adapter_difference(folder: Path, weights: RunWeights) -> float:
    config = weights.config
    loader: Any = QueryAdapter
    theirs = loader.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
    )
    width = theirs.config["width"]
    ours = Conditioner(config.condition, width, config.generator.condition_width)
    _fill(ours, lambda name: weights.get(ADAPTER_PREFIX + name))
    c_BPD = _inputs(2, 7, width)
    difference = _relative(ours.connector(c_BPD, None), theirs.connector(c_BPD))
    if ours.adapter is not None:
        queries = ours.adapter(c_BPD, torch.ones(2, 7, dtype=torch.bool))
        difference = max(difference, _relative(queries, theirs.adapter(c_BPD)))
    return difference


@torch.no_grad()
def _vae_report(folder: Path, config: Config, *, outputs: bool) -> ModuleReport:
    """The folder's autoencoder against the one that the run names, if it is on this machine in files."""
    settings = replace(config.codec, path=str(folder), revision=None)
    theirs = open_codec(settings, torch.float32, torch.device("cpu"))
    ours = open_codec(config.codec, torch.float32, torch.device("cpu"))
    pairs = {name: tensor_hash(tensor) for name, tensor in theirs.vae.state_dict().items()}
    own = {name: tensor_hash(tensor) for name, tensor in ours.vae.state_dict().items()}
    hashes = {
        name: (pairs.get(name, "missing"), own.get(name, "missing"))
        for name in sorted(pairs.keys() | own.keys())
    }
    differing = [name for name, (there, here) in hashes.items() if there != here]
    difference = None
    if outputs:
        x = _inputs(1, 4, ours.token_channels)
        decoded = pipeline.decode_tokens(theirs.vae, x, config.codec.patch)
        levels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255)
        difference = _relative(ours.decode(x).float(), levels)
    return ModuleReport("vae", len(hashes), differing, hashes, difference)
