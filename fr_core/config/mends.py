"""Errors about recipes and overrides: one line that says what is wrong and how to write it.

People bring words from other code, such as ``learning_rate`` or ``resnet50``. An error names bigface's field for the
word; the word itself is never accepted.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from fr_core.config.nets import Residual
from fr_core.config.reference import all_knobs, knob_names
from fr_core.config.sections import Section

DEPTHS = get_args(Residual.model_fields["depth"].annotation)
BACKBONE = re.compile(r"(?:i?_?resnet|ir_?se|ir|r)[-_]?(\d+)", re.IGNORECASE)
RUN_OPTION = "is an option of the command, not a field"

# Words of other code for a field, and what to write instead; {value} is the value that stands behind the word.
WORDS = (
    ("learning_rate base_lr init_lr lr", "the learning rate is optim.lr: write optim.lr={value}"),
    (
        "batch_size batch bs total_batch_size train_batch_size",
        "the batch of all workers together is train.global_batch: write train.global_batch={value}",
    ),
    (
        "batch_size_per_gpu per_gpu_batch_size micro_batch_size samples_per_gpu",
        "the batch of all workers together is train.global_batch: write workers × {value} there",
    ),
    (
        "num_classes n_classes class_num num_class num_identities num_ids identities",
        "the classes are counted from the shards: leave it out",
    ),
    ("num_image num_images num_samples", "the images are counted from the shards: leave it out"),
    ("num_epoch num_epochs n_epochs epoch max_epochs", "the epochs are train.epochs: write train.epochs={value}"),
    (
        "steps num_steps total_steps total_step max_iter iterations",
        "the run's length is train.epochs; to stop early write train.max_steps={value}",
    ),
    (
        "warmup warmup_epoch warmup_steps",
        "the warm-up is schedule.warmup_epochs, in epochs: write schedule.warmup_epochs=1",
    ),
    ("wd l2", "the weight decay is optim.weight_decay: write optim.weight_decay={value}"),
    (
        "embedding_size embedding_dim embed_dim emb_size feature_dim feat_dim num_features",
        "the width of the embedding is net.embedding: write net.embedding={value}",
    ),
    (
        "image_size img_size resolution crop_size",
        "the side of the input, in pixels, is net.input_size: write net.input_size={value}",
    ),
    (
        "backbone network arch architecture model",
        "the backbone is net.kind and net.depth: write {backbone}; for weights to start from write init.backbone=RUN",
    ),
    (
        "margin margin_list loss_margin",
        "the margin is the section method.margin: write method.margin.m2=0.5 method.margin.m3=0 for ArcFace, "
        "method.margin.m2=0 method.margin.m3=0.4 for CosFace",
    ),
    ("s logit_scale", "the scale of the logits is method.margin.scale: write method.margin.scale={value}"),
    (
        "loss criterion loss_type loss_name head head_type",
        "the loss follows from method.kind and method.margin: write method.kind=bigface, and method.margin.m2 or m3",
    ),
    (
        "num_workers data_workers dataloader_workers",
        "bigface reads data without DataLoader workers: leave it out; for workers that train give --workers N",
    ),
    (
        "workers gpus num_gpus n_gpus ngpus world_size nproc_per_node devices",
        "the number of workers is set at launch: give --workers N",
    ),
    ("fp16 amp use_amp mixed_precision half", "the precision is train.precision: write train.precision=float16"),
    ("bf16", "the precision is train.precision: write train.precision=bfloat16"),
    ("dtype", "the precision is train.precision: write train.precision={value}"),
    (
        "output output_dir out out_dir save_dir work_dir workdir exp_dir log_dir ckpt_dir",
        f"the run's folder {RUN_OPTION}: give --out DIR",
    ),
    ("resume resume_from", f"resuming {RUN_OPTION}: give --resume and the run's --out"),
    (
        "pretrained pretrained_path checkpoint ckpt weights finetune",
        "the weights to start from are init.backbone: write init.backbone={value}",
    ),
    (
        "rec rec_path root root_dir data_dir data_root dataset dataset_path train_data",
        "the training set is data.path, a folder of shards: run bigface ingest {value} --out shards, "
        "then write data.path=shards",
    ),
    (
        "val_targets val val_set val_data eval_pairs test_pairs",
        "the pairs are verify.pairs: write verify.pairs=FILE verify.images=DIR, or run bigface verify RUN --suite DIR",
    ),
    ("optimizer optimiser opt", "the optimiser is the section optim: write optim.kind=sgd, lars, adamw or muon"),
    (
        "scheduler lr_scheduler lr_schedule lr_policy",
        "the schedule of the learning rate is the section schedule: write schedule.kind=cosine, or another kind",
    ),
    (
        "lr_steps decay_epoch decay_epochs decay_steps",
        "the milestones are epochs of the schedule: write \"schedule={{kind='multistep', milestones=[10, 15]}}\"",
    ),
    (
        "gradient_acc grad_accum accumulation accumulation_steps gradient_accumulation_steps accumulate_grad_batches",
        "the micro-batches of a step are train.accumulate: write train.accumulate={value}",
    ),
    (
        "clip_grad grad_clip max_norm max_grad_norm gradient_clip gradient_clip_val",
        "the largest norm of the gradient is optim.clip: write optim.clip={value}",
    ),
    (
        "interclass_filtering_threshold filter_threshold",
        "the inter-class filter is method.drop_negatives_above: write method.drop_negatives_above={value}",
    ),
    ("pfc partial_fc pfc_rate", "Partial FC is method.sample_rate: write method.sample_rate=0.1"),
    (
        "frequent print_freq log_freq log_interval",
        "log lines come every train.log_every steps: write train.log_every={value}",
    ),
    (
        "save_freq save_interval ckpt_interval",
        "checkpoints come every train.save_every steps: write train.save_every={value}",
    ),
    (
        "eval_freq eval_interval val_interval",
        "verifications come every train.verify_every steps: write train.verify_every={value}",
    ),
    (
        "gradient_checkpointing activation_checkpointing use_checkpoint checkpointing",
        "activation checkpointing is train.recompute: write train.recompute=true",
    ),
    ("model_ema ema_decay", "the decay of the averaged weights is train.ema: write train.ema=0.999"),
    (
        "wandb use_wandb wandb_project tensorboard logger project",
        "MLflow records the run: write tracking.experiment=NAME, or tracking.uri=ADDRESS",
    ),
    ("device gpu cuda", "each worker takes its card, or the CPU, by itself: leave it out"),
    ("dali pin_memory prefetch_factor shuffle drop_last", "bigface plans the reading of data itself: leave it out"),
    (
        "mask mask_ratio mask_prob",
        "synthetic masks are the section data.masks: write data.masks.ratio=0.35",
    ),
)
MENDS = {word: mend for words, mend in WORDS for word in words.split()}

# Words of other code for a kind, and what to write instead.
ARCFACE = "write method.kind=bigface method.margin.m2=0.5 method.margin.m3=0"
COSFACE = "write method.kind=bigface method.margin.m2=0 method.margin.m3=0.4"
KINDS = {
    "arcface": f"ArcFace is a margin of bigface: {ARCFACE}",
    "cosface": f"CosFace is a margin of bigface: {COSFACE}",
    "amsoftmax": f"AM-Softmax is CosFace, a margin of bigface: {COSFACE}",
    "softmax": f"the class matrix is bigface's: {COSFACE}",
    "fc": f"the class matrix is bigface's: {COSFACE}",
    "partial_fc": "Partial FC samples the classes of bigface: write method.kind=bigface method.sample_rate=0.1",
    "pfc": "Partial FC samples the classes of bigface: write method.kind=bigface method.sample_rate=0.1",
    "distill": "bigface distils from a teacher: write method.kind=bigface method.distill.teacher=REF",
    "ekd": "EKD is a loss of quantface: write method.kind=quantface method.loss.kind=ekd",
    "step": "the kind is multistep: write \"schedule={kind='multistep', milestones=[10, 15]}\"",
    "steplr": "the kind is multistep: write \"schedule={kind='multistep', milestones=[10, 15]}\"",
    "linear": "the kind is polynomial: write \"schedule={kind='polynomial', power=1}\"",
    "adam": "the kind is adamw: write optim.kind=adamw",
}
# What to say of a missing field whose section cannot be given by one override.
MISSING = {
    "net.net": "net.kind = quantised needs the float net that it quantises: to quantise a trained run use "
    "bigface quantize RUN, or give the whole section: \"net={kind='quantised', net={kind='iresnet', depth=50}}\"",
}


def explain(mistake: Mapping[str, Any]) -> str:
    """Return one line that says what is wrong and how to mend it.

    Args:
        mistake: an error as pydantic details it: type, loc, msg, input, ctx.
    """
    where, value = field_name(mistake["loc"]), mistake["input"]
    match mistake["type"]:
        case "extra_forbidden":
            return _unknown_key(where, value, mistake["loc"])
        case "union_tag_invalid":
            kinds = mistake["ctx"]["expected_tags"].replace("'", "")
            return f"unknown kind {mistake['ctx']['tag']!r} of {where}{_kind_mend(mistake['ctx']['tag'], kinds)}"
        case "missing":
            text = next((knob.description for knob in all_knobs() if knob.name == where), "")
            return MISSING.get(where) or f"{where} is missing: give {where}=… ({text})"
        case "model_type" | "model_attributes_type":
            return f"{where} is a section, not {_show(value)!r}{_section_mend(where, value)}"
    message = mistake["msg"].removeprefix("Value error, ")
    return message if not where or message.startswith(f"{where}.") else f"{where}: {message}"


def field_name(loc: Sequence[str | int]) -> str:
    """Return the dotted name of the field at which an error lies."""
    return ".".join(_fields(loc))


def recipe_mend(name: str, recipes: Sequence[str]) -> str:
    """Return what to write instead of a recipe's name that does not exist."""
    if backbone := backbone_override(name):
        depth = backbone.rpartition("=")[2]
        near = [recipe for recipe in recipes if f"_r{depth}_" in f"{recipe}_"]
        named = f"recipes with this backbone are {', '.join(near)}; or" if near else "no recipe has this backbone:"
        return f"{named} write {backbone} after a recipe's name"
    if name.lower() in KINDS:
        return f"{KINDS[name.lower()]} after a recipe's name, such as bigface_r50"
    near = get_close_matches(name, recipes, 1)
    return f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(recipes)}"


