"""What a streaming multiprocessor has, and what bounds a loop of compiled code on it (for gpu_static.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import sass


@dataclass(frozen=True)
class SM:
    """What a streaming multiprocessor has (CUDA C++ Programming Guide, "Compute capabilities"; the whitepapers)."""

    warps: int
    blocks: int
    shared_bytes: int  # of which each block takes 1 KiB more than it asks for
    lanes: int  # fp32 multiply-adds a cycle
    tensor_macs: int  # fp16 with fp32 sums, dense, a cycle
    sync_share: float  # of these that `mma.sync` reaches; the later ones want wgmma and tcgen05
    registers: int = 65536


ARCHITECTURES = {
    "7.5": SM(32, 16, 64 << 10, 64, 512, 1.0),
    "8.0": SM(64, 32, 164 << 10, 64, 1024, 1.0),
    "8.6": SM(48, 16, 100 << 10, 128, 512, 1.0),
    "8.9": SM(48, 24, 100 << 10, 128, 512, 1.0),
    "9.0": SM(64, 32, 228 << 10, 128, 2048, 0.6),
    "10.0": SM(64, 32, 228 << 10, 128, 4096, 0.3),
    "12.0": SM(48, 24, 100 << 10, 128, 512, 1.0),
}


def occupancy(registers: int, shared_bytes: int, threads: int, sm: SM) -> int:
    """Warps of an SM that live at once. Registers go out by 256 a warp, shared memory by 128 bytes, 1 KiB a block."""
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = sm.registers // 4 // per_warp * 4 // warps  # a quarter of the SM holds whole warps
    shared = -(-(shared_bytes + 1024) // 128) * 128
    return warps * min(sm.warps // warps, sm.blocks, by_registers, sm.shared_bytes // shared)


def wavefronts(loop: Counter, uniform_loads: bool, factor: float = 1.0, own_reads: int | None = None) -> float:
    """Cycles that shared memory and the first cache, which are one, need for what a warp asks of them in the loop.

    Args:
        uniform_loads: loads of global memory are of one address for the whole warp.
        factor: what bank conflicts multiply reads of shared memory by.
        own_reads: of 16-byte reads of shared memory those where each lane has an address of its own; the other reads of
            it are of one address, or few, and come by two registers a cycle (tests/emulator/costs.cpp says how that is
            known). None: all are the lanes' own.
    """
    total = 0.0
    own = Counter() if own_reads is None else Counter({"LDS.128": min(own_reads, loop["LDS.128"])})
    for name, count in loop.items():
        unit, _, width = name.partition(".")
        if unit == "LDS":
            lanes = count if own_reads is None else own[name]
            total += lanes * max(1.0, int(width) / 32) * factor + (count - lanes) * max(1.0, int(width) / 64)
        elif unit == "STS":
            total += count * max(1.0, int(width) / 32)
        elif unit == "LDSM":
            total += count * int(width[1:]) * factor
        elif unit == "LDGSTS":
            total += count * 4  # 16 bytes a lane
        elif unit in ("LDG", "STG"):
            total += count * (1.0 if uniform_loads and unit == "LDG" else max(1.0, int(width) / 32))
    return total


def bound(
    loop: list[sass.Instruction], sm: SM, uniform_loads: bool, factor: float = 1.0, own_reads: int | None = None
) -> tuple[float, str]:
    """(share of the peak, what limits it): cycles of an SM for the units that multiply against those for the rest. The
    arguments are those of ``wavefronts``."""
    matrix = sum(sass.macs(i) for i in loop if i.name == "HMMA" and ".SP" not in i.opcode)
    matrix += sum(sass.macs(i) / 2 for i in loop if i.name == "HMMA" and ".SP" in i.opcode)
    vector = sum(sass.macs(i) for i in loop if i.name != "HMMA")
    ideal = matrix / sm.tensor_macs if matrix else vector / sm.lanes
    sparse = any(".SP" in i.opcode for i in loop)
    units = "FMA units" if not matrix else "mma.sp" if sparse else "mma.sync"
    cycles = {
        units: matrix / (sm.tensor_macs * sm.sync_share) if matrix else ideal,
        "issue": len(loop) / 4,
        "shared memory": wavefronts(sass.mix(loop), uniform_loads, factor, own_reads),
    }
    limiter = max(cycles, key=cycles.get)
    return ideal / cycles[limiter], limiter
