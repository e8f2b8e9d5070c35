"""Imports between the project's modules: none goes in a circle, those inside functions and by name included."""

import ast
import fnmatch
from collections.abc import Iterator
from pathlib import Path

import networkx

ROOT = Path(__file__).parents[1]
PACKAGES = ("diffusion", "flows")
BY_NAME = ("import_module", "__import__")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports at run time: statements anywhere in it, and strings given to importlib."""
    type_checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in type_checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            name = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
            assert name[:1] != "*", f"cannot tell what {ast.unparse(node)} imports"
            yield name


def import_graph() -> "networkx.DiGraph[str]":
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = {module_name(path) for path in paths}
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for path in paths:
        importer = module_name(path)
        for imported in imported_names(ast.parse(path.read_text())):
            # What is imported from a module may be a module in it, or a name of it.
            matches = fnmatch.filter(names, imported) or {imported.rpartition(".")[0]} & names
            graph.add_edges_from((importer, module) for module in matches if module != importer)
    return graph


def test_no_circular_imports() -> None:
    cycles = [sorted(part) for part in networkx.strongly_connected_components(import_graph()) if len(part) > 1]
    assert cycles == []
