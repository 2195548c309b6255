"""Independent plain versions of the equations, in loops, for the tests to hold the code against.

Everything works on a flat dictionary of weights with the names of the objective's parameters and
uses no module of the pipeline: attention is written out, patches are cut one by one, and hidden
and visible are Python sets.
"""

import math

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """A pre-norm transformer block on the tokens [N, D] of one image."""
    n, width = x.shape
    qkv = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    q, k, v = qkv.view(n, 3, heads, width // heads).permute(1, 2, 0, 3)
    attention = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).softmax(-1)
    x = x + linear((attention @ v).transpose(0, 1).reshape(n, width), w, f"{name}.attn.proj")
    y = linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return x + linear(y, w, f"{name}.mlp.fc2")


def blocks(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> Tensor:
    depth = 0
    while f"{name}.{depth}.norm1.weight" in w:
        x = block(x, w, f"{name}.{depth}", heads)
        depth += 1
    return x


def sincos(rows: int, columns: int, width: int) -> Tensor:
    """Position table written entry by entry: first half the column, second half the row."""
    table = torch.zeros(1 + rows * columns, width)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                for half, coordinate in enumerate((column, row)):
                    angle = coordinate / 10000 ** (i / quarter)
                    place = 1 + row * columns + column
                    table[place, half * 2 * quarter + i] = math.sin(angle)
                    table[place, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def patch_of(image: Tensor, position: int, patch: int) -> Tensor:
    """uint8 [H, W, 3] → normalised float [patch, patch, 3] of one position."""
    columns = image.shape[1] // patch
    row, column = divmod(position, columns)
    pixels = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    return (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def target_of(image: Tensor, position: int, patch: int, norm_pix: bool = True) -> Tensor:
    values = patch_of(image, position, patch).reshape(-1)
    if not norm_pix:
        return values
    mean = values.sum() / len(values)
    variance = ((values - mean) ** 2).sum() / (len(values) - 1)
    return (values - mean) / (variance + 1e-6).sqrt()


def encode(
    w: dict[str, Tensor], image: Tensor, visible: list[int], *, patch: int, heads: int,
    tokens: bool = False,
) -> Tensor:  # fmt: skip
    """f on one image: cls token and visible patches (or all positions with mask tokens)."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    kernel = w["encoder.patch_embed.proj.weight"]
    position = sincos(rows, columns, kernel.shape[0])
    embedded = {
        p: (patch_of(image, p, patch).permute(2, 0, 1) * kernel).sum((1, 2, 3))
        + w["encoder.patch_embed.proj.bias"]
        for p in visible
    }
    rows_of = [w["encoder.cls_token"].reshape(-1)]
    for p in range(rows * columns) if tokens else visible:
        token = embedded[p] if p in embedded else w["encoder.mask_token"]
        rows_of.append(token + position[1 + p])
    x = blocks(torch.stack(rows_of), w, "encoder.blocks", heads)
    return layer_norm(x, w, "encoder.norm")


def decode(
    w: dict[str, Tensor], z: Tensor, visible: list[int], grid: tuple[int, int], heads: int
) -> Tensor:
    """d on one image: predictions [L, p·p·3] for every position."""
    name = "measure.decoder"
    embedded = linear(z, w, f"{name}.embed")
    position = sincos(*grid, embedded.shape[1])
    x = [embedded[0]]
    for p in range(grid[0] * grid[1]):
        token = embedded[1 + visible.index(p)] if p in visible else w[f"{name}.mask_token"]
        x.append(token + position[1 + p])
    y = blocks(torch.stack(x), w, f"{name}.blocks", heads)
    return linear(layer_norm(y, w, f"{name}.norm"), w, f"{name}.head")[1:]


def reconstruction_loss(
    w: dict[str, Tensor], images: Tensor, first: list[list[int]], second: list[list[int]] | None,
    *, patch: int, heads: int, decoder_heads: int, lam: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Eq. 3 where second is None, else the two terms of Eq. 8, by loops over images and patches."""
    grid = (images.shape[1] // patch, images.shape[2] // patch)
    everything = set(range(grid[0] * grid[1]))
    constraint, similarity = [], []
    for b, image in enumerate(images):
        one = decode(
            w, encode(w, image, first[b], patch=patch, heads=heads), first[b], grid, decoder_heads
        )
        region = everything - set(first[b])
        if second is None:
            errors = [((one[p] - target_of(image, p, patch)) ** 2).mean() for p in sorted(region)]
            constraint.append(torch.stack(errors).mean())
            continue
        region &= set(second[b])
        two = decode(
            w, encode(w, image, second[b], patch=patch, heads=heads), second[b], grid,
            decoder_heads,
        )  # fmt: skip
        constraint.append(
            torch.stack(
                [((two[p] - target_of(image, p, patch)) ** 2).mean() for p in sorted(region)]
            ).mean()
        )
        similarity.append(
            torch.stack([((one[p] - two[p]) ** 2).mean() for p in sorted(region)]).mean()
        )
    if second is None:
        return {"loss": torch.stack(constraint).mean()}
    terms = {
        "constraint": torch.stack(constraint).mean(),
        "similarity": torch.stack(similarity).mean(),
    }
    return terms | {"loss": terms["similarity"] + lam * terms["constraint"]}


def mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y = linear(x, w, f"{name}.0")
    return linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), w, f"{name}.2")


def infonce_loss(query: Tensor, key: Tensor, *, temperature: float, negatives: str) -> Tensor:
    """Eq. 9-10 for queries and keys [B, T, C], one pair at a time."""

    def s(z: Tensor, other: Tensor) -> Tensor:
        return (z * other).sum() / (z.norm() * other.norm())

    batch, tokens = query.shape[:2]
    losses = []
    for b in range(batch):
        for t in range(tokens):
            among = {
                "all": [(i, u) for i in range(batch) for u in range(tokens)],
                "position": [(i, t) for i in range(batch)],
                "image": [(b, u) for u in range(tokens)],
            }[negatives]
            logits = [s(query[b, t], key[i, u]) / temperature for i, u in among]
            positive = s(query[b, t], key[b, t]) / temperature
            losses.append(torch.logsumexp(torch.stack(logits), 0) - positive)
    return torch.stack(losses).mean()


class Muon:
    """Muon for the matrices of the blocks (q, k and v apart), AdamW for the rest, name by name."""

    def __init__(self, module, groups, betas):
        self.param_groups = [{**group, "lr": 0.0} for group in groups]
        of = {id(p): group for group in self.param_groups for p in group["params"]}
        self.parts, rest = [], []
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            if "blocks." in name and p.ndim == 2:
                rows = len(p) // 3 if "qkv" in name else len(p)
                pieces = [slice(start, start + rows) for start in range(0, len(p), rows)]
                self.parts.append((p, pieces, of[id(p)], torch.zeros_like(p)))
            else:
                rest.append((p, of[id(p)]))
        params = [{"params": [p], "weight_decay": group["weight_decay"]} for p, group in rest]
        self.adamw = torch.optim.AdamW(params, lr=0.0, betas=betas, eps=1e-8)
        self.rest = [group for _, group in rest]

    def zero_grad(self):
        self.adamw.zero_grad()
        for p, *_ in self.parts:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for group, of in zip(self.adamw.param_groups, self.rest, strict=True):
            group["lr"] = of["lr"]
        self.adamw.step()
        for p, pieces, group, momentum in self.parts:
            lr, decay = group["lr"], group["weight_decay"]
            momentum.copy_(0.95 * momentum + 0.05 * p.grad)
            ahead = 0.05 * p.grad + 0.95 * momentum
            for piece in pieces:
                x = ahead[piece] / (ahead[piece].norm() + 1e-7)
                for _ in range(5):
                    if len(x) > x.shape[1]:  # the smaller product, for equal rounding
                        a = x.T @ x
                        x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
                    else:
                        a = x @ x.T
                        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                scale = 0.2 * max(x.shape) ** 0.5
                p[piece] -= lr * (scale * x + decay * p[piece])
