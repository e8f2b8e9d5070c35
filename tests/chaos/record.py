"""pytest plugin of `make chaos`: runs all drills, records each as it ends, and goes on from there when run again.

What is recorded lies in ``.chaos/CODE-killsN/``, where CODE is the digest of the code: results of other code or of
fewer kills are never taken for this one's. ``results.jsonl`` has a line for each drill that ended, ``logs/`` what a
failed one wrote. When every drill has a result, docs/operations/failure-drills.md gets its table.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
from filelock import FileLock, Timeout

from tests.chaos.table import PAGE, ROOT, UNKNOWN, drills, read, write

HOME = ROOT / ".chaos"
MARK = "CHAOS_OF"
"""Variable in the environment of all that the drills of this checkout start."""
CODE = ("diffusion", "flows", "tests", "pyproject.toml")
PATIENCE = 3600
"""Seconds after which a drill counts as hung."""
GUESS = 60.0
"""Seconds of a drill that nobody has measured."""


def code_digest() -> str:
    """Of all files that decide how a drill ends."""
    digest = sha256()
    for name in CODE:
        paths = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*"))
        for path in paths:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Results:
    """What is known of the drills of this code, a line of JSON for each end of one."""

    def __init__(self) -> None:
        self.kills = int(os.environ.get("KILLS", "2"))
        self.folder = HOME / f"{code_digest()[:12]}-kills{self.kills}"
        self.file = self.folder / "results.jsonl"

    def by_item(self) -> dict[str, dict[str, object]]:
        """The last one of each test with its parameters."""
        return {each["id"]: each for each in _lines(self.file)}

    def add(self, **fields: object) -> None:
        """Keep one, also if the power goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(fields) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cells(self) -> dict[str, tuple[str, str, str]]:
        """Kills, seconds and result of each drill whose every parameter has a result, by its test."""
        results_by_test: dict[str, list[dict[str, object]]] = {}
        for item, result in self.by_item().items():
            results_by_test.setdefault(item.partition("[")[0], []).append(result)
        return {
            test: (
                str(sum(int(str(each["kills"])) for each in results) or ""),
                f"{sum(float(str(each['seconds'])) for each in results):.0f}",
                _worst([str(each["outcome"]) for each in results]),
            )
            for test, results in results_by_test.items()
        }


def _lines(file: Path) -> Iterator[dict[str, str]]:
    if file.exists():
        for line in file.read_text().splitlines():
            # The last line of one that was killed may be cut.
            if line.endswith("}"):
                yield json.loads(line)


def _worst(outcomes: list[str]) -> str:
    return next((outcome for outcome in outcomes if outcome != "passed"), "passed")


