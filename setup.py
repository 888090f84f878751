"""Package list of the two import packages, `iomm` and `iomm_kernels`, and the build of csrc/. Everything else
is in pyproject.toml.

`iomm_kernels` lies in kernels/, a folder that is no package itself: the top-level name `kernels` belongs to
another project that transformers looks for.

`iomm.launch.scripts` is examples/slurm: `iomm launch slurm` submits the script that users read there.

csrc/ is compiled into a wheel where torch and a compiler are there. pip's isolated builds see no torch, so
that needs `pip wheel --no-build-isolation .`; a checkout builds in place with `make kernels`. Without csrc/
the package works.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))

from iomm_kernels import build  # noqa: E402

LIBRARIES = [
    library for library in build.LIBRARIES if library.problem() is None and not library.missing()
]


class BuildLibraries(build_ext):
    """Lets `iomm_kernels.build` make the libraries, which are no Python modules."""

    def build_extension(self, ext: Extension) -> None:
        library = next(library for library in LIBRARIES if ext.name == f"iomm_kernels.{library.name}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        assert target.name == library.file, f"setuptools wants {target.name}, the loader {library.file}"
        build.build(library, target.parent)


setup(
    packages=find_packages(include=["iomm", "iomm.*"])
    + ["iomm.launch.scripts"]
    + find_packages(where="kernels", include=["iomm_kernels", "iomm_kernels.*"]),
    package_dir={"iomm_kernels": "kernels/iomm_kernels", "iomm.launch.scripts": "examples/slurm"},
    ext_modules=[
        Extension(
            f"iomm_kernels.{library.name}",
            [str(path.relative_to(Path(__file__).resolve().parent)) for path in library.sources()],
            py_limited_api=True,
        )
        for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if LIBRARIES else {},
)
