"""The emulator reports bugs sown into the 2:4 convolution, one at a time, as in test_emulator.py."""

import re

import emulated
import pytest
from emulated import said_of

FILE = "conv2d_24.cuh"
FOREIGN = "out of bounds|output.* before it was written"  # what lies behind a buffer may be the output

# what stands in FILE, what is put in its place, what the checker says of it.
BUGS = {
    "no barrier after the copies": (
        "    __syncthreads();  // what other threads copied, and the stage that is filled next was read\n",
        "",
        "asynchronous copy|no barrier between|before it was written",
    ),
    "waits for too few copies": (
        "copy_async_wait<kConv2d24Stages - 2>",
        "copy_async_wait<kConv2d24Stages - 1>",
        "async",
    ),
    "results in stages that are still read": (
        "  __syncthreads();  // before the stages take results\n",
        "",
        "no barrier between",
    ),
    "results read before they are there": (
        "    __syncthreads();  // results of all groups\n",
        "",
        "no barrier between|before it was written",
    ),
    "results overwritten too early": ("    __syncthreads();  // before the next results\n", "", "no barrier between"),
    "last pixel off by one": ("first_pixel + i < p.pixels;", "first_pixel + i <= p.pixels;", "out of bounds"),
    "row of the input off by one": ("y < p.in_h &&", "y <= p.in_h &&", FOREIGN),
    "metadata beyond the last tile": (
        "min(first_row / 16 + thread / 8, p.row_tiles - 1)",
        "first_row / 16 + thread / 8",
        "out of bounds",
    ),
    "values beyond the last row": (" < p.rows;\n      copy_async16", " <= p.rows;\n      copy_async16", FOREIGN),
    "channels beyond the last": (
        "bool channels_there = (block * 8 + pixel_vector) * 8 < p.channels;",
        "bool channels_there = true;",
        FOREIGN,
    ),
    "rows of a matrix eight bytes apart": ("row + m * 16 * 4 * 16);", "row + m * 8);", "misaligned"),
}

# Two blocks of channels that are not full, borders, pixels and rows that don't fill a tile; and a single step, whose
# stage is the one that the results take, also where one group of warps takes all steps and rows are no whole vectors.
RUN = """
from test_conv2d_24 import mask_24
from sparsekd.sparse import formats_24
shapes = (88, 80, 3, 3), (88, 80, 3, 3), (88, 64, 1, 1), (150, 64, 1, 1), (150, 64, 1, 1)
for seed, shape in enumerate(shapes):
    emulator.functions.emulator_set_seed(seed % 2)
    emulator.functions.emulator_set_device(8, 163 << 10, 108 if shape[0] == 88 else 1)
    values, metadata = formats_24.pack_24(torch.randn(shape).half(), mask_24(shape))
    input = torch.randn(1, shape[1], 7, 6).half().contiguous(memory_format=torch.channels_last)
    run("conv2d_24", input, values, metadata, None, shape[0], shape[2:], (1, 1), (1, 1), (1, 1), 1)
"""


@pytest.mark.slow
def test_nothing_is_said_of_the_kernel_as_it_is():
    assert said_of(emulated.library_path(), RUN) == ""


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_finds(bug, tmp_path):
    right, wrong, says = BUGS[bug]
    source = (emulated.ROOT / "csrc" / "cuda" / FILE).read_text()
    assert source.count(right) == 1, "the place where the bug is sown is gone"
    emulated.library_path()
    said = said_of(emulated.compile_changed(tmp_path, {FILE: source.replace(right, wrong)}), RUN)
    assert re.search(says, said), said
