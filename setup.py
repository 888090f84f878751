"""Package list of the two import packages, `iomm` and `iomm_kernels`. Everything else is in pyproject.toml.

`iomm_kernels` lies in kernels/, a folder that is no package itself: the top-level name `kernels` belongs to
another project that transformers looks for.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["iomm", "iomm.*"])
    + find_packages(where="kernels", include=["iomm_kernels", "iomm_kernels.*"]),
    package_dir={"iomm_kernels": "kernels/iomm_kernels"},
)
