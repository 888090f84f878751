"""Damaged and strange inputs through `iomm shard` and the loader: each one must be accounted for.

    images, tars                    bytes: sound ones of many kinds, and what damage does to them
    cases, tar_cases, live_cases    one input: files in a folder, and what was put into them
    kinds                           all kinds, and the input of a (seed, number)
    trial, surroundings             an input through make, index and loader: what became of each thing put in
    watch                           the same in a child process, with limits of time and memory
    table                           many inputs, by kind

`make fuzz-data` runs 10,000 of them, `make test` the first 500.
"""
