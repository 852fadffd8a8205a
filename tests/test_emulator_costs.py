"""What the emulator counts of memory requests: on patterns whose cost is known, and in the hot loops of our kernels."""

import emulated
import pytest
import torch
from test_cuda_conv2d_tensor import LARGE, device

from sparsekd.sparse import formats

# bytes a lane, distance of neighbours, offset, and, of lanes that share places, how many neighbours do and how many
# places there are: wavefronts and the ideal. 32 banks of 4 bytes; 16-byte requests are served 8 lanes at a time, or 16
# where pairs of lanes want the same. The sources are in emulator/costs.cpp.
SHARED = {
    (4, 4, 0): (1, 1),
    (4, 0, 0): (1, 1),  # all lanes the same word
    (4, 8, 0): (2, 1),
    (4, 16, 0): (4, 1),
    (4, 128, 0): (32, 1),
    (4, 132, 0): (1, 1),  # padded rows
    (2, 2, 0): (1, 1),
    (16, 16, 0): (4, 4),
    (16, 32, 0): (8, 4),
    (16, 128, 0): (32, 4),
    (4, 4, 0, 1, 4): (1, 1),
    (8, 8, 0): (2, 2),
    (8, 0, 0): (1, 1),
    (8, 8, 0, 16): (1, 1),
    (16, 0, 0): (2, 2),  # two registers a cycle at most
    (16, 16, 0, 2): (2, 2),
    (16, 16, 0, 8): (2, 2),
    (16, 128, 0, 8): (4, 2),
    (16, 32, 0, 16): (2, 2),  # measured on 8.6 and 9.0
    (16, 32, 0, 1, 16): (8, 2),  # measured on 8.6 and 9.0
    (16, 16, 0, 1, 4): (4, 2),  # measured on 7.5
    (16, 16, 0, 1, 2): (2, 2),  # lanes two apart are pairs
}
# the same in sectors of 32 bytes
GLOBAL = {
    (4, 4, 0): (4, 4),
    (4, 4, 4): (5, 4),  # not at a sector's border
    (4, 0, 0): (1, 1),
    (4, 8, 0): (8, 4),
    (4, 32, 0): (32, 4),
    (2, 2, 0): (2, 2),
    (2, 2, 2): (3, 2),
    (16, 16, 0): (16, 16),
    (16, 16, 16): (17, 16),
    (16, 32, 0): (32, 16),
}


@pytest.mark.parametrize("space", ["shared", "global"])
def test_known_patterns(space):
    for pattern, want in (SHARED if space == "shared" else GLOBAL).items():
        size, stride, offset, together, places = (*pattern, *(1, 32)[len(pattern) - 3 :])
        with emulated.counting():
            run = emulated.emulator().functions.emulator_pattern
            assert run(space == "shared", size, stride, offset, together, places) == 0
        got = emulated.costs("pattern_kernel")[space, "read", size]
        assert got == want, f"{size} bytes at a distance of {stride} from {offset}: {together} lanes, {places} places"


MOST_WAVEFRONTS, MOST_SECTORS = 1.05, 1.15
# Sums over lanes come by 16 and 32 bytes, which begin wherever the first of their non-zeros lies. It is one store for
# four reads and more of the staged tile.
MOST_OF_SUMS = 1.5
# The convolution on CUDA cores stores float32 from registers, wherever in a sector a lane's position lies: an H200 took
# less time for that than for the way through shared memory, which has whole sectors, since L2 puts the parts together.
# Narrow results still go that way, but by tiles that were chosen for float32's times.
MOST_OF_REGISTERS, MOST_OF_NARROW = 1.85, 2.75

