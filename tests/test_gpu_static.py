"""The static check of the CUDA kernels: what it reads, and that it flags what got worse."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_toolkit
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_static  # noqa: E402
import sass  # noqa: E402

# A loop of a vector read and four multiply-adds (0020 to 0080) inside one that copies (0010 to 00b0), and the slow path
# of a shuffle at the end, whose jump back makes no loop.
LISTING = """
		Function : _Z6kernelv
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_PTX_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
                                                                            /* 0x000fe200078e00ff */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;      /* 0x0000000402057fae */
        /*0020*/                   LDS.128 R8, [R4] ;                       /* 0x0000000004087984 */
        /*0030*/                   FFMA R12, R8, R20, R12 ;                 /* 0x00000014080c7223 */
        /*0040*/                   FFMA R13, R9, R20, R13 ;                 /* 0x00000014090d7223 */
        /*0050*/                   FFMA R14, R10, R20, R14 ;                /* 0x000000140a0e7223 */
        /*0060*/                   FFMA R15, R11, R20, R15 ;                /* 0x000000140b0f7223 */
        /*0070*/                   IADD3 R4, R4, 0x10, RZ ;                 /* 0x0000001004047810 */
        /*0080*/              @!P1 BRA 0x20 ;                               /* 0xffffff9000009947 */
        /*0090*/                   BRA.DIV ~URZ, 0x100 ;                    /* 0x000000d27f007947 */
        /*00a0*/                   SHFL.IDX PT, R3, R3, R4, 0x1f ;          /* 0x00001f0403037589 */
        /*00b0*/               @P0 BRA 0x10 ;                               /* 0xfffffff000000947 */
        /*00c0*/                   STG.E [R2.64], R12 ;                     /* 0x0000000c02007986 */
        /*00d0*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00e0*/                   BRA 0xe0;                                /* 0xfffffff000007947 */
        /*0100*/                   WARPSYNC R5 ;                            /* 0x0000000500007348 */
        /*0110*/                   BRA 0xa0 ;                               /* 0xfffffff000007947 */
"""
TENSOR_LOOP = """
		Function : tensor
        /*0000*/                   LDSM.16.MT88.4 R4, [R2] ;                /* 0x0 */
        /*0010*/                   HMMA.16816.F32 R8, R12, R4, R8 ;         /* 0x0 */
        /*0020*/                   HMMA.16816.F32 R20, R12, R6, R20 ;       /* 0x0 */
        /*0030*/               @P0 BRA 0x0 ;                                /* 0x0 */
        /*0040*/                   EXIT ;                                   /* 0x0 */
"""
RESOURCES = """
Resource usage:
 Function _Z6kernelv:
  REG:40 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:680 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CLEAN = {"registers": 40, "shared_bytes": 1024, "spill_bytes": 0}


def row(listing=LISTING, kernel="kernel", arch="8.0", resources=CLEAN):
    return gpu_static.row_of(kernel, arch, resources, next(iter(sass.parse_sass(listing).values())))


def test_instructions_and_resources_are_read():
    (code,) = sass.parse_sass(LISTING).values()
    assert len(code) == 17
    assert [i.opcode for i in code[:3]] == ["IMAD.MOV.U32", "LDGSTS.E.BYPASS.128", "LDS.128"]
    assert (code[8].target, code[8].conditional) == (0x20, True)
    assert code[9].target is None
    assert sass.parse_resources(RESOURCES) == {"_Z6kernelv": {"registers": 40, "shared_bytes": 1024, "spill_bytes": 24}}


def test_the_hot_loop_is_the_innermost():
    found = row()
    assert found["hot_loop"] == {"BRA": 1, "FFMA": 4, "IADD3": 1, "LDS.128": 1}
    assert found["instructions_per_fma"] == 7 / 4
    # 4 * 32 multiply-adds on 64 lanes: 2 cycles; 512 bytes of shared memory: 4.
    assert (found["bound"], found["limiter"]) == (0.5, "shared memory")
    assert row(arch="9.0")["bound"] == 0.25


WEIGHTS = """
        /*0028*/                   LDS.128 R20, [R5] ;                      /* 0x0 */
        /*002c*/                   LDS.64 R24, [R5+0x20] ;                  /* 0x0 */
"""
WITH_WEIGHTS = LISTING.replace("        /*0030*/", WEIGHTS + "        /*0030*/")


@pytest.mark.parametrize("kernel, wavefronts", [("conv2d_kernel<1, 4>", 4 + 2 + 1), ("other<1, 4>", 4 + 4 + 2)])
def test_reads_of_weights_bring_two_registers_a_cycle(kernel, wavefronts):
    """With V = 1 on CUDA cores one read of 16 bytes feeds 4 multiply-adds: the others are of weights."""
    found = row(WITH_WEIGHTS, kernel)
    assert found["hot_loop"] == {"BRA": 1, "FFMA": 4, "IADD3": 1, "LDS.128": 2, "LDS.64": 1}
    assert (found["bound"], found["limiter"]) == (round(2 / wavefronts, 4), "shared memory")


