"""Imports run one way: nsa_kernels <- nsa_dist <- nsa_dist.adapters <- launch."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels" / "nsa_kernels").rglob("*.py"))
ATTENTION = sorted((ROOT / "nsa_dist").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").rglob("*.py"))
ADAPTERS = [path for path in ATTENTION if "adapters" in path.parts]
CORE = [path for path in ATTENTION if "adapters" not in path.parts]


def _module(path: Path) -> str:
    """Dotted name of a file of nsa_dist or nsa_kernels; a package's is that of its __init__."""
    root = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported(source: str, module: str = "", is_package: bool = False) -> set[str]:
    """Dotted names that ``source`` imports anywhere, or reaches as torch.distributed.

    ``from a import b`` counts as a and a.b, since b may be a module; relative ones are resolved
    from ``module``.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + is_package
                base = ".".join(parts[:keep] + ([base] if base else []))
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def _imported_by(path: Path) -> set[str]:
    module = _module(path)
    return imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _offenders(files: list[Path], *banned: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(_imported_by(path))
        if any(_within(name, package) for package in banned)
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        (
            "def f():\n    import torch\n    return torch.distributed.get_rank()",
            "torch.distributed",
        ),
        ("from ..adapters import megatron", "nsa_dist.adapters"),
        ("from .x import y", "nsa_dist.comm.x.y"),
    ],
)
def test_the_checker_sees_imports(source: str, expected: str) -> None:
    assert expected in imported(source, "nsa_dist.comm.halo")


def test_the_files_are_found() -> None:
    assert KERNELS
    assert CORE
    assert LAUNCH


def test_kernels_know_one_device_only() -> None:
    banned = ("torch.distributed", "nsa_dist", "launch", "tests")
    assert _offenders(KERNELS, *banned) == []


def test_attention_imports_no_adapter_and_no_program() -> None:
    assert _offenders(CORE, "nsa_dist.adapters", "launch", "tests") == []


def test_adapters_import_no_program() -> None:
    assert _offenders(ADAPTERS, "launch", "tests") == []


def _at_import(path: Path) -> set[str]:
    """Modules of launch/ that are imported when this one is: not in functions, not for types."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.With | ast.Try):
            found |= imported(ast.unparse(node))
    return found & {_module(path) for path in LAUNCH} - {"launch"}


def test_launch_has_no_circle() -> None:
    graph = {_module(path): _at_import(path) for path in LAUNCH}
    assert graph["launch.train"] >= {"launch.settings", "launch.engines.registry"}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # Raises CycleError.


def test_only_engines_know_their_names() -> None:
    """Others ask the registry, which loads an engine's module by its row."""
    names = {"fsdp2", "megatron", "deepspeed"}
    known: dict[str, set[str]] = {}
    for path in LAUNCH:
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and node.value in names
        }
        if strings and "engines" not in path.parts:
            known[path.relative_to(ROOT).as_posix()] = strings
    # The default, and the two whose checkpoints become each other's.
    assert known == {"launch/settings.py": {"fsdp2"}, "launch/convert.py": {"fsdp2", "megatron"}}
    engines = [path for path in LAUNCH if path.parent.name == "engines"]
    shared = [path for path in engines if path.stem in ("base", "registry")]
    assert _offenders(shared, *(f"launch.engines.{name}" for name in names)) == []


def test_programs_import_no_test() -> None:
    assert _offenders(LAUNCH, "tests") == []


def test_core_needs_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "nsa_kernels", "nsa_dist", *sys.stdlib_module_names}
    offenders = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in KERNELS + CORE
        for name in sorted(_imported_by(path))
        if name.split(".")[0] not in allowed
    ]
    assert offenders == []


def test_oracle_imports_torch_only() -> None:
    oracle = ROOT / "kernels" / "nsa_kernels" / "reference.py"
    allowed = {"torch", *sys.stdlib_module_names}
    names = {name for name in _imported_by(oracle) if name.split(".")[0] not in allowed}
    assert names == set()


def test_no_backend_uses_the_oracle() -> None:
    others = [path for path in KERNELS + CORE if path.name != "reference.py"]
    assert _offenders(others, "nsa_kernels.reference") == []


IDIOM = """
if __name__ == "__main__":
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[{up}]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]
"""
BEFORE = ["from __future__ import annotations", "import sys", "from pathlib import Path"]
PROGRAMS = [path for path in LAUNCH if '__name__ == "__main__"' in path.read_text("utf-8")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_program_takes_its_folder_off_the_path(program: Path) -> None:
    """Before all other imports: a module beside a program must not hide a library from it."""
    _, *statements = map(ast.unparse, ast.parse(program.read_text("utf-8")).body)
    up = len(program.relative_to(ROOT).parts) - 1
    assert statements[:4] == [*BEFORE, ast.unparse(ast.parse(IDIOM.format(up=up)))]


def test_nothing_of_ours_hides_a_module_of_others() -> None:
    """What the checkout's two folders on sys.path hold, and what lies beside a program when Python
    starts it."""
    tops = (ROOT, ROOT / "kernels")
    ours = {path.parent.name for top in tops for path in top.glob("*/__init__.py")}
    ours |= {path.stem for top in tops for path in top.glob("*.py")}
    assert ours == {"launch", "nsa_dist", "nsa_kernels", "tests"}
    installed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if set(distributions) != {"nsa-dist"}
    }
    assert ours & {*sys.stdlib_module_names, *installed} == set()
    beside = {path.stem for program in PROGRAMS for path in program.parent.glob("*.py")}
    assert beside & set(sys.stdlib_module_names) == set()
