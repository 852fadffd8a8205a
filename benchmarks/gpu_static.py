"""Compiles every CUDA kernel for several architectures and looks at what came out; needs nvcc, but no GPU.

    python benchmarks/gpu_static.py             # compare with benchmarks/results/gpu_static.json; 1 when it got worse
    python benchmarks/gpu_static.py --update    # write it anew, and the table beside it

Worse is: a spill, a vector load that got narrower, a matrix instruction or asynchronous copy that is gone, or more than
5% more instructions per multiply-add in the hot loop (the innermost loop with the most multiply-adds).

The bound is what the loop could reach if nothing ever waited: of the peak of the units that multiply, limited by what
an SM issues in a cycle (4 instructions) and by what its shared memory delivers (128 bytes; of what all lanes want, two
registers). It is an upper bound, not a speed: it knows no latency, no cache and no memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sass
from gpu_model import ARCHITECTURES, bound, occupancy

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 1.05


@dataclass(frozen=True)
class Expected:
    """What a kernel is launched with, and what must be found in its code; on 7.5 nothing of tensor cores and copies."""

    kernel: str  # regular expression
    threads: int = 256
    shared_bytes: int = 0  # dynamic, as the host side usually asks for
    contains: tuple[str, ...] = ()  # anywhere in the kernel
    hot: tuple[str, ...] = ()  # in the hot loop
    uniform_loads: bool = True  # global loads of the hot loop: one address for the whole warp
    # Multiply-adds that a 16-byte read of shared memory feeds; the other reads in the hot loop are of weights, by all
    # lanes at once. 0: all are the lanes' own.
    products_of_read: int = 0


TENSOR = ("LDGSTS", "LDSM", "HMMA")
SPARSE_TENSOR = ("LDGSTS", "LDSM", "HMMA.SP")
# kConv2d24Variants: tiles of 16 rows and of 8 pixels of a warp, warps of rows and of pixels, groups of such warps.
TILES_24 = ((4, 8, 2, 2, 1), (4, 4, 2, 4, 1), (4, 4, 1, 2, 2), (4, 4, 2, 2, 3), (2, 4, 2, 2, 1))
EXPECTED = (
    Expected(r"^conv2d_tensor_kernel<\w+, 8,", 512, 122 << 10, TENSOR, ("HMMA.16816", "LDSM.x4"), False),
    Expected(r"^conv2d_tensor_kernel<\w+, 16,", 512, 122 << 10, TENSOR, ("HMMA.16816", "LDSM.x4", "LDG.64"), False),
    Expected(r"^conv2d_tensor_kernel<", 512, 122 << 10, TENSOR, ("HMMA.16816", "LDSM.x4", "LDG.64"), False),
    # In the hot loop as well: the copies of two steps ahead, and the metadata.
    *(
        Expected(
            rf"^conv2d_24_kernel<\w+, {m}, {n}, {rows}, {pixels}, {depth}>",
            32 * rows * pixels * depth,
            48 * depth * (16 * m * rows * 4 + 8 * n * pixels * 8 + 8 * m * rows),
            SPARSE_TENSOR,
            ("HMMA.SP.16832", "LDSM.x4", "LDGSTS"),
        )
        for m, n, rows, pixels, depth in TILES_24
    ),
    *(
        Expected(rf"^conv2d_kernel<{v},", 256, 72 << 10, ("LDGSTS",), ("FFMA", "LDS.128"), products_of_read=4 * v)
        for v in (1, 2, 4, 8)
    ),
    Expected(r"^to_lanes_kernel<", 128),
)
# As instructions of other widths, where the compiler has better ones on a later architecture.
SAME = {"FFMA": ("FFMA", "FFMA2")}
BEFORE_COPIES = ("7.5",)  # without asynchronous copies; the kernels for tensor cores trap there


def expected_of(kernel: str) -> Expected:
    return next((e for e in EXPECTED if re.search(e.kernel, kernel)), Expected(kernel))


# ---- compiling ----


def toolkit() -> Path:
    """The one that setup.py builds with."""
    import os

    spec = importlib.util.spec_from_file_location("sparsekd_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    home = setup.find_cuda_home(os.environ)
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        sys.exit("Expected a CUDA toolkit with nvcc (at CUDA_HOME, nvcc or /usr/local/cuda), got none")
    return Path(home)


def cuobjdump(home: Path) -> Path:
    """The toolkit's, or the one that comes with triton."""
    spec = importlib.util.find_spec("triton")
    folders = [home / "bin"]
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return folder / "cuobjdump"
    sys.exit(f"Expected cuobjdump and nvdisasm in {home}/bin or in the triton package, got none")


def output_of(*command) -> str:
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(f"Expected `{Path(command[0]).name}` to succeed, got: {(ran.stderr or ran.stdout).strip()[-2000:]}")
    return ran.stdout


def demangled(names: list[str]) -> list[str]:
    """`conv2d_kernel<1, 4, 4, 64, 1>`: without namespaces and parameters."""
    if not names:
        return []
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    whole = output_of(filt, *names).splitlines() if filt else names
    short = []
    for name in whole:
        name = name.replace("(int)", "").replace("(anonymous namespace)::", "").removeprefix("void ")
        name = re.sub(r"\((?:.(?!\())*\)$", "", name)  # the parameters
        short.append(re.sub(r"\b\w+::", "", name))
    return short