def test_tensor_cores_are_counted_by_their_matrices():
    found = row(TENSOR_LOOP)
    assert found["hot_loop"] == {"BRA": 1, "HMMA.16816": 2, "LDSM.x4": 1}
    # Two products of 2048 at 1024 a cycle: 4 cycles, as many as 512 bytes take.
    assert found["bound"] == 1.0
    assert row(TENSOR_LOOP, arch="9.0")["bound"] == pytest.approx(0.5)


def test_a_uniform_branch_may_fall_through():
    """As 10.0 has it: the predicate is an operand, and what comes after is reached."""
    found = row(TENSOR_LOOP.replace("@P0 BRA 0x0 ", "BRA.U UP0, 0x0 "))
    assert found["hot_loop"] == row(TENSOR_LOOP)["hot_loop"]
    code = next(iter(sass.parse_sass(TENSOR_LOOP.replace("@P0 BRA 0x0 ", "BRA.U !UP0, 0x0 ")).values()))
    assert code[3].conditional and code[3].target == 0
    assert not next(iter(sass.parse_sass(TENSOR_LOOP.replace("@P0 BRA 0x0 ", "BRA.U 0x0 ")).values()))[3].conditional


def test_sparse_matrices_count_half_of_their_products():
    found = row(TENSOR_LOOP.replace("HMMA.16816.F32", "HMMA.SP.16832.F32"))
    assert found["hot_loop"] == {"BRA": 1, "HMMA.SP.16832": 2, "LDSM.x4": 1}
    # Two of 4096, zeros included, at 2048 a cycle: 4 cycles again.
    assert found["bound"] == 1.0
    copying = TENSOR_LOOP.replace("HMMA.16816.F32", "HMMA.SP.16832.F32").replace(
        "BRA 0x0", "LDGSTS.E.BYPASS.128 [R5], [R2.64] ; /* 0x0 */\n        /*0038*/ @P0 BRA 0x0"
    )
    assert (row(copying)["bound"], row(copying)["limiter"]) == (0.5, "shared memory")  # 512 bytes more


def test_a_table_agrees_with_itself():
    rows = [row(), row(TENSOR_LOOP, "tensor")]
    assert gpu_static.compared(rows, {"nvcc": "13.0", "kernels": copy.deepcopy(rows)}, "13.0") == []


FFMA = "        /*0060*/                   FFMA R15, R11, R20, R15 ;                /* 0x000000140b0f7223 */\n"
BRA = "        /*0080*/              @!P1 BRA 0x20 ; "


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r, s: row(LISTING, resources={**CLEAN, "spill_bytes": 8}), "spilled"),
        (lambda r, s: row(s.replace("STG.E [R2.64]", "STL [R1]")), "spilled"),
        (lambda r, s: row(s.replace("LDS.128", "LDS.64")), "LDS of 64 bits"),
        (lambda r, s: row(s.replace("LDGSTS.E.BYPASS.128", "LDG.E.128")), "LDGSTS is gone"),
        (lambda r, s: row(s.replace(FFMA, FFMA.replace("FFMA", "FADD"))), "instructions per multiply-add"),
        (lambda r, s: row(re.sub("BRA 0x[12]0 ", "NOP ", s)), "the hot loop is gone"),
        (lambda r, s: row(kernel="other"), "no longer compiled"),
    ],
)
def test_what_got_worse_is_flagged(change, said):
    before = row()
    wrong = gpu_static.compared([change(before, LISTING)], {"nvcc": "13.0", "kernels": [before]}, "13.0")
    assert any(said in sentence for sentence in wrong), wrong


def test_a_matrix_instruction_that_is_gone_is_flagged():
    before = row(TENSOR_LOOP)
    now = row(TENSOR_LOOP.replace("HMMA.16816.F32", "FFMA"))
    wrong = gpu_static.compared([now], {"nvcc": "13.0", "kernels": [before]}, "13.0")
    assert any("HMMA.16816 is gone" in sentence for sentence in wrong), wrong


def test_required_properties_hold_with_another_compiler_too(capsys):
    listing = LISTING.replace("LDGSTS.E.BYPASS.128", "LDG.E.128").replace("LDS.128", "LDS.64")
    now = row(listing, kernel="conv2d_kernel<1, 4, 4, 64, 1>")
    wrong = gpu_static.compared([now], {"nvcc": "12.8", "kernels": []}, "13.0")
    assert any("no LDGSTS" in sentence for sentence in wrong) and any("no LDS.128" in sentence for sentence in wrong)
    assert "nvcc 12.8" in capsys.readouterr().out


