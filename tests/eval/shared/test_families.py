"""One member of every family of ViTs that timm has, through everything that needs only features:
timm's own pooling, tokens, mean and std; finetuning; CKA where patches can be left out."""

import pytest
import timm
import torch
from eval_helpers import ALONE, coloured_images, write_shards
from timm.data import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled

from eval import attentive, cka, knn, linprobe
from eval.shared.classifier import build_classifier, layer_groups, read_classifier, write_classifier
from eval.shared.encoders import EncoderInfo, check_feature
from eval.shared.features import image_features
from eval.shared.options import EncoderChoice
from eval.shared.session import open_session
from pipeline import load_encoder
from pipeline.errors import UserError
from pipeline.weights.families import block_features, drops_patches

TINY = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}
P14 = TINY | {"img_size": 28}
# name → (options, own pooling, tokens before those of the patches)
FAMILIES = {
    "vit_base_patch16_224": (TINY, "cls", 1),
    "vit_base_patch16_224.dino": (TINY, "cls", 1),
    "vit_base_patch16_clip_224": (TINY, "cls", 1),
    "vit_base_patch16_clip_quickgelu_224": (TINY, "cls", 1),
    "vit_base_patch16_siglip_224": (TINY, "own", 0),
    "vit_base_patch16_siglip_gap_224": (TINY, "mean_patch", 0),
    "vit_base_patch14_dinov2": (P14, "cls", 1),
    "vit_base_patch14_reg4_dinov2": (P14, "cls", 5),
    "vit_base_patch16_reg4_gap_256": (TINY, "mean_patch", 4),
    "vit_huge_patch14_gap_224": (P14, "mean_patch", 0),
    "vit_small_patch16_36x1_224": (TINY, "cls", 1),
    "vit_small_patch16_18x2_224": (TINY, "cls", 1),
    "vit_tiny_r_s16_p8_224": (TINY | {"img_size": 64}, "cls", 1),
    "flexivit_small": (TINY, "cls", 1),
    "aimv2_large_patch14_224": (P14, "mean_patch", 0),
    "beit3_base_patch16_224": (TINY, "mean_patch", 1),
    "deit_tiny_patch16_224": (TINY, "cls", 1),
    "deit_tiny_distilled_patch16_224": (TINY, "own", 2),
    "deit3_small_patch16_224": (TINY, "cls", 1),
    "beit_base_patch16_224": (TINY, "mean_patch", 1),
    "beitv2_base_patch16_224": (TINY, "mean_patch", 1),
    "eva_giant_patch14_224": (P14, "mean_patch", 1),
    "eva02_tiny_patch14_224": (P14, "mean_patch", 1),
    "eva02_base_patch16_clip_224": (TINY, "cls", 1),
    "vit_small_patch16_dinov3": (TINY, "mean_patch", 5),
    "vit_small_patch16_dinov3_qkvb": (TINY, "mean_patch", 5),
    "vit_small_patch16_rope_224": (TINY, "cls", 1),
    "vit_small_patch16_rope_mixed_224": (TINY, "cls", 1),
    "vit_small_patch16_rope_ape_224": (TINY, "cls", 1),
    "vit_pe_core_tiny_patch16_384": (TINY, "own", 1),
    "vit_pe_spatial_tiny_patch16_512": (TINY, "mean_patch", 1),
    "vit_relpos_small_patch16_224": (TINY, "mean_patch", 0),
    "vit_relpos_base_patch16_cls_224": (TINY, "cls", 1),
    "vit_srelpos_small_patch16_224": (TINY, "mean_patch", 0),
    "samvit_base_patch16": (TINY, "mean_patch", 0),
    "vitamin_small_224": ({"img_size": 64}, "mean_patch", 0),
    "cait_xxs24_224": (TINY, "cls", 1),
    "xcit_nano_12_p16_224": (TINY, "cls", 1),
    "deepseek_vit_412m": (P14, "mean_patch", 0),
    "gemma4_vit_167m": (TINY | {"img_size": 48}, "mean_patch", 0),
    "qwen3_vit_88m": (TINY, "mean_patch", 0),
    "naflexvit_base_patch16_gap": (TINY, "mean_patch", 4),
    "naflexvit_base_patch16_map": (TINY, "own", 1),
    "naflexvit_base_patch16_siglip": (TINY, "own", 0),
}


