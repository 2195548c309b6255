"""Which architectures timm has, looked up in its source text, since importing timm imports torch.

A name that is nowhere in the source of timm's models is refused. Any other name is left for timm to
judge, so nothing that timm knows is refused here.
"""

from __future__ import annotations

import difflib
import re

from pipeline.config.installed import source
from pipeline.errors import UserError

# Sizes as torchvision, OpenAI and the papers write them: vit_b_16, ViT-L/14.
_LONG = {"t": "tiny", "ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
_MODEL = re.compile(r"^@register_model\b.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
EXAMPLES = "vit_tiny_patch16_224, vit_small_patch16_224, vit_base_patch16_224"


def _models() -> str:
    return source("timm", "models/**/*.py")


def check_arch(arch: str, what: str) -> None:
    """UserError if timm certainly has no architecture of this name. what: begins the sentence."""
    text = _models()
    if text and not (re.fullmatch(r"\w+", arch) and _says(text, arch)):
        raise no_model(arch, what)


def _says(text: str, word: str) -> bool:
    """Whether a text contains a word. A pattern that begins with the word is found ten times as
    fast as one that begins with a lookbehind."""
    places = (match.start() for match in re.finditer(rf"{word}(?!\w)", text))
    return any(not re.match(r"\w", text[place - 1 : place]) for place in places)


def check_hub(name: str, what: str) -> None:
    """`check_arch` of a name that may have a tag of its weights (vit_base_patch16_224.mae)."""
    arch, _, tag = name.partition(".")
    check_arch(arch, what)
    if _models() and tag not in _models():
        raise UserError(f"{what}: timm has no weights of {arch} with the tag {tag!r}")


def no_model(arch: str, what: str) -> UserError:
    """What to say of an architecture that timm does not have."""
    near = _near(arch)
    hint = f"did you mean {near}?" if near else f"for example: {EXAMPLES}"
    return UserError(f"{what} is not a timm model; {hint}")


def _near(arch: str) -> str:
    """The model whose name, or its beginning, is most like this one: `vit_small` means
    `vit_small_patch16_224` and not `gcvit_small`. Empty where none is."""
    words = [_LONG.get(word, word) for word in re.split(r"[\W_]+", arch.lower()) if word]
    if not words:
        return ""
    asked = re.sub(r"(?<=_)(?=(8|14|16|32)(_|$))", "patch", "_".join(words))
    beginnings: dict[str, list[str]] = {}
    for name in _MODEL.findall(_models()):
        for beginning in {name, "_".join(name.split("_")[: len(words)])}:
            beginnings.setdefault(beginning, []).append(name)
    for near in difflib.get_close_matches(asked, beginnings, 1):
        names = beginnings[near]
        return next((name for name in names if name.endswith("patch16_224")), names[0])
    return ""
