"""Generators to Hugging Face and back: `export_run`, `import_folder`, `verify`, `inspect`.

The layout is in `hf_layout`, the names of weights in `names`. Everything streams: a conversion holds little
more than its largest tensor.
"""

from collections import Counter
from pathlib import Path

import torch

from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.hf_export import export_run
from iomm.checkpoint.hf_import import Imported, import_folder
from iomm.checkpoint.hf_layout import Manifest, read_json
from iomm.checkpoint.hf_run import RunWeights
from iomm.checkpoint.hf_verify import ParityReport, verify
from iomm.checkpoint.streaming import SafetensorsReader, Spec, total_bytes

__all__ = ["CheckpointError", "Imported", "ParityReport", "export_run", "import_folder", "inspect", "verify"]


def inspect(path: Path) -> str:
    """What a run, a checkpoint or a folder in the Hugging Face layout holds, a line each.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if (path / "transformer").is_dir() or (path / "config.json").is_file():
        return _inspect_folder(path)
    weights = RunWeights(path, ema=False)
    info, generator = weights.info, weights.config.generator
    stored = {
        name: Spec(shape, weights.spec(f"generator.{name}").dtype)
        for name, shape in weights.table.ours.items()
    }
    lines = [
        f"checkpoint {weights.checkpoint}, step {info.step}, saved by iomm {info.iomm_version}",
        f"family {generator.family}, EMA {'kept' if info.has_ema else 'not kept'}",
        _summary("generator", stored),
        _summary("query adapter", weights.adapter),
    ]
    return "\n".join(lines) + "\n"


def _inspect_folder(path: Path) -> str:
    transformer = path / "transformer" if (path / "transformer").is_dir() else path
    manifest = Manifest.read(path)
    lines = [
        f"folder {path}, {read_json(transformer / 'config.json').get('_class_name')}",
        "not exported by iomm"
        if manifest is None
        else f"exported by iomm {manifest.iomm_version}, step {manifest.step}, weights {manifest.weights}",
        _summary("transformer", SafetensorsReader(transformer).specs),
    ]
    if (path / "query_adapter").is_dir():
        lines.append(_summary("query adapter", SafetensorsReader(path / "query_adapter").specs))
    return "\n".join(lines) + "\n"


def _summary(what: str, specs: dict[str, Spec]) -> str:
    dtypes = Counter(str(s.dtype).removeprefix("torch.") for s in specs.values())
    kinds = ", ".join(f"{count} {name}" for name, count in dtypes.items())
    numbers = sum(torch.Size(s.shape).numel() for s in specs.values())
    size = total_bytes(specs.values())
    return f"{what}: {numbers:,} parameters in {len(specs)} tensors ({kinds}), {size:,} bytes"
