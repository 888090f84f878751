"""Putting runs on a cluster: `iomm launch slurm`. Needs no torch, so it works on a login node."""
