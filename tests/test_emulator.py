"""The emulator reports what it is there to find: bugs sown into the real kernels, one at a time."""

import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

# file, what stands there, what is put in its place, what the checker says of it.
BUGS = {
    "no barrier after the copies": (
        "conv2d.cuh",
        "    __syncthreads();  // what other threads copied\n",
        "",
        "asynchronous copy|no barrier between|before it was written",
    ),
    "no barrier before the buffer is filled again": (
        "conv2d.cuh",
        "    __syncthreads();  // before the buffer is filled again\n",
        "",
        "no barrier between|asynchronous copy",
    ),
    "waits for too few copies": ("conv2d.cuh", "copy_async_wait<1>();", "copy_async_wait<2>();", "asynchronous copy"),
    "copies end after the thread": ("conv2d.cuh", "  copy_async_wait<0>();\n", "", "not waited for"),
    "barrier under a condition of a warp": (
        "conv2d.cuh",
        "    __syncthreads();  // what other threads copied\n",
        "    if (warp == 0) __syncthreads();\n",
        "deadlock|__syncthreads|no barrier between",
    ),
    "staged plane shifted by one vector": (
        "conv2d.cuh",
        "copy_async16(to + lane + j * 32, from",
        "copy_async16(to + lane + j * 32 + 1, from",
        "written by|before it was written|out of bounds|asynchronous copy",
    ),
    "records begin four bytes late": (
        "conv2d.cuh",
        "p.records + int64_t(i) * kRecordBytes<kV>;",
        "p.records + int64_t(i) * kRecordBytes<kV> + 4;",
        "misaligned",
    ),
    "one record too many": (
        "conv2d.cuh",
        "if (i + 1 < end) ahead",
        "if (i < end) ahead",
        "out of bounds|before it was",
    ),
    "column bound off by one": (
        "conv2d.cuh",
        "column < p.axes[1].positions;",
        "column <= p.axes[1].positions;",
        "written by another block|out of bounds|no barrier between",
    ),
    "row bound off by one": (
        "conv2d.cuh",
        "row_in_strip < p.lanes.strip_rows &&",
        "row_in_strip <= p.lanes.strip_rows &&",
        "written by another block|out of bounds|no barrier between",
    ),
    "last column never written": (
        "conv2d.cuh",
        "column < p.axes[1].positions;",
        "column + 1 < p.axes[1].positions;",
        "never written",
    ),
    "counters without __syncwarp": (
        "conv2d.cuh",
        "    __syncwarp();  // all have read before the first of the peers counts on\n",
        "",
        "no barrier between",
    ),
    "shuffle in a loop of unequal lengths": (
        "conv2d.cuh",
        "    for (int r = 0; r < kRows; ++r) {\n",
        "    for (int r = 0; r < (inside ? kRows : 0); ++r) {\n",
        "deadlock|diverge|have ended",
    ),
    "mask without half of the lanes": (
        "conv2d.cuh",
        "__shfl_xor_sync(kAll, before, distance)",
        "__shfl_xor_sync(0x0000ffffu, before, distance)",
        "without the lane itself",
    ),
    "guard of the last block of threads": (
        "lanes.cuh",
        "  if (index >= vectors) return;\n",
        "",
        "out of bounds|outside of all buffers",
    ),
    "border off by one": ("lanes.cuh", "x < p.axes[1].size;", "x <= p.axes[1].size;", "out of bounds|outside of all"),
}
IN_MAKE_TEST = ("no barrier after the copies", "last column never written", "border off by one")

# Several blocks of channels, two groups, odd sizes, borders; whole images, and strips of them, in the lanes.
RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
import emulated
from pathlib import Path
from sparsekd.sparse import formats
emulator = emulated.load(Path({library!r}))
torch.manual_seed(0)
said = ""
for vector, dtype in ((1, torch.float32), (4, torch.float32), (2, torch.float32)):
    mask = (torch.rand(48 // vector, 20, 3, 3) < 0.3).repeat_interleave(vector, 0)
    values, crow, col, rows = formats.pack(torch.randn(48, 20, 3, 3), mask, vector, 2)
    for batch, height, seed in ((3, 11, 0), (16, 7, 1), (1, 11, 1)):
        emulator.functions.emulator_set_seed(seed)
        input = torch.randn(batch, 40, height, 9)
        try:
            emulator.ops.conv2d(input, values, crow, col, rows, None, None, 48, (3, 3), (1, 1), (1, 1), (1, 1), 2)
        except RuntimeError as error:
            said = said or str(error).splitlines()[0]
print("said:", said)
"""


def said_of(library):
    code = RUN.format(tests=str(Path(__file__).parent), library=str(library))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=emulated.ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.rpartition("said:")[2].strip()


def test_nothing_is_said_of_the_kernels_as_they_are():
    assert said_of(emulated.library_path()) == ""


@pytest.mark.parametrize("bug", [pytest.param(b, marks=[] if b in IN_MAKE_TEST else pytest.mark.slow) for b in BUGS])
def test_finds(bug, tmp_path):
    name, right, wrong, says = BUGS[bug]
    source = (emulated.ROOT / "csrc" / "cuda" / name).read_text()
    assert right in source, "the place where the bug is sown is gone"
    emulated.library_path()
    library = emulated.compile_library(tmp_path, {name: source.replace(right, wrong, 1)})
    said = said_of(library)
    assert re.search(says, said), said
