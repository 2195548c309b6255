"""What CUDA and NCCL say, as a sentence that names the GPU and what to do."""

import socket
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import DistBackendError

from pipeline.distributed import Ranks, lost_contact
from pipeline.errors import UserError
from pipeline.gpu_errors import cuda_fault, nccl_fault, one_line
from pipeline.rendezvous import joining
from pipeline.runtime.watchdog import last_failure, report_failure

HEAD = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
VERSION = "(run with NCCL_DEBUG=INFO for details), NCCL version 2.30.7\n"
SYSTEM = HEAD + "unhandled system error " + VERSION + "ncclSystemError: System call (e.g. socket, "
SYSTEM += "malloc) or external library call failed or device error. \nLast error:\n"
USAGE = HEAD + "invalid usage " + VERSION + "ncclInvalidUsage: This usually reflects invalid usage "
USAGE += "of NCCL library.\nLast error:\n"
CUDA = HEAD + "unhandled cuda error " + VERSION + "ncclUnhandledCudaError: Call to CUDA function "
CUDA += "failed.\nLast error:\n"
REMOTE = HEAD + "remote process exited or there was a network error, NCCL version 2.30.7\n"
REMOTE += "ncclRemoteError: A call failed possibly due to a network error or a remote process "
REMOTE += "exiting prematurely.\nLast error:\n"
SHM = "Error while creating shared memory segment /dev/shm/nccl-Qk2 (size 9637888), error: No space"


@pytest.fixture
def address(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (SYSTEM + SHM, "/dev/shm is too small or not shared: docker run --shm-size"),
        (
            USAGE + "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
            "start at most one rank per GPU",
        ),
        (
            USAGE + "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENA",
            "start at most one rank per GPU",
        ),
        (SYSTEM + "Bootstrap : no socket interface found", "NCCL_SOCKET_IFNAME must name"),
        (CUDA + "Cuda failure 214 'uncorrectable ECC error encountered'", "the GPU or its link is"),
        (CUDA + "Cuda failure 1 'invalid argument'", "NCCL_DEBUG=INFO shows more"),
    ],
)
def test_a_fault_of_nccls_is_no_lost_rank(text, advice, address):
    error = DistBackendError(text)
    told = nccl_fault(error)
    assert told.startswith(
        f"NCCL on {socket.gethostname()}: {text.partition('Last error:')[2][1:]}"
    )
    assert told.partition("; ")[2].startswith(advice)
    assert not lost_contact(error)
    with pytest.raises(UserError) as caught, joining():
        raise error
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "text",
    [
        REMOTE + "socketProgress: Connection closed by remote peer node7<41262>",
        SYSTEM + "socketProgress: Connection closed by remote peer node7<41262>",
        SYSTEM + "Call to recv from 10.0.0.7<41262> failed : Connection reset by peer",
        SYSTEM + "Net : Connect to 10.0.0.7<41262> failed : No route to host",
        "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-"
        "value store by key '0', but store->get('0') got error: Connection reset by peer",
    ],
)
def test_a_rank_that_is_gone_stays_one(text, address):
    error = DistBackendError(text)
    assert nccl_fault(error) == ""
    assert lost_contact(error)
    with pytest.raises(UserError, match="lost contact with another rank"), joining():
        raise error


def test_without_a_last_error_nccls_first_line_is_told():
    error = DistBackendError(USAGE.partition("Last error")[0])
    assert "invalid usage (run with NCCL_DEBUG=INFO for details)" in nccl_fault(error)


@pytest.fixture
def gpu(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H100", uuid="93e1-77")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)


AFTER = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below
might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""


@pytest.mark.parametrize(
    ("told", "advice"),
    [
        ("CUDA error: uncorrectable ECC error encountered", "; the GPU or its link is faulty: le"),
        ("CUDA error: an illegal memory access was encountered", "; a kernel read or wrote"),
        ("Triton Error [CUDA]: unspecified launch failure", "; a kernel read or wrote where it mu"),
        (
            "CUDA error: no kernel image is available for execution on the device",
            "; this torch has",
        ),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", ""),
    ],
)
def test_an_error_of_cudas_is_one_line_that_names_the_gpu(told, advice, gpu, tmp_path, capsys):
    error = RuntimeError(told + AFTER)
    sentence = cuda_fault(error)
    where = f"{told} on cuda:3 (NVIDIA H100, GPU-93e1-77) of {socket.gethostname()}"
    assert sentence.startswith(where + advice)
    assert advice or sentence == where
    ranks = Ranks(5, 8, 5, torch.device("cpu"))
    assert report_failure(tmp_path, ranks, "step 7", error) == 1
    assert last_failure(tmp_path) == f"rank 5 on {socket.gethostname()}, step 7: {sentence}"
    told_aloud = capsys.readouterr().err
    assert f"error (rank 5, step 7): {sentence}\n" in told_aloud
    assert "Traceback" not in sentence
    assert "RuntimeError" in told_aloud  # the traceback, for a slip


def test_a_gpu_that_does_not_answer_leaves_the_rest(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "current_device", lost)
    sentence = cuda_fault(RuntimeError("CUDA error: GPU is lost"))
    assert sentence.startswith(f"CUDA error: GPU is lost on a GPU of {socket.gethostname()}; the ")


def test_other_errors_are_their_first_line(gpu):
    assert cuda_fault(RuntimeError("size mismatch\nmore")) == ""
    assert nccl_fault(RuntimeError(SYSTEM + SHM)) == ""  # not of that class
    assert one_line(RuntimeError("size mismatch\nmore")) == "size mismatch"
    assert one_line(KeyError()) == "KeyError"
    traced = (
        "Caught X in DataLoader worker 0.\nOriginal Traceback (most recent call last):\n  a\nX: b\n"
    )
    assert one_line(RuntimeError(traced)) == "Caught X in DataLoader worker 0. X: b"