def compile_source(source: Path, architecture: str, home: Path, folder: Path) -> list[dict]:
    """One row for each kernel of a source."""
    cubin = folder / f"{source.stem}-{architecture}.cubin"
    target = "sm_" + architecture.replace(".", "")
    output_of(home / "bin" / "nvcc", "-std=c++20", "-O3", "-cubin", f"-arch={target}", source, "-o", cubin)
    dump = cuobjdump(home)
    resources = sass.parse_resources(output_of(dump, "-res-usage", cubin))
    functions = sass.parse_sass(output_of(dump, "-sass", cubin))
    names = list(functions)
    return [
        row_of(name, architecture, resources[mangled], functions[mangled])
        for mangled, name in zip(names, demangled(names), strict=True)
    ]


# ---- one kernel on one architecture ----


def hot_loop(code: list[sass.Instruction]) -> list[sass.Instruction]:
    """The innermost loop with the most multiply-adds, times their share of it, or [] where multiplying is not what the
    kernel does: an activation at the end has some, too, among many others.

    Of a loop that the compiler cut in two, while there is something to copy and after that, the one that copies.
    """
    loops = sass.innermost_loops(code)
    best = max(
        loops, key=lambda loop: (sum(map(sass.macs, loop)) ** 2 / len(loop), sass.mix(loop)["LDGSTS"]), default=[]
    )
    if any(i.name == "HMMA" for i in code) and not any(i.name == "HMMA" for i in best):
        # Turns that have nothing to multiply became a loop of their own, in the one that multiplies.
        holding = [loop for loop in sass.innermost_loops(code, nested=True) if any(i.name == "HMMA" for i in loop)]
        best = min(holding, key=len, default=best)
    multiplying = sum(1 for instruction in best if sass.macs(instruction))
    # One instruction of the tensor cores is work enough.
    return best if multiplying >= 0.15 * len(best) or any(i.name == "HMMA" for i in best) else []


def row_of(kernel: str, architecture: str, resources: dict, code: list[sass.Instruction]) -> dict:
    sm, expected = ARCHITECTURES[architecture], expected_of(kernel)
    loop, everything = hot_loop(code), sass.mix(code)
    row = {
        "kernel": kernel,
        "arch": architecture,
        "registers": resources["registers"],
        "shared_bytes": resources["shared_bytes"] + min(expected.shared_bytes, sm.shared_bytes - 1024),
        "spills": resources["spill_bytes"] + everything["LDL"] + everything["STL"],
        "threads": expected.threads,
        "instructions": len(code),
        "contains": sorted(n for n in everything if n.startswith(("HMMA", "LDGSTS", "LDSM"))),
    }
    row["warps"] = occupancy(row["registers"], row["shared_bytes"], row["threads"], sm)
    row["occupancy"] = round(row["warps"] / sm.warps, 3)
    if loop:
        products = sum(2 if i.name == "FFMA2" else 1 for i in loop if sass.macs(i))
        own_reads = products // expected.products_of_read if expected.products_of_read else None
        share, limiter = bound(loop, sm, expected.uniform_loads, own_reads=own_reads)
        row["hot_loop"] = dict(sorted(sass.mix(loop).items()))
        row["products"] = products
        row["instructions_per_fma"] = round(len(loop) / products, 4)
        row["bound"], row["limiter"] = round(share, 4), limiter
    return row


# ---- what is wrong ----


def missing(row: dict) -> list[str]:
    """Properties that must hold whatever was there before."""
    expected, where = expected_of(row["kernel"]), f"{row['kernel']} on {row['arch']}"
    wrong = [f"{where}: {row['spills']} bytes or instructions of spilled registers"] if row["spills"] else []
    if row["arch"] in BEFORE_COPIES:
        expected = Expected(expected.kernel, hot=() if "HMMA" in "".join(expected.contains) else expected.hot)
    found = set(row["contains"])
    wrong += [f"{where}: no {name}" for name in expected.contains if not any(f.startswith(name) for f in found)]
    loop = row.get("hot_loop", {})
    for name in expected.hot:
        if not any(f.startswith(same) for same in SAME.get(name, (name,)) for f in loop):
            wrong.append(f"{where}: no {name} in the hot loop")
    return wrong


def regressions(row: dict, before: dict) -> list[str]:
    """What got worse since the committed table."""
    where, wrong = f"{row['kernel']} on {row['arch']}", []
    for name in before["contains"]:
        if name not in row["contains"]:
            wrong.append(f"{where}: {name} is gone")
    if "hot_loop" not in before:
        return wrong
    if "hot_loop" not in row:
        return [*wrong, f"{where}: the hot loop is gone"]
    now, then = row["instructions_per_fma"], before["instructions_per_fma"]
    if now > then * TOLERANCE:
        wrong.append(f"{where}: {now:.3f} instructions per multiply-add in the hot loop, {then:.3f} before")
    for unit in ("LDS", "LDG"):
        width_now, width_then = (mean_width(r["hot_loop"], unit) for r in (row, before))
        if width_then and width_now < width_then / TOLERANCE:
            wrong.append(f"{where}: {unit} of {width_now:.0f} bits a lane in the hot loop, {width_then:.0f} before")
    return wrong


