"""What a command does before the imports that take seconds. Nothing here imports torch."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

from pipeline.errors import UserError, mend_streams, reachable, reader_may_leave, refuse
from pipeline.interrupts import interrupt_quietly
from pipeline.loading import explain_limits
from shard_tools.home import expand_words

T = TypeVar("T")


def alone() -> bool:
    """Whether this process is the only rank, according to the environment."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1")


def check_environment() -> None:
    """UserError if RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT is impossible, if several ranks lack
    what they need to meet, and if MPI or Slurm started several processes without WORLD_SIZE."""
    limits = {
        "WORLD_SIZE": (1, 10**6),
        "RANK": (0, int(os.environ["WORLD_SIZE"]) - 1 if _number("WORLD_SIZE") else 0),
        "LOCAL_RANK": (0, 10**6),
        "MASTER_PORT": (1, 65535),
    }
    for name, (least, most) in limits.items():
        if name not in os.environ:
            continue
        if not _number(name) or not least <= int(os.environ[name]) <= most:
            raise UserError(
                f"{name} is {os.environ[name]!r}: must be a number from {least} to {most}; the "
                "launcher sets it (launch.sh, deepspeed, torchrun), a single process needs none"
            )
    for name in () if alone() else ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"{name} is not set: with WORLD_SIZE {os.environ['WORLD_SIZE']} a rank must know "
                "its number and where rank 0 listens; the launcher sets it (launch.sh, deepspeed, "
                "torchrun)"
            )
    for name in () if "WORLD_SIZE" in os.environ else _started_by():
        if _number(name) and int(os.environ[name]) > 1:
            raise UserError(
                f"{name} is {os.environ[name]} and WORLD_SIZE is not set: mpirun or srun has "
                "started this command several times, and each copy would run on its own; start it "
                "with launch.sh, such as `srun ./launch.sh`, or set WORLD_SIZE=1 if independent "
                "runs are meant"
            )


def _started_by() -> tuple[str, ...]:
    """Where Open MPI, other MPIs and Slurm say how many processes they have started; of a shell of
    `srun --pty` all others have ended."""
    of_shell = () if "SLURM_PTY_PORT" in os.environ else ("PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return ("OMPI_COMM_WORLD_SIZE", *of_shell)


def _number(name: str) -> bool:
    value = os.environ.get(name, "")
    return value.isascii() and value.isdecimal()


def check_unused(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], where: str
) -> None:
    """UserError if one of these options is given although it has no effect (where)."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} does nothing {where}; leave it out")


def early(parse: Callable[[], T], check: Callable[[T], object], *, ranks: bool = False) -> None:
    """Parse and check the command line before the heavy imports; ends the process after `--help`,
    and with a sentence if `parse` or `check` raises UserError. Several ranks check their input
    together, later. ranks: whether a launcher may start several of this command.

    Until `imported` is called, garbage collection is off (see late.uncollected) and Ctrl-C ends the
    process without a traceback, as it does since the first import (interrupts.py). A limit of the
    process that keeps an import from its library is one sentence (loading.py).
    """
    mend_streams()
    try:
        sys.argv[1:] = expand_words(sys.argv[1:])
        args = parse()
        if ranks:
            check_environment()
        if alone():
            with reachable():
                check(args)
    except UserError as error:
        sys.exit(refuse(error))
    gc.disable()
    interrupt_quietly()
    explain_limits()


def imported() -> None:
    """Call it after the imports that follow `early`: garbage collection is on again, and Ctrl-C
    raises KeyboardInterrupt."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_main(main: Callable[[], int]) -> NoReturn:
    """End the process with main's exit code, or on Ctrl-C with a sentence and 130."""
    imported()
    mend_streams()
    try:
        with reader_may_leave(), reachable():
            code = main()
    except UserError as error:
        code = refuse(error)
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)
