"""The architectures of timm as its source tells them, against timm itself."""

import re

import pytest
import timm
from timm.models._registry import get_deprecated_models

from pipeline.config import installed, timm_names
from pipeline.config.timm_names import check_arch
from pipeline.errors import UserError


def test_nothing_that_timm_knows_is_refused():
    known = {*timm.list_models(), *get_deprecated_models()}
    assert len(known) > 1000
    words = set(re.findall(r"\w+", installed.source("timm", "models/**/*.py")))
    assert not known - words
    check_arch("vit_base_patch16_224", "--arch")
    check_arch(sorted(known)[0], "--arch")


def test_examples_and_suggestions_are_models():
    assert {*timm_names.EXAMPLES.split(", ")} <= {*timm.list_models()}
    assert {*timm_names._MODEL.findall(installed.source("timm", "models/**/*.py"))} <= {
        *timm.list_models()
    }


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("vit_bose_patch16_224", "did you mean vit_base_patch16_224?"),
        ("vit_base_patch16_22", "did you mean vit_base_patch16_22"),
        ("vit_*_patch16_224", "did you mean vit_tiny_patch16_224?"),
        ("vit_smal", "did you mean vit_small_patch16_224?"),
        ("vit_l_16", "did you mean vit_large_patch16_224?"),
        ("ViT-B/16", "did you mean vit_base_patch16_224?"),
        ("zzz", "for example: vit_tiny_patch16_224, "),
        ("", "for example: vit_tiny_patch16_224, "),
        ("def vit", "is not a timm model"),
    ],
)
def test_another_name_is_refused_with_what_is_near(arch, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_arch(arch, f"--arch {arch}")


def test_without_timms_source_it_is_left_to_timm(monkeypatch):
    monkeypatch.setattr(timm_names, "_models", lambda: "")
    check_arch("vit_bose_patch16_224", "--arch")
