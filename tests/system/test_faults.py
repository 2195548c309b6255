"""A short slice of `make test-faults`: a few kills and faults of the real trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_killed_and_broken_runs_end_as_the_undisturbed_one():
    command = [sys.executable, TESTS / "faults", "--kills", "4", "--quick"]
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS / 'helpers'}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["kills"], summary["lost"], summary["failed"]) == (4, 0, 0)
