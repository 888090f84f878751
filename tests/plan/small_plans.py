"""Small configurations of both families, as the planner takes them; no file is needed."""

import dataclasses

from iomm.config import Config, GeneratorConfig, ParallelConfig
from iomm.plan.hardware import Cluster, find_gpu
from iomm.plan.shapes import CodecShape, LmShape, MllmShape, VitShape
from iomm.plan.workload import Workload
from iomm.presets import b

FLUX = GeneratorConfig(
    hidden_size=64, heads=4, double_blocks=3, single_blocks=2, rope_axes=(4, 6, 6), condition_width=48
)
Z_IMAGE = GeneratorConfig(
    family="z_image",
    hidden_size=96,
    heads=4,
    double_blocks=0,
    single_blocks=5,
    refiner_blocks=1,
    rope_axes=(8, 8, 8),
    condition_width=48,
)
LM = LmShape(width=64, layers=2, heads=4, kv_heads=2, mlp=160, vocabulary=100, tied=True)
VIT = VitShape(width=32, layers=2, mlp=128, image_px=64, patch_px=8, shuffle=2)
MLLM = MllmShape(name="small", lm=LM, vit=VIT)
CODEC = CodecShape(name="small", channels=(8, 16), resnets=1, latent_channels=16)
H800 = find_gpu("h800")


def config_of(generator: GeneratorConfig, parallel: ParallelConfig | None = None) -> Config:
    """Preset B's settings around a small generator."""
    base = b("small", images=("images",))
    condition = dataclasses.replace(
        base.condition,
        queries=8,
        adapter_heads=4,
        connector=dataclasses.replace(base.condition.connector, layers=2, heads=4),
    )
    return dataclasses.replace(
        base,
        generator=generator,
        condition=condition,
        data=dataclasses.replace(base.data, image_px=32),
        parallel=parallel or ParallelConfig(),
        train=dataclasses.replace(base.train, global_batch_images=64, micro_batch_images=4),
    )


def small_work(generator: GeneratorConfig = FLUX, parallel: ParallelConfig | None = None) -> Workload:
    """64 image tokens, 16 patch tokens."""
    return Workload(config=config_of(generator, parallel), mllm=MLLM, codec=CODEC)


def cluster(gpus: int) -> Cluster:
    return Cluster(gpu=H800, gpus=gpus)
