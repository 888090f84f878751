"""Damaged and strange inputs through `iomm shard` and the loader: each one must be accounted for.

    images, tars, records    bytes: sound ones of many kinds, and what damage does to them
    cases                    one input: files in a folder, what was put into them, by (seed, number) alone
    trial                    an input through make, index and loader: what became of each thing put in
    watch                    the same in child processes, with limits of time and memory
    table                    many inputs, by kind

`make fuzz-data` runs 10,000 of them, `make test` the first 500.
"""
