"""What an evaluation copies to a GPU: from pinned memory, and no constants with every batch."""

from types import SimpleNamespace

import pytest
import torch
from eval_helpers import MEAN, STD, coloured_images, write_shards

from eval import attentive, embed, finetune, linprobe, psnr
from eval.shared.features import normalise, to_device
from eval.shared.session import EvalSession
from pipeline.data.crops import CentreCrop
from pipeline.data.loader import Loader
from pipeline.distributed import Ranks

CPU = torch.device("cpu")


class Asked(Exception):
    """A loader was asked for; whether it is to pin its batches."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", *coloured_images(16, 2, 0))


@pytest.fixture
def pinned(monkeypatch, shards):
    """pinned(use, device): whether the loader that use(session, folder) starts pins its batches."""

    def answer(self, dataset, tasks, workers, pin_memory, *_):
        raise Asked(pin_memory)

    monkeypatch.setattr(Loader, "__init__", answer)

    def ask(use, device):
        ranks = Ranks(0, 1, 0, torch.device(device))
        session = SimpleNamespace(
            ranks=ranks, image_size=16, workers=0, crop=CentreCrop(16, 18), device=device
        )
        with pytest.raises(Asked) as asked:
            use(session, str(shards))
        return asked.value.args[0]

    return ask


def train_probe(session, folder):
    settings = linprobe.Settings(folder, folder, batch_size=8)
    plan = SimpleNamespace(micro_batch=8, partitions=1, total=1)
    next(linprobe.global_features(session, settings, plan, 0))


def train_attentive(session, folder):
    settings = attentive.Settings(folder, folder, batch_size=8, steps=1)
    next(attentive.training_tokens(session, settings, folder))


def train_finetuning(session, folder):
    run = SimpleNamespace(
        plan=SimpleNamespace(train=folder, partitions=1, total=1), session=session, augment=None,
        settings=finetune.Settings(folder, folder, batch_size=8), ranks=session.ranks,
        run_plan=SimpleNamespace(micro_batch=8),
    )  # fmt: skip
    finetune.Finetuning.loader(run, 0)


def reconstruct(session, folder):
    settings = psnr.Settings(encoder="run", val=folder, workers=0)
    psnr.measure(SimpleNamespace(size=16), session.ranks, settings, 0.75)


def embed_images(session, folder):
    manifest = embed.image_sets.open_images(folder, None)
    settings = SimpleNamespace(images=folder, micro_batch=8, on_error="fail")
    embed.write_rows(settings, session, manifest, SimpleNamespace(todo=lambda: [0, 1]))


def validate(session, folder):
    EvalSession.loader(session, folder, 8)


USES = [validate, train_probe, train_attentive, train_finetuning, reconstruct, embed_images]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_batches_are_pinned_for_a_gpu_alone(use, pinned):
    assert pinned(use, "cuda") is True
    assert pinned(use, "cpu") is False


def test_mean_and_std_are_copied_once(monkeypatch):
    image = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    first = normalise(image, MEAN, STD, CPU)
    expected = (image.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    assert torch.equal(first, expected)

    def made(*_, **__):
        raise AssertionError("a tensor is made with every batch")

    monkeypatch.setattr(torch, "tensor", made)
    assert torch.equal(normalise(image, tuple(MEAN), STD, CPU), expected)


def test_what_the_host_makes_goes_by_pinned_memory():
    asked = []

    class Tensor:
        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, non_blocking):
            asked.append((str(device), non_blocking))

    to_device(Tensor(), torch.device("cuda"))
    to_device(Tensor(), CPU)
    assert asked == ["pinned", ("cuda", True), ("cpu", True)]
