"""The emulator reports what it is there to find: bugs sown into the real kernels, one at a time."""

import re

import emulated
import pytest
from emulated import said_of

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
        "deadlock|__syncthreads|no barrier between|before it was written",
    ),
    "staged plane shifted by one vector": (
        "conv2d.cuh",
        "copy_async16(to, from, at >= 0)",
        "copy_async16(to + 1, from, at >= 0)",
        "written by|before it was written|out of bounds|asynchronous copy",
    ),
    "records begin four bytes late": (
        "conv2d.cuh",
        "record_at<kV>(p.records, begin + mine,",
        "record_at<kV>(p.records + 4, begin + mine,",
        "misaligned",
    ),
    "one record too many": (
        "conv2d.cuh",
        "min(done + part, staged - 1);",
        "min(done + part, staged);",
        "out of bounds|before it was",
    ),
    "one pair of records too many": (
        "conv2d.cuh",
        "left > 0; --left,",
        "left >= 0; --left,",
        "out of bounds|before it was",
    ),
    "distances are not copied": (
        "conv2d.cuh",
        "copy_async4(chunk + staged_distance<kV>(mine), record.distance);",
        "",
        "before it was",
    ),
    "one record too few is copied": (
        "conv2d.cuh",
        "if (mine >= count) continue;",
        "if (mine + 1 >= count) continue;",
        "before it was",
    ),
    "results from registers one column too far": (
        "conv2d.cuh",
        "column_of(j) < p.axes[1].positions; };",
        "column_of(j) <= p.axes[1].positions; };",
        "written by another block|out of bounds|no barrier between",
    ),
    "results of strips one row too far apart": (
        "conv2d_finish.cuh",
        "const int64_t to_strip = int64_t(p.lanes.strip_rows) *",
        "const int64_t to_strip = int64_t(p.lanes.strip_rows + 1) *",
        "written by another block|out of bounds|never written|no barrier between",
    ),
    "one record too many for all parts of a warp": (
        "conv2d.cuh",
        "rest < end; ++rest) {",
        "rest <= end; ++rest) {",
        "out of bounds|before it was",
    ),
    "no barrier after the places of a plane": (
        "conv2d.cuh",
        "  __syncthreads();  // places and starts\n",
        "",
        "no barrier between|before it was written",
    ),
    "column bound off by one": (
        "conv2d_finish.cuh",
        "column < p.axes[1].positions;",
        "column <= p.axes[1].positions;",
        "written by another block|out of bounds|no barrier between",
    ),
    "row bound off by one": (
        "conv2d_finish.cuh",
        "row_in_strip < p.lanes.strip_rows &&",
        "row_in_strip <= p.lanes.strip_rows &&",
        "written by another block|out of bounds|no barrier between",
    ),
    "last column never written": (
        "conv2d_finish.cuh",
        "column < p.axes[1].positions;",
        "column + 1 < p.axes[1].positions;",
        "never written",
    ),
    "counters without __syncwarp": (
        "conv2d_records.cuh",
        "    __syncwarp();  // all have read before the first of the peers counts on\n",
        "",
        "no barrier between",
    ),
    "shuffle in a loop of unequal lengths": (
        "conv2d_finish.cuh",
        "    for (int r = 0; r < kRows; ++r) {\n",
        "    for (int r = 0; r < (inside ? kRows : 0); ++r) {\n",
        "deadlock|diverge|have ended",
    ),
    "mask without half of the lanes": (
        "conv2d_records.cuh",
        "__shfl_xor_sync(kAll, before, distance)",
        "__shfl_xor_sync(0x0000ffffu, before, distance)",
        "without the lane itself",
    ),
    "plane staged one vector short": (
        "conv2d.cuh",
        "position < p.plane; position += 32) {\n      const int at = places[position];",
        "position < p.plane - 1; position += 32) {\n      const int at = places[position];",
        "before it was written",
    ),
    "run of one row too many": (
        "conv2d.cuh",
        "if (row >= p.lanes.rows) return -1;",
        "if (row > p.lanes.rows) return -1;",
        "out of bounds|outside of all buffers",
    ),
    "results of a run without __syncwarp": (
        "conv2d.cuh",
        "    __syncwarp();  // results\n",
        "",
        "no barrier between|before it was written",
    ),
    "run one output too long": (
        "conv2d_finish.cuh",
        "together ? there : min(there, span.count)",
        "together ? there : min(there, span.count + 1)",
        "written by another block|out of bounds|no barrier between|before it was written",
    ),
    "run without what lies before a sector": (
        "conv2d_finish.cuh",
        "begin = -static_cast<int>(at & (sector - 1));",
        "begin = static_cast<int>(-at & (sector - 1));",
        "never written",
    ),
    "strips stored again one by one": (
        "conv2d_finish.cuh",
        "(merged && strip > 0 && i > 0)) continue;",
        "false) continue;",
        "out of bounds|before it was written|never written|written by",
    ),
    "interleaved rows of the next tile": (
        "conv2d.cuh",
        "inside(j) && row_of(j) < first_row + tile_rows;",
        "inside(j);",
        "out of bounds|no barrier between",
    ),
    "interleaved results without __syncwarp": (
        "conv2d.cuh",
        "      __syncwarp();  // interleaved results\n",
        "",
        "no barrier between|before it was written",
    ),
    "interleaved row one too long": (
        "conv2d_finish.cuh",
        "min(2 * p.tile_w, p.out_size[1] - 2 * x0), 2 * p.tile_w};",
        "min(2 * p.tile_w, p.out_size[1] - 2 * x0) + 1, 2 * p.tile_w};",
        "written by another block|out of bounds|no barrier between|before it was written",
    ),
    "no barrier after a tile that is turned": (
        "planar.cuh",
        "    __syncthreads();  // the tile\n    each_of_last(store);",
        "    each_of_last(store);",
        "no barrier between|before it was written",
    ),
    "planes turned one pixel short": (
        "planar.cuh",
        "for (int q = warp; q < pixels; q += warps) {",
        "for (int q = warp; q < pixels - 1; q += warps) {",
        "never written|before it was written",
    ),
    "planes turned without what lies before a sector": (
        "planar.cuh",
        "- static_cast<int>((first + begin_at) % kSector);",
        "+ static_cast<int>((first + begin_at) % kSector);",
        "never written|before it was written",
    ),
    "places of a staged plane too few": (
        "weight_grad.cuh",
        "for (int i = threadIdx.x; i < p.plane; i += blockDim.x) store_vector(places",
        "for (int i = threadIdx.x; i < p.plane - 1; i += blockDim.x) store_vector(places",
        "before it was written",
    ),
    "one channel too many in lanes": (
        "lanes.cuh",
        "min(lanes.channels - channel,",
        "min(lanes.channels + 1 - channel,",
        "out of bounds|outside of all|written by another block",
    ),
    "guard of the last block that fills records": (
        "lanes.cuh",
        "blockIdx.y == 0 && index < p.fill.n_records",
        "blockIdx.y == 0",
        "out of bounds|outside of all|reads outside",
    ),
    "border off by one": ("lanes.cuh", "x < p.axes[1].size;", "x <= p.axes[1].size;", "out of bounds|outside of all"),
    "no barrier after all warps have written": (
        "kd_loss_terms.cuh",
        "  __syncthreads();  // all warps have written\n",
        "",
        "no barrier between|before it was written",
    ),
    "no barrier before the scratch is used again": (
        "kd_loss_terms.cuh",
        "  __syncthreads();  // all have read before the scratch is used again\n",
        "",
        "no barrier between",
    ),
    "labels of rows that don't exist": (
        "kd_loss_terms.cuh",
        "  if (row >= p.rows) return labels;\n",
        "",
        "out of bounds|outside of all",
    ),
    "gradient of classes that don't exist": (
        "kd_loss.cuh",
        "      if (class_of(i) >= all_classes) continue;\n",
        "",
        "out of bounds|no barrier between|written by another block",
    ),
    "shuffle under a condition of a row": (
        "kd_loss.cuh",
        "    if (c.hard) {  // the same for all rows",
        "    if (labels.hard) {  // the same for all rows",
        "diverge|deadlock|have ended",
    ),
    "gradient of unlabelled rows left out": (
        "kd_loss.cuh",
        "grad && k < p.classes; k += kKDLossThreads) grad[k] = 0.0f;",
        "grad && k + 1 < p.classes; k += kKDLossThreads) grad[k] = 0.0f;",
        "never written",
    ),
    "four classes from where one begins": (
        "kd_loss.cuh",
        "load_four(from, dtype, begin + k);",
        "load_four(from, dtype, begin + k + 1);",
        "misaligned",
    ),
    "no barrier after the copies of the input": (
        "weight_grad.cuh",
        "      __syncthreads();  // what other threads copied\n",
        "",
        "asynchronous copy|no barrier between|before it was written",
    ),
    "no barrier before the input's buffer is filled again": (
        "weight_grad.cuh",
        "      __syncthreads();  // before the buffer is filled again\n",
        "",
        "no barrier between|asynchronous copy",
    ),
    "first tile adds to what nobody wrote": (
        "weight_grad.cuh",
        "*to = tile == first_tile ? sums[0] : *to + sums[0];",
        "*to = *to + sums[0];",
        "before it was written",
    ),
    "one lane too many stores sums": ("weight_grad.cuh", "if (lane < kValues &&", "if (lane <= kValues &&", "race"),
    "guard of the last block of sums": (
        "weight_grad.cuh",
        "  if (index >= count) return;\n",
        "",
        "out of bounds|outside of all",
    ),
    "one label too many": ("kd_loss.cuh", "threadIdx.x; row < p.rows;", "threadIdx.x; row <= p.rows;", "out of bounds"),
}
IN_MAKE_TEST = ("no barrier after the copies", "last column never written", "border off by one", "one label too many")