# batch, channels, filters, size, stride, V: ResNet's 3 x 3 layers with fewer channels
LAYERS = [
    (1, 8, 16, 56, 1, 1),
    (4, 8, 16, 28, 1, 4),
    (16, 8, 32, 14, 1, 1),
    (16, 16, 16, 14, 2, 8),
    (16, 8, 16, 8, 1, 2),
]
# dtype, batch, size, V; from V = 8 on halves are for tensor cores. Of 28 columns every second row begins in the middle
# of a sector, of 14 and 7 nearly all do, and so do planes.
STORED = [
    *(
        (dtype, batch, size, v)
        for dtype in (torch.float32, torch.float16)
        for size in (28, 14, 7)
        for batch, v in ((1, 1), (4, 2), (16, 4))
    ),
    *((torch.float32, 16, size, 8) for size in (28, 14)),
    *((torch.float16, batch, 56, v) for batch, v in ((1, 1), (4, 2), (16, 4))),
    *((torch.float16, 8, 28, 1), (torch.float16, 16, 14, 1)),
    *((torch.float16, batch, size, 16) for size in (56, 32, 28, 14, 8, 7) for batch in (1, 8)),
    (torch.float16, 4, 28, 16),
    *((torch.float16, batch, 28, v) for batch, v in ((1, 8), (8, 8), (8, 32), (2, 64))),
    *((torch.float16, batch, size, 64) for batch, size in ((1, 56), (4, 14), (8, 7))),
]
# batch, size, V on 108 multiprocessors, for which tiles have to be small
STORED_BY_MANY = [(1, 28, 8), (1, 56, 16), (2, 14, 16), (8, 7, 16), (1, 14, 32), (2, 28, 64)]
STORED_BY_MANY += [
    pytest.param(batch, size, v, marks=pytest.mark.slow)
    for v in (8, 16, 32, 64)
    for batch, size in ((1, 56), (2, 56), (8, 56), (8, 28), (1, 7), (2, 7))
]


