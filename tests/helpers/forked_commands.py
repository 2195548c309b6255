"""Many command lines, each in a fork of one process, that may not import what is heavy.

    run(cases, heavy) → [(exit code, the heavy module that it wanted, CPU seconds, its output), …]

The process imports what all commands share once; a fork then costs hundredths of a second.
"""

import gc
import importlib
import importlib.machinery
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "eval.studies.cifar_plan", "eval.paper.reproduction", "eval.report", "eval.shared.results",
    "pipeline.runtime.preflight", "shard_tools.make_shards",
)  # fmt: skip
WANTED = 77  # exit code of a fork that imported something heavy


def run(cases, heavy):
    """cases: (file of a command, its words, environment). heavy: modules that end it."""
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, text=True, capture_output=True, check=False,
        input=json.dumps([list(heavy), cases]), env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Wanted(BaseException):
    """Something heavy was imported."""


class Watch:
    """Finds heavy modules as the import system would, and ends the process that loads one."""

    def __init__(self, heavy):
        self.heavy = heavy

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in self.heavy else None
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise Wanted(module.__name__)


def child(file, words, environment, heavy):
    """The exit code of a command line in this process."""
    sys.meta_path.insert(0, Watch(heavy))
    os.environ.update(environment)
    sys.argv, sys.path[0] = [file, *words], str(Path(file).resolve().parent)
    sys.path.insert(1, str(ROOT))
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Wanted as module:
        print(f"\nwanted {module}", flush=True)
        return WANTED
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(case, heavy):
    """A case in a fork: (exit code, …), see run."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if not pid:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = child(*case, heavy)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        output.seek(0)
        text = output.read()
    code = os.waitstatus_to_exitcode(status)
    wanted = text.rsplit("wanted ", 1)[-1].strip() if code == WANTED else ""
    return code, wanted, usage.ru_utime + usage.ru_stime, text


def main():
    heavy, cases = json.load(sys.stdin)
    for name in list(os.environ):
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    for name in SHARED:
        importlib.import_module(name)
    gc.disable()  # forks share what is not touched
    json.dump([forked(case, set(heavy)) for case in cases], sys.stdout)


if __name__ == "__main__":
    main()