def _known_seconds() -> dict[str, float]:
    """Of each test as it was measured last, here or by whoever wrote the table."""
    _, results = read(PAGE.read_text())
    known = {test: float(seconds) for test, (_, seconds, _) in results.items() if seconds}
    for file in sorted(HOME.glob("*/results.jsonl"), key=lambda path: path.stat().st_mtime):
        known |= {line["id"].partition("[")[0]: float(line["seconds"]) for line in _lines(file)}
    return known


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make chaos RESTART=1` gives this."""
    parser.addoption("--restart", action="store_true", help="discard the record of passed drills, and run every drill")


def pytest_configure(config: pytest.Config) -> None:
    """The process that is started by a person, not its workers, records."""
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    HOME.mkdir(exist_ok=True)
    lock = FileLock(HOME / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise pytest.UsageError(f"drills are running in {ROOT}: wait for their end, or stop them") from error
    _stop_leftovers()
    os.environ[MARK] = str(HOME)
    results = Results()
    if config.option.restart:
        shutil.rmtree(results.folder, ignore_errors=True)
    config.pluginmanager.register(Recorder(config, results, lock), "drill-recorder")


def _stop_leftovers() -> None:
    """End what a run that was killed has left: servers and commands."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(HOME):
                process.kill()
        except psutil.Error:
            continue


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep drills that did not pass yet, those of the longest files first."""
    before = Results().by_item()
    drill_items = [
        item
        for item in items
        if item.get_closest_marker("drill") and before.get(item.nodeid, {}).get("outcome") != "passed"
    ]
    seconds_by_test = _known_seconds()
    seconds: dict[str, float] = {}
    for item in drill_items:
        file, test = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
        seconds[file] = seconds.get(file, 0) + seconds_by_test.get(test, GUESS)
        # In place of what the test has, which is for a few kills.
        item.add_marker(pytest.mark.timeout(PATIENCE), append=False)
    config.hook.pytest_deselected(items=[item for item in items if item not in drill_items])
    items[:] = sorted(drill_items, key=lambda item: -seconds[item.nodeid.partition("::")[0]])


class Recorder:
    """Records what ends, says how far the drills are, and writes the table."""

    def __init__(self, config: pytest.Config, results: Results, lock: FileLock) -> None:
        self.config, self.results, self.lock = config, results, lock
        self.began = time.monotonic()
        self.known = _known_seconds()
        self.waiting: list[str] = []
        self.done: list[str] = []
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.logs: list[Path] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without workers, this process has collected."""
        self._expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """With workers, each of them has collected the same."""
        self._expect(ids)

    def _expect(self, ids: list[str]) -> None:
        if ids and not self.waiting:
            self.waiting = list(ids)
            passed = sum(each["outcome"] == "passed" for each in self.results.by_item().values())
            self._say(f"{len(ids)} drills to go, {passed} passed before with this code and KILLS={self.results.kills}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots: a line is written for each drill."""
        return (report.outcome if report.when == "call" or not report.passed else "", "", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a drill when its last phase is over."""
        reports = self.reports.setdefault(report.nodeid, [])
        reports.append(report)
        if report.when != "teardown":
            return
        outcome = _worst([each.outcome for each in reports])
        if any(each.failed for each in reports):
            outcome = "failed"
            self._keep_log(report.nodeid, reports)
        seconds = sum(each.duration for each in reports if each.when == "call")
        kills = dict(report.user_properties).get("kills", 0)
        self.results.add(id=report.nodeid, outcome=outcome, seconds=round(seconds, 1), kills=kills)
        del self.reports[report.nodeid]
        self.done.append(report.nodeid)
        place = f"[{len(self.done)}/{len(self.waiting)}]"
        self._say(f"{place} {outcome} after {seconds:.0f} s, {self._left()} left: {report.nodeid}")

    def _keep_log(self, nodeid: str, reports: list[pytest.TestReport]) -> None:
        path = self.results.folder / "logs" / ("".join(c if c.isalnum() else "-" for c in nodeid)[-120:] + ".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [text for each in reports for text in (each.longreprtext, *(f"{a}\n{b}" for a, b in each.sections))]
        path.write_text("\n".join([nodeid, *texts]))
        self.logs.append(path)

    def _left(self) -> str:
        """Time left, at the pace so far and by what each drill took the last time."""
        weights = {item: self.known.get(item.partition("[")[0], GUESS) for item in self.waiting}
        elapsed_weight = sum(weights.get(item, GUESS) for item in self.done)
        remaining_weight = sum(weights.values()) - elapsed_weight
        return _clock(max(remaining_weight, 0) * (time.monotonic() - self.began) / max(elapsed_weight, 1))

    def _say(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(f"{datetime.now().astimezone():%H:%M:%S} {line}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """That nothing was left to be done is a success; what failed is in the logs, and not shown again."""
        self.config.option.tbstyle = "no"
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._complete():
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self) -> None:
        """One line at the end; the table, if every drill has a result."""
        cells = {drill.test: self.results.cells().get(drill.test, UNKNOWN) for drill in drills()}
        count = {
            word: sum(result == word for _, _, result in cells.values()) for word in ("passed", "failed", "skipped")
        }
        unfinished_count = len(cells) - sum(count.values())
        if self._complete():
            write(self._header(), cells)
            end = f"{PAGE.relative_to(ROOT)} has the table"
        else:
            end = f"{unfinished_count} not run: the same command goes on with them"
        words = ", ".join(f"{number} {word}" for word, number in count.items() if number)
        for log in self.logs:
            self._say(f"failed: see {log.relative_to(ROOT)}")
        self._say(f"drills: {words or 'none run'} of {len(cells)} in {_clock(time.monotonic() - self.began)}; {end}")

    def _complete(self) -> bool:
        """Whether every drill that there is has a result, and none of them is still waiting for its turn."""
        cells = self.results.cells()
        return set(self.waiting) <= self.results.by_item().keys() and all(drill.test in cells for drill in drills())

    def _header(self) -> str:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        seconds = sum(float(str(each["seconds"])) for each in self.results.by_item().values())
        return (
            f"Last whole run: commit {commit or 'unknown'}, code {self.results.folder.name.partition('-')[0]}, "
            f"KILLS={self.results.kills}, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}; {_clock(seconds)} of drills."
        )

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind that runs."""
        _stop_leftovers()
        self.lock.release()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