# Several blocks of channels, two groups, odd sizes, borders; whole images, and strips of them, in the lanes; with
# channels last, too.
CONV2D = """
for vector, dtype in ((1, torch.float32), (4, torch.float32), (4, torch.float16), (2, torch.float32)):
    mask = (torch.rand(48 // vector, 20, 3, 3) < 0.3).repeat_interleave(vector, 0)
    values, crow, col, rows = formats.pack(torch.randn(48, 20, 3, 3).to(dtype), mask, vector, 2)
    for batch, height, seed in ((3, 11, 0), (16, 7, 1), (1, 11, 1)):
        emulator.functions.emulator_set_seed(seed)
        for format in (torch.contiguous_format, torch.channels_last):
            input = torch.randn(batch, 40, height, 9).to(dtype).contiguous(memory_format=format)
            run("conv2d", input, values, crow, col, rows, None, None, 48, (3, 3), (1, 1), (1, 1), (1, 1), 2)
"""

# Tiles that are rectangles, of a wide map and of stride 3's gradient. Results of float32 are stored from registers,
# others by way of shared memory.
IN_RECTANGLES = """
mask = torch.rand(6, 5, 3, 3) < 0.3
for batch, seed, dtype in ((2, 0, torch.float32), (16, 1, torch.float32), (2, 1, torch.float16), (16, 0, torch.half)):
    values, crow, col, rows = formats.pack(torch.randn(6, 5, 3, 3).to(dtype), mask, 1, 1)
    emulator.functions.emulator_set_seed(seed)
    input = torch.randn(batch, 5, 11, 37).to(dtype).contiguous(memory_format=torch.channels_last)
    run("conv2d", input, values, crow, col, rows, None, None, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    size = (batch, 5, 11, 20)
    grad = torch.randn(batch, 6, 4, 7).to(dtype)
    run("conv2d_input_grad", grad, values, crow, col, rows, None, size, (3, 3), (3, 3), (1, 1), (1, 1), 1)
"""

