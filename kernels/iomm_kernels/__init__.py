"""Fused GPU operators for image-only pre-training. Empty for now: no operator is here yet.

What will live here: one operator a file, each running header -> reference -> forward -> backward -> autograd
-> public function -> `OP` record (name, fused, reference, cases, bytes_moved), which feeds the parity test,
the ahead-of-time compile gate and the benchmark. Until an operator exists, iomm runs plain PyTorch.

This package imports torch and triton only, and nothing of `iomm`.
"""
