"""What compiled GPU code says of itself: resources, instructions and loops, read from cuobjdump's text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# The code of one warp instruction: /*0a10*/ @!P0 BRA 0x1090 ;
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers: LDS.128, HMMA.16816.F32
    operands: str
    conditional: bool

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes, or a call under a condition, by which nvcc leaves loops. The slow path of shuffles
        (BRA.DIV) is left out: it makes loops that are none."""
        leaves = self.name == "CALL" and self.conditional
        if not (leaves or self.name in ("BRA", "JMP")) or ".DIV" in self.opcode:
            return None
        found = _TARGET.findall(self.operands)
        return int(found[-1], 16) if found else None


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """``cuobjdump -sass``: mangled name of each function to its instructions."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if "Function :" in line:
            current = functions.setdefault(line.partition("Function :")[2].strip(), [])
        elif found := _LINE.match(line):
            address, guard, opcode, operands = found.groups()
            # @UPT and @PT are always true. A uniform branch has its predicate among the operands: BRA.U !UP0, 0x1330.
            guarded = guard is not None and guard.strip() not in ("@PT", "@UPT")
            conditional = guarded or (opcode.startswith("BRA.U") and re.match(r"!?UP\d", operands) is not None)
            current.append(Instruction(int(address, 16), opcode, operands.strip(), conditional))
    return functions


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """``cuobjdump -res-usage``: {function: {"registers", "shared_bytes", "spill_bytes"}}."""
    resources = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
        resources[name] = {
            "registers": numbers["REG"],
            "shared_bytes": numbers["SHARED"],
            # Registers that don't fit and arrays that can't be registers both lie there.
            "spill_bytes": numbers["STACK"] + numbers["LOCAL"],
        }
    return resources


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and for each those that may follow."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.target is not None or instruction.name in ENDS:
            leaders.add(i + 1)
        if instruction.target in index:
            leaders.add(index[instruction.target])
    starts = sorted(leader for leader in leaders if leader < len(code))
    blocks = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    block_at = {block[0].address: i for i, block in enumerate(blocks)}
    follows = []
    for i, block in enumerate(blocks):
        last, after = block[-1], []
        if last.target in block_at:
            after.append(block_at[last.target])
        goes = (last.target is not None and last.name != "CALL") or last.name in ENDS
        falls = last.conditional or not goes
        if falls and i + 1 < len(blocks):
            after.append(i + 1)
        follows.append(after)
    return blocks, follows


def innermost_loops(code: list[Instruction], nested: bool = False) -> list[list[Instruction]]:
    """The natural loops that hold no other: edges back to a block that dominates where they come from.

    Args:
        nested: those that hold others, too.
    """
    blocks, follows = _blocks(code)
    # What no edge leads to, as the slow paths of shuffles, leads nowhere.
    reached, open_ = {0}, [0]
    while open_:
        for j in follows[open_.pop()]:
            if j not in reached:
                reached.add(j)
                open_.append(j)
    follows = [after if i in reached else [] for i, after in enumerate(follows)]
    before: list[list[int]] = [[] for _ in blocks]
    for i, after in enumerate(follows):
        for j in after:
            before[j].append(i)
    everything = set(range(len(blocks)))
    dominators = [{0}] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            found = set.intersection(*(dominators[j] for j in before[i])) | {i} if before[i] else {i}
            if found != dominators[i]:
                dominators[i], changed = found, True
    loops: dict[int, set[int]] = {}
    for i, after in enumerate(follows):
        for header in after:
            if header in dominators[i]:
                members, open_ = loops.setdefault(header, {header}), [i]
                while open_:
                    j = open_.pop()
                    if j not in members:
                        members.add(j)
                        open_ += before[j]
    inner = [m for h, m in loops.items() if nested or not any(other in m and other != h for other in loops)]
    # A block that only traps (BRA to itself at the function's end) is no loop.
    result = [[instruction for i in sorted(members) for instruction in blocks[i]] for members in inner]
    return [loop for loop in result if len(loop) > 1]


# Multiply-adds of one warp instruction: per lane for vector units, of the whole matrix for tensor cores.
VECTOR_MACS = {"FFMA": 32, "FFMA2": 64, "HFMA2": 64, "DFMA": 32}


def macs(instruction: Instruction) -> int:
    """Multiply-adds of a warp; those of sparse matrices count as if they were dense."""
    if instruction.name == "HMMA":
        sizes = {"16816": 2048, "1688": 1024, "1684": 512, "16832": 4096}
        found = next((size for shape, size in sizes.items() if f".{shape}" in instruction.opcode), 0)
        return found
    if instruction.name == "HFMA2" and "RZ, RZ" in instruction.operands:
        return 0  # how the compiler loads a constant
    return VECTOR_MACS.get(instruction.name, 0)


def load_bytes(instruction: Instruction) -> int:
    """Of each lane."""
    width = re.search(r"\.(128|64|U16|U8|S16|S8)\b", instruction.opcode)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width.group(1)] if width else 4


def kind(instruction: Instruction) -> str:
    """Under which name the table counts it: loads with their width, matrix products with their shape."""
    name = instruction.name
    if name in ("LDS", "LDG", "LDSM", "STS", "STG"):
        if name == "LDSM":
            return "LDSM.x" + (re.search(r"\.([124])$", instruction.opcode) or ["", "1"])[1]
        return f"{name}.{8 * load_bytes(instruction)}"
    if name == "HMMA":
        sparse = ".SP" if ".SP" in instruction.opcode else ""
        return f"HMMA{sparse}." + (re.search(r"\.(168\d+)", instruction.opcode) or ["", "?"])[1]
    return name


def mix(code: list[Instruction]) -> Counter:
    return Counter(kind(instruction) for instruction in code)