# Interleaved results, in rectangles and in runs.
INTERLEAVED = """
import ctypes
only = ctypes.c_int.in_dll(emulator.functions, "emulator_conv2d_variant")
mask = torch.rand(6, 5, 3, 3) < 0.3
values, crow, col, rows = formats.pack(torch.randn(6, 5, 3, 3), mask, 1, 1)
# The last: of kConv2dVariants.
SIZES = ((1, 56, 56, -1), (4, 9, 28, -1), (16, 9, 131, -1), (4, 28, 28, 4), (4, 28, 28, 5))
for seed, (batch, height, width, only.value) in enumerate(SIZES):
    emulator.functions.emulator_set_seed(seed % 2)
    grad_output = torch.randn(batch, 6, (height + 1) // 2, (width + 1) // 2)
    size = (batch, 5, height, width)
    run("conv2d_input_grad", grad_output, values, crow, col, rows, None, size, (3, 3), (2, 2), (1, 1), (1, 1), 1)
only.value = -1
"""

# By plans for CUDA cores.
PLANNED = """
mask = torch.rand(6, 5, 3, 3) < 0.3
values, crow, col, rows = formats.pack(torch.randn(6, 5, 3, 3), mask, 1, 1)
geometry = 6, (3, 3), (1, 1), (1, 1), (1, 1), 1
tiling = run("conv2d_tiling", col, 1, (2, 5, 9, 7), *geometry, False)
plan = run("conv2d_plan", crow, col, tiling, 1, (2, 5, 9, 7), *geometry)
finish = rows, None, None, None, "none", False
run("conv2d_planned", torch.randn(2, 5, 9, 7), values, plan, tiling, *finish, *geometry)
"""

