"""Run a command line of eval/. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

from pipeline.command import imported
from pipeline.errors import UserError, mend_streams, reachable, reader_may_leave, refuse
from shard_tools.cli import Stopped
from shard_tools.home import expand_words


def run_command(main: Callable[[], None]) -> None:
    """Run a command line: bad input ends as `error: …` on stderr and exit code 2, and so does
    running out of memory, on the device, in this process or in a worker. A rank that loses another
    says so and ends with 1. Ctrl-C ends it with a sentence and exit code 130; SIGTERM, where
    stop_on_sigterm was called, with 143."""
    imported()
    mend_streams()
    joined = _joined()  # before, by whoever calls it in a process of theirs
    try:
        with _explaining(), reader_may_leave(), reachable():
            sys.argv[1:] = expand_words(sys.argv[1:])
            main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        sys.exit(refuse(error, f" (rank {rank})" if rank else ""))
    except RuntimeError as error:
        if not (fault := _lost(error)):
            raise
        who = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
        print(f"error ({who}): {fault}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        number = stop.code - 128 if isinstance(stop, Stopped) else signal.SIGINT
        print(f"error: stopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        if _joined() and not joined:
            from pipeline.distributed import close

            close()


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception:
        from pipeline.runtime.memory import explaining_memory  # imports torch

        with explaining_memory():
            raise


def _lost(error: RuntimeError) -> str:
    """What a rank says of another that is gone, or of NCCL; "" for any other error."""
    if not _joined():
        return ""
    from pipeline.distributed import lost_contact
    from pipeline.gpu_errors import nccl_fault

    return nccl_fault(error) or ("lost contact with another rank" if lost_contact(error) else "")


def _joined() -> bool:
    """Whether this process is one of several ranks; without torch it is not."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())
