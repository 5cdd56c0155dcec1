"""The layer rule: imports and includes only go down, and each thing has its one place."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
CUDA = sorted(path for path in KERNELS.rglob("*.cu*") if path.suffix in (".cu", ".cuh"))
PACKAGE = ROOT / "cuattn"
FOLDERS = ("*.py", "emulator/*.py", "interop/**/*.py")
PYTHON = sorted(path for pattern in FOLDERS for path in PACKAGE.glob(pattern))
HOST = sorted(  # the emulator's C++: its core, and the kernels' headers for a CPU
    path for path in PACKAGE.glob("emulator/**/*") if path.suffix in (".cpp", ".h", ".cuh")
)

CUDA_FLOORS = ("core", "ptx", "tile", "attention", ".")  # "." holds the kernels themselves

# A module imports only from the lines above its own.
PYTHON_FLOORS = (
    ("_records", "_dtypes", "_layout"),
    ("_sources", "_config", "_device", "_overlap", "_host"),
    ("_compile", "_params", "_tool_params", "_tensor_map", "_hopper"),
    ("_replay", "_replay_decode", "_check_arrays"),
    ("reference_decode",),
    ("reference_mla",),
    ("_ingest", "_check", "_heuristics", "_launch", "reference", "_workspace"),
    ("skip_softmax", "_shipped", "_workloads", "_check_tools", "_check_mla"),
    ("_workloads_paged",),
    ("emulator._build", "emulator._tensor_map"),
    ("emulator._memory", "emulator._report"),
    ("emulator._run",),
    ("emulator._settings",),
    ("emulator._launch",),
    ("emulator",),
    ("_tools",),
    ("_validate",),
    ("_call",),
    ("prefill", "decode", "append", "merge", "mla"),
    ("__init__", "interop"),
    ("interop._jax_call",),
    ("interop._jax_forms",),
    ("interop.jax",),
    ("interop._engines",),
    ("interop._rank_seeds",),
    ("interop.distributed",),
    ("interop._torch_stream",),
    ("interop._torch_operators",),
    ("interop._torch_arguments", "interop._torch_padded"),
    ("interop.torch",),
    ("interop.transformers",),
    ("interop.flashinfer._arguments",),
    ("interop.flashinfer._results",),
    ("interop.flashinfer._wrapper", "interop.flashinfer.mla"),
    ("interop.flashinfer._prefill_wrapper", "interop.flashinfer._decode_wrapper"),
    ("interop.flashinfer.prefill", "interop.flashinfer.decode"),
    ("interop.flashinfer",),
    ("_demo", "_cli_compile"),
    ("_cli_info",),
    ("_cli_check",),
    ("__main__",),
)
NUMPY_ONLY = (
    "_records",
    "_check",
    "_check_arrays",
    "_check_mla",
    "_heuristics",
    "_hopper",
    "_shipped",
    "_config",
    "_params",
    "_tool_params",
    "_check_tools",
    "_overlap",
    "_tensor_map",
    "_replay",
    "_replay_decode",
    "_dtypes",
    "_layout",
    "_host",
    "reference",
    "reference_decode",
    "reference_mla",
)
# Modules that may import CuPy, and only inside their functions.
CUPY_INSIDE = (
    *("_ingest", "_device", "_compile", "_launch"),
    # To allocate results, counters and room for partial results.
    *("_call", "skip_softmax", "_workspace", "_tools", "_validate", "merge"),
    *("_demo", "_workloads", "_cli_check", "_cli_info"),
    *("interop._jax_call", "interop._engines"),
    "interop._torch_stream",
)
FRAMEWORKS_INSIDE = ("_demo", "interop._engines")
# Modules for a framework, which import it as they are imported.
FRAMEWORKS = {
    "interop._jax_call": ("jax",),
    "interop._torch_stream": ("torch",),
    "interop._torch_operators": ("torch",),
    "interop._torch_arguments": ("torch",),
    "interop._torch_padded": ("torch",),
    "interop.torch": ("torch",),
    "interop.transformers": ("torch", "transformers"),
    "interop.flashinfer": ("torch",),  # all of the folder
}
LINES = 450


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(text: str) -> str:
    """Blank out comments and keep the line numbers."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL
    )


def lines_with(path: Path, pattern: str) -> list[str]:
    code = without_comments(path.read_text(encoding="utf-8"))
    return [
        f"{name_of(path)}:{number}: {line.strip()}"
        for number, line in enumerate(code.splitlines(), 1)
        if re.search(pattern, line)
    ]


