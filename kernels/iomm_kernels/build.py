"""Builds what is compiled: operators, csrc/*.cpp into one library and csrc/*.cu into another, and the decoder
of JPEGs, csrc/*.c, into a third.

    python -m iomm_kernels.build        what this machine's compilers allow, beside this file (`make kernels`)

Operators see torch through its stable ABI only, so a library serves every Python and every torch from 2.10
on; the decoder sees neither. A file `<library>.digest` holds the digest of what a library was built from: an
unchanged one is left alone, and one that is older than its sources is refused.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"  # of a checkout; an installed package has none
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
HIDE = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library, the suffix of its sources and the compiler that makes it."""

    name: str
    suffix: str
    headers: tuple[str, ...]  # how the names of the headers begin that its sources include
    compiler: str
    variable: str  # environment variable that names another compiler
    flags: tuple[str, ...]
    links: tuple[str, ...]
    torch: bool = True  # whether it is made of operators; its `links` then are torch's, else the system's
    probe: str = ""  # a source that the compiler can read where the system has what is needed
    needs: str = ""  # what that is, and how to get it

    @property
    def file(self) -> str:
        return f"{self.name}.abi3.so"

    def sources(self) -> list[Path]:
        return sorted(SOURCES.glob(f"*{self.suffix}"))

    def digest(self) -> str:
        """Of everything the library is made from."""
        headers = [path for path in sorted(SOURCES.glob("*.h")) if path.name.startswith(self.headers)]
        files = (*self.sources(), *headers)
        contents = [repr((self.flags, self.links, TORCH_TARGET)).encode(), *(f.read_bytes() for f in files)]
        return hashlib.sha256(b"\0".join(contents)).hexdigest()

    def program(self) -> str | None:
        """Path of the compiler; None where there is none."""
        return shutil.which(os.environ.get(self.variable) or self.compiler)

    def problem(self) -> str | None:
        """Why it cannot be built here; None if it can."""
        if not self.sources():
            return "has no sources here (csrc/ of a checkout)"
        program = self.program()
        if program is None:
            asked = os.environ.get(self.variable)
            return f"needs a compiler {asked or self.compiler!r} on PATH, or another named in {self.variable}"
        if self.torch and torch_folder() is None:
            return "needs torch's headers, and torch is not installed for this Python"
        if (
            self.probe
            and subprocess.run(
                [program, "-E", "-"], input=self.probe, text=True, capture_output=True, check=False
            ).returncode
        ):
            return f"needs {self.needs}"
        return None

    def stale(self, folder: Path = HERE) -> str | None:
        """Why the library in this folder is of no use; None if it is there and made from these sources."""
        path = folder / self.file
        if not path.exists():
            needs = self.needs or self.compiler
            return f"is not built: {path} is not there (run `make kernels`; it needs {needs})"
        record = folder / f"{self.file}.digest"
        if self.sources() and (not record.exists() or record.read_text() != self.digest()):
            return f"is older than its sources in {SOURCES} (run `make kernels`)"
        return None

    def missing(self) -> list[str]:
        """Libraries of torch that it links and the installed torch has not: a CPU build has no torch_cuda. It
        can be built nevertheless, and not loaded."""
        if not self.torch:
            return []
        folder = _torch() / "lib"
        return [name for name in self.links if not (folder / f"lib{name}.so").exists()]


CPU = Library(
    name="_csrc",
    suffix=".cpp",
    headers=("clones", "common", "norm_rows", "philox", "stream_rows"),
    compiler="c++",
    variable="CXX",
    flags=("-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", *HIDE),
    links=("torch_cpu",),
)
CUDA = Library(
    name="_csrc_cuda",
    suffix=".cu",
    headers=("cuda_common",),
    compiler="nvcc",
    variable="NVCC",
    flags=("-O3", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", ",".join(HIDE)),
    links=("torch_cpu", "torch_cuda"),
)
JPEG = Library(
    name="_jpeg",
    suffix=".c",
    headers=("clones", "resize_rows"),
    compiler="cc",
    variable="CC",
    # GNU's C fuses multiplication and addition; without signed zeros and NaN clamping is one instruction.
    flags=(
        "-O3",
        "-std=gnu11",
        "-fno-trapping-math",
        "-fno-signed-zeros",
        "-ffinite-math-only",
        "-Wno-psabi",
        *HIDE,
    ),
    links=("jpeg", "m"),
    torch=False,
    probe="""#include <stdio.h>
#include <jpeglib.h>
#if LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error older than 2.1
#endif
""",
    needs="cc and the headers of libjpeg-turbo 2.1 or newer (Debian: apt-get install libjpeg62-turbo-dev)",
)
LIBRARIES = (CPU, CUDA, JPEG)


def torch_folder() -> Path | None:
    """Where torch's include/ and lib/ are, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _torch() -> Path:
    folder = torch_folder()
    assert folder is not None, "torch is not installed"
    return folder


def compile_command(library: Library, source: Path, target: Path) -> list[str]:
    """One source file to one object file."""
    program = library.program()
    assert program is not None, library.problem()
    torch = [TORCH_TARGET, "-isystem", str(_torch() / "include")] if library.torch else []
    return [program, *library.flags, *torch, "-c", str(source), "-o", str(target)]


def link_commands(library: Library, objects: list[Path], target: Path) -> list[list[str]]:
    """Object files to the library. It names torch's libraries without their folder: torch is in the process
    when it is loaded. One that the installed torch has not is stood for by an empty one."""
    program = library.program()
    assert program is not None, library.problem()
    folder = target.parent
    host = CPU.program() or CPU.compiler  # nvcc needs one too
    empty = [host, "-shared", "-x", "c++", os.devnull]
    stubs = [
        [*empty, f"-Wl,-soname=lib{name}.so", "-o", str(folder / f"lib{name}.so")]
        for name in library.missing()
    ]
    search = [f"-L{_torch() / 'lib'}", f"-L{folder}"] if library.torch else []
    links = [f"-l{name}" for name in library.links]
    return [*stubs, [program, "-shared", *map(str, objects), *search, *links, "-o", str(target)]]


def build(library: Library, folder: Path, jobs: int = 2) -> Path:
    """Build into `folder`, beside a file with the digest; what is there and unchanged is left alone.

    Raises:
        ValueError: it cannot be built here.
        RuntimeError: the compiler failed; the message is the compiler's.
    """
    if problem := library.problem():
        raise ValueError(f"{library.file} {problem}.")
    target, record = folder / library.file, folder / f"{library.file}.digest"
    digest = library.digest()
    if target.exists() and record.exists() and record.read_text() == digest:
        return target
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        objects = [Path(scratch) / f"{source.stem}.o" for source in library.sources()]
        commands = [compile_command(library, s, o) for s, o in zip(library.sources(), objects, strict=True)]
        list(pool.map(run, commands))
        made = Path(scratch) / library.file
        for command in link_commands(library, objects, made):
            run(command)
        record.unlink(missing_ok=True)
        shutil.copy(made, folder / f".{library.file}.tmp")
        os.replace(folder / f".{library.file}.tmp", target)  # a process that has the old one open keeps it
    record.write_text(digest)
    return target


def run(command: list[str]) -> str:
    """Standard output and errors of a compiler.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def main() -> int:
    """Build what can be built here; a missing compiler is said and is no failure, a failing one is."""
    for library in LIBRARIES:
        problem = library.problem()
        if problem is None and library.missing():
            problem = "could not be loaded: the installed torch is a CPU build"
        if problem is not None:
            sys.stdout.write(f"{library.file}: not built, it {problem}\n")
        else:
            sys.stdout.write(f"{build(library, HERE)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
