"""Mutation check: does a test notice if a tensor is not moved to the device, or not made on it?

python -m tests.drills.device_places FOLDER [PART OF A PLACE …]

Each place in diffusion/ that moves a tensor, or makes one on a device, is left out in a process of its own, which then
computes the workloads that get there (``tests.builders.device_workloads``) on the simulated device. The place is caught
if one raises, gives other bits than the CPU, waits for the device more often than before, or computes less on it. All
places are compiled in, and one is switched on, so that nothing is imported twice. FOLDER keeps what was found, and the
check resumes: give it a new one when code has changed.
"""

import ast
import builtins
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 600
"""Seconds after which a workload that lacks a place counts as one that noticed."""

FIXED = ("'meta'", "'cpu'")
"""Devices that are the same wherever the program runs."""
ENOUGH = 2
"""Workloads that try a place of which it is explained why they do not notice."""
SHARDED = "of networks that processes share, whose collectives the device lacks"
EXPLAINED = {
    "diffusion/common/image_grids.py": "what the program shows is on the CPU already",
    "diffusion/diffusers_format/pipeline.py: scheduler.alphas_cumprod": "diffusers makes the levels on the CPU",
    "diffusion/evaluation/metrics/held_out_loss.py: result.": "means of what stays on the device are the same",
    "diffusion/families/pretrained/model.py: scheduler.alphas_cumprod": "diffusers makes the levels on the CPU",
    "diffusion/families/pretrained/network.py: tokens.attention_mask": "only encoders that are told so read the mask",
    "diffusion/families/gan/network.py: ((places": "made of what is on the device, and changes its type alone",
    "diffusion/families/fine_tuning.py": "adapters are merged on the CPU, and weights keep their type",
    "diffusion/process/objective.py: around.to(x0)": "the objective of the family has moved it, and it keeps the type",
    "diffusion/training/trainer.py: torch.ones(": "a CPU tensor without dimensions is an argument of the kernel",
    "diffusion/training/trainer.py: torch.zeros(": SHARDED,
    "diffusion/training/checkpointing.py: value.to(": "which step the thread that writes would see depends on time",
    "diffusion/training/checkpointing.py: part.detach().cpu()": SHARDED,
    "diffusion/training/distributed.py: tensor.to(like.device)": SHARDED,
}
"""Why it is not noticed that a place is left out, by the place or its beginning."""


class Places(ast.NodeTransformer):
    """Makes each place of a module one that can be left out."""

    def __init__(self, path: str, places: list[str]) -> None:
        self.path, self.places = path, places

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Replace a call that moves a tensor or makes one."""
        self.generic_visit(node)
        without = left_out(node)
        if without is None:
            return node
        name = f"{self.path}: {ast.unparse(original(node))}"
        name += f" #{count + 1}" if (count := sum(each.partition(" #")[0] == name for each in self.places)) else ""
        self.places.append(name)
        switch = ast.Call(ast.Name("is_left_out", ast.Load()), [ast.Constant(name)], [])
        return ast.IfExp(switch, without, node)


def original(node: ast.AST) -> ast.AST:
    """The code as it was before places in it were replaced."""

    class Original(ast.NodeTransformer):
        def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
            self.generic_visit(node)
            test = node.test
            return node.orelse if isinstance(test, ast.Call) and ast.unparse(test.func) == "is_left_out" else node

    return Original().visit(ast.parse(ast.unparse(node), mode="eval").body)


def left_out(node: ast.Call) -> ast.expr | None:
    """The ``node`` without its move to a device, or made without one; None: it has nothing to do with devices."""
    if ast.unparse(node.func) == "copy_to_device":
        return node.args[0]
    for keyword in node.keywords:
        value = ast.unparse(keyword.value)
        is_device = keyword.arg == "device" and value not in (*FIXED, "device_name(where)")
        if is_device or (keyword.arg == "non_blocking" and value == "True"):
            kept = [each for each in node.keywords if each is not keyword]
            return ast.Call(node.func, node.args, kept)
    if not isinstance(node.func, ast.Attribute):
        return None
    name, receiver = node.func.attr, node.func.value
    if name in ("cpu", "pin_memory") and not node.args:
        return receiver
    if name == "synchronize":
        return ast.Constant(None)
    if name != "to" or not node.args:
        return None
    target = ast.unparse(node.args[0])
    if (
        target in FIXED
        or target.endswith(("dtype", "value.type]"))
        or (target.startswith("torch.") and "device" not in target)
    ):
        return None
    if "device" in target.lower() or "CPU" in target:
        return receiver
    # As another tensor is, in type alone.
    return ast.Call(node.func, [ast.Attribute(node.args[0], "dtype", ast.Load())], node.keywords)


class Loader(SourceFileLoader):
    """Compiles a module with its places, and keeps no compiled file."""

    places: list[str]

    def get_code(self, fullname: str) -> CodeType:
        """Compile the source."""
        path = self.get_filename(fullname)
        places = Places(Path(path).relative_to(ROOT).as_posix(), self.places)
        tree = places.visit(ast.parse(self.get_data(path)))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class Finder(MetaPathFinder):
    """Finds the modules of ``diffusion``."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as usual, and replace its loader."""
        if fullname.partition(".")[0] != "diffusion":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
            spec.loader.places = self.places
        return spec


