"""Power is cut while ``ingest``, ``train``, ``evaluate``, ``sample`` and ``up`` work."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import power_drills as drills
from tests.chaos.power_drills import Drill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CUTS = 2 * int(os.environ.get("KILLS", "3"))
EVERY = [
    drills.ingest_drill,
    drills.adding_drill,
    drills.train_drill,
    drills.evaluate_drill,
    drills.sample_drill,
    drills.stack_drill,
]


@pytest.mark.drill
@pytest.mark.parametrize("drill", EVERY, ids=lambda drill: drill.__name__)
def test_a_power_cut_tears_no_file_and_can_be_resumed(drill: Callable[[Path], Drill], tmp_path: Path) -> None:
    """Power cut: all or some of what was not synced is lost, data and names. No finished file is torn; the same end."""
    power_drill = drill(tmp_path)
    assert power_drill.run(tmp_path, CUTS, seed=CUTS) >= CUTS
