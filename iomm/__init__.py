"""iomm: image-only pre-training of image generators (method of arXiv 2603.16139).

Start with `iomm.cli` (the commands), `iomm.config` (every setting) and `iomm.training.train` (the loop).
Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
