"""Compare the sizes of packages, modules and functions with their limits in pyproject.toml.

A package's budget counts the lines of its Python files, except in subpackages that have a budget of their own. To raise
one is a decision of its own, in a commit of its own that says why.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("diffusion", "flows")


def read_modules(package: str) -> dict[str, str]:
    """Read the Python files of a package, by their paths."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / package).rglob("*.py"))}


def own_imports(tree: ast.Module) -> set[str]:
    """Collect the modules of this project that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def excesses(limits: dict[str, int], budgets: dict[str, int]) -> Iterator[str]:
    """Yield a line for each limit that is exceeded."""
    modules = {path: text for package in PACKAGES for path, text in read_modules(package).items()}
    for path, text in modules.items():
        tree = ast.parse(text)
        if (lines := text.count("\n")) > limits["module"]:
            yield f"{path} has {lines} lines, at most {limits['module']} are allowed: split it by ideas"
        if (count := len(own_imports(tree))) > limits["imports"]:
            yield f"{path} imports {count} of our modules, at most {limits['imports']} are allowed"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > limits["function"]:
                    place = f"{path}:{node.lineno} {node.name}"
                    yield f"{place} has {lines} lines, at most {limits['function']} are allowed"
    sizes = dict.fromkeys(budgets, 0)
    for path, text in (modules | read_modules("tests")).items():
        owners = [package for package in budgets if path.startswith(f"{package}/") or path == f"{package}.py"]
        if not owners:
            yield f"{path} is in no package of tool.darkroom.budgets in pyproject.toml: name its package there"
            continue
        sizes[max(owners, key=len)] += text.count("\n")
    for package, size in sizes.items():
        if size > budgets[package]:
            yield f"{package} has {size:,} lines, and a budget of {budgets[package]:,}: simplify what is there"


def main() -> None:
    """Print what is too large, and exit with 1 if anything is."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["darkroom"]
    found = [*excesses(settings["limits"], settings["budgets"])]
    print(*found, sep="\n", end="\n" * bool(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