def model(arch, options):
    torch.manual_seed(5)
    vit = timm.create_model(arch, num_classes=0, **options).eval()
    for name, parameter in vit.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return vit


def own_pooling(vit):
    """What the encoder's own pooling is: `cls`, `mean_patch`, or `own` where it is neither."""
    if isinstance(vit, VisionTransformerDistilled) or getattr(vit, "attn_pool", None) is not None:
        return "own"
    kinds = {"token": "cls", "avg": "mean_patch"}
    return kinds.get(str(getattr(vit, "global_pool", "avg")), "own")


@pytest.fixture(params=FAMILIES)
def member(request, tmp_path):
    """(arch, options, own pooling, prefix, timm's model, the file of its weights)."""
    options, pooling, prefix = FAMILIES[request.param]
    vit = model(request.param, options)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    return request.param, options, pooling, prefix, vit, tmp_path / "x.pth"


def test_features_are_timms_own(member):
    arch, options, pooling, prefix, theirs, path = member
    vit, info = load_encoder(path, arch=arch, options=options)
    config = resolve_model_data_config(theirs)
    assert (tuple(info["mean"]), tuple(info["std"])) == (config["mean"], config["std"])
    assert info["options"] == options
    assert (own_pooling(vit), vit.num_prefix_tokens) == (pooling, prefix)
    side = options["img_size"]
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        tokens = theirs.forward_features(pixels)
        own = theirs.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(image_features(vit, pixels, "own", "fp32"), own)
    assert own.shape == (2, vit.num_features)
    if tokens.ndim == 4:  # SAM's map has the channels first
        tokens = tokens.flatten(2).mT if arch.startswith("sam") else tokens.flatten(1, 2)
    torch.testing.assert_close(vit.forward_features(pixels).detach(), tokens)
    assert tokens.shape[1] == prefix + vit.patch_embed.num_patches
    mean = vit.fc_norm(tokens[:, prefix:].mean(1)).detach()
    torch.testing.assert_close(image_features(vit, pixels, "mean_patch", "fp32"), mean)
    if pooling != "own":
        torch.testing.assert_close(own, image_features(vit, pixels, pooling, "fp32"))
    if vit.cls_token is None:
        with pytest.raises(UserError, match="--feature own"):
            check_feature(vit, "cls")


def test_a_classifier_starts_from_all_weights_and_is_read_back(member, tmp_path):
    arch, options, _, prefix, theirs, path = member
    vit, record = load_encoder(path, arch=arch, options=options)
    classifier = build_classifier(vit, EncoderInfo.of(record), 3, 0.1)
    mine = {k.replace("dist_token", "reg_token"): v for k, v in theirs.state_dict().items()}
    fresh = [k for k in classifier.state_dict() if not torch.equal(
        classifier.state_dict()[k], mine.get(k, torch.tensor(torch.nan)))]  # fmt: skip
    assert all(k.startswith(("fc_norm.", "head.")) for k in fresh), fresh
    groups = layer_groups(classifier, weight_decay=0.1, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.5**n for n in range(len(classifier.blocks) + 2)}
    side = options["img_size"]
    pixels = torch.randn(2, 3, side, side)
    torch.nn.functional.cross_entropy(classifier(pixels), torch.tensor([0, 2])).backward()
    assert any(p.grad is not None for p in classifier.blocks[0].parameters())
    write_classifier(tmp_path, classifier.state_dict(), record, ("a", "b", "c"))
    again, info = read_classifier(tmp_path)
    assert (info["mean"], info["classes"]) == (record["mean"], ["a", "b", "c"])
    with torch.no_grad():
        torch.testing.assert_close(again(pixels), classifier.eval()(pixels))
        if not isinstance(classifier.fc_norm, torch.nn.Identity) and arch[:3] != "sam":
            tokens = classifier.forward_features(pixels)[:, prefix:]
            logits = classifier.head(classifier.fc_norm(tokens.mean(1)))
            torch.testing.assert_close(again(pixels), logits)


