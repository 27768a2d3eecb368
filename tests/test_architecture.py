"""The rules of the house, read off the source: see docs/architecture.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hforce"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
TREES = {name: ast.parse((SOURCE / name).read_text(encoding="utf-8")) for name in FILES}

LONGEST_FILE, LONGEST_FUNCTION = 400, 60
MAY_IMPORT_CONFIG = {"cli.py", "generate.py", "dry_run.py", "profile.py", "bench.py", "bench_kernels.py", "length.py",
                     "build.py", "sidecar.py", "toy/train.py", "toy/evaluate.py", "toy/heads.py"}  # fmt: skip
KERNELS = {"attention/triton_kernel.py", "models/fused.py", "models/wan_join.py"}  # in Triton
OPTIONAL = {*KERNELS, "attention/cudnn.py"}
HEAVY = {"torch", "transformers", "diffusers", "matplotlib", "triton"}
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATORS = {"append", "add", "update", "extend", "insert", "pop", "popitem", "clear", "remove", "setdefault", "discard"}


def imports(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def package_of(name: str) -> str:
    return ".".join(["hforce", *Path(name).parent.parts])


IMPORTS = {name: imports(tree, package_of(name)) for name, tree in TREES.items()}


def is_below(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def importers(*modules: str) -> set[str]:
    return {name for name in FILES if any(is_below(module, *modules) for module in IMPORTS[name])}


def in_wing(*wings: str) -> set[str]:
    return {name for name in FILES if name.startswith(tuple(f"{wing}/" for wing in wings))}


def where(name: str, node: ast.AST) -> str:
    return f"{name}:{getattr(node, 'lineno', 1)}"


def test_models_and_cache_do_not_know_each_other():
    assert not importers("hforce.cache") & in_wing("models")
    assert not importers("hforce.models") & in_wing("cache")


@pytest.mark.parametrize("name", sorted({"cache/policy.py"} | in_wing("cache/policies")))
def test_policies_are_plain_functions_of_frames(name):
    allowed = ("hforce.cache.policy", "hforce.errors")
    if name == "cache/policies/__init__.py":  # the table of the policies
        allowed += ("hforce.cache.policies",)
    ours = {module for module in IMPORTS[name] if is_below(module, "hforce")} - {"hforce.cache"}
    assert {module for module in ours if not is_below(module, *allowed)} == set()
    assert not {module for module in IMPORTS[name] if is_below(module, "torch", "numpy")}


def test_configuration_stays_above():
    assert importers("omegaconf") == {"config.py"}
    assert importers("hforce.config", "hforce.settings") <= MAY_IMPORT_CONFIG | {"config.py"}


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_what_needs_triton_or_cudnn_is_behind_one_door(name):
    """Nobody else imports these packages; and each of the files that do is imported in one place, inside a function."""
    assert importers("triton") == KERNELS and importers("cudnn") == OPTIONAL - KERNELS
    module = f"hforce.{name.removesuffix('.py').replace('/', '.')}"
    (door,) = importers(module)
    top = ast.Module([node for node in TREES[door].body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert module not in imports(top, package_of(door))


def assigned(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, ast.expr]]:
    """Every name that gets a value at module level."""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                yield node, target.id, node.value


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        name = getattr(value.func, "id", getattr(value.func, "attr", ""))
        return name in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def changes(tree: ast.Module, names: set[str]) -> Iterator[ast.AST]:
    """Every place that changes one of the names: `NAME[x] = y`, `del NAME[x]`, `NAME.append(x)`, `NAME += x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            target: ast.expr = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            target = node.func.value
        elif isinstance(node, ast.AugAssign):
            target = node.target
        else:
            continue
        if isinstance(target, ast.Name) and target.id in names:
            yield node


@pytest.mark.parametrize("name", FILES)
def test_modules_have_no_state(name):
    tree = TREES[name]
    held = [(node, label) for node, label, value in assigned(tree) if is_mutable(value) and label != "__all__"]
    # A table in capitals is a constant, as long as nothing changes it.
    assert [where(name, node) for node, label in held if not label.lstrip("_").isupper()] == []
    assert [where(name, node) for node in changes(tree, {label for _, label in held})] == []
    assert [where(name, node) for node in ast.walk(tree) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("name", sorted(set(FILES) - {"cli.py", "__main__.py"}))
def test_below_the_command_line_nobody_prints_or_reads_the_environment(name):
    prints, reads = [], []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            prints.append(where(name, node))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}:
            reads.append(where(name, node))
    assert (prints, reads) == ([], [])
    assert not {module for module in IMPORTS[name] if module in {"os.environ", "os.getenv"}}


def told_phrases() -> dict[str, str]:
    """Path below src/hforce -> phrase, from the fenced trees of docs/architecture.md.

    A line `name.py  phrase` (a number between the two is passed over) lies in the folders `name/` above it that begin
    further left; a name with slashes in it says its folder itself.
    """
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told: dict[str, str] = {}
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        folders: list[tuple[int, str]] = []
        for line in block.splitlines():
            folder = re.match(r"^([|`\- ]*)([\w./]+)/(?:\s|$)", line)
            file = re.match(r"^([|`\- ]*)([\w/]+\.py)\s+(?:\d+\s+)?(\S.*)$", line)
            if not (folder or file):
                continue
            column = len((folder or file)[1])
            folders = [(left, name) for left, name in folders if left < column]
            if file:
                path = "/".join([name for _, name in folders] + [file[2]])
                if "tests/" not in path:
                    told[path.rpartition("src/hforce/")[2]] = file[3].strip()
            else:
                folders.append((column, folder[2]))
    return told


def test_every_file_begins_with_the_phrase_in_the_tree():
    written = {name: (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".") for name, tree in TREES.items()}
    told = {name: phrase.rstrip(".") for name, phrase in told_phrases().items()}
    assert {name: phrase for name, phrase in told.items() if name not in written} == {}, "told of, but not there"
    assert {name: phrase for name, phrase in written.items() if told.get(name) != phrase} == {}


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    assert len((SOURCE / name).read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{where(name, node)} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {function: lines for function, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def floors(name: str) -> set[str]:
    """The files of hforce that a file imports, inside functions too."""
    ours = {module for module in IMPORTS[name] if is_below(module, "hforce")}
    modules = {module.removeprefix("hforce.").replace(".", "/") for module in ours}
    return {file for module in modules for file in (f"{module}.py", f"{module}/__init__.py") if file in TREES} - {name}


def test_imports_run_downhill():
    left = {name: floors(name) for name in FILES}
    while ready := [name for name, needs in left.items() if not needs]:
        left = {name: needs - set(ready) for name, needs in left.items() if name not in ready}
    assert left == {}, "these import each other in a ring, or something that does"


def test_help_is_there_without_the_heavy_libraries():
    command = [sys.executable, "-X", "importtime", "-m", "hforce.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "src", timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hforce.errors" in imported
    assert {module for module in imported if module.split(".")[0] in HEAVY} == set()