def cuda_floor(name: str) -> int:
    folder = Path(name).parent.as_posix()
    assert folder in CUDA_FLOORS, f"{name} is in none of the folders {CUDA_FLOORS}"
    return CUDA_FLOORS.index(folder)


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", CUDA, ids=name_of)
def test_includes_go_down(path: Path) -> None:
    floor = cuda_floor(path.relative_to(KERNELS).as_posix())
    for include in includes(path):
        assert re.fullmatch(r"<[\w/]+\.cuh>", include), (
            f"{name_of(path)} includes {include}; wanted an angle include of a .cuh of kernels/"
        )
        target = include[1:-1]
        assert (KERNELS / target).is_file(), f"{name_of(path)} includes {target}, not in kernels/"
        assert cuda_floor(target) <= floor, f"{name_of(path)} includes {target}: that goes up"


@pytest.mark.parametrize("path", CUDA, ids=name_of)
def test_instructions_and_branches_keep_to_their_floors(path: Path) -> None:
    floor = path.relative_to(KERNELS).parts[0]
    if floor not in ("ptx", "core"):
        assert not lines_with(path, r"\basm\b"), "asm belongs to kernels/ptx and kernels/core"
    if floor != "core":
        assert not lines_with(path, r"^\s*#\s*(if|ifdef|ifndef)\b"), "use if constexpr"


@pytest.mark.parametrize("path", HOST, ids=name_of)
def test_the_emulator_includes_the_kernels_and_itself(path: Path) -> None:
    """Headers that kernels see bring no standard header, whose names a GPU would not have."""
    folder = PACKAGE / "emulator" / "include"
    for include in includes(path):
        target = include.strip('<>"')
        if path.is_relative_to(folder) and include != "EMULATED_FILE":
            assert (folder / target).is_file() or (KERNELS / target).is_file(), (
                f"{name_of(path)} includes {include}; wanted a header of the emulator or kernels/"
            )
        assert "ptx/" not in target, f"{name_of(path)} includes {include}: that goes up"
    assert not lines_with(path, r"\b__CUDA_ARCH__\b|\b__CUDACC__\b")


@pytest.mark.parametrize("path", [*CUDA, *PYTHON, *HOST], ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= LINES, f"{name_of(path)} has {count} lines; {LINES} are the limit"


def module_of(path: Path) -> str:
    """`_call`, `emulator._run`; `emulator` for its `__init__`."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def python_floor(module: str) -> int:
    for floor, modules in enumerate(PYTHON_FLOORS):
        if module in modules:
            return floor
    raise AssertionError(f"cuattn.{module} has no place in PYTHON_FLOORS")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield dotted names imported at run time, each with whether that is inside a function."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, inside)
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parent.parts if node.level else ()
            parts = parts[: len(parts) + 1 - node.level]
            package = ".".join(filter(None, (*parts, node.module)))
            yield from ((f"{package}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_python_imports_go_down(path: Path) -> None:
    floor = python_floor(module_of(path))
    modules = {module_of(other) for other in PYTHON}
    for name, _ in imports(path):
        package, _, module = name.partition(".")
        if package != "cuattn":
            continue
        while module and module not in modules:  # a public name: `from cuattn import prefill`
            module = module.rpartition(".")[0]
        module = module or "__init__"
        assert python_floor(module) < floor, f"{name_of(path)} imports cuattn.{module}: not below"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_flashinfers_names_stand_on_public_functions(path: Path) -> None:
    """They see what users see, themselves, and nothing below."""
    module = module_of(path)
    if not module.startswith("interop.flashinfer"):
        return
    public = PYTHON_FLOORS[PYTHON_FLOORS.index(("__init__", "interop")) - 1]
    for name, _ in imports(path):
        package, _, target = name.partition(".")
        if package == "cuattn" and not target.startswith("interop"):
            assert target.split(".")[0] in (*public, "skip_softmax"), (
                f"{name_of(path)} imports {name}; wanted a module of public functions"
            )


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_foreign_imports_are_the_allowed_ones(path: Path) -> None:
    module = module_of(path)
    for name, inside in imports(path):
        package = name.partition(".")[0]
        if package in ("cuattn", "numpy", "ml_dtypes") or package in sys.stdlib_module_names:
            continue
        assert module not in NUMPY_ONLY, f"{name_of(path)} imports {name}; NumPy is its limit"
        if package in ("cupy", "cupyx"):
            assert module in CUPY_INSIDE and inside, (
                f"{name_of(path)} imports {name}; that is for functions of {CUPY_INSIDE}"
            )
        elif package in FRAMEWORKS.get(re.sub(r"^(interop\.flashinfer).*", r"\1", module), ()):
            assert not inside, f"{name_of(path)} imports {name} in a function; wanted at its top"
        elif package == "benchmarks":
            assert module in ("_demo", "__main__") and inside
        else:
            assert module in FRAMEWORKS_INSIDE and inside, f"{name_of(path)} imports {name}"
