"""From tar shards to batches: shards, schedule (order, mixture, buckets, views), decoders, loader, and the
cache of frozen encoders' outputs.

Every sample is a pure function of (shards, seed, global sample index), so a run resumes exactly by its step
number alone and sees the same samples under any number of ranks, micro-batch size, thread count or prefetch
depth.
"""