# Turned to planes and back: tiles of whole planes and of parts.
TURNED = """
mask = torch.rand(40, 9, 1, 1) < 0.3
for height, dtype, seed in ((7, torch.float16, 0), (21, torch.float32, 1)):
    emulator.functions.emulator_set_seed(seed)
    values, crow, col, rows = formats.pack(torch.randn(40, 9, 1, 1).to(dtype), mask, 1, 1)
    input = torch.randn(2, 9, height, 13).to(dtype).contiguous(memory_format=torch.channels_last)
    run("conv2d", input, values, crow, col, rows, None, None, 40, (1, 1), (1, 1), (0, 0), (1, 1), 1)
"""

# Tiles that are runs: of whole rows and of others, of four images and of fewer.
IN_RUNS = """
import ctypes
only = ctypes.c_int.in_dll(emulator.functions, "emulator_conv2d_variant")
SIZES = ((1, 13, 29, 4, (4, 5)), (2, 7, 7, 8, (10, 11)), (1, 7, 7, 1, (4, -1)))  # the last: of kConv2dVariants
for (vector, height, width, batch, variants), dtype in [(s, d) for s in SIZES for d in (torch.float32, torch.float16)]:
    mask = (torch.rand(16 // vector, 8, 3, 3) < 0.3).repeat_interleave(vector, 0)
    values, crow, col, rows = formats.pack(torch.randn(16, 8, 3, 3).to(dtype), mask, vector, 1)
    for seed, only.value in zip((0, 1), variants):
        emulator.functions.emulator_set_seed(seed)
        input = torch.randn(batch, 8, height, width).to(dtype)
        run("conv2d", input, values, crow, col, rows, None, None, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1)
only.value = -1
"""

# The same for the weight gradient.
WEIGHT_GRAD = """
for vector in (1, 4):
    mask = (torch.rand(48 // vector, 20, 3, 3) < 0.3).repeat_interleave(vector, 0)
    _, crow, col, rows = formats.pack(torch.randn(48, 20, 3, 3), mask, vector, 2)
    for batch, height, seed in ((3, 11, 0), (16, 7, 1)):
        emulator.functions.emulator_set_seed(seed)
        input, grad_output = torch.randn(batch, 40, height, 9), torch.randn(batch, 48, height, 9)
        run("conv2d_weight_grad", input, grad_output, crow, col, rows, vector, (3, 3), (1, 1), (1, 1), (1, 1), 2)
"""

# Rows in 8 lanes, in a warp and in a block; some without a label, some that a warp's last rows don't have.
KD_LOSS = """
for classes, rows in ((10, 13), (21, 5), (100, 9), (1500, 3)):
    for seed in (0, 1):
        emulator.functions.emulator_set_seed(seed)
        target = torch.randint(classes, (rows,))
        target[0] = -100
        logits = torch.randn(2, rows, classes)
        run("kd_loss_forward", logits[0], logits[1], target, 4.0, 0.5, -100, 0.1, False, True)
"""
RUNS = {"conv2d_records.cuh": CONV2D, "lanes.cuh": PLANNED, "weight_grad.cuh": WEIGHT_GRAD}
RUNS |= dict.fromkeys(("conv2d.cuh", "conv2d_finish.cuh"), IN_RECTANGLES + IN_RUNS + INTERLEAVED + CONV2D)
RUNS["planar.cuh"] = TURNED
RUNS |= dict.fromkeys(("kd_loss.cuh", "kd_loss_terms.cuh"), KD_LOSS)


def test_nothing_is_said_of_the_kernels_as_they_are():
    assert said_of(emulated.library_path(), *dict.fromkeys(RUNS.values())) == ""


@pytest.mark.parametrize("bug", [pytest.param(b, marks=[] if b in IN_MAKE_TEST else pytest.mark.slow) for b in BUGS])
def test_finds(bug, tmp_path):
    name, right, wrong, says = BUGS[bug]
    source = (emulated.ROOT / "csrc" / "cuda" / name).read_text()
    assert right in source, "the place where the bug is sown is gone"
    emulated.library_path()
    library = emulated.compile_changed(tmp_path, {name: source.replace(right, wrong, 1)})
    said = said_of(library, RUNS[name])
    assert re.search(says, said), said
