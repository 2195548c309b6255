"""The linear probe's classifier and its optimizer, for one or many learning rates at once."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval.shared.features import to_device
from pipeline.config.schedules import warmup_cosine


class Probe(nn.Module):
    """Heads on features [b, D] → logits [heads, b, classes].

    BatchNorm without affine parameters (eps 1e-6), shared, then per head a linear layer with
    weights N(0, 0.01) and zero bias. The heads start alike and differ by their learning rate.
    """

    def __init__(self, width: int, classes: int, heads: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.weight = nn.Parameter(weight.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, feature: Tensor) -> Tensor:
        feature = self.norm(feature)
        # One product per head: its rounding then does not depend on how many heads there are.
        heads = zip(self.weight, self.bias, strict=True)
        return torch.stack([F.linear(feature, weight, bias) for weight, bias in heads])


class Training:
    """The heads' optimizer and schedule: one `step` per global batch.

    LARS (You et al. 2017) with momentum m = 0.9, trust t = 0.001 and no weight decay, per head:

        g ← t · |w| / |g| · g  (weights; biases, being 1-D, keep their g)
        v ← m v + g;  w ← w - lr · v

    Learning rate of head h: rates[h] · batch / 256; `warmup` epochs of warm-up, of `epochs` with
    `steps` each, then a cosine to 0. name: of the file of its state.
    """

    momentum, trust = 0.9, 0.001

    def __init__(
        self, probe: Probe, rates: tuple[float, ...], *, batch: int, steps: int, epochs: int,
        warmup: float, name: str = "probe",
    ) -> None:  # fmt: skip
        self.file = f"{name}.safetensors"
        self.probe, self.steps, self.epochs, self.warmup = probe, steps, epochs, warmup
        self.peaks = [rate * batch / 256 for rate in rates]
        self.speed = [torch.zeros_like(p) for p in (probe.weight, probe.bias)]

    def rate(self, step: int, head: int = 0) -> float:
        """Learning rate of a head at a step (counted from 0), given `steps` per epoch."""
        total, warmup = self.epochs * self.steps, self.warmup * self.steps
        return warmup_cosine(step, peak=self.peaks[head], total=total, warmup=warmup)

    @property
    def finite(self) -> Tensor:
        """Whether each head's weights and bias are finite: bool [heads]."""
        parts = (self.probe.weight, self.probe.bias)
        return torch.stack([p.isfinite().flatten(1).all(dim=1) for p in parts]).all(dim=0)

    def state(self) -> dict[str, Tensor]:
        """All that training resumes from: weights, statistics, momentum. Not copies."""
        return self.probe.state_dict() | dict(zip(("speed.w", "speed.b"), self.speed, strict=True))

    def write(self, first: bool, folder: Path) -> str:
        """Write the state, which all ranks share, on the first; why that failed, or ""."""
        try:
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                state = {k: v.detach().cpu() for k, v in self.state().items()}
                save_file(state, folder / self.file)
        except (OSError, SafetensorError) as error:
            return str(error)
        return ""

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Resume from a state that was written."""
        saved = load_file(folder / self.file)
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])

    def step(self, step: int, feature: Tensor, label: Tensor) -> Tensor:
        """One update on features [B, D], labels [B] of the global batch; mean losses [heads]."""
        logits = self.probe(feature)
        heads = len(logits)
        losses = F.cross_entropy(logits.flatten(0, 1), label.repeat(heads), reduction="none")
        losses = losses.view(heads, -1).mean(dim=1)
        # The heads share no parameter: the sum gives each its own gradient.
        weight, bias = torch.autograd.grad(losses.sum(), (self.probe.weight, self.probe.bias))
        self._update(step, weight, bias)
        return losses.detach()

    @torch.no_grad()
    def _update(self, step: int, weight: Tensor, bias: Tensor) -> None:
        """Apply gradients [heads, classes, D] and [heads, classes]."""
        size, slope = (x.flatten(1).norm(dim=1) for x in (self.probe.weight, weight))
        trust = torch.where((size > 0) & (slope > 0), self.trust * size / slope, 1.0)
        weight = weight * trust[:, None, None]
        rates = [self.rate(step, head) for head in range(len(self.peaks))]
        rate = to_device(torch.tensor(rates), bias.device)
        for parameter, speed, gradient in zip(
            (self.probe.weight, self.probe.bias), self.speed, (weight, bias), strict=True
        ):
            speed.mul_(self.momentum).add_(gradient)
            parameter.sub_(rate.view(-1, *[1] * (speed.ndim - 1)) * speed)


def write_all(trainings: list[Training], first: bool, folder: Path) -> str:
    """Write every state, see Training.write."""
    return next(filter(None, [training.write(first, folder) for training in trainings]), "")


def read_all(trainings: list[Training], folder: Path) -> None:
    """Resume all from states that were written."""
    for training in trainings:
        training.read(folder)