def test_cka_drops_patches_where_their_positions_go_with_them(member):
    arch, options, _, prefix, theirs, path = member
    vit, _ = load_encoder(path, arch=arch, options=options)
    if not drops_patches(vit):
        with pytest.raises(UserError, match="blocks know patches by their position"):
            cka.check_encoder(vit, arch, "mean_patch")
        return
    cka.check_encoder(vit, arch, "mean_patch")
    side = options["img_size"]
    pixels = torch.randn(2, 3, side, side)
    length = vit.patch_embed.num_patches
    kept = torch.arange(length).flip(0).expand(2, -1)  # all of them, in another order
    with torch.no_grad():
        full, moved = block_features(vit, pixels), block_features(vit, pixels, kept)
        tokens = theirs.forward_features(pixels)
        normed = theirs.norm(full[-1])
        part = block_features(vit, pixels, kept[:, :2])
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(normed, tokens)
    torch.testing.assert_close(moved[-1][:, :prefix], full[-1][:, :prefix], **close)
    torch.testing.assert_close(moved[-1][:, prefix:].flip(1), full[-1][:, prefix:], **close)
    assert part[-1].shape[1] == prefix + 2


@pytest.mark.parametrize(
    "arch",
    ["vit_base_patch16_siglip_224", "samvit_base_patch16", "naflexvit_base_patch16_gap",
     "vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224"],
)  # fmt: skip
def test_every_protocol_runs(arch, tmp_path):
    """k-NN, both linear probes, the attentive probe: on the way that the command lines take."""
    options, _, _ = FAMILIES[arch]
    torch.save(model(arch, options).state_dict(), tmp_path / "x.pth")
    train = write_shards(tmp_path / "train", *coloured_images(32, 2, seed=1))
    val = write_shards(tmp_path / "val", *coloured_images(8, 2, seed=2))
    session = open_session(
        EncoderChoice(str(tmp_path / "x.pth"), arch, options), ALONE, feature="own"
    )
    where = {"train": str(train), "val": str(val)}
    for feature in ("own", "mean_patch"):
        result = knn.evaluate(knn.Settings(**where, feature=feature, k=3), session)
        assert result["images"] == 8
        assert result["feature"] == feature
    cached = linprobe.Settings(
        **where,
        protocol="cached",
        feature="own",
        epochs=2,
        warmup_epochs=1,
        batch_size=8,
        grid=(0.1,),
    )
    assert linprobe.evaluate(cached, session, tmp_path / "c")["images"] == 8
    s = attentive.Settings(**where, steps=2, batch_size=8, rates=(1e-3,), decays=(0.0,))
    assert attentive.evaluate(s, session, tmp_path / "a")["images"] == 8


def test_what_is_no_vit_of_tokens_is_refused(tmp_path):
    for arch in ("resnet18", "swin_tiny_patch4_window7_224"):
        torch.save({"patch_embed.proj.weight": torch.ones(96, 3, 4, 4)}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"{arch} is a .*vision transformers of timm"):
            load_encoder(tmp_path / "x.pth", arch=arch)


@pytest.mark.parametrize("arch", ["vit_base_patch16_siglip_224", "vit_small_patch16_dinov3",
                                  "samvit_base_patch16", "naflexvit_base_patch16_gap"])  # fmt: skip
def test_random_members_depend_on_the_seed_alone(arch, tmp_path):
    options, pooling, prefix = FAMILIES[arch]
    torch.save(model(arch, options).state_dict(), tmp_path / "x.pth")
    one, info = load_encoder("random", arch=arch, options=options, seed=3)
    two, _ = load_encoder(tmp_path / "x.pth", arch=arch, options=options, random=True, seed=3)
    other, _ = load_encoder("random", arch=arch, options=options, seed=4)
    assert (own_pooling(one), one.num_prefix_tokens) == (pooling, prefix)
    assert (info["random"], info["random_seed"]) == (True, 3)
    names = [n for n, p in one.named_parameters() if p.ndim > 1]
    assert all(torch.equal(one.state_dict()[n], two.state_dict()[n]) for n in names)
    assert not torch.equal(one.state_dict()[names[-1]], other.state_dict()[names[-1]])
