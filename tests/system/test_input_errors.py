"""Every command refuses what a user gets wrong by a sentence, with exit code 2, before torch is
imported and before it has written anything."""

import json
import shlex
import zipfile
from pathlib import Path

import forked_commands
import numpy as np
import pytest
from eval_helpers import coloured_images, write_shards
from PIL import Image
from safetensors.numpy import save_file
from test_startup import DECODERS, FILES, HEAVY
from tiny import tiny_overrides, tiny_recipe

from pipeline.config.recipe import dump_recipe
from shard_tools.atomic import seal

MOST = 0.6  # CPU seconds, beyond what all commands import
TINY = " ".join(f"--set '{text}'" for text in tiny_overrides("mae"))
PRETRAIN = "--recipe mae --data {shards} --output {new} {tiny}"
SETS = "--train {shards} --val {shards}"
RANDOM = "--encoder random --arch vit_tiny_patch16_224"
NO_MODEL = "is not a timm model; did you mean vit_base_patch16_224?"
NO_WEIGHTS = "cannot be read as a file of weights"
NO_ENCODER = "no exported encoder there"
UNWRITABLE = "/proc/none/x"  # for root too
LONG = "x" * 300  # a name that no file can have
TOO_LONG = "(File name too long)"

# DeepSpeed's configuration, by name.
CONFIGS = {
    "key": {"zero_optimization": {"stage": 2, "reduce_bukket_size": 1}},
    "type": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
    "inner": {"zero_optimization": {"stage": 2, "offload_optimizer": {"devize": "cpu"}}},
    "comms": {"comms_logger": {"enable": True}},
    "profiler": {"flops_profiler": {"enable": True}},
    "micro": {"train_micro_batch_size_per_gpu": 3},
    "text": {"wall_clock_breakdown": "no"},
    "huge": {"train_micro_batch_size_per_gpu": 10**400},
    "ever": {"watchdog_seconds": 1e300},
}

# Of each command (words, what is said).
ENCODERS = [
    ("--encoder {none}", "/none: no such file or folder"),
    ("--encoder {text}/x", "/x: no such file or folder"),
    ("--encoder {empty}", NO_ENCODER),
    (f"--encoder {LONG}", TOO_LONG),
    (f"--encoder {{run}} --output {LONG}", TOO_LONG),
    ("--encoder {text}", NO_WEIGHTS),
    ("--encoder timm:vit_bose_patch16_224", NO_MODEL),
    ("--encoder random", "random does not say its architecture"),
    ("--encoder random --arch vit_bose_patch16_224", NO_MODEL),
    ("--encoder {run} --resize 2", "resize 2 is smaller than image_size 16"),
    (f"--encoder {{run}} --output {UNWRITABLE}", "cannot be written"),
    ("--encoder {run} --output {text}/x", "cannot be written"),
    ("--encoder {run} --workers -1", "-1: must be 0 (no process of its own) or more"),
    ("--encoder {run} --seed -1", "-1: must be between 0 and"),
    ("--encoder {run} --workers x", "x: must be 0 (no process of its own) or more"),
    ("--encoder ''", "--encoder is given as an empty text"),
    ("--encoder {run} --output=", "--output is given as an empty text"),
    ("--encoder {run} --nonsense", "unrecognized arguments: --nonsense"),
]
MORE_ENCODERS = [
    ("--encoder {bad}.pth --arch vit_tiny_patch16_224", NO_WEIGHTS),
    ("--encoder {bad}.safetensors --arch vit_tiny_patch16_224", NO_WEIGHTS),
    ("--encoder {cut}.pth --arch vit_tiny_patch16_224", "it is a part of one"),
    ("--encoder {cut}.safetensors --arch vit_tiny_patch16_224", "incomplete metadata"),
    ("--encoder {weights}", "does not say its architecture"),
    ("--encoder {run}/encoder/encoder.safetensors --arch vit_bose_patch16_224", NO_MODEL),
    ("--encoder {bare}", NO_ENCODER),
    ("--encoder {bert}", "model_type 'bert' is neither vit nor vit_mae"),
    ("--encoder {broken}", "broken/encoder/encoder.safetensors: " + NO_WEIGHTS),
    ("--encoder timm:vit_base_patch16_224.nope", "no weights of vit_base_patch16_224 with the tag"),
    ("--encoder {run} --arch vit_base_patch16_224", "says itself that it is vit_tiny_patch16_224"),
    ("--encoder {run} --options '{{depth: 9}}'", "with depth 2; only img_size may differ"),
    ("--encoder {run} --options '{{img_size: 15}}'", "img_size 15 is not a multiple of the patch"),
    ("--encoder {run} --options 3", "--options 3: write them as"),
    ("--encoder {run} --options '{{img_size: yes}}'", "img_size True: must be a whole number"),
    (f"{RANDOM} --options '{{{{img_size: [32, 48]}}}}'", "img_size [32, 48]: must be a whole"),
    ("--encoder {run} --options '{{a: 1, a: 2}}'", "write them as"),
    ("--encoder {run} --output {empty}/", "must be a file, such as {empty}/result.json"),
    ("--encoder {run} --ema", "has no checkpoint with an EMA teacher"),
    ("--encoder {run} --random --ema", "--ema: a random encoder has no average of its weights"),
    (f"{RANDOM} --ema", "--ema: a random encoder has no average of its weights"),
    (f"{RANDOM} --options '{{{{img_size: 32, patch_size: 64}}}}'", "img_size 32 is not a multiple"),
    (f"{RANDOM} --options '{{{{depth: 0}}}}'", "--options {{depth: 0}}: must be a whole number"),
    (f"{RANDOM} --options '{{{{in_chans: 1}}}}'", "{{in_chans: 1}}: the pictures have 3 channels"),
    ("--encoder {run} --precision fp16", "invalid choice: 'fp16'"),
]
FOLDERS = [("{none}", "/none: no such folder"), ("{empty}", "has no manifest.json"),
           ("{text}", "is a file and no folder")]  # fmt: skip


