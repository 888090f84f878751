"""The ahead-of-time gate: compile every shipped kernel for sm_90a, without a GPU, and judge its machine code.

    python tools/kernels_gate.py [--only WORD] [--out runs/kernels_gate] [--processes 2]

Writes gate.md and gate.json and exits with 1 where a kernel
    - spills registers to local memory
    - is streaming and makes less than 95 % of its global accesses 128 bits wide, stated scalars apart
    - leaves fewer warps resident than its stated occupancy
    - states tensor-core instructions and has none, or moves fewer bytes than its minimum (a wrong statement)

Counts are of instructions in the code, not of executions. Predicted microseconds are bytes at 3.35 TB/s, an
H800's memory: no GPU has run these kernels for this table.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tools")]

from csrc_gate import csrc_gate  # noqa: E402

from iomm_kernels.record import Compile  # noqa: E402

BYTES_PER_US = 3.35e6
WIDE_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the machine code of one kernel shows."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    wide_share: float  # of global accesses to rows, those 128 bits wide
    tensor_core: int  # HGMMA and HMMA instructions
    bytes_min: int
    bytes_actual: int
    problems: list[str] = field(default_factory=list)

    @property
    def predicted_us(self) -> float:
        return self.bytes_actual / BYTES_PER_US


def occupancy(registers: int, shared_bytes: int, warps: int) -> float:
    """Resident warps of an SM of compute capability 9.0 / 64 (CUDA's occupancy formula): 65,536 registers in
    units of 256 a warp and 4 warps, 228 KiB shared memory with 1 KiB reserved a block, 32 blocks."""
    registers_a_warp = -(-registers * 32 // 256) * 256
    by_registers = (65_536 // registers_a_warp // 4 * 4) // warps
    by_shared = 233_472 // (-(-(shared_bytes + 1024) // 128) * 128)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def compile_kernel(compiled: Compile) -> Any:
    """The compiled kernel (PTX and cubin) for sm_90a."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compiled.kernel.arg_names
    source = ASTSource(
        fn=compiled.kernel,
        signature={name: compiled.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in compiled.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compiled.aligned},
    )
    # Newer versions of Triton change the default of enable_fp_fusion: pinned.
    options = {"num_warps": compiled.num_warps, "num_stages": compiled.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def disassemble(cubin: bytes) -> tuple[dict[str, int], collections.Counter[str]]:
    """Resources of a cubin by cuobjdump's names (REG, STACK, SHARED, LOCAL), and how often each instruction
    appears. Both tools come inside Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool("cuobjdump"), "-res-usage", file.name)
        code = _output(tool("nvdisasm"), "-c", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", code)
    return resources, collections.Counter(found)


def tool(name: str) -> Path:
    """One of NVIDIA's tools inside Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _output(program: Path, *arguments: str) -> str:
    return subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True).stdout


def judge(compiled: Compile) -> Row:
    """Compile one configuration and say what is wrong with it."""
    kernel = compile_kernel(compiled)
    return judge_code(compiled, *disassemble(kernel.asm["cubin"]), kernel.metadata.shared, kernel.asm["ptx"])


def judge_code(
    compiled: Compile,
    resources: dict[str, int],
    instructions: collections.Counter[str],
    shared_bytes: int,
    ptx: str,
) -> Row:
    """What the code of a kernel shows, and what is wrong with it."""

    def count(pattern: str) -> int:
        return sum(n for name, n in instructions.items() if re.match(pattern, name))

    bulk = count(r"UTMA|UBLKCP")
    wide = bulk + count(r"(LDG|STG|LDGSTS)\.(.*\.)?128")
    narrow = max(0, bulk + count(r"LDG|STG|LDGSTS") - wide - compiled.scalars)
    row = Row(
        name=compiled.name,
        registers=resources["REG"],
        spill_bytes=max(resources["STACK"], resources["LOCAL"]) + 4 * count(r"LDL|STL"),
        shared_bytes=shared_bytes,
        occupancy=occupancy(resources["REG"], shared_bytes, compiled.num_warps),
        wide_share=wide / max(1, wide + narrow),
        tensor_core=count(r"HGMMA|HMMA"),
        bytes_min=compiled.bytes_min,
        bytes_actual=compiled.bytes_actual,
    )
    row.problems.extend(_problems(row, compiled, ptx))
    return row


def _problems(row: Row, compiled: Compile, ptx: str) -> list[str]:
    narrow = f"only {row.wide_share:.0%} of its row accesses are 128 bits wide; {WIDE_SHARE:.0%} is the bound"
    found = {
        "is not compiled for sm_90a": ".target sm_90a" not in ptx,
        f"spills ({row.spill_bytes} bytes of local memory and of accesses to it)": row.spill_bytes > 0,
        f"is streaming, but {narrow}": compiled.streaming and row.wide_share < WIDE_SHARE,
        f"has occupancy {row.occupancy:.2f}; {compiled.min_occupancy} is its bound": (
            row.occupancy < compiled.min_occupancy
        ),
        "has no tensor-core instruction": compiled.dot and not row.tensor_core,
        f"states {row.bytes_actual} bytes, less than its minimum {row.bytes_min}": (
            row.bytes_actual < row.bytes_min
        ),
    }
    return [text for text, wrong in found.items() if wrong]


def _judge_shipped(op_index: int, compile_index: int) -> Row:
    import iomm_kernels

    return judge(iomm_kernels.OPS[op_index].compiles[compile_index])


def judge_all(only: str, processes: int) -> list[Row]:
    """A row for every shipped configuration whose name holds the word."""
    import iomm_kernels

    jobs = [
        (i, j)
        for i, op in enumerate(iomm_kernels.OPS)
        for j, compiled in enumerate(op.compiles)
        if only in compiled.name
    ]
    if not jobs:
        raise SystemExit(f"no shipped kernel has {only!r} in its name.")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_judge_shipped, *zip(*jobs, strict=True)))


def table(rows: list[Row]) -> str:
    """Markdown."""
    columns = (
        "kernel", "registers", "spills, B", "shared, B", "occupancy", "128-bit", "tensor core", "MB",
        "/ minimum", "predicted us",
    )  # fmt: skip
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    for r in rows:
        code = [
            str(r.registers),
            str(r.spill_bytes),
            str(r.shared_bytes),
            f"{r.occupancy:.2f}",
            f"{r.wide_share:.0%}",
        ]
        ratio = f"{r.bytes_actual / max(1, r.bytes_min):.2f}"
        traffic = [f"{r.bytes_actual / 1e6:.1f}", ratio, f"{r.predicted_us:.1f}"]
        lines.append([r.name, *code, str(r.tensor_core), *(traffic if r.bytes_actual else ["", "", ""])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """0 where every kernel passes, 1 where one does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name holds this word")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "kernels_gate", help="folder of the results"
    )
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2))
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing. Unset it.")
    rows = judge_all(options.only, options.processes)
    csrc_rows, unchecked = csrc_gate(options.out / "csrc", judge_code, tool("cuobjdump"))
    rows += [row for row in csrc_rows if options.only in row.name]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gate.md").write_text(table(rows))
    (options.out / "gate.json").write_text(
        json.dumps([asdict(r) | {"predicted_us": r.predicted_us} for r in rows], indent=1)
    )
    sys.stdout.write(table(rows))
    problems = [f"{r.name}: {problem}" for r in rows for problem in r.problems]
    if unchecked is not None:
        sys.stdout.write(f"{unchecked}\n")
    sys.stdout.write("\n".join([*problems, f"{len(rows)} kernels, {len(problems)} problems"]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