def mean_width(loop: dict, unit: str) -> float:
    widths = [(int(name.partition(".")[2]), count) for name, count in loop.items() if name.startswith(unit + ".")]
    total = sum(count for _, count in widths)
    return sum(width * count for width, count in widths) / total if total else 0.0


def compared(rows: list[dict], table: dict, release: str) -> list[str]:
    """Everything that is wrong. Counts of another compiler's code are not compared."""
    wrong = [sentence for row in rows for sentence in missing(row)]
    if table.get("nvcc") != release:
        print(f"The table is nvcc {table.get('nvcc')}'s, this is {release}: only the required properties are checked.")
        return wrong
    before = {(r["kernel"], r["arch"]): r for r in table["kernels"]}
    for row in rows:
        key = (row["kernel"], row["arch"])
        if key in before:
            wrong += regressions(row, before[key])
        else:
            wrong.append(f"{key[0]} on {key[1]}: not in the table yet (--update adds it)")
    names = {row["kernel"] for row in rows}
    wrong += sorted({f"{k}: in the table, but no longer compiled (--update)" for k, _ in before if k not in names})
    return wrong


# ---- Triton's kernels, where they are there ----


def triton_rows() -> list[dict]:
    """Their own static table: dicts with kernel, arch, registers, shared_bytes, spills, loop and wrong."""
    try:
        from sparsekd.kernels.static import rows
    except ImportError:
        return []
    return rows()


# ---- the table ----


def markdown(rows: list[dict], triton: list[dict], release: str) -> str:
    lines = [
        f"# What nvcc {release} makes of the kernels",
        "",
        "Written by `make gpu-static ARGS=--update`; nothing here was timed. Instructions per FMA and the bound are of",
        "the hot loop. The bound is a share of the peak (fp32 on CUDA cores; dense fp16 on tensor cores, twice that of",
        "2:4, whose zeros count) that the loop could reach if nothing ever waited: latency, caches, memory and bank",
        "conflicts are not in it. Shared memory is what a launch usually asks for. `mma.sync` and `mma.sp` count as",
        "60% of the tensor cores' peak on 9.0, 30% on 10.0.",
        "",
        "| kernel | arch | registers | shared | occupancy | instr./FMA | bound | limited by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shared = f"{r['shared_bytes'] / 1024:.0f} KiB" if r["shared_bytes"] else "–"
        loop = [f"{r['instructions_per_fma']:.2f}", f"{r['bound']:.0%}", r["limiter"]] if "bound" in r else ["–"] * 3
        cells = [f"`{r['kernel']}`", r["arch"], str(r["registers"]), shared, f"{r['occupancy']:.0%}", *loop]
        lines.append("| " + " | ".join(cells) + " |")
    if triton:
        lines += [
            "",
            "Triton's, and what the loop of products has (16: vectors of 16 bytes, 4 and 2: single values):",
            "",
            "| kernel | arch | registers | shared | spills | loop |",
            "|---|---|---|---|---|---|",
        ]
        for r in triton:
            cells = [
                f"`{r['kernel']}`",
                r["arch"],
                str(r["registers"]),
                f"{r['shared_bytes'] / 1024:.0f} KiB",
                str(r["spills"]),
                ", ".join(f"{name} x{count}" for name, count in r["loop"].items()) or "–",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--table", type=Path, default=RESULTS / "gpu_static.json")
    args = parser.parse_args()

    home = toolkit()
    release = re.search(r"release (\d+\.\d+)", output_of(home / "bin" / "nvcc", "--version")).group(1)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        tasks = [
            pool.submit(compile_source, source, architecture, home, Path(folder))
            for source in sources
            for architecture in args.architectures
        ]
        rows = [row for task in tasks for row in task.result()]
    order = list(ARCHITECTURES)
    rows.sort(key=lambda r: (r["kernel"], order.index(r["arch"])))
    triton = triton_rows()
    print(f"{len({r['kernel'] for r in rows})} kernels, {len(rows)} rows, nvcc {release}")
    if args.update:
        wrong = [sentence for row in rows for sentence in missing(row)]
        args.table.write_text(json.dumps({"nvcc": release, "kernels": rows, "triton": triton}, indent=1) + "\n")
        args.table.with_suffix(".md").write_text(markdown(rows, triton, release))
        print(f"Wrote {args.table} and {args.table.with_suffix('.md')}")
    else:
        if not args.table.is_file():
            sys.exit(f"Expected a table at {args.table}, got none: --update writes it")
        table = json.loads(args.table.read_text())
        table["kernels"] = [r for r in table["kernels"] if r["arch"] in args.architectures]
        wrong = compared(rows, table, release)
    wrong += [f"{r['kernel']} on {r['arch']}: {sentence}" for r in triton for sentence in r["wrong"]]
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
