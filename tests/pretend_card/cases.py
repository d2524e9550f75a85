"""The trainings that the pretend card counts: each method with each feature that it has.

A case begins with the name of its recipe. ``FOLDER`` in an override stands for the folder of the data.
"""

TEACHER = "FOLDER/teacher.safetensors"
ACCUMULATE = ("train.accumulate=2",)
RECOMPUTE = ("train.recompute=true",)
EMA = ("train.ema=0.9",)
FUSED = ("method.update=fused",)
SAMPLED = ("method.sample_rate=0.9",)  # more rows than faces, as in real runs
ADAPTER = ("method.distill.adapter=true",)
UNLABELLED = ("method.distill.unlabelled={path='FOLDER/flat', batch=16}",)
EMBEDDINGS = ("method.distill.embeddings=FOLDER/embeddings",)
FROZEN = (
    *(f"init.backbone={TEACHER}", "init.net=iresnet10"),
    "finetune.freeze=['conv1*', 'bn1*', 'prelu*', 'layer1.*']",
)
INTEGERS = (
    f"init.backbone={TEACHER}",
    "net={kind='quantised', calibration_batches=2, "
    "net={kind='iresnet', depth=10, width=8, input_size=32, embedding=32}}",
)
VIT = (
    "net={kind='vit', depth=3, width=16, heads=2, patch=8, mask=0.2, input_size=32, embedding=32}",
    "optim={kind='adamw', head={lr=0.1}}",
    *RECOMPUTE,
)

OFTEN: dict[str, tuple[str, ...]] = {
    "bigface": (),
    "bigface-float32": ("train.precision=float32",),
    "bigface-fused": FUSED,
    "bigface-partial-fc-fused": SAMPLED + FUSED,
    "bigface-vit": VIT,
    "distill": (),
    "attfc": (),
    "f2c": (),
    "virtual_fc": (),
    "quantface": (),
}
"""Cases of ``make test``."""

RARE: dict[str, tuple[str, ...]] = {
    "bigface-partial-fc": SAMPLED,
    "bigface-accumulate": ACCUMULATE,
    "bigface-recompute": RECOMPUTE,
    "bigface-ema": EMA,
    "attfc-accumulate": ("method.order=reference", *ACCUMULATE),
    "dcq": (),
    "moe": (),
    "fastface": ("schedule={kind='fastface', window=0.5, patience=0.5}",),
    "bigface-float16": ("train.precision=float16",),
    "bigface-bfloat16-head": ("method.precision=bfloat16",),
    "bigface-filter": ("method.drop_negatives_above=0.9",),
    "bigface-arcface": ("method.margin={scale=16.0, m2=0.5, m3=0.0}",),
    "bigface-adaface": ("method.margin.kind=adaface",),
    "bigface-magface": ("method.margin.kind=magface",),
    "bigface-elastic-plus": ("method.margin={kind='elastic_arc', plus='paper'}",),
    "bigface-curricular-fused": ("method.margin.kind=curricular", *FUSED),
    "bigface-partial-fc-accumulate": SAMPLED + ACCUMULATE,
    "bigface-ghost": ("train.ghost_batch=8",),
    "bigface-ghostfacenet": ("net={kind='ghostfacenet', width=0.5, input_size=32, embedding=32}",),
    "bigface-lars": ("optim.kind=lars", "optim.head.lr=0.1"),
    "bigface-muon": ("optim={kind='muon'}",),
    "bigface-frozen": FROZEN,
    "bigface-layer-decay": (*FROZEN, "finetune.layer_decay=0.9"),
    "bigface-head-only": (f"init.backbone={TEACHER}", "init.net=iresnet10", "finetune.head_epochs=10"),
    "bigface-adamw": ("optim={kind='adamw', head={lr=0.1}}",),
    "distill-fused": FUSED,
    "distill-partial-fc": SAMPLED,
    "distill-accumulate-recompute-ema": ACCUMULATE + RECOMPUTE + EMA,
    "distill-adapter": ADAPTER,
    "distill-unlabelled": UNLABELLED,
    "distill-embeddings": EMBEDDINGS,
    "attfc-recompute-ema": RECOMPUTE + EMA,
    "attfc-float16": ("train.precision=float16",),
    "dcq-accumulate": ACCUMULATE,
    "dcq-recompute": RECOMPUTE,
    "f2c-recompute-ema": RECOMPUTE + EMA,
    "virtual_fc-recompute-ema": RECOMPUTE + EMA,
    "quantface-recompute-ema": RECOMPUTE + EMA,
    "quantface-relative-similarity": ("method.loss.kind=relative_similarity",),
    "quantface-mse": ("method.loss={kind='mse'}",),
    "quantface-cross-entropy": ("method.cross_entropy={weight=0.1}",),
    "quantface-integers": INTEGERS,
    "moe-recompute-ema": RECOMPUTE + EMA,
}
"""Further cases of ``make soak``."""

CASES = OFTEN | RARE
GROUPED = {"attfc", "dcq", "f2c", "virtual_fc"}  # recipes with class images
TAUGHT = {
    "distill": ("method.distill.teacher", "method.distill.teacher_net"),
    "quantface": ("method.teacher", "method.teacher_net"),
}


def recipe_of(case: str) -> str:
    """Return the name of a case's recipe, without `debug_`."""
    return case.partition("-")[0]


def overrides_of(case: str, folder: str) -> list[str]:
    """Return the overrides of a case's recipe, with the training data and the teacher in a folder."""
    recipe, own = recipe_of(case), CASES[case]
    given = [f"data.path={folder}/{'grouped' if recipe in GROUPED else 'flat'}", *own]
    if recipe in TAUGHT and own != EMBEDDINGS:
        file, net = TAUGHT[recipe]
        given += [f"{file}={TEACHER}", f"{net}=iresnet10"]
    return [override.replace("FOLDER", folder) for override in given]