def backbone_override(name: object) -> str | None:
    """Return the overrides that choose a backbone by its name elsewhere, such as ``resnet50``; None: no known name."""
    if str(name).lower().replace("_", "") in ("mobilefacenet", "mbf"):
        return "net.kind=mobilefacenet"
    found = BACKBONE.fullmatch(str(name))
    if not found:
        return None
    if int(found[1]) in DEPTHS:
        return f"net.kind=iresnet net.depth={found[1]}"
    return f"net.kind=iresnet net.depth=N, where N is one of {', '.join(map(str, DEPTHS))}"


def _unknown_key(key: str, value: object, loc: Sequence[str | int]) -> str:
    """Say what to write instead of a key that its section lacks."""
    section, _, last = key.rpartition(".")
    kinds = [part for part in loc if part in _all_kinds()]
    if kinds and key in knob_names():
        having = list(dict.fromkeys(kind for knob in all_knobs() if knob.name == key for _, kind in knob.choices[-1:]))
        return (
            f"unknown key {key}: kind {kinds[-1]} has no such key (kinds with it: {', '.join(having)}): leave it out, "
            f"or give the whole section: \"{section}={{kind='…', …}}\""
        )
    word = last.replace("-", "_").lower()
    if words := [word] if word in MENDS else get_close_matches(word, MENDS, 1, cutoff=0.85):
        backbone = backbone_override(value) or "net.kind=iresnet net.depth=50"
        return f"unknown key {key}: {MENDS[words[0]].format(value=_show(value), backbone=backbone)}"
    elsewhere = sorted((name for name in knob_names() if name.endswith(f".{last}")), key=len)
    if elsewhere and len(last) > 2 and last != "kind":
        return f"unknown key {key}: did you mean {elsewhere[0]}? write {elsewhere[0]}={_show(value)}"
    dot = f"{section}." if section else ""
    beside = [name.removeprefix(dot) for name in knob_names() if name.rpartition(".")[0] == section]
    if near := get_close_matches(last, beside, 1):
        return f"unknown key {key}: did you mean {dot}{near[0]}?"
    if near := get_close_matches(key, knob_names(), 1, cutoff=0.75):
        return f"unknown key {key}: did you mean {near[0]}?"
    return f"unknown key {key}: see bigface knobs {section}".strip()