def evaluation(name, sets, *more, encoders=()):
    """Cases of an evaluation of encoders on `sets`: the words that name its data."""
    cases = [(f"{words} {sets}", said) for words, said in (*ENCODERS, *encoders)]
    option = sets.split()[-2]
    cases += [(f"{RANDOM} {sets} {option} {bad}", said) for bad, said in FOLDERS]
    cases += [(f"{RANDOM} {sets} {words}", said) for words, said in more]
    return {f"eval/{name}.py": cases}


def pretraining(*cases):
    return {"pipeline/pretrain.py": [(f"{PRETRAIN} {words}", said) for words, said in cases]}


CASES = {
    **pretraining(
        *((f"--{key} {LONG}", TOO_LONG) for key in ("output", "recipe", "ds_config", "init")),
        ("--set encoder.arch=vit_bose_patch16_224", NO_MODEL),
        ("--set encoder.image_size=17", "17 is not divisible by the patch size 4"),
        ("--set encoder.image_size=1028", "an image has 66049 patches; at most 65535"),
        ("--set encoder.image_size=5000 --set encoder.options.patch_size=40",
         "must be between 1 and 4096 pixels"),
        ("--set encoder.options.num_heads=3", "embed_dim 16 is not divisible by num_heads 3"),
        ("--set encoder.options.embed_dim=18", "needs a width divisible by 4, not 18"),
        ("--set measure.decoder.heads=3", "width 8 is not divisible by its heads 3"),
        ("--set measure.knd=x", "unknown key 'measure.knd'"),
        ("--set measure.kind=x", "'x' is none of reconstruction, infonce, byol"),
        ("--set views.mask=blok", "input should be random or block, got 'blok'"),
        ("--set views.mask_ratio=0.99", "leaves none of the 16 patches visible"),
        ("--set data.sizes=[[0.5,8],[1,16]] --set views.mask_ratio=0.8", "of 8 pixels views"),
        ("--set data.sizes=[[1e-9,8],[1,16]]", "the images of 8 pixels have none of the"),
        ("--set data.crop.scale=[0.9,0.1]", "crop scale (0.9, 0.1): needs 0 < low"),
        ("--set data.randaugment=x", "a policy of timm such as rand-m9-mstd0.5-inc1, got 'x'"),
        ("--set data.std=[0,1,1]", "'data.std.0': input should be greater than or equal to 0.0000"),
        ("--set optimizer.base_lr=.inf", "should be a finite number, got inf"),
        ("--set optimizer.epochs=x", "'optimizer.epochs'"),
        ("--set monitor.knn_steps=1", "/val: no such folder"),
        ("--set monitor.log_to=[wandb]", "wandb is not installed"),
        ("--set batch_size=128", "64 samples are fewer than one batch of 128"),
        ("--set optimizer.epochs=0.01 --set optimizer.warmup_epochs=0", "too few for one step"),
        ("--set optimizer.kind=muon --ds_config zero3", "does not work under ZeRO stage 3"),
        ("--ds_config zero9", "zero9: cannot be read"),
        ("--ds_config {ds}-key.json", "unknown key 'zero_optimization.reduce_bukket_size'; valid"),
        ("--ds_config {ds}-type.json", "should be a valid integer"),
        ("--ds_config {ds}-inner.json", "'zero_optimization.offload_optimizer.devize'; valid"),
        ("--ds_config {ds}-comms.json", "unknown key 'comms_logger.enable'; valid: debug, enabled"),
        ("--ds_config {ds}-profiler.json", "'flops_profiler.enable'; did you mean enabled?"),
        ("--ds_config {ds}-micro.json", "3 does not divide the 8 images per rank"),
        ("--ds_config {ds}-text.json", "must be true or false, not 'no'"),
        ("--ds_config {ds}-huge.json", "does not divide the 8 images per rank"),
        ("--ds_config {ds}-ever.json", "watchdog_seconds must be a number from 1 to 10^9"),
        ("--ds_config {ds}-twice.json", "key 'stage' is there twice"),
        ("--ds_config {ds}-nan.json", "Infinity is not a number of JSON"),
        ("--output ''", "--output is given as an empty text; is a shell variable unset?"),
        ("--output {loop}", "a link to nothing"),
        ("--init ''", "--init is given as an empty text"),
        ("--init {none}", "/none: no such file or folder"),
        ("--init {empty}", NO_ENCODER),
        ("--init {text}", NO_WEIGHTS),
        ("--init {cut}.pth", "it is a part of one"),
        ("--init {cut}.safetensors", "incomplete metadata"),
        ("--init {broken}", "broken/model.safetensors: " + NO_WEIGHTS),
        ("--init {bare}", NO_ENCODER),
        ("--init timm:vit_bose_patch16_224", NO_MODEL),
        ("--init timm:vit_base_patch16_224 --set init.ema=true", "init.ema: timm:vit_base"),
        ("--set init.weights=~nobody-here/x", "there is no user 'nobody-here'"),
        ("--resume {none}", "--resume {none}: no valid checkpoint there (no such file"),
        ("--resume {empty}", "no valid checkpoint there; give auto, none"),
        ("--resume {text}", "no valid checkpoint there; give auto, none"),
        ("--resume {bare}", "no valid checkpoint there; give auto, none"),
        ("--resume {broken}", "weights.bin: missing or of the wrong size; no valid checkpoint is"),
        ("--resume {run} --set seed=3", "a checkpoint of another recipe (seed: 0 != 3)"),
        ("--output {run} --set seed=3", "a checkpoint of another recipe (seed: 0 != 3)"),
        ("--output {run} --resume none", "already holds a run"),
        ("--output {broken}", "no valid checkpoint is left"),
        ("--output {text}", "is a file; --output is a folder"),
        ("--output {text}/x", "--output cannot be written"),
        (f"--output {UNWRITABLE}", "--output cannot be written"),
        ("--output s3://bucket/x", "it is a URL; only local files are written"),
        ("--recipe mea", "did you mean mae?"),
        ("--recipe {text}", "a recipe is a mapping of keys"),
        ("--max-steps x", "invalid int value: 'x'"),
        *((f"--data {bad}", said) for bad, said in FOLDERS),
    ),
    **evaluation(
        "knn", SETS,
        ("--k 99", "--k 99: must be between 1 and 64"),
        ("--feature x", "invalid choice: 'x'"),
        ("--temperature nan", "--temperature nan: must be finite"),
        encoders=MORE_ENCODERS,
    ),
    **evaluation(
        "linprobe", f"--batch-size 8 {SETS}",
        ("--protocol x", "invalid choice: 'x'"),
        ("--also x", "invalid choice: 'x'"),
        ("--grid 1 2", "--grid does nothing under --protocol mae"),
        ("--protocol cached --base-lr 1", "--base-lr does nothing under --protocol cached"),
        ("--batch-size 99", "64 samples, too few for --batch-size 99"),
    ),
    **evaluation(
        "finetune", f"--batch-size 8 {SETS}",
        ("--ds_config {ds}-key.json", "unknown key 'zero_optimization.reduce_bukket_size'"),
        ("--ds_config {ds}-micro.json", "3 does not divide the 8 images per rank"),
        ("--ds_config zero3", "ZeRO stage 3 shards the weights"),
        ("--ds_config zero0 --precision bf16", "--precision bf16 needs ZeRO stage 1 or 2"),
        ("--batch-size 9", "mixup and cutmix pair images, and 9 per"),
        ("--randaugment x", "--randaugment 'x' is not a policy of timm"),
        ("--subset {none}", "/none: no such file"),
        ("--fraction 2", "--fraction 2: must be above 0 and at most 1"),
        ("--subset-seed 1", "--subset-seed does nothing without --fraction"),
        ("--options '{{drop_path_rate: 0.2}}'", "drop_path_rate is --drop-path of finetuning"),
    ),
    **evaluation("attentive", f"--batch-size 8 {SETS}", ("--rates 0", "--rates 0: must be above")),
    **evaluation(
        "cka", "--batch-size 8 --val {shards}",
        ("--hsic x", "invalid choice: 'x'"),
        ("--images 2", "fewer than --batch-size 8"),
    ),
    "eval/embed.py": [
        *((f"{words} --images {{shards}}", said) for words, said in ENCODERS),
        (f"{RANDOM} --images {{none}}", "/none: no such file or folder"),
        (f"{RANDOM} --images {{empty}}", "empty: holds no images"),
        (f"{RANDOM} --images {{list}}", "/none: cannot be read"),
        (f"{RANDOM} --images {{shards}} --feature x", "--feature x: must be cls, mean_patch"),
        (f"{RANDOM} --images {{list}} --root {{none}}", "--root {none}: no such folder"),
        (f"{RANDOM} --images {{images}} --root {{images}}", "--root {images} does nothing with"),
    ],
    "eval/psnr.py": [
        ("--encoder {none} --val {shards}", "/none: no such file or folder"),
        ("--encoder {bare} --val {shards}", "bare/model.safetensors: " + NO_WEIGHTS),
        ("--encoder {text} --val {shards}", "a checkpoint file needs --recipe"),
        ("--encoder {text} --recipe mae --val {shards}", NO_WEIGHTS),
        ("--encoder {text} --recipe cmae --val {shards}", "no decoder, so no reconstructions"),
        ("--encoder {run} --val {shards} --recipe mae", "--recipe mae: {run} is a run, which has"),
        ("--encoder {run} --val {shards} --set seed=1", "--set seed=1: {run} is a run, which has"),
        ("--encoder {run} --val {shards} --mask-ratio 1", "must be above 0 and below 1"),
        ("--encoder {run} --val {shards} --mask-ratio 0.99", "some of the 16 patches masked and"),
        ("--encoder {run} --val {shards} --resize 2", "resize 2 is smaller than image_size 16"),
        ("--encoder {run} --val {none}", "/none: no such folder"),
        (f"--encoder {{run}} --val {{shards}} --output {UNWRITABLE}", "cannot be written"),
    ],
    "eval/reconstruct.py": [
        ("--encoder {none} --data {shards} --output {new}.png", "/none: no such file or folder"),
        ("--encoder {broken} --data {shards} --output {new}.png", NO_WEIGHTS),
        ("--encoder {run} --data {none} --output {new}.png", "/none: no such folder"),
        ("--encoder {run} --files {none} --output {new}.png", "/none: cannot be read"),
        ("--encoder {run} --data {shards} --output {new}.jpg", ".jpg: must end in .png"),
        ("--encoder {run} --files {text} --images 3 --output {new}.png", "--images does nothing"),
        (f"--encoder {{run}} --data {{shards}} --output {UNWRITABLE}.png", "cannot be written"),
    ],
    "eval/visualise.py": [
        ("--encoder random --images {shards}", "random: needs --arch where it is the first"),
        ("--encoder {run} timm:vit_bose_patch16_224 --images {shards}", NO_MODEL),
        ("--encoder {bad}.pth --arch vit_tiny_patch16_224 --images {shards}", NO_WEIGHTS),
        ("--encoder {run} --images {empty}", "empty: holds no images"),
        ("--encoder {run} --files {text} --count 3", "--count does nothing with --files"),
        ("--encoder {run} --images {shards} --arch vit_tiny_patch16_224", "--arch does nothing wi"),
        ("--encoder {run} --images {shards} --point 2 2", "--point 2 2: must be shares"),
        ("--encoder {run} --images {shards} --output {text}", "text: cannot be written (Not a"),
        (f"--encoder {{run}} --images {{shards}} --output {UNWRITABLE}", "cannot be written"),
    ],
    "eval/shape_bias.py": [
        ("--classifier {none} --images {cue}", "no classifier of eval/finetune.py there"),
        ("--classifier {classifier} --images {cue}", "classifier.safetensors: " + NO_WEIGHTS),
        ("--classifier timm:vit_bose_patch16_224 --images {cue}", NO_MODEL),
        ("--classifier timm:vit_base_patch16_224 --images {empty}", "has no images in folders"),
        (f"--decisions {{text}} --output {UNWRITABLE}", "cannot be written"),
        ("--decisions {none}", "/none: cannot be read"),
    ],
    "eval/retrieve.py": [
        ("--embeddings {empty}", "no embeddings there"),
        ("--embeddings {embeddings}", "/none: no such file or folder"),
        ("{none} --embeddings {embeddings}", "no image file, no key of"),
        ("--embeddings {embeddings} --seed -1", "--seed: -1: must be between 0 and 4294967295"),
        ("{none} --embeddings {embeddings} --random 3", "--random does nothing with a QUERY"),
        (f"--embeddings {{embeddings}} --output {UNWRITABLE}.html", "cannot be written"),
    ],
    "eval/report.py": [
        ("{none}", "/none: "),
        ("{empty}", "is not a run folder"),
        (f"{{run}} --output {UNWRITABLE}", "cannot be written"),
        ("{run} {none}", "/none: "),
        ("{run} --watch 0.1", "--watch 0.1: at least 1 second"),
    ],
    "eval/reproduce.py": [
        ("--table 99", "--table 99: the paper's tables are"),
        ("--table 4 --scale x", "--scale x: "),
        ("--table 4 --rows x", "rows of table 4 are"),
        (f"--table 4 {SETS} --set encoder.arch=vit_bose_patch16_224", NO_MODEL),
        (f"--table 4 {SETS} --set encoder.arh=x", "unknown key 'encoder.arh'"),
        (f"--table 5 {SETS} --classes {{none}} --output {{new}}", "/none: no such file"),
        ("--table 4 --scale mini --dry-run --few-labels {blank}", "--few-labels {blank}: lists no"),
        (f"--table 4 {SETS} --few-labels {{list}} --output {{new}}", "no file names were recorded"),
        (f"--table 1 {SETS} --few-labels {{list}} --output {{new}}", "few labels (--also fewshot)"),
        (f"--table 4 {SETS} --classes {{none}} --output {{new}}", "no row here takes a list of"),
        ("--table 4 --scale mini --output {text}", "text: cannot be written (Not a directory)"),
        (f"--table 4 --scale mini --output {UNWRITABLE}", "cannot be written"),
    ],
    "eval/mini_paper.py": [
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--set encoder.arh=x --output {new}", "unknown key 'encoder.arh'"),
        ("--set encoder.arch=vit_bose_patch16_224 --output {new}", NO_MODEL),
        (f"--output {UNWRITABLE}", "cannot be written"),
    ],
    "eval/demo.py": [
        ("--ranks 3", "--ranks 3: must be a divisor of 8"),
        (f"--output {{new}} --data {LONG}", TOO_LONG),
        ("--set encoder.arh=x --output {new} --data {new}", "unknown key 'encoder.arh'"),
        ("--set encoder.arch=vit_bose_patch16_224 --output {new} --data {new}", NO_MODEL),
        ("--train 3 --output {new} --data {new}", "--train 3: must be at least 16"),
        ("--output {text} --data {new}", "text: cannot be written (Not a directory)"),
        (f"--output {{new}} --data {UNWRITABLE}", "cannot be written"),
    ],
    "eval/sweep.py": [
        (f"mea --grid views.mask_ratio=0.5 {SETS}", "did you mean mae?"),
        (f"mae --grid views.mask=0.5,blok {{tiny}} {SETS}", "input should be"),
        (f"mae --grid encoder.arch=vit_bose_patch16_224 {SETS}", NO_MODEL),
        (f"mae --grid views.mask_ratio=0.5 {{tiny}} {SETS} --eval x", "--eval x: should be one of"),
        (f"mae --grid views.mask_ratio=0.5 {{tiny}} {SETS} --ds_config zero9", "zero9: cannot be"),
        (f"mae --grid views.mask_ratio=0.5 {{tiny}} {SETS} --output {UNWRITABLE}", "cannot be wri"),
        ("mae --grid views.mask_ratio=0.5 {tiny} --train {shards} --val {none}", "/none: no"),
    ],
    "eval/cifar_paper.py": [
        ("--cifar10 {none} --output {new} --data {new}", "/none: no such file or folder"),
        ("--output {new} --data {new}", "name your copy: --cifar10 PATH"),
        ("--page {text} --claims 3", "--claims does nothing with --page"),
        ("--restore {text} --output {new} --data {new}", "text: not an archive of runs, or"),
        ("--restore --output {run} --data {new}", "--restore: {run} holds something already"),
        ("--set encoder.arh=x --cifar10 {empty} --output {new}", "unknown key 'encoder.arh'"),
        (f"--cifar10 {{empty}} --data {{new}} --output {UNWRITABLE}", "cannot be written"),
        (f"--cifar10 {{empty}} --data {{new}} --archive {UNWRITABLE}", "another --archive"),
        ("--page {none}", "/none: no such file"),
    ],
    "pipeline/export.py": [
        ("{none} --format timm {new}.safetensors", "/none: no such file or folder"),
        ("{empty} --format timm {new}.safetensors", "is not a run folder"),
        ("{broken} --format timm {new}.safetensors", NO_WEIGHTS),
        ("{run} --format timm {new}.pth", "name the output with .safetensors"),
        (f"{{run}} --format timm {UNWRITABLE}.safetensors", "cannot be written"),
        ("{run} --format hf {text}", "text: cannot be written (Not a directory)"),
        ("{contrast} --format mae {new}.pth", "only a reconstruction measure has a decoder"),
        ("{run} --format run {new}", "of eval/finetune.py there (it has no classifier.json)"),
        ("{classifier} --format run {new}", NO_WEIGHTS),
        ("{run} --format hf {run}", "{run}: there is something else (recipe.yaml)"),
        ("{run} --format timm {run}/encoder/encoder.safetensors", "is in encoder/ of a run"),
    ],
    "pipeline/estimate.py": [
        (f"--recipe {LONG}", TOO_LONG),
        ("--recipe mea", "did you mean mae?"),
        ("--recipe mae --set encoder.arch=vit_bose_patch16_224", NO_MODEL),
        ("--recipe mae --set encoder.image_size=225", "225 is not divisible by the patch size 16"),
        ("--recipe mae --gpus 3", "--gpus 3: batch_size 1024 and data.partitions 64 must be multi"),
        ("--recipe mae --micro-batch 3", "--micro-batch 3: must be one of [128, 64, 32, "),
        ("--gpus 0", "--gpus 0: must be at least 1"),
        ("--gpu-memory nan", "--gpu-memory nan: must be above 0"),
        ("--launch-ms inf", "--launch-ms inf: must be at least 0"),
        ("--flops --gpu a100", "--gpu does nothing with --flops"),
        ("--flops --recipe mae --gpus 3", "--gpus 3: batch_size 1024 and data.partitions 64 must"),
        ("--flops --json {new}", "--json does nothing with --flops"),
        ("--fit 0 --precision bf16", "--fit 0: ZeRO 0 does not run in --precision bf16, but 1, 2"),
        ("--recipe mae --images 1", "--images 1: 1 samples are fewer than one batch of 1024"),
        ("--fit 2 --micro-batch 8", "--micro-batch does nothing with --fit"),
        (f"--json {UNWRITABLE}", "cannot be written"),
    ],
    "pipeline/doctor.py": [("--nonsense", "unrecognized arguments: --nonsense")],
    "shard_tools/make_shards.py": [
        ("{none} {new}", "/none: no such file or folder"),
        ("s3://b/x {new}", "s3:/b/x: no such file or folder; it is a URL, and only local files"),
        (f"{{images}} {LONG}", TOO_LONG),
        ("{empty} {new}", "empty: "),
        ("{images} {text}", "text: cannot be written (Not a directory)"),
        (f"{{images}} {UNWRITABLE}", "cannot be written"),
        ("{images} s3://bucket/x", "it is a URL; only local files are written"),
        ("{images} {images}/x", "is inside"),
        ("{images} {new} --classes-from {none}", "/none: "),
        ("{images} {new} --fields x", "invalid choice: 'x'"),
        ("{images} {new} --workers -1", "must be 0 (no process of its own) or more"),
        ("{images} {new} --shard-size x", "'x' is not a size such as 256MiB"),
        ("{images} {new} --shard-size inf", "'inf' is not a size such as 256MiB"),
        ("{images} {new} --shard-size 1", "--shard-size: 1: must be at least 1KiB"),
        (f"{{images}} {{new}} --seed {'1' * 65}", "1: must be between 0 and 4294967295"),
        ("{images} {new} --seed -1", "--seed: -1: must be between 0 and 4294967295"),
        ("{images} {new} --num-tasks 0", "--num-tasks 0: must be at least 1"),
        ("{images} ''", "a path is given as an empty text"),
        ("{loop} {new}", "{loop}: "),
        ("{images} {loop}", "{loop}: cannot be written (a link to nothing"),
    ],
    "shard_tools/subset.py": [
        ("{none} {new} --fraction 0.5", "/none: no such folder"),
        ("{shards} {new} --fraction 2", "--fraction 2: must be above 0 and at most 1"),
        ("{shards} {new} --fraction 0.5 --choose first", "--choose first belongs to --count"),
        ("{shards} {new} --count 5 --shard-size 1M", "--shard-size belongs to --copy"),
        ("{shards} {new} --count 5 --copy --shard-size 0", "--shard-size: 0: must be at least 1K"),
        ("{shards} {new} --count 5 --copy --shard-size=-5", "--shard-size: -5: must be at least 1"),
        (f"{{shards}} {{new}} --count 5 --seed {'1' * 65}", "1: must be between 0 and 4294967295"),
        ("{shards} {new} --names {blank}", "blank: lists no image"),
        ("{shards} {new} --names {blank} --copy", "blank: lists no image"),
        ("{shards} {new} --names {none}", "/none: no such file"),
        ("{shards} {text} --fraction 0.5", "text: cannot be written (Not a directory)"),
        (f"{{shards}} {UNWRITABLE} --fraction 0.5 --copy", "cannot be written"),
    ],
    "shard_tools/verify_shards.py": [*FOLDERS, ("{shards} --workers -1", "must be 0")],
    "shard_tools/index_shards.py": [
        ("{none}", "/none: no such file or folder"),
        ("s3://b/x", "s3:/b/x: no such file or folder; it is a URL, and only local files are read"),
        ("{empty}", "holds no .tar files"),
        ("{shards}", "already has a manifest.json"),
        (f"{{shards}}/part-000000.tar --output {UNWRITABLE}", "cannot be written"),
        ("{shards}/part-000000.tar --output {new} --classes-from {none}", "/none: "),
    ],
    "shard_tools/shuffle_quality.py": [*FOLDERS, ("{shards} --window 0", "--window 0: must be")],
    "shard_tools/demo_images.py": [
        ("{new} --train 3", "--train 3: must be at least 16"),
        (f"{UNWRITABLE}", "cannot be written"),
        ("{loop}", "cannot be written (a link to nothing"),
        ("{new} --seed -1", "--seed: -1: must be between 0 and 4294967295"),
        ("{new} --size 999999", "--size 999999: must be at least 8 and at most 4096"),
    ],
    "shard_tools/cifar_images.py": [
        ("{none} {new}", "/none: no such file or folder"),
        ("{text} {new}", "is damaged, or no folder, zip or tar"),
        (f"{{images}} {UNWRITABLE}", "cannot be written"),
    ],
}  # fmt: skip
ALL = [(file, words, said) for file, cases in CASES.items() for words, said in cases]


