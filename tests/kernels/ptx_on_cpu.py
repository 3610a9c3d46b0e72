"""A PTX kernel run on the CPU: translated to C, one statement each, compiled with the C compiler at hand.

Knows the instructions that the emulated Blackwell kernel has, and the Hopper kernel of up to eight rows a group;
another one is an error. See ``ptx_on_cpu.h`` for threads, barriers, TMA and matrices.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

_HERE = Path(__file__).parent
_TYPES = {f"{sign}{bits}": f"{'u' * (sign == 'u')}int{bits}_t" for sign in "su" for bits in (8, 16, 32, 64)}
_WIDTH = {"pred": "uint8_t", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_SPECIAL = {"%tid.x": "current", "%ctaid.x": "program", "%nctaid.x": "programs", "%laneid": "(current & 31)"}


def _operands(text: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


class _Translator:
    def __init__(self) -> None:
        self.scope = 0
        self.in_scope = False

    def value(self, text: str) -> str:
        """An operand as a C expression."""
        if text in _SPECIAL:
            return _SPECIAL[text]
        if text.startswith("%"):
            return text[1:]
        if text.startswith("__dynamic_shmem__"):
            return "SHARED_AT"
        if parameter := re.fullmatch(r"\w+_param_(\d+)", text):
            return f"(uint64_t)&maps[{parameter[1]}]"
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
            return f"0x{text[2:]}u"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text):
            return f"({text})"
        return "v_" + text

    def address(self, text: str) -> str:
        """``[register or symbol + offset]``."""
        base, _, offset = text.strip("[] ").partition("+")
        return f"({self.value(base)} + ({offset or 0}))"

    def label(self, text: str) -> str:
        return text[1:] if text.startswith("$") else f"{text}_{self.scope}"

    def floats(self, values: list[str]) -> list[str]:
        return [f"f({value})" for value in values]

    def statement(self, text: str) -> str:
        guard = ""
        if text.startswith("@"):
            condition, text = text.split(None, 1)
            condition = condition[1:]
            guard = f"if ({'!' * condition.startswith('!')}{self.value(condition.lstrip('!'))}) "
        name, _, rest = text.partition(" ")
        if name.startswith(".reg"):
            kind, names = rest.strip().split(None, 1)
            found = re.fullmatch(r"%(\w+)<(\d+)>", names.strip())
            every = [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [
                self.value(each.strip()) for each in names.split(",")
            ]  # fmt: skip
            return f"{_WIDTH[kind[1:]]} {', '.join(f'{each} = 0' for each in every)};"
        if name.startswith(".pragma"):
            return ""
        return guard + "{ " + self.operation(name.split("."), _operands(rest)) + " }"

    def operation(self, name: list[str], operands: list[str]) -> str:
        op, kind = name[0], name[-1]
        if op == "bra":
            return f"goto {self.label(operands[0])};"
        if op == "ret":
            return "return;"
        if op in ("fence", "prefetch", "griddepcontrol"):
            return ""
        if op in ("ldmatrix", "mma"):
            return self.matrices(op, operands)
        if op == "cp" and "tensor" not in name:
            to, source, size, barrier = operands
            return f"bulk({self.address(to)}, {self.address(source)}, {self.value(size)}, {self.address(barrier)});"
        if op == "cp":
            (to, source, barrier, _) = operands
            described, _, place = source.strip("[]").partition(",")
            places = [self.value(each) for each in _operands(place.strip().strip("{}"))]
            at = ", ".join(f"(int32_t){each}" for each in places)
            return f"tma({self.address(to)}, {self.value(described)}, {self.address(barrier)}, {len(places)}, {at});"
        if op == "mbarrier":
            return self.barrier(name, operands)
        if op == "bar":
            if "warp" in name:
                return "warp(0);"
            return f"meet(&blocks[{operands[0]}], {(*operands, 'THREADS')[1]}, 0, 0);"
        if op in ("ld", "st"):
            return self.memory(name, operands)
        if op == "elect":
            _, chosen = operands[0].split("|")
            return f"warp(0); {self.value(chosen)} = (current & 31) == 0;"
        target, *sources = operands
        if op == "mov" and target.startswith("{"):
            low, high = (self.value(each) for each in _operands(target.strip("{}")))
            return f"{low} = {self.value(sources[0])}; {high} = {self.value(sources[0])} >> 16;"
        to, values = self.value(target), [self.value(each) for each in sources]
        if op == "shfl":
            if name[2] == "up":
                return f"{to} = shuffle_up({values[0]}, {values[1]});"
            if name[2] == "bfly":
                return f"{to} = warp({values[0]})[(current & 31) ^ {values[1]}];"
            return f"{to} = warp({values[0]})[{values[1]}];"
        if op == "movmatrix":
            return f"{to} = transpose({values[0]});"
        if op == "atom":
            return f"uint32_t *p = at_global({self.address(sources[0])}, 4); {to} = *p; *p += {values[1]};"
        if op == "mov" and sources[0].startswith("{"):
            low, high = (self.value(each) for each in _operands(sources[0].strip("{}")))
            return f"{to} = {low} | (uint32_t){high} << 16;"
        return f"{to} = {self.expression(op, name, kind, values)};"

    def matrices(self, op: str, operands: list[str]) -> str:
        """What a warp does together with several registers of each thread."""
        groups = [
            [self.value(each) for each in _operands(group.strip("{}"))] for group in operands if group.startswith("{")
        ]
        results = groups[0]
        if op == "ldmatrix":
            made = f"load_matrices({self.address(operands[1])}, d);"
        else:
            arrays = [f"uint32_t {n}[] = {{{', '.join(group)}}};" for n, group in zip("abc", groups[1:], strict=True)]
            made = " ".join(arrays) + " mma(a, b, c, d);"
        return f"uint32_t d[4]; {made} " + " ".join(f"{each} = d[{i}];" for i, each in enumerate(results))

    def barrier(self, name: list[str], operands: list[str]) -> str:
        if name[1] == "init":
            return f"barrier_init({self.address(operands[0])}, {self.value(operands[1])});"
        if name[1] == "arrive":
            at, number = self.address(operands[1]), self.value(operands[2])
            return f"barrier_arrive({at}, {f'{number}, 1' if 'expect_tx' in name else f'0, {number}'});"
        if name[1] == "try_wait":
            target, at, parity = operands[:3]
            return f"{self.value(target)} = barrier_test({self.address(at)}, {self.value(parity)});"
        raise NotImplementedError(".".join(name))

    def memory(self, name: list[str], operands: list[str]) -> str:
        op, space, kind = name[0], name[1], name[-1]
        place, registers = (operands[1], operands[0]) if op == "ld" else (operands[0], operands[1])
        if space == "param":
            number = re.search(r"_param_(\d+)", place)
            assert number is not None
            return f"{self.value(registers)} = parameters[{number[1]}];"
        c_type = f"uint{kind[1:]}_t"
        each = _operands(registers.strip("{}"))
        size = int(kind[1:]) // 8
        lines = [f"{c_type} *p = at_{space}({self.address(place)}, {size * len(each)});"]
        for i, register in enumerate(each):
            value = self.value(register)
            lines.append(f"{value} = p[{i}];" if op == "ld" else f"p[{i}] = {value};")
        return " ".join(lines)

    def expression(self, op: str, name: list[str], kind: str, v: list[str]) -> str:
        if op in ("mov", "cvta"):
            return v[0]
        if op == "selp":
            return f"{v[2]} ? {v[0]} : {v[1]}"
        if op == "not":
            return f"!{v[0]}"
        if op == "prmt":
            return f"permute({', '.join(v)})"
        if op == "shf":
            return f"(uint32_t)(((uint64_t){v[1]} << 32 | {v[0]}) >> ({v[2]} & 31))"
        if kind == "bf16x2" and op in ("mul", "min"):
            return f"bf16x2({v[0]}, {v[1]}, {'times' if op == 'mul' else 'fminf'})"
        if kind == "u16x2" and op == "max":
            return f"max_u16x2({v[0]}, {v[1]})"
        if op == "setp":
            x, y = self.floats(v) if kind == "f32" else [f"({_TYPES.get(kind, _WIDTH.get(kind))}){each}" for each in v]
            return f"{x} {_COMPARE[name[1]]} {y}"
        if op == "cvt":
            return self.conversion(".".join(name[1:]), v)
        if kind == "f32":
            return f"u({self.arithmetic(op, name, self.floats(v))})"
        if op in _INFIX and name[1] in ("s16", "s32", "s64", "b16", "b32", "b64", "u32", "pred"):
            return f"{v[0]} {_INFIX[op]} {v[1]}"
        if op in ("shl", "shr"):
            if kind in ("b64", "u16"):
                return f"{v[0]} {'<<' if op == 'shl' else '>>'} {v[1]}"
            if kind == "s16":
                return f"(int16_t){v[0]} >> {v[1]}"
            return f"{'sar' if kind == 's32' else op}({v[0]}, {v[1]})"
        if op == "neg":
            return f"-{v[0]}"
        signed = [f"({_TYPES[kind]}){each}" for each in v]
        if op in ("mul", "mad"):
            if name[1] == "wide":
                wide = {"s16": "int32_t", "s32": "int64_t", "u32": "uint64_t"}[kind]
                return f"({wide}){signed[0]} * ({wide}){signed[1]}"
            if name[1] == "hi":
                return f"(uint32_t)((int64_t){signed[0]} * (int64_t){signed[1]} >> 32)"
            return f"{v[0]} * {v[1]}" + (f" + {v[2]}" if op == "mad" else "")
        if op in ("div", "rem"):
            return f"{signed[0]} {'/' if op == 'div' else '%'} {signed[1]}"
        if op in ("min", "max"):
            chosen = f"({signed[0]} {'<' if op == 'min' else '>'} {signed[1]} ? {signed[0]} : {signed[1]})"
            return f"({chosen} < 0 ? 0 : {chosen})" if "relu" in name else chosen
        raise NotImplementedError(".".join(name))

    def arithmetic(self, op: str, name: list[str], v: list[str]) -> str:
        if op in _INFIX:
            return f"{v[0]} {_INFIX[op]} {v[1]}"
        if op in ("min", "max"):
            return f"{op}_nan({v[0]}, {v[1]})" if "NaN" in name else f"f{op}f({v[0]}, {v[1]})"
        known = {"div": "{} / {}", "fma": "fmaf({}, {}, {})", "neg": "-{}", "ex2": "flush(exp2f(flush({})))",
                 "rcp": "flush(1.0f / flush({}))"}  # fmt: skip
        return known[op].format(*v)

    def conversion(self, kinds: str, v: list[str]) -> str:
        if kinds == "rn.bf16x2.f32":
            return f"bf16(f({v[0]})) << 16 | bf16(f({v[1]}))"
        if kinds == "rn.satfinite.e4m3x2.f32":
            return f"e4m3(f({v[0]})) << 8 | e4m3(f({v[1]}))"
        # Through f16, exactly; kept as the number itself until the next conversion, whose register has room for a byte.
        if kinds in ("rn.f16x2.e4m3x2", "u16.u32", "u32.u16"):
            return f"({'uint16_t' if kinds == 'u16.u32' else 'uint32_t'}){v[0]}"
        if kinds == "f32.f16":
            return f"u(e4m3_value({v[0]} & 255))"
        target, source = kinds.split(".")
        return f"({_TYPES[target]})({_TYPES[source]}){v[0]}"

    def body(self, text: str) -> list[str]:
        lines = []
        for raw in text.splitlines():
            line = raw.split("//")[0].strip()
            if re.fullmatch(r"\{|\{\s*\..*", line):
                self.scope += 1
                lines.append("{")
                line = line[1:].strip()
            while found := re.match(r"([$\w]+):", line):
                lines.append(self.label(found[1]) + ":;")
                line = line[found.end() :].strip()
            closes = line.endswith("}") and ("{" not in line or line.endswith("; }"))
            statements = (line[:-1] if closes else line).split(";")
            lines += [self.statement(" ".join(each.split())) for each in statements if each.strip()]
            if closes:
                lines.append("}")
        return lines


def translate(ptx: str) -> str:
    """C source of a kernel."""
    begin = ptx.index("\n{") + 2
    threads = re.search(r"\.reqntid (\d+)", ptx)
    assert threads is not None
    lines = _Translator().body(ptx[begin : ptx.rindex("}")])
    head = f'#define THREADS {threads[1]}\n#include "ptx_on_cpu.h"\nstatic void thread(void) {{\n'
    return head + "\n".join(lines) + "\n}\n"


class Map(ctypes.Structure):
    """What a tensor map says, by the arguments of :func:`dsv4.kernels.cutedsl.launch.tensor_map`."""

    _fields_ = [
        ("address", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5), ("rank", ctypes.c_uint32), ("element", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
    ]  # fmt: skip


def tensor_map(
    address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], *, element_bytes: int = 1,
    swizzle: int = 0,
) -> Map:  # fmt: skip
    """In place of :func:`dsv4.kernels.cutedsl.launch.tensor_map`; refuses what the driver refuses."""
    assert address % 16 == 0
    assert all(stride % 16 == 0 for stride in strides)
    assert all(0 < size <= 256 for size in box)
    assert all(size > 0 for size in sizes)
    assert box[0] * element_bytes % 16 == 0
    assert not swizzle or box[0] * element_bytes <= swizzle
    result = Map(address=address, rank=len(sizes), element=element_bytes, swizzle=swizzle)
    result.sizes[: len(sizes)], result.box[: len(sizes)] = sizes, box
    result.strides[: len(strides)] = strides
    return result


class Kernel:
    """A translated kernel, launched as :class:`dsv4.kernels.cutedsl.launch.Kernel` is."""

    def __init__(self, ptx: str, shared_bytes: int):
        options = ["-O1", "-w", "-shared", "-fPIC", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off"]
        with TemporaryDirectory() as folder:
            source, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
            source.write_text(translate(ptx))
            subprocess.run(["cc", *options, f"-I{_HERE}", "-o", str(library), str(source), "-lm"], check=True)
            self.library = ctypes.CDLL(str(library))
        self.shared_bytes, self.seed = shared_bytes, 0

    def __call__(self, grid: int, stream: int, *arguments: object, dependent: bool = False) -> None:
        maps = [each for each in arguments if isinstance(each, Map)]
        words = (ctypes.c_uint64 * len(arguments))()
        for i, value in enumerate(arguments):
            if isinstance(value, float):
                words[i] = ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value
            elif isinstance(value, int):
                words[i] = value
        text = ctypes.create_string_buffer(1024)
        self.seed += 1
        failed = self.library.run(
            grid, self.shared_bytes, words, (Map * len(maps))(*maps), ctypes.c_uint64(self.seed), text
        )
        if failed:
            raise RuntimeError(text.value.decode())