def packed(channels, filters, vector, dtype=torch.float32, density=0.2):
    mask = (torch.rand(filters // vector, channels, 3, 3) < density).repeat_interleave(vector, 0)
    return formats.pack(torch.randn(filters, channels, 3, 3).to(dtype), mask, vector, 1)


def sectors_of(output):
    """Those that the planes of an output lie in: what one takes that is written in one go."""
    size = output[0, 0].numel() * output.element_size()
    return sum(-(-(i + 1) * size // 32) - i * size // 32 for i in range(output.shape[0] * output.shape[1]))


def too_much(kernel, stores=MOST_SECTORS):
    """The requests of a kernel that take more than the most that is allowed, with what they take."""
    found = {}
    for (space, kind, size), (actual, ideal) in emulated.costs(kernel).items():
        # What is read a few bytes at a time are bounds and indices, before the loop.
        if space == "global" and kind == "read" and size < 8:
            continue
        most = MOST_WAVEFRONTS if space == "shared" else stores if kind == "write" else MOST_SECTORS
        if actual > ideal * most:
            found[space, kind, size] = actual / ideal
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_convolutions_waste_no_bandwidth(layer):
    batch, channels, filters, size, stride, vector = layer
    values, crow, col, rows = packed(channels, filters, vector)
    input = torch.randn(batch, channels, size, size)
    geometry = ((3, 3), (stride, stride), (1, 1), (1, 1), 1)
    with emulated.counting():
        output = emulated.emulator().ops.conv2d(input, values, crow, col, rows, None, None, filters, *geometry)
    assert too_much("conv2d_kernel", MOST_OF_REGISTERS) == {}
    assert too_much("to_lanes_kernel") == {}
    with emulated.counting():
        emulated.emulator().ops.conv2d_weight_grad(input, output, crow, col, rows, vector, *geometry)
    assert too_much("weight_grad_kernel", MOST_OF_SUMS) == {}


@pytest.mark.parametrize("dtype, batch, size, vector", STORED, ids=str)
def test_images_are_stored_by_whole_sectors(dtype, batch, size, vector):
    filters = 128 if vector == 64 else 64 if vector >= 16 else 16
    values, crow, col, rows = packed(16, filters, vector, dtype, 0.1)
    input = torch.randn(batch, 16, size, size).to(dtype)
    # One multiprocessor is never short of tiles; for many, tiles get smaller.
    with emulated.counting(), device(8, LARGE, 1):
        output = emulated.emulator().ops.conv2d(
            input, values, crow, col, rows, None, None, filters, (3, 3), (1, 1), (1, 1), (1, 1), 1
        )
    if dtype == torch.float16 and vector >= 8:
        return check_stores_of_tensor_cores(output)
    actual, _ = emulated.costs("conv2d_kernel")["global", "write", output.element_size()]
    assert actual <= (MOST_OF_REGISTERS if dtype == torch.float32 else MOST_OF_NARROW) * sectors_of(output)
    assert not [(kind, size) for space, kind, size in too_much("conv2d_kernel") if space == "shared" and size == 4]


def check_stores_of_tensor_cores(output):
    """Directly to images, or to lanes and from there to images."""
    actual, ideal = emulated.costs("conv2d_tensor_kernel")["global", "write", 16]
    # Of eight positions a warp, results are half a sector, whose other half is stored next: L2 puts them together.
    assert actual <= 2 * ideal
    through_lanes = emulated.costs("from_lanes16_kernel")
    if not through_lanes:
        assert actual <= 2 * sectors_of(output)
        return
    # Of rows of 7 positions, four that are stored at once may begin in the middle of a sector.
    assert actual <= (MOST_OF_SUMS if output.shape[-1] < 8 else MOST_SECTORS) * ideal
    # A warp takes 32 results wherever they begin: most often two sectors and a part of a third, or, where strips are
    # shorter than that, the ends of several, whose other parts the next lanes' stores bring.
    strips = -(-8 // output.shape[0])
    short = -(-output.shape[-2] // strips) * output.shape[-1] < 32
    most = (3 if short else MOST_OF_SUMS + 0.2) * sectors_of(output)
    assert through_lanes["global", "write", 2][0] <= most
    assert through_lanes["global", "read", 16][0] <= MOST_OF_SUMS * through_lanes["global", "read", 16][1]


@pytest.mark.parametrize("batch, size, vector", STORED_BY_MANY)
def test_many_multiprocessors_store_by_whole_sectors_too(batch, size, vector):
    values, crow, col, rows = packed(32, 128, vector, torch.float16, 0.1)
    input = torch.randn(batch, 32, size, size).half()
    with emulated.counting(), device(8, LARGE, 108):
        output = emulated.emulator().ops.conv2d(
            input, values, crow, col, rows, None, None, 128, (3, 3), (1, 1), (1, 1), (1, 1), 1
        )
    check_stores_of_tensor_cores(output)


@pytest.mark.parametrize(
    "dtype, batch, size",
    [(torch.float32, 4, 13), (torch.float32, 16, 14), (torch.float16, 1, 28), (torch.float16, 2, 56)],
)
def test_the_gradient_of_a_stride_is_stored_by_whole_sectors(dtype, batch, size):
    values, crow, col, rows = packed(16, 16, 1, dtype)
    grad_output = torch.randn(batch, 16, (size + 1) // 2, (size + 1) // 2).to(dtype)
    geometry = ((batch, 16, size, size), (3, 3), (2, 2), (1, 1), (1, 1), 1)
    with emulated.counting():
        grad = emulated.emulator().ops.conv2d_input_grad(grad_output, values, crow, col, rows, None, *geometry)
    actual, _ = emulated.costs("conv2d_kernel")["global", "write", grad.element_size()]
    assert actual <= MOST_SECTORS * sectors_of(grad)


@pytest.mark.parametrize(
    "dtype, size, vector",
    [(torch.float32, 28, 1), (torch.float32, 7, 4), (torch.float16, 14, 1), (torch.float16, 14, 16)],
)
def test_channels_last_activations_are_turned_by_whole_sectors(dtype, size, vector):
    values, crow, col, rows = packed(32, 64, vector, dtype, 0.1)
    input = torch.randn(2, 32, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    with emulated.counting():
        output = emulated.emulator().ops.conv2d(
            input, values, crow, col, rows, None, None, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1
        )
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert {key for key in too_much("to_lanes16_kernel") if key[0] == "global"} == set()
    costs = emulated.costs("planar_kernel")
    of_last = {t: t.numel() * t.element_size() // 32 for t in (input, output)}
    turned = [output] if vector == 16 else [output, input]  # tensor cores take the input as it is
    read = sum(sectors_of(t) if t is output else of_last[t] for t in turned)
    written = sum(of_last[t] if t is output else sectors_of(t) for t in turned)
    assert costs["global", "read", input.element_size()][0] <= MOST_SECTORS * read
    assert costs["global", "write", input.element_size()][0] <= MOST_SECTORS * written


@pytest.mark.parametrize("rows, classes", [(9, 1000), (64, 32), (3, 2048)])
def test_the_loss_wastes_no_bandwidth(rows, classes):
    logits, target = torch.randn(2, rows, classes), torch.randint(classes, (rows,))
    with emulated.counting():
        emulated.emulator().ops.kd_loss_forward(*logits, target, 4.0, 0.5, -100, 0.0, False, True)
    assert too_much("rows_kernel") == {}
