"""Peak memory of a conversion both ways, on a random checkpoint.

    python tools/measure_conversion.py --params 1.6e9 [--folder SCRATCH]

Writes a checkpoint of random fp32 weights, exports it, imports the export, each in a process of its own, and
says how much more memory each held at its peak than the interpreter at its start (VmHWM: shared libraries and
mapped files count). Everything it wrote is removed again. It takes 8 bytes of disk for a parameter.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 1536
BLOCK_PARAMETERS = 36 * WIDTH**2  # of a double block


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def write_run(folder: Path, params: float) -> None:
    """A FLUX-family checkpoint of about `params` random weights, with tiny frozen models."""
    import torch
    from diffusers import AutoencoderKL

    from iomm import __version__, presets
    from iomm.checkpoint.folder import name_of, write_info
    from iomm.checkpoint.names import family_table
    from iomm.checkpoint.streaming import Spec, write_sharded
    from iomm.conditioning.conditioner import Conditioner
    from iomm.conditioning.random_mllm import save_random_internvl

    save_random_internvl(folder / "mllm", width=64, layers=1, image_tokens=4)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8,) * 4,
    }
    AutoencoderKL(**blocks, latent_channels=16, norm_num_groups=4).save_pretrained(folder / "vae")
    config = presets.tiny("measured", folder, steps=1).override(
        [
            f"mllm.path={folder / 'mllm'}",
            f"codec.path={folder / 'vae'}",
            f"generator.hidden_size={WIDTH}",
            f"generator.heads={WIDTH // 64}",
            "generator.rope_axes=[16,24,24]",
            "generator.token_channels=64",
            "generator.single_blocks=0",
            f"generator.double_blocks={max(1, round(params / BLOCK_PARAMETERS))}",
        ]
    )
    with torch.device("meta"):
        adapter = Conditioner(config.condition, 64, config.generator.condition_width).state_dict()
    shapes = {f"model.generator.{n}": s for n, s in family_table(config.generator).ours.items()}
    shapes |= {f"model.conditioner.{n}": tuple(t.shape) for n, t in adapter.items()}

    def get(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.rand(shapes[name], generator=generator)

    checkpoint = folder / "run" / "checkpoints" / name_of(1)
    checkpoint.mkdir(parents=True)
    write_sharded(checkpoint, {n: Spec(s, torch.float32) for n, s in shapes.items()}, get)
    info = {"step": 1, "config": config.to_dict(), "extra": {}, "has_ema": False, "iomm_version": __version__}
    write_info(checkpoint, info)


def export(folder: Path) -> None:
    from iomm.checkpoint.hf import export_run

    export_run(folder / "run", folder / "exported", ema=False)


def import_(folder: Path) -> None:
    from iomm.checkpoint.hf import import_folder

    import_folder(folder / "exported", folder / "imported")


STEPS: dict[str, Callable[[Path], None]] = {"export": export, "import": import_}


def _child(step: str, folder: Path, at_start: int) -> None:
    import iomm.checkpoint.hf  # noqa: F401 - measured apart

    loaded, began = memory("VmRSS"), time.monotonic()
    STEPS[step](folder)
    seconds = time.monotonic() - began
    result = {"start": at_start, "loaded": loaded, "peak": memory("VmHWM"), "s": seconds}
    sys.stdout.write(json.dumps(result) + "\n")


def _measure(step: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    at_start = memory("VmRSS")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=float, default=0.8e9, help="parameters (default 0.8e9)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--step", choices=["write", *STEPS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "write":
        write_run(arguments.folder, arguments.params)
        return 0
    if arguments.step is not None:
        _child(arguments.step, arguments.folder, at_start)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="conversion_", dir=arguments.folder))
    try:
        needed, free = int(8.5 * arguments.params), shutil.disk_usage(folder).free
        if free < needed:
            sys.stderr.write(f"{needed:,} bytes are needed in {folder}, {free:,} are free. Lower --params.\n")
            return 1
        writing = ["--step", "write", "--folder", str(folder), "--params", str(arguments.params)]
        subprocess.run([sys.executable, __file__, *writing], check=True)
        size = sum(f.stat().st_size for f in (folder / "run").rglob("*") if f.is_file())
        sys.stdout.write(f"checkpoint of {size / 1e9:.2f} GB\n")
        for step in STEPS:
            m = _measure(step, folder)
            sys.stdout.write(
                f"{step}: {m['s']:.0f} s, peak {(m['peak'] - m['start']) / 1e9:.2f} GB above the interpreter "
                f"({(m['loaded'] - m['start']) / 1e9:.2f} GB of it are the imported libraries)\n"
            )
            if step == "export":
                shutil.rmtree(folder / "run")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
