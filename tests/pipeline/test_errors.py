"""The sentence about a number that is out of its bounds; streams that are closed or narrow."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError, check_range

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"at_least": 1}, "--n 0: must be at least 1"),
        (1234567, {"at_most": 2}, "--n 1234567: must be at most 2"),
        (-(10**400), {"at_least": 1}, f"--n -1{'0' * 400}: must be at least 1"),
        (1.5, {"above": 0, "at_most": 1}, "--n 1.5: must be above 0 and at most 1"),
        (0.0, {"above": 0, "at_most": 1}, "--n 0: must be above 0 and at most 1"),
        (1.0, {"at_least": 0, "below": 1}, "--n 1: must be at least 0 and below 1"),
        (-1e-9, {"at_least": 0}, "--n -1e-09: must be at least 0"),
        (math.nan, {"at_least": 0}, "--n nan: must be at least 0 and finite"),
        (math.inf, {"above": 0}, "--n inf: must be above 0 and finite"),
        (math.nan, {}, "--n nan: must be finite"),
    ],
)
def test_a_number_out_of_its_bounds_is_named(value, bounds, said):
    with pytest.raises(UserError) as error:
        check_range("--n", value, **bounds)
    assert str(error.value) == said


def test_the_ends_belong_to_closed_bounds_and_an_option_not_given_is_in_all():
    check_range("--n", 1, at_least=1, at_most=1)
    check_range("--n", 0.5, above=0, below=1)
    check_range("--n", None, at_least=1)
    check_range("--n", 10**400, at_least=1)


STREAMS = """
import os, sys
from pipeline.errors import mend_streams
mend_streams()
print("2 × 3 → 6", flush=True)
print("2 × 3 → 6", file=sys.stderr)
with open("{0}", "w") as file:
    file.write(f"{{file.fileno()}} {{sys.stdin.read() if sys.stdin else None!r}}")
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&- </dev/null"])
def test_closed_streams_lead_nowhere_and_no_file_takes_their_numbers(closed, tmp_path):
    command = [sys.executable, "-c", STREAMS.format(tmp_path / "file")]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0
    number, text = (tmp_path / "file").read_text().split(maxsplit=1)
    assert int(number) > 2
    assert text == "''"


def test_a_path_that_is_no_utf8_is_printed_with_an_escape():
    code = "from pipeline.errors import mend_streams; mend_streams(); print('r\\udce9n')"
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout == b"r\\udce9n\n", done.stderr


@pytest.mark.parametrize(
    ("encoding", "line"), [("latin-1", b"2 \xd7 3 ? 6"), ("ascii", b"2 ? 3 ? 6")]
)
def test_what_the_encoding_of_the_locale_lacks_is_no_error(encoding, line, tmp_path):
    command = [sys.executable, "-c", STREAMS.format(tmp_path / "file")]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, line, line)
