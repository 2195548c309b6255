"""Write the weights of a run under other projects' names.

    python pipeline/export.py runs/rmae --format timm rmae.safetensors

  timm    FILE.safetensors   the encoder, for timm.create_model(…, checkpoint_path=FILE)
  mae     FILE.pth           encoder and decoder, as facebookresearch/mae's checkpoints
  hf      FOLDER             the encoder, for transformers' ViTModel.from_pretrained(FOLDER)
  hf-mae  FOLDER             encoder and decoder, for ViTMAEForPreTraining.from_pretrained(FOLDER)
  run     FOLDER             from a classifier that eval/finetune.py wrote: its encoder, as a run
                             folder for the protocols of eval/ (supervised pretraining)

In place of the run, one of its checkpoints may be named (RUN/checkpoints/step-…). Both hold
the full fp32 model.safetensors whatever the ZeRO stage: each save consolidates it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from pipeline.command import early, run_main
from pipeline.config.recipe import run_recipe
from pipeline.config.timm_names import check_arch
from pipeline.errors import UserError, naming, refuse
from pipeline.method.checks import need_mae_decoder
from pipeline.weights.header import METADATA, check_file
from pipeline.weights.source import no_classifier, read_classifier_info
from shard_tools.atomic import check_writable, write_atomic, write_json

SUFFIXES = {"timm": ".safetensors", "mae": ".pth"}  # of the formats that are a file
# What the folder of a run, a classifier or shards has, and folders in a run that are its own. A
# classifier.json may also be a finetuning's result, beside which its encoder is exported.
OWNERS = ("recipe.yaml", "encoder.json", "classifier.safetensors", "manifest.json")
OF_A_RUN = ("encoder", "checkpoints")
HF_MODELS = {"hf": "ViTModel", "hf-mae": "ViTMAEForPreTraining"}
FORMATS = ("timm", "mae", "hf", "hf-mae", "run")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write the weights of a run under other projects' names.",
        epilog=str(__doc__).split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of a checkpoint")
    parser.add_argument("--format", choices=FORMATS, required=True, help="see below")
    parser.add_argument("out", type=Path, help="file or folder to write")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """UserError for what is seen to be wrong before any weights are read."""
    if args.out.suffix != (suffix := SUFFIXES.get(args.format, args.out.suffix)):
        raise UserError(f"{args.out}: name the output with {suffix}")
    if args.format == "run":
        arch = read_classifier_info(args.run)["arch"].split(".")[0]
        check_arch(arch, f"{args.run}/classifier.json: arch {arch!r}")
        check_file(args.run / "classifier.safetensors")
    else:
        recipe = run_recipe(args.run)
        if args.format in ("mae", "hf-mae"):
            need_mae_decoder(recipe)
        check_arch(recipe.encoder.arch, f"encoder.arch {recipe.encoder.arch!r}")
        check_file(args.run / "model.safetensors")
    check_writable(args.out, folder=args.format not in SUFFIXES)
    check_place(args.out, args.format)


def check_place(out: Path, kind: str) -> None:
    """UserError where the export would take the place of a part of a run, of a classifier or of
    shards, or of any file of weights but an earlier export."""
    folder = (out.parent if kind in SUFFIXES else out).resolve()
    for place in (folder, *folder.parents):
        if place.name in OF_A_RUN and (place.parent / "recipe.yaml").is_file():
            raise UserError(f"{out}: is in {place.name}/ of a run; choose another output")
    if kind not in SUFFIXES or out.name == "model.safetensors":
        names = (*OWNERS, "config.json" if kind == "run" else "encoder/encoder.json")
        owner = next((name for name in names if (folder / name).is_file()), None)
        if owner:
            raise UserError(f"{out}: there is something else ({owner}); choose another output")
    written = {"run": "encoder/encoder.json", "hf": "model.safetensors"}.get(kind.split("-")[0])
    old = out / written if written else out
    if old.is_file() and not _is_export(old):
        raise UserError(f"{old}: is there, and no earlier export; choose another output")
    if kind in HF_MODELS and (out / "config.json").is_file():
        config = (out / "config.json").read_text(encoding="utf-8", errors="replace")
        if f'"{HF_MODELS[kind]}"' not in config:
            raise UserError(f"{out}: is an export in another format; choose another output")


def _is_export(path: Path) -> bool:
    """Whether a file that is there is one of ours to replace. Nothing of a run is a .pth."""
    if path.suffix == ".json":
        return '"method": "supervised"' in path.read_text(encoding="utf-8", errors="replace")
    try:
        return path.suffix != ".safetensors" or METADATA in check_file(path)
    except UserError:
        return False


if __name__ == "__main__":  # the help, and what is seen to be wrong without torch
    early(parse_args, check)

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.method.checks import vit_options
from pipeline.method.objective import Objective
from pipeline.method.vit import build_vit
from pipeline.weights.interop import not_in_mae, to_hf_mae, to_hf_vit, to_mae
from pipeline.weights.run import encoder_info, encoder_state, load_run


def export(objective: Objective, kind: str, out: Path) -> str:
    """Write one format to `out`; returns a line that says how to open it."""
    recipe = objective.recipe
    facts = encoder_info(recipe)
    if objective.reconstructs and kind in ("mae", "hf-mae"):
        facts["decoder_heads"] = recipe.measure.decoder.heads
    about = {METADATA: json.dumps(facts)}
    if kind == "timm":
        state = encoder_state(objective.encoder.state_dict(), objective.encoder)
        write_atomic(out, save(state, metadata={"format": "pt"} | about))
        return _timm_call(objective, out)
    if kind == "mae":
        data = io.BytesIO()
        torch.save({"model": to_mae(objective)} | about, data)
        write_atomic(out, data.getvalue())
        if other := not_in_mae(objective.encoder):
            print(
                f"warning: {out}: facebookresearch/mae's own model does not load it, for "
                f"{len(other)} weights that one of the two lacks, such as {other[0]}",
                file=sys.stderr,
            )
        return f"torch.load({str(out)!r})['model']"
    state, config = to_hf_vit(objective) if kind == "hf" else to_hf_mae(objective)
    whole: dict[str, Tensor] = {k: v.detach().float().contiguous() for k, v in state.items()}
    write_json(out / "config.json", config)
    write_json(out / "preprocessor_config.json", _preprocessor(objective))
    write_atomic(out / "model.safetensors", save(whole, metadata={"format": "pt"} | about))
    return f"transformers.{config['architectures'][0]}.from_pretrained({str(out)!r})"


def _timm_call(objective: Objective, out: Path) -> str:
    """The Python that opens a file with timm, with the statistics of the pixels.

    pretrained_cfg_overlay is where timm.data.resolve_model_data_config, and so timm's own
    validation script, reads them; without it they would be those of timm's weights.
    """
    recipe = objective.recipe
    data = {"mean": recipe.data.mean, "std": recipe.data.std}
    keywords = vit_options(recipe.encoder) | {"pretrained_cfg_overlay": data}
    options = "".join(f", {k}={v!r}" for k, v in keywords.items())
    arch = recipe.encoder.arch
    return f"timm.create_model({arch!r}, checkpoint_path={str(out)!r}, num_classes=0{options})"


def classifier_encoder(folder: Path, out: Path) -> str:
    """Write the encoder of a finetuned classifier to out/encoder/; returns how to use it.

    The classifier pools the mean of the patch tokens and normalises it with fc_norm, which becomes
    the encoder's norm; so evaluate it with `--feature mean_patch`.
    """
    info = read_classifier_info(folder)
    info["arch"] = info["arch"].split(".")[0]  # without the tag of timm's weights
    try:
        vit = build_vit(info["arch"], info["options"])
    except UserError as error:
        raise UserError(
            f"{folder}: no run can hold its encoder ({error}); give --encoder "
            f"{folder / 'classifier.safetensors'} --arch {info['arch']} instead"
        ) from None
    try:
        state = load_file(folder / "classifier.safetensors")
    except (OSError, SafetensorError) as error:
        raise no_classifier(folder, error) from None
    weights = {
        k.replace("fc_norm.", "norm."): v for k, v in state.items() if not k.startswith("head.")
    }
    try:
        vit.load_state_dict(weights)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its weights do not fit {info['arch']}: {why}") from None
    del info["classes"]
    name = {"method": "supervised", "recipe": "supervised"}
    with naming(out, "cannot be written"):
        write_atomic(out / "encoder" / "encoder.safetensors", save(weights))
        write_json(out / "encoder" / "encoder.json", info | name)
    return f"--encoder {out} --feature mean_patch"


def _preprocessor(objective: Objective) -> dict[str, object]:
    """Hugging Face's description of the pixels that the encoder expects."""
    recipe = objective.recipe
    size = recipe.encoder.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.data.mean),
        "image_std": list(recipe.data.std),
    }


def main(argv: list[str] | None = None) -> int:
    """Run it; returns the exit code (0 done, 2 bad input)."""
    args = parse_args(argv)
    try:
        check(args)
        if args.format == "run":
            line = classifier_encoder(args.run, args.out)
        else:
            objective = load_run(args.run)
            with naming(args.out, "cannot be written"):
                line = export(objective, args.format, args.out)
    except UserError as error:
        return refuse(error)
    print(f"written: {args.out}; open it with {line}", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