def write_run(run: Path, recipe) -> Path:
    """A run folder with a checkpoint; its weights are one number, since nobody loads them."""
    save_file({"x": np.zeros(1)}, (run / "model.safetensors"))
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "encoder").mkdir()
    save_file({"x": np.zeros(1)}, run / "encoder/encoder.safetensors")
    options = recipe.encoder.options | {"img_size": recipe.encoder.image_size}
    info = {"arch": recipe.encoder.arch, "options": options, "mean": [0.5] * 3, "std": [0.5] * 3}
    (run / "encoder/encoder.json").write_text(json.dumps(info))
    place = run / "checkpoints/.step-00000001"
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(bytes(100))
    (place / "recipe.yaml").write_text(dump_recipe(recipe))
    (place / "state.json").write_text('{"step": 1}')
    seal(place, place.with_name("step-00000001"))
    return run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folders and files of the cases, by name."""
    top = tmp_path_factory.mktemp("input")
    write_shards(top / "data/shards", *coloured_images(64, 2, seed=0))
    for name in ("empty", "run", "broken", "bare", "contrast", "images/a", "images/b", "cue/cat",
                 "classifier", "embeddings"):  # fmt: skip
        (top / name).mkdir(parents=True)
    recipe = tiny_recipe("mae")
    for name in ("run", "broken"):
        write_run(top / name, recipe)
    for name in ("model.safetensors", "encoder/encoder.safetensors",
                 "checkpoints/step-00000001/weights.bin"):  # fmt: skip
        (top / "broken" / name).write_bytes(b"x")
    (top / "bare/recipe.yaml").write_text(dump_recipe(recipe))
    (top / "bert").mkdir()
    (top / "bert/config.json").write_text('{"model_type": "bert"}')
    (top / "contrast/recipe.yaml").write_text(dump_recipe(tiny_recipe("cmae")))
    for name in ("text", "bad.pth", "bad.safetensors", "cue/cat/cat1-dog2.png"):
        (top / name).write_text("hello, this is no file of weights")
    save_file({"x": np.zeros(9)}, top / "weights.safetensors")
    (top / "cut.safetensors").write_bytes((top / "weights.safetensors").read_bytes()[:-8])
    with zipfile.ZipFile(top / "cut.pth", "w") as archive:
        archive.writestr("data.pkl", "x" * 99)
    (top / "cut.pth").write_bytes((top / "cut.pth").read_bytes()[:-30])
    (top / "list.txt").write_text(f"{top}/none\n")
    (top / "blank").write_text("\n \n")
    for name in ("a/1.png", "b/2.png"):
        Image.new("RGB", (8, 8)).save(top / "images" / name)
    about = {"arch": "vit_tiny_patch16_224", "options": {"img_size": 16}, "classes": ["a"] * 1000}
    about |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    (top / "classifier/classifier.json").write_text(json.dumps(about))
    np.save(top / "embeddings/embeddings.npy", np.ones((2, 3), "f4"))
    (top / "embeddings/names.txt").write_text("a\t0\t/a\nb\t0\t/b\n")
    info = {
        "images": str(top / "none"), "root": None, "shape": [2, 3], "classes": [],
        "encoder": {"source": "random", "arch": "vit_tiny_patch16_224", "options": {},
                    "random": True},
        "settings": {"feature": "cls", "dtype": "float32", "format": "npy", "precision": "fp32",
                     "micro_batch": 1, "on_error": "fail", "image size": 8, "resize": 9,
                     "weights": ""},
    }  # fmt: skip
    (top / "embeddings/embeddings.json").write_text(json.dumps(info))
    for name, config in CONFIGS.items():
        (top / f"ds-{name}.json").write_text(json.dumps(config))
    (top / "ds-twice.json").write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    (top / "ds-nan.json").write_text('{"watchdog_seconds": Infinity}')
    (top / "loop").symlink_to("loop")
    names = ("none", "empty", "text", "run", "broken", "bare", "contrast", "images", "cue", "bad",
             "classifier", "embeddings", "cut", "new", "ds", "bert", "loop", "blank")  # fmt: skip
    found = {name: str(top / name) for name in names} | {"shards": str(top / "data/shards")}
    return found | {
        "list": f"{top}/list.txt",
        "weights": f"{top}/weights.safetensors",
        "tiny": TINY,
    }


@pytest.fixture(scope="module")
def verdicts(places):
    """What each case came to: (exit code, the heavy module that it wanted, CPU seconds, output);
    and the files that all of them left."""
    top = Path(places["empty"]).parent
    before = set(top.rglob("*"))
    cases = [(file, shlex.split(words.format(**places)), {}) for file, words, _ in ALL]
    found = forked_commands.run(cases, sorted(HEAVY - DECODERS))
    left = {path for path in top.rglob("*") if path.is_file()} - before
    return dict(zip(ALL, found, strict=True)), left


@pytest.mark.parametrize(
    "case", ALL, ids=lambda c: f"{Path(c[0]).stem} {c[1].replace(PRETRAIN, '…')}"[-100:]
)
def test_wrong_input_is_a_sentence_at_once(case, verdicts, places):
    code, wanted, seconds, output = verdicts[0][case]
    assert (code, wanted) == (2, ""), output
    assert case[2].format(**places) in output
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") or ": error: " in last, output
    assert seconds < MOST


def test_nothing_is_written_by_a_command_that_is_refused(verdicts):
    assert {path.name for path in verdicts[1]} <= {"lock"}


def test_every_command_has_cases():
    assert {*FILES, "pipeline/doctor.py"} == CASES.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "x"), ("RANK", "1"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "0")],
)
def test_a_launcher_that_sets_nonsense(name, value, places):
    words = shlex.split(PRETRAIN.format(**places))
    knn = shlex.split(f"{RANDOM} {SETS}".format(**places))
    cases = [("pipeline/pretrain.py", words, {name: value}), ("eval/knn.py", knn, {name: value})]
    for code, wanted, _, output in forked_commands.run(cases, sorted(HEAVY - DECODERS)):
        assert (code, wanted) == (2, ""), output
        assert f"error: {name} is '{value}': must be a number from" in output