def import_with_places() -> list[str]:
    """Register the device, import all of ``diffusion`` with its places, and name them."""
    from tests.builders.simulated_device import register

    register()
    builtins.is_left_out = lambda _: False  # type: ignore[attr-defined]
    finder = Finder()
    sys.meta_path.insert(0, finder)
    package = import_module("diffusion")
    for module in pkgutil.walk_packages(package.__path__, "diffusion."):
        import_module(module.name)
    import_module("tests.builders.device_workloads")
    import_module("tests.builders.pipelines")
    return sorted(finder.places)


def in_a_process(work: Callable[[], Any], seconds: float = 3600) -> Any:
    """Return what ``work`` returns in a fork of this process; {"error": …} if it raises or takes too long."""
    with tempfile.TemporaryFile("w+") as answer:
        if (child := os.fork()) == 0:
            try:
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, 1)
                os.dup2(nothing, 2)
                try:
                    result = work()
                except BaseException as error:  # noqa: BLE001 (told to the parent)
                    words = str(error).partition("\n")[0][:150]
                    result = {
                        "error": f"{type(error).__name__}: {words}",
                        "at": traceback.format_exc().splitlines()[-12:],
                    }
                json.dump(result, answer)
                answer.flush()
            finally:
                os._exit(0)
        deadline = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return {"error": f"took more than {seconds:.0f} s"}
            time.sleep(0.05)
        answer.seek(0)
        return json.loads(answer.read() or '{"error": "the process died"}')


class Check:
    """The check in a folder."""

    def __init__(self, folder: Path) -> None:
        from tests.builders.device_workloads import WORKLOADS, write_data

        self.workloads, self.inputs = WORKLOADS, folder / "inputs"
        self.references, self.found = folder / "references.json", folder / "places.json"
        self.inputs.mkdir(parents=True, exist_ok=True)
        write_data(self.inputs)

    def compute(self, name: str, left_out: str = "") -> dict[str, Any]:
        """Compute a workload on the device, without a place: digests, places that it got to, waits, operations."""
        from tests.builders.simulated_device import STATE

        hits: set[str] = set()

        def is_left_out(place: str) -> bool:
            hits.add(place)
            return place == left_out

        with tempfile.TemporaryDirectory(dir=self.inputs.parent) as scratch:
            folder = shutil.copytree(self.inputs, Path(scratch) / "inputs", copy_function=os.link)
            builtins.is_left_out = is_left_out  # type: ignore[attr-defined]
            STATE.waited.clear()
            STATE.launched = 0
            values = self.workloads[name](folder, "auto")
        return {"values": values, "places": sorted(hits), "waits": len(STATE.waited), "launched": STATE.launched}

    def reference(self, name: str) -> dict[str, Any]:
        """What a workload gives with all places, which is what the CPU gives."""
        known = json.loads(self.references.read_text()) if self.references.is_file() else {}
        if name not in known:
            on_cpu = in_a_process(lambda: self.workloads[name](self.inputs, "cpu"))
            result = in_a_process(lambda: self.compute(name))
            if result.get("values") != on_cpu:
                raise RuntimeError(f"{name} gives {result.get('at')} on the device, not the CPU's {on_cpu.get('at')}")
            known[name] = result
            self.references.write_text(json.dumps(known))
        reference: dict[str, Any] = known[name]
        return reference

    def leave_out(self, place: str, name: str) -> str | None:
        """Leave a place out of a workload that gets there: how that is noticed, or None."""
        reference, result = self.reference(name), in_a_process(lambda: self.compute(name, place), MAX_SECONDS)
        if "error" in result:
            return str(result["error"])
        if result["values"] != reference["values"]:
            return "other bits"
        if result["launched"] < reference["launched"] * 0.9:
            return "computed elsewhere"
        # How often a dry run waits depends on the time that it has.
        more = 0 if name == "dry run" else result["waits"] - reference["waits"]
        return f"{more} more waits" if more > 0 else None

    def run(self, places: Sequence[str]) -> dict[str, dict[str, str]]:
        """Leave out ``places``, each of all workloads that get there until one notices: what was noticed, by workload.

        None of them have noticed a place whose last one has no words.
        """
        known = json.loads(self.found.read_text()) if self.found.is_file() else {}
        for name in self.workloads:
            for place in self.reference(name)["places"]:
                tried = known.setdefault(place, {})
                is_enough = any(tried.values()) or (explanation(place) and len(tried) == ENOUGH)
                if place not in places or name in tried or is_enough:
                    continue
                tried[name] = self.leave_out(place, name)
                self.found.write_text(json.dumps(known, indent=1))
                print(f"{place}: {name}: {tried[name] or 'not noticed'}", flush=True)
        return {place: known.get(place, {}) for place in places}


def explanation(place: str) -> str | None:
    """Why it is not noticed that ``place`` is left out, if that is known."""
    return next((why for beginning, why in EXPLAINED.items() if place.startswith(beginning)), None)


def main() -> None:
    """Check all places; exits with 1 if one is neither caught nor explained."""
    places = import_with_places()
    chosen = [place for place in places if not sys.argv[2:] or any(part in place for part in sys.argv[2:])]
    counts = {"caught": 0, "explained": 0, "open": 0}
    for place, tried in Check(Path(sys.argv[1]).absolute()).run(chosen).items():
        if any(tried.values()):
            counts["caught"] += 1
            continue
        why = explanation(place)
        counts["explained" if why else "open"] += 1
        print(f"{'explained' if why else 'OPEN'}: {place}: {why or f'{len(tried)} workloads get there'}")
    print(*(f"{count} {outcome}" for outcome, count in counts.items()), sep=", ")
    sys.exit(bool(counts["open"]))


if __name__ == "__main__":
    main()
