"""Transformer Engine's layers under a pretended GPU: constructed and looked at, never computed with.

    python tests/parallel/pretended_te.py > tests/parallel/te_names.jsonl

records names, shapes and splits of the small models' weights; needs Transformer Engine (recorded with
2.20.2), and the repository and its kernels/ on PYTHONPATH. `--check` goes through what else can be seen
without a GPU.
"""

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")  # of imports

# Before iomm, which without a GPU hides Transformer Engine from Megatron-Core.
import torch  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402  # pyright: ignore[reportMissingImports]
from torch import nn  # noqa: E402
from transformer_engine.common import recipe  # noqa: E402  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.quantization import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    DelayedScalingRecipeState,
    FP8GlobalStateManager,
)

from iomm.config import Fp8Config, ParallelConfig  # noqa: E402
from iomm.parallel import mesh as mesh_module  # noqa: E402
from iomm.parallel.backend import Layers, transformer_config  # noqa: E402
from iomm.parallel.backend_choice import te_missing  # noqa: E402
from iomm.parallel.fp8 import fp8_region, fp8_state, load_fp8_state, use_fp8  # noqa: E402
from iomm.parallel.mesh import Mesh  # noqa: E402
from iomm.system import FAMILIES  # noqa: E402
from tests.model.small_models import FLUX, Z_IMAGE  # noqa: E402

KEEP = ("image_in*", "condition_in*", "out*", "time*", "*modulation*")


def pretend_gpu() -> None:
    class Hopper:
        name, major, minor, multi_processor_count, total_memory = "pretended", 9, 0, 132, 80 << 30

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: Hopper  # type: ignore[assignment, return-value]


def build(backend: Any, mesh: Mesh, config: Any = FLUX) -> nn.Module:
    parallel = ParallelConfig(backend=backend)
    transformer = transformer_config(config.hidden_size, config.heads, torch.bfloat16, mesh, parallel)
    return FAMILIES[config.family](config, Layers(transformer, mesh))


def table(model: nn.Module) -> dict[str, list[Any]]:
    """Name -> [shape, axis along which tensor-parallel ranks split it or None], in the order of the model."""
    return {
        name: [list(w.shape), w.partition_dim if getattr(w, "tensor_model_parallel", False) else None]  # type: ignore[attr-defined]
        for name, w in model.named_parameters()
    }


def check(mesh: Mesh) -> None:
    assert te_missing(torch.bfloat16) is None and "fp64" in str(te_missing(torch.float64))
    local, model = build("local", mesh), build("te", mesh)
    model.load_state_dict(local.state_dict(), strict=True)
    assert list(model.state_dict()) == list(local.state_dict()), "something beside the weights is in it"
    with torch.device("meta"):
        assert table(build("te", mesh)) == table(model)

    # Inside a region the blocks' linears compute in FP8, the kept ones do not.
    settings = Fp8Config(
        recipe="blockwise", keep=("image_in*", "condition_in*", "out*", "time*", "*modulation*")
    )
    names = use_fp8(model, settings)
    te.Linear.forward = lambda self, x: FP8GlobalStateManager.is_fp8_enabled()  # type: ignore[method-assign]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, te.Linear)}
    transformer = transformer_config(32, 2, torch.bfloat16, mesh, ParallelConfig(backend="te"))
    with fp8_region(settings, transformer, mesh)():
        inside = {f"{name}.weight" for name, layer in linears.items() if layer(None)}
    assert inside == set(names) and len(names) == 24
    assert not any(layer(None) for layer in linears.values())

    # Recipes by name.
    from iomm.parallel import te as ours

    delayed = ours.recipe(Fp8Config(recipe="delayed", amax_history=16, margin=2))
    assert isinstance(delayed, recipe.DelayedScaling) and (delayed.amax_history_len, delayed.margin) == (
        16,
        2,
    )
    assert delayed.fp8_format == recipe.Format.HYBRID and delayed.amax_compute_algo == "max"
    assert isinstance(ours.recipe(Fp8Config(recipe="current")), recipe.Float8CurrentScaling)
    blockwise = ours.recipe(settings)
    assert isinstance(blockwise, recipe.Float8BlockScaling) and blockwise.fp8_format == recipe.Format.E4M3

    # Scales from the local layers' emulation, and back.
    emulated = build("local", mesh)
    use_fp8(emulated, Fp8Config(recipe="delayed", amax_history=16, keep=KEEP))
    state = {name: torch.rand_like(value) for name, value in fp8_state(emulated).items()}
    for value in state.values():
        value[:1] *= value.ndim == 1  # row 0 of a history is the running step's
    for name, layer in model.named_modules():
        if f"{name}.weight" in names:
            layer.fp8_meta |= {  # type: ignore[union-attr, operator]
                f"scaling_{way}": DelayedScalingRecipeState(
                    delayed, mode=mode, num_quantizers=count, device=torch.device("cpu")
                )
                for way, mode, count in (("fwd", "forward", 3), ("bwd", "backward", 2))
            }
    load_fp8_state(model, state)
    back = fp8_state(model)
    assert list(back) == list(state)
    assert all(back[name].equal(value) for name, value in state.items())


def main() -> None:
    mesh = mesh_module.start(ParallelConfig())
    pretend_gpu()
    if "--check" in sys.argv:
        check(mesh)
        return
    for config in (FLUX, Z_IMAGE):
        for name, entry in table(build("te", mesh, config)).items():
            sys.stdout.write(json.dumps([config.family, name, *entry]) + "\n")


if __name__ == "__main__":
    main()