def _kind_mend(kind: str, kinds: str) -> str:
    """Say which kind to write instead, if one is near, and name all kinds."""
    if mend := _known_kind(kind, kinds):
        return f": {mend}"
    near = get_close_matches(str(kind), kinds.split(", "), 1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return f"{hint} The kinds are: {kinds}"


def _known_kind(kind: str, kinds: str) -> str | None:
    """Return the mend of a kind that other code has, if it is one."""
    if "iresnet" not in kinds:
        return KINDS.get(str(kind).lower())
    backbone = backbone_override(kind)
    return backbone and f"write {backbone}"


def _section_mend(section: str, value: object) -> str:
    """Say how to write a section that was given as a value."""
    choice = next((knob for knob in all_knobs() if knob.name == f"{section}.kind"), None)
    if choice and isinstance(value, str):
        kinds = choice.type.removeprefix("one of ")
        return f": write {section}.kind={value}" if value in kinds.split(", ") else _kind_mend(value, kinds)
    fields = [knob.name for knob in all_knobs() if knob.section == section]
    return f": write one of its fields, such as {next(iter(fields), section)}=…"


def _fields(loc: Sequence[str | int]) -> Iterator[str]:
    """Yield the fields that lead to an error. In ``loc`` a kind follows the field of a choice, and is no field."""
    after_kind = True
    for part in loc:
        is_kind = not after_kind and part in _all_kinds()
        if not is_kind:
            yield str(part)
        after_kind = is_kind


def _all_kinds(section: type[Section] = Section) -> set[str]:
    """Return the kinds of all sections that derive from one."""
    kind = section.model_fields.get("kind")
    own = {kind.default} if kind and not kind.is_required() else set()
    return own.union(*(_all_kinds(below) for below in section.__subclasses__()))


def _show(value: object) -> str:
    """Return a value as an override writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else "…"
