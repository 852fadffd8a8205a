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

PROGRAM = r"""
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

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
int main() {
  print_product<cute::SM80_16x8x16_F32F16F16F32_TN>("float16-16");
  print_product<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16-16");
  print_product<cute::SM80_16x8x8_F32F16F16F32_TN>("float16-8");
  print_product<cute::SM80_16x8x8_F32BF16BF16F32_TN>("bfloat16-8");
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
    headers = [Path(found.origin).parent / "source" / "include", include, include / "cccl"]
    command = ["g++", "-std=c++17", "-O0", "-w", *(f"-I{h}" for h in headers), "layouts.cpp", "-o", "layouts"]
    subprocess.run(command, cwd=folder, check=True)
    lines = subprocess.run([folder / "layouts"], capture_output=True, text=True, check=True).stdout.splitlines()
    tables = collections.defaultdict(dict)
    for what, part, thread, value, index in map(str.split, lines):
        tables[what, part][int(thread), int(value)] = int(index)
    return {
        key: np.array([[table[t, v] for v in range(len(table) // 32)] for t in range(32)])
        for key, table in tables.items()
    }


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
