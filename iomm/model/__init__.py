"""The generator: a FLUX-family MM-DiT on column- and row-parallel linears."""
