"""What a compiled kernel is made of, by the disassemblers that come with Triton."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L_x_\d+):")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    name: str
    operands: str

    @property
    def kind(self) -> str:
        """The first word, and the width of a wide load or store."""
        wide = re.search(r"\.(?:64|128)\b", self.name)
        return self.name.split(".")[0] + (wide[0] if wide else "")


@dataclass(frozen=True)
class MachineCode:
    """One kernel.

    Attributes:
        instructions: in order.
        labels: name -> index of the instruction behind it.
        registers: of a thread, at launch.
        stack: bytes of a thread's frame.
        local: bytes of a thread's local memory.
        parameters: (offset, size) of each argument.
        threads: of a program, as compiled for.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int
    stack: int
    local: int
    parameters: list[tuple[int, int]]
    threads: int

    def loops(self, kind: str) -> list[list[Instruction]]:
        """The innermost loop around each instruction of that kind, with its branch back."""
        backward = []
        for end, instruction in enumerate(self.instructions):
            target = re.search(r"\.L_x_\d+", instruction.operands)
            if instruction.name.startswith("BRA") and target and self.labels[target[0]] <= end:
                backward.append(range(self.labels[target[0]], end + 1))
        places = [i for i, instruction in enumerate(self.instructions) if instruction.kind == kind]
        inner = {min((s for s in backward if place in s), key=len) for place in places}
        return [self.instructions[s.start : s.stop] for s in sorted(inner, key=lambda s: s.start)]


def counts(instructions: list[Instruction]) -> Counter[str]:
    """Number of instructions of each kind."""
    return Counter(i.kind for i in instructions)


def read(cubin: bytes) -> MachineCode:
    """The only kernel of ``cubin``."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        code, usage, elf = (
            subprocess.run([_TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout
            for tool, options in (("nvdisasm", []), ("cuobjdump", ["-res-usage"]), ("cuobjdump", ["-elf"]))
        )
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2]))
    (resources,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    places = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", elf)
    ordered = sorted((int(n, 16), int(offset, 16), int(size, 16)) for n, offset, size in places)
    (threads,) = re.findall(r"EIATTR_REQNTID\s+Format:\s+\w+\s+Value:\s+0x(\w+)", elf)
    return MachineCode(
        instructions, labels, *(int(r) for r in resources), [place[1:] for place in ordered], int(threads, 16)
    )