def test_occupancy_agrees_with_nvidias_own(tmp_path):
    """cuda_occupancy.h is host code: registers, shared memory and threads to blocks of an SM."""
    include = gpu_toolkit.include()
    if include is None or not (include / "cuda_occupancy.h").is_file():
        pytest.skip("needs the CUDA toolkit's headers")
    cases = [
        (r, s, t) for r in (32, 40, 72, 124, 168, 255) for s in (0, 20 << 10, 64 << 10, 98 << 10) for t in (64, 96, 256)
    ]
    program = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  struct { int major, minor, threads, shared, reserved; } all[] = {
      {7, 5, 1024, 64 << 10, 64 << 10}, {8, 0, 2048, 164 << 10, 163 << 10}, {8, 6, 1536, 100 << 10, 99 << 10},
      {8, 9, 1536, 100 << 10, 99 << 10}, {9, 0, 2048, 228 << 10, 227 << 10},
      {10, 0, 2048, 228 << 10, 227 << 10}, {12, 0, 1536, 100 << 10, 99 << 10}};
  struct { int registers, shared, threads; } cases[] = {CASES};
  for (auto& a : all) {
    for (auto& c : cases) {
      cudaOccDeviceProp p{};
      p.computeMajor = a.major; p.computeMinor = a.minor; p.maxThreadsPerBlock = 1024;
      p.maxThreadsPerMultiprocessor = a.threads; p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32;
      p.sharedMemPerBlock = 48 << 10; p.sharedMemPerMultiprocessor = a.shared; p.numSms = 100;
      p.sharedMemPerBlockOptin = a.reserved; p.reservedSharedMemPerBlock = 1024;
      cudaOccFuncAttributes f{};
      f.maxThreadsPerBlock = 1024; f.numRegs = c.registers; f.maxDynamicSharedSizeBytes = a.reserved;
      f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; f.partitionedGCConfig = PARTITIONED_GC_OFF;
      cudaOccDeviceState s{}; s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
      cudaOccResult r{};
      cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, c.threads, c.shared);
      std::printf("%d\\n", r.activeBlocksPerMultiprocessor);
    }
  }
}
""".replace("CASES", ", ".join(f"{{{r}, {s}, {t}}}" for r, s, t in cases))
    source, binary = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(program)
    subprocess.run(["g++", "-w", f"-I{include}", str(source), "-o", str(binary)], check=True)
    said = [int(n) for n in subprocess.run([str(binary)], capture_output=True, text=True).stdout.split()]
    ours = [
        gpu_static.occupancy(r, s, t, gpu_static.ARCHITECTURES[arch]) // (t // 32)
        for arch in gpu_static.ARCHITECTURES
        for r, s, t in cases
    ]
    assert ours == said


def test_a_constant_is_no_product():
    """Which the compiler loads by HFMA2 from 12.0 on: a loop that only copies is none that multiplies."""
    (code,) = sass.parse_sass(LISTING.replace("FFMA R12, R8, R20, R12", "HFMA2 R12, -RZ, RZ, 0, 0")).values()
    assert [sass.macs(i) for i in code[3:7]] == [0, 32, 32, 32]


@pytest.mark.slow
def test_no_kernel_spills_or_got_worse_on_any_architecture():
    if gpu_toolkit.include() is None or not (gpu_toolkit.include().parent / "bin" / "nvcc").is_file():
        pytest.skip("needs the CUDA toolkit with nvcc")
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu_static.py")], check=True)


def test_the_committed_table_holds_what_is_required():
    table = json.loads((gpu_static.RESULTS / "gpu_static.json").read_text())
    assert {r["arch"] for r in table["kernels"]} == {"7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"}
    assert [sentence for r in table["kernels"] for sentence in gpu_static.missing(r)] == []


def test_the_bound_of_2_to_4_convolutions():
    """Of what `mma.sp` reaches on an architecture, copies and metadata counted: the tile of 128 x 128."""
    table = json.loads((gpu_static.RESULTS / "gpu_static.json").read_text())
    rows = [r for r in table["kernels"] if re.fullmatch(r"conv2d_24_kernel<\w+, 4, 8, 2, 2, 1>", r["kernel"])]
    assert len(rows) == 2 * 7
    for r in rows:
        if r["arch"] in gpu_static.BEFORE_COPIES:  # where they trap
            assert "bound" not in r
            continue
        assert r["bound"] / gpu_static.ARCHITECTURES[r["arch"]].sync_share >= 0.6, r


def test_a_loop_may_be_left_by_a_call():
    code = """
        /*0000*/                   FADD R0, R0, R1 ;
        /*0010*/              @!P0 CALL.REL.NOINC 0x30 ;
        /*0020*/                   BRA 0x0 ;
        /*0030*/                   FFMA R0, R0, R1, R2 ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   EXIT ;
    """
    (code,) = sass.parse_sass("Function : f\n" + code).values()
    assert [[i.address for i in loop] for loop in sass.innermost_loops(code)] == [[0x0, 0x10, 0x20], [0x30, 0x40]]
