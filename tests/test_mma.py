"""The emulator's matrix instructions against CUTLASS's own account of which lane holds what.

The layouts stand in our kernels and in the emulator, so that a wrong reading of the PTX ISA would agree with itself.
CUTLASS's headers (nvidia-cutlass) say them independently, in host code.
"""

import collections
import ctypes
import importlib.util
import subprocess
from pathlib import Path

import emulated
import gpu_toolkit
import numpy as np
import pytest
import torch

from sparsekd.sparse import formats_24

PROGRAM = r"""
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cutlass/util/host_reorder.h>
#include <cutlass/util/host_uncompress.h>

template <class Layout>
void print(const char* what, const char* part, Layout layout) {
  for (int thread = 0; thread < cute::size<0>(layout); ++thread) {
    for (int value = 0; value < cute::size<1>(layout); ++value) {
      std::printf("%s %s %d %d %d\n", what, part, thread, value, int(layout(thread, value)));
    }
  }
}
template <class Atom>
void print_product(const char* what) {
  using Traits = cute::MMA_Traits<Atom>;
  print(what, "a", typename Traits::ALayout{});
  print(what, "b", typename Traits::BLayout{});
  print(what, "c", typename Traits::CLayout{});
}
// The 2:4 metadata of 32 rows and 32 columns, 16 bits for 16 columns of a row: what lies in which half of which lane's
// word when the instructions for rows 0 to 15 (selector 0) and 16 to 31 (selector 1) read them; and which value each of
// four columns holds.
void print_metadata() {
  uint16_t rows[32 * 2], words[32 * 2];
  for (int i = 0; i < 64; ++i) rows[i] = i;
  cutlass::TensorRef<uint16_t, cutlass::layout::RowMajor> from(rows, 2);
  cutlass::TensorRef<uint16_t, cutlass::layout::ColumnMajorInterleaved<2>> to(words, 32 * 2);
  cutlass::reorder_meta(to, from, cutlass::gemm::GemmCoord(32, 8, 2));
  for (int i = 0; i < 64; ++i) std::printf("metadata words %d %d %d\n", i / 2, i % 2, words[i]);
  for (int places = 0; places < 16; ++places) {
    if (places % 4 >= places / 4) continue;
    cutlass::half_t packed[8], dense[16];
    for (int i = 0; i < 8; ++i) packed[i] = cutlass::half_t(i + 1);
    uint16_t bits = places * 0x1111;
    cutlass::TensorRef<cutlass::half_t, cutlass::layout::RowMajor> a(packed, 8), whole(dense, 16);
    cutlass::TensorRef<uint16_t, cutlass::layout::RowMajor> e(&bits, 1);
    cutlass::uncompress(whole, a, e, 1, 16);
    for (int i = 0; i < 16; ++i) std::printf("metadata places %d %d %d\n", places, i, int(float(dense[i])) - 1);
  }
}
int main() {
  print_metadata();
  print_product<cute::SM80_16x8x16_F32F16F16F32_TN>("float16-16");
  print_product<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16-16");
  print_product<cute::SM80_16x8x8_F32F16F16F32_TN>("float16-8");
  print_product<cute::SM80_16x8x8_F32BF16BF16F32_TN>("bfloat16-8");
  print("ldmatrix", "plain", cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{});
  print("ldmatrix", "to", cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>::DstLayout{});
}
"""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """{(instruction, operand): [32, values] of CUTLASS's linear index}"""
    found = importlib.util.find_spec("cutlass_library")
    include = gpu_toolkit.include()
    if found is None or include is None:
        pytest.skip("needs nvidia-cutlass and the CUDA toolkit's headers")
    folder = tmp_path_factory.mktemp("cutlass")
    (folder / "layouts.cpp").write_text(PROGRAM)
    source = Path(found.origin).parent / "source"
    headers = [source / "include", source / "tools" / "util" / "include", include, include / "cccl"]
    # g++ finds names in CUTLASS's templates that only nvcc knows; none of these templates is used.
    flags = ["-std=c++17", "-O0", "-w", "-fpermissive", *(f"-I{h}" for h in headers)]
    command = ["g++", *flags, "layouts.cpp", "-o", "layouts"]
    subprocess.run(command, cwd=folder, check=True)
    lines = subprocess.run([folder / "layouts"], capture_output=True, text=True, check=True).stdout.splitlines()
    tables = collections.defaultdict(dict)
    for what, part, thread, value, index in map(str.split, lines):
        tables[what, part][int(thread), int(value)] = int(index)
    return {
        key: np.array([[table[t, v] for v in range(len(table) // 32)] for t in range(32)])
        for key, table in tables.items()
        if key != ("metadata", "places")
    } | {("metadata", "places"): tables["metadata", "places"]}


def as_words(values):
    """[32, n] of 16 bits to [32, n / 2] of 32, the first in the lower half."""
    return np.ascontiguousarray(values.view(torch.int16).numpy()).view(np.uint32)


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def product(a, b, c, dtype, depth):
    """c + a @ b by the emulator, from words and sums as the lanes hold them."""
    c = np.ascontiguousarray(c, np.float32)
    emulated.emulator().functions.emulator_mma(pointer(c), pointer(a), pointer(b), depth, dtype == torch.bfloat16)
    return c


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [16, 8])
def test_products_of_matrices(layouts, dtype, depth):
    name = f"{str(dtype).removeprefix('torch.')}-{depth}"
    a, b = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
    c = torch.randn(16, 8)
    # CUTLASS counts down the columns of A [m, k], B [n, k] and C [m, n].
    a_lanes, b_lanes = as_words(a.T.flatten()[layouts[name, "a"]]), as_words(b.flatten()[layouts[name, "b"]])
    got = product(a_lanes, b_lanes, c.T.flatten()[layouts[name, "c"]], dtype, depth)
    want = (c + a.float() @ b.float()).T.flatten()[layouts[name, "c"]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # Two words of A the other way round: the test can fail.
    swapped = np.ascontiguousarray(a_lanes[:, [1, 0, *range(2, a_lanes.shape[1])]])
    assert not np.allclose(product(swapped, b_lanes, np.zeros((32, 4)), dtype, depth) + 0, got, atol=1e-2)


def test_transposed_matrices(layouts):
    rows = np.arange(32 * 8, dtype=np.uint16)
    words = np.zeros((32, 4), np.uint32)
    emulated.emulator().functions.emulator_load_matrices_transposed(pointer(words), pointer(rows))
    bits = layouts["ldmatrix", "to"]  # where each bit of a lane's words comes from, in the bits of all rows
    np.testing.assert_array_equal(words.view(np.uint16), rows[bits[:, ::16] // 16])
    np.testing.assert_array_equal(np.diff(bits.reshape(32, 8, 16), axis=2), 1)


def sparse_matrix(layouts, rows):
    """[rows, 32] with two of each four columns kept, its values [rows, 16] and CUTLASS's bits for them [rows, 2]."""
    places = layouts["metadata", "places"]
    kinds = sorted({pair for pair, _ in places})
    chosen = np.array(kinds)[np.random.default_rng(0).integers(len(kinds), size=(rows, 8))]
    bits = (chosen.reshape(rows, 2, 4) << np.arange(0, 16, 4)).sum(2).astype(np.uint16)
    values = torch.randn(rows, 16)
    dense = torch.zeros(rows, 32)
    for row in range(rows):
        for column in range(32):
            value = places[int(chosen[row, column // 4]), column % 4]  # of the first four columns
            if value >= 0:
                dense[row, column] = values[row, column // 4 * 2 + value]
    return dense, values, bits


def words_of(layouts, bits):
    """The lanes' words [32] for the bits [32, 2] of two times 16 rows."""
    return np.ascontiguousarray(bits.flatten()[layouts["metadata", "words"]]).view(np.uint32)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_sparse_matrices(layouts, dtype):
    name = f"{str(dtype).removeprefix('torch.')}-16"
    dense, values, bits = sparse_matrix(layouts, 32)
    words = words_of(layouts, bits)
    b, c = torch.randn(32, 8).to(dtype), torch.randn(16, 8)
    # The second half of the rows of B as of another product with K = 16.
    halves = [as_words(half.flatten()[layouts[name, "b"]]) for half in (b[:16], b[16:])]
    b_lanes = np.ascontiguousarray(np.concatenate(halves, axis=1))
    results = []
    for selector in (0, 1):
        rows = slice(16 * selector, 16 * selector + 16)
        a_lanes = as_words(values[rows].to(dtype).T.flatten()[layouts[name, "a"]])
        got = np.ascontiguousarray(c.T.flatten()[layouts[name, "c"]], np.float32)
        operands = map(pointer, (got, a_lanes, b_lanes, words))
        emulated.emulator().functions.emulator_mma_sparse(*operands, selector, dtype == torch.bfloat16)
        want = (c + dense[rows].to(dtype).float() @ b.float()).T.flatten()[layouts[name, "c"]]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        results.append(got)
    # The other lanes' words: the test can fail.
    operands = map(pointer, (got, a_lanes, b_lanes, words))
    emulated.emulator().functions.emulator_mma_sparse(*operands, 0, dtype == torch.bfloat16)
    assert not np.allclose(got, 2 * results[1] - c.T.flatten()[layouts[name, "c"]].numpy(), atol=1e-2)


def test_metadata_is_packed_as_cutlass_orders_it(layouts):
    dense, values, bits = sparse_matrix(layouts, 32)
    # 16 output channels: the first 32 input channels of a tile are chosen from by selector 0, the others by selector 1.
    weight = torch.cat([dense[:16], dense[16:]], dim=1).view(16, 64, 1, 1)
    packed = formats_24.pack_24(weight)
    np.testing.assert_array_equal(packed.metadata.numpy().view(np.uint32)[0, 0, 0], words_of(layouts, bits))
    assert torch.equal(packed.values[:, 0], torch.cat([values[:16], values[16:]], dim=1))


def test_matrices(layouts):
    rows = np.arange(32 * 8, dtype=np.uint16)
    words = np.zeros((32, 4), np.uint32)
    emulated.emulator().functions.emulator_load_matrices(pointer(words), pointer(rows))
    bits = layouts["ldmatrix", "plain"]
    np.testing.assert_array_equal(words.view(np.uint16), rows[bits[:, ::16] // 16])
