"""The emulator reports bugs sown into the tensor-core convolution, one at a time, as in test_emulator.py."""

import re

import emulated
import pytest
from emulated import said_of

FILES = tuple(f"conv2d_tensor{part}.cuh" for part in ("", "_pattern", "_stage", "_finish"))

# what stands in one of FILES, what is put in its place, what the checker says of it.
BUGS = {
    "no barrier after the copies": (
        "      __syncthreads();  // what other threads copied\n",
        "",
        "asynchronous copy|no barrier between|before it was written",
    ),
    "no barrier before the buffer is filled again": (
        "      __syncthreads();  // before the buffer is filled again\n",
        "",
        "asynchronous copy|no barrier between",
    ),
    "waits for too few copies": ("copy_async_wait<1>();", "copy_async_wait<2>();", "asynchronous copy"),
    "rows of a matrix eight bytes apart": (
        "(min(distance, p.most_distance) + position16) * 16;",
        "(2 * min(distance, p.most_distance) + position16) * 8;",
        "misaligned",
    ),
    "zeros for the first place of a tile alone": (
        "    store_vector(buffers + i / p.zeros",
        "    if (i % p.zeros < 8) store_vector(buffers + i / p.zeros",
        "before it was written",
    ),
    "values beyond the last octet": (
        "  if (octet >= p.n_octets) return;\n",
        "",
        "out of bounds",
    ),
    "lanes make unequal numbers of steps": (
        "for (; step + 1 < steps; step += 2) {",
        "for (; step + 1 < steps + (lane == 7 ? 2 : 0); step += 2) {",
        "diverge|deadlock|have ended|out of bounds|before it was written",
    ),
    "what rows need is not found for the last one": (
        "i < p.row_warps * kGroups * kRows;",
        "i < p.row_warps * kGroups * kRows - 1;",
        "before it was written",
    ),
    "residues counted on too early": (
        "      __syncwarp();  // before the next are counted\n",
        "",
        "no barrier between",
    ),
    "residues summed before they are counted": (
        "  __syncthreads();  // counts of each residue\n",
        "",
        "no barrier between|before it was written",
    ),
    "slots read before they are there": (
        "  __syncthreads();  // slot_in\n",
        "",
        "no barrier between|before it was written",
    ),
    "places counted on while others read them": (
        "    __syncwarp();  // all have read before the first of the peers counts on\n",
        "",
        "no barrier between",
    ),
    "distances read before they are there": (
        "  __syncwarp();  // distances\n",
        "",
        "no barrier between|before it was written",
    ),
    "an octet has nine places": (
        "(mine + 7) / 8;\n      first_of",
        "(mine + 8) / 9;\n      first_of",
        "no barrier between|out of bounds|written by another block",
    ),
    "column bound off by one": (
        "in_row < p.tile_w && y < p.strip_rows && x < p.positions[1];",
        "in_row <= p.tile_w && y < p.strip_rows && x <= p.positions[1];",
        "written by another block|out of bounds|no barrier between",
    ),
    "row bound off by one": (
        "y < p.strip_rows &&",
        "y <= p.strip_rows &&",
        "written by another block|out of bounds|no barrier between",
    ),
    "a strip's rows go on below the image": (
        "first_row + y < p.rows",
        "first_row + y <= p.rows",
        "written by another block|out of bounds|no barrier between",
    ),
    "images beyond the last": ("image < p.batch && first_row", "first_row", "out of bounds"),
}

# Three blocks of channels in little shared memory, odd columns and octets, borders, two matrices of rows a warp; fewer
# channels, which one buffer takes; strips whose last tile is not full. Blocks of threads go on from tile to tile.
RUN = """
cases = (8, 0, 40, 90, 9, 9), (16, 1, 40, 90, 9, 9), (32, 0, 40, 90, 9, 9), (16, 0, 163, 24, 9, 9)
cases += (16, 0, 163, 24, 13, 9), (16, 1, 163, 24, 9, 8)
for vector, seed, shared, channels, rows, columns in cases:
    emulator.functions.emulator_set_device(8, shared << 10, 1)
    emulator.functions.emulator_set_seed(seed)
    mask = (torch.rand(64 // vector, channels, 3, 3) < 0.1).repeat_interleave(vector, 0)
    values, crow, col, _ = formats.pack(torch.randn(64, channels, 3, 3), mask, vector)
    input, values = torch.randn(3, channels, rows, columns).half(), values.half()
    geometry = (64, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    tiling = emulator.ops.conv2d_tiling(col, vector, input.shape, *geometry)
    run("conv2d", input, values, crow, col, None, None, None, *geometry)  # by tiles of whole rows
    plan = run("conv2d_plan", crow, col, tiling, vector, input.shape, *geometry)
    if plan is not None:  # of which nothing was said
        run("conv2d_planned", input, values, plan, tiling, *[None] * 4, "none", True, *geometry)
"""


def test_nothing_is_said_of_the_kernels_as_they_are():
    assert said_of(emulated.library_path(), RUN) == ""


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_finds(bug, tmp_path):
    right, wrong, says = BUGS[bug]
    sources = {name: (emulated.ROOT / "csrc" / "cuda" / name).read_text() for name in FILES}
    holding = [name for name, source in sources.items() if right in source]
    assert len(holding) == 1, "the place where the bug is sown is gone"
    emulated.library_path()
    library = emulated.compile_changed(tmp_path, {holding[0]: sources[holding[0]].replace(right, wrong, 1)})
    said = said_of(library, RUN)
    assert re.search(says, said), said
