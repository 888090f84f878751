"""How the work is laid over ranks: the mesh, the layers of a backend, the pipeline's schedules, and the
engine that steps the weights.

    mesh        who stands where; the groups that ranks talk in
    backend     column- and row-parallel layers: Megatron-Core's or Transformer Engine's
    stages      which blocks a pipeline rank holds
    pipeline    the order of forward and backward passes over chunks and micro-batches
    engine      one step: gradients, their sum over ranks, clip, update, average
    optimizer   AdamW and Muon, over chunks and what all ranks share
    masters     which parts of weights a rank steps; ema: their average
"""
