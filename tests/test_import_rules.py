"""Who may import whom, by the text of both packages: imports go down, never up or round, and no folder is a heap."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from checkout import ROOT

SOURCES = {"blendmaskd": ROOT / "daemon", "blendmaskd_workers": ROOT / "workers"}
MOST_MODULES = 18  # in a folder, beside its __init__
ENTRIES = {"blendmaskd", *(f"{package}.{name}" for package in SOURCES for name in ("__main__", "commands"))}

LANGUAGE, WORKER = "blendmaskd", "blendmaskd_workers"  # the modules right there; coco, images and settings belong to it
NETWORK, ENGINES, TRAINING = (f"{WORKER}.{name}" for name in ("blendmask", "engines", "training"))
CORE, SHELL, CLIENT, PROGRAMS, CHECK, HTTP = (
    f"{LANGUAGE}.{name}" for name in ("core", "shell", "client", "programs", "check", "http")
)
TOOLS = {f"{WORKER}.{name}" for name in ("benchmark", "cluster", "evaluation", "programs")}
LAUNCHING = f"{SHELL}.launch"  # of the shell, what starts a worker as the daemon does
REST = {f"{HTTP}.rest", f"{HTTP}.bodies"}  # of the HTTP front, what Ray's application has too
LENT = {f"{SHELL}.{name}" for name in ("addresses", "csp", "systemd")}  # of the shell, what the HTTP front has too

MAY = {
    LANGUAGE: {LANGUAGE},
    CORE: {LANGUAGE, CORE},
    SHELL: {LANGUAGE, CORE, SHELL},
    CHECK: {LANGUAGE, CORE, SHELL, CHECK, HTTP},
    CLIENT: {LANGUAGE, CLIENT},
    PROGRAMS: {LANGUAGE, CLIENT, PROGRAMS},
    HTTP: {LANGUAGE, CORE, CLIENT, HTTP, *LENT},
    NETWORK: {NETWORK},
    ENGINES: {LANGUAGE, WORKER, NETWORK, ENGINES},
    WORKER: {LANGUAGE, WORKER, NETWORK, ENGINES},
    TRAINING: {LANGUAGE, PROGRAMS, WORKER, NETWORK, TRAINING},
    **{tool: {LANGUAGE, CORE, LAUNCHING, CLIENT, PROGRAMS, WORKER, NETWORK, ENGINES, TRAINING} for tool in TOOLS},
}
ALSO = {  # networks with random weights; the load of the accelerator check
    f"{WORKER}.cluster": REST,
    f"{WORKER}.evaluation": {f"{WORKER}.programs", f"{WORKER}.benchmark"},
}


def _modules() -> dict[str, Path]:
    found = {}
    for package, root in SOURCES.items():
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def room(name: str) -> str:
    """The folder of a module, as `MAY` has it."""
    if name == LAUNCHING:
        return LAUNCHING
    package, *below = name.split(".")
    folder = f"{package}.{below[0]}" if below and (SOURCES[package] / package / below[0]).is_dir() else package
    return LANGUAGE if folder in {f"{LANGUAGE}.{name}" for name in ("coco", "images", "settings")} else folder


def imported(tree: ast.AST, *, at_once: bool = False) -> Iterator[str]:
    """What a module imports: `at_once`, as it is loaded; else in functions and for type checkers too."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                names = [f"{module}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else module for name in names)
            case ast.ImportFrom():
                raise AssertionError("imports name the whole package")
            case ast.FunctionDef() | ast.AsyncFunctionDef() if at_once:
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if at_once:
                pass
            case _:
                yield from imported(node, at_once=at_once)


def of(name: str, *, at_once: bool = False) -> set[str]:
    """The modules of ours that one imports."""
    return set(imported(ast.parse(MODULES[name].read_text()), at_once=at_once)) & MODULES.keys()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - ENTRIES))
def test_a_module_imports_what_its_room_may(name: str) -> None:
    here = room(name)
    may = (MAY[SHELL] if here == LAUNCHING else MAY[here]) | ALSO.get(here, set()) | {here}
    may |= {LAUNCHING} if SHELL in may else set()
    assert {other: room(other) for other in of(name) if not {other, room(other)} & may} == {}


def test_entries_are_imported_by_entries_only() -> None:
    packages = set(SOURCES)  # `blendmaskd` lends the client's names to users, and holds the others' modules
    for name in MODULES.keys() - ENTRIES:
        assert not of(name) & (ENTRIES - packages), name


def test_no_module_is_loaded_by_what_it_loads() -> None:
    TopologicalSorter({name: of(name, at_once=True) for name in MODULES}).prepare()


def test_no_folder_has_more_modules_than_a_reader_takes_in() -> None:
    folders = {path.parent for path in MODULES.values()}
    sizes = {folder: len([*folder.glob("*.py")]) - (folder / "__init__.py").exists() for folder in folders}
    assert {folder: size for folder, size in sizes.items() if size > MOST_MODULES} == {}


def test_nothing_imports_by_the_folders_names() -> None:
    """`daemon` is python-daemon's."""
    for folder in ("daemon", "workers", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
            assert not tops & {"daemon", "workers"}, path
