"""Five training steps of a tiny model made of the six ops: kernels and references agree."""

import torch
from kernels_testing import DEVICE, IMAGENET, assert_agree, random_images, using
from torch import nn

from pipeline import kernels

BATCH, SIDE, PATCH, WIDTH, LENGTH, SHOWN = 4, 32, 8, 24, 16, 5
STEPS = 5


class Tiny(nn.Module):
    """An encoder, a decoder shared by both views (R-MAE), and a contrast of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.head = nn.Linear(WIDTH, 3 * PATCH**2)
        self.register_buffer("position", torch.randn(LENGTH + 1, WIDTH) * 0.2)

    def sequence(self, image, visible, inverse):
        """One view: [B,1+L,D], hidden places filled by mask tokens."""
        tokens = kernels.embed_visible(
            image, visible, self.embed.weight, self.embed.bias, self.position[1:], **IMAGENET
        )
        tokens = torch.cat([self.class_token.expand(len(image), 1, -1), tokens], 1)
        tokens = self.block(tokens)
        return kernels.place_tokens(tokens, inverse, self.mask_token, self.position, prefix=1)

    def forward(self, image, masks, drawn):
        jittered = kernels.color_jitter(image, *drawn, visible=masks.visible2, patch=PATCH)
        first = self.sequence(image, masks.visible1, masks.inverse1)
        second = self.sequence(jittered, masks.visible2, masks.inverse2)
        region = masks.hidden1.long()[..., None].expand(-1, -1, WIDTH)
        shown = [self.head(x[:, 1:].gather(1, region)) for x in (first, second)]
        terms = kernels.patch_loss(
            shown[1], image, masks.hidden1, patch=PATCH, other=shown[0], **IMAGENET
        )
        contrast, similarity = kernels.token_infonce(
            first[:, 1:], second[:, 1:].detach(), temperature=0.2, negatives="all", offset=0
        )
        return terms.sum() + contrast, torch.cat([terms, contrast[None], similarity]).detach()


def train(implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss terms of every step, the weights after them)."""
    torch.manual_seed(0)
    model = Tiny().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    curve = []
    with using(implementation):
        for step in range(STEPS):
            sample = torch.arange(BATCH, device=DEVICE) + BATCH * step
            key = {"seed": 3, "epoch": step // 2}
            masks = kernels.sample_masks(
                sample, **key, length=LENGTH, visible=(SHOWN, 0), policy="complement"
            )
            drawn = kernels.jitter_parameters(sample, **key, view=1, grayscale=0.2)
            loss, terms = model(random_images(BATCH, SIDE, SIDE, seed=step), masks, drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(terms)
    return torch.stack(curve), {name: w.detach() for name, w in model.named_parameters()}


def test_five_steps_agree():
    expected, reference_weights = train("reference")
    got, weights = train("triton")
    assert expected[-1, :3].sum() < expected[0, :3].sum()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, weight in reference_weights.items():
        assert_agree(name, weights[name], weight, 1e-4)
