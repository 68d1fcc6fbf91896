"""What the shipped kernels compile to, on a machine without a GPU.

    python -m ppo_nlu.kernels.compile_report [--arch 80 90] [--only NAME] [--quick] [--csv FILE]

Every kernel module offers `shipped()`: its launches at real shapes. They are recorded instead of
run, with what Triton would specialise on (types, ones, divisibility by 16), and compiled for each
chip. The read-outs come from the machine code itself, through the tools in Triton's wheel:
registers a thread, shared memory a program, spills (loads and stores of local memory) and
tensor-core instructions (HGMMA: wgmma of sm_90, HMMA: mma of sm_80).
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

MODULES: tuple[str, ...] = (
    "token_logprobs", "linear_logprobs", "online_logprobs", "lora_gemm", "gae", "ppo_loss",
)  # fmt: skip
SHARED_LIMIT = {80: 166912, 90: 232448}  # bytes a program may have: A100, H100 and H200
REGISTER_LIMIT = 65536  # of one multiprocessor, so of one program as well
_POINTEES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch as Triton would see it."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    warps: int
    stages: int
    grid: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for launches that compile to the same code."""
        constants = tuple(sorted((k, str(v)) for k, v in self.constants.items()))
        signature = tuple(self.signature.items())
        name = self.kernel.__name__
        return name, signature, constants, self.divisible, self.warps, self.stages


@dataclass(frozen=True)
class Readout:
    """What one launch compiles to for one chip."""

    label: str
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    shared: int
    spills: int
    hgmma: int
    hmma: int

    def faults(self) -> list[str]:
        """Why this could not be launched, or would be slow."""
        found = []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} are had")
        if self.registers * self.warps * 32 > REGISTER_LIMIT:
            found.append(f"{self.registers} registers on {self.warps} warps")
        if self.spills:
            found.append(f"{self.spills} spilling instructions")
        return found


@contextmanager
def recording(launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> Iterator[None]:
    """Inside, launches are appended as (kernel, args, kwargs, grid) and nothing runs."""
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append((self, args, kwargs, grid))

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def record(label: str, thunk: Callable[[], object]) -> list[Launch]:
    """The launches of a thunk on CPU tensors, none of them run."""
    raw: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
    with recording(raw):
        thunk()
    return [_describe(label, *launch) for launch in raw]


def _describe(
    label: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any
) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for index, param in enumerate(kernel.params):
        value = values.get(param.name, param.default)
        plain = param.do_not_specialize
        if param.is_constexpr or value is None or (_is_int(value) and value == 1 and not plain):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        signature[param.name] = _type(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if _is_int(number) and number % 16 == 0 and not plain:
            divisible.append(index)
    numbers = grid(values) if callable(grid) else grid
    return Launch(
        label, kernel, signature, constants, tuple(divisible),
        kwargs.get("num_warps", 4), kwargs.get("num_stages", 3), tuple(numbers),
    )  # fmt: skip


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_POINTEES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel; its `asm` holds ttir, ttgir, llir, ptx and cubin."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def parse_launch(launch: Launch, arch: int) -> Any:
    """The first step of compiling alone, which checks a kernel's types in milliseconds."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": launch.warps, "num_stages": launch.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    given = {
        "target": target,
        "options": options,
        "context": context,
        "codegen_fns": backend.get_codegen_implementation(options),
        "module_map": backend.get_module_map(),
    }
    source = _source(launch)
    wanted = inspect.signature(source.make_ir).parameters  # Triton's versions differ in these
    return source.make_ir(**{name: given[name] for name in wanted})


def _source(launch: Launch) -> ASTSource:
    return ASTSource(
        launch.kernel,
        signature=launch.signature,
        constexprs={(launch.kernel.arg_names.index(n),): v for n, v in launch.constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )


def read_out(launch: Launch, arch: int) -> Readout:
    """Compile a launch for one chip and read its machine code."""
    built = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    return Readout(
        launch.label, launch.kernel.__name__, arch, launch.warps, launch.stages, registers,
        built.metadata.shared,
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        len(re.findall(r"\bHGMMA\b", code)),
        len(re.findall(r"\bHMMA\b", code)),
    )  # fmt: skip


def _tool(name: str, *args: object) -> str:
    """The output of one of the CUDA tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(path), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def shipped(only: str = "") -> list[Launch]:
    """The launches of every module, equal ones once, whose label holds `only`."""
    found: dict[tuple[object, ...], Launch] = {}
    for name in MODULES:
        module = importlib.import_module(f"{__package__}.{name}")
        for label, thunk in module.shipped():
            for launch in record(f"{name}: {label}", thunk):
                found.setdefault(launch.key, launch)
    return [launch for launch in found.values() if only in launch.label + launch.kernel.__name__]


def one_each(launches: list[Launch]) -> list[Launch]:
    """The first launch of each kernel."""
    return list({launch.kernel: launch for launch in reversed(launches)}.values())[::-1]


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=[80, 90], help="default: both")
    parser.add_argument("--only", default="", metavar="NAME", help="part of a label or kernel name")
    parser.add_argument(
        "--quick", action="store_true", help="one launch a kernel, and sm_90 alone without --arch"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    launches = shipped(args.only)
    if not launches:
        parser.error(f"--only: no label or kernel holds {args.only!r}; try {', '.join(MODULES)}")
    if args.quick:
        launches = one_each(launches)
    archs = args.arch or ([90] if args.quick else [80, 90])
    readouts, failed = [], 0
    print("label | kernel | arch | warps | stages | registers | shared KiB | spills | HGMMA | HMMA")
    for launch in launches:
        for arch in archs:
            readouts.append(r := read_out(launch, arch))
            print(
                f"{r.label} | {r.kernel} | sm_{arch} | {r.warps} | {r.stages} | {r.registers} | "
                f"{r.shared / 1024:.1f} | {r.spills} | {r.hgmma} | {r.hmma}",
                *r.faults(),
                flush=True,
            )
            failed += bool(r.faults())
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["triton", *(f.name for f in fields(Readout))])
            writer.writerows(
                [triton.__version__, *(getattr(r, f.name) for f in fields(Readout))]
                for r in readouts
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
