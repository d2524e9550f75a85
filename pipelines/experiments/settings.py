"""What ``bigface compare`` sets against each other: overrides of a recipe, by name."""

from fr_core.config import Config
from fr_core.config.mends import as_toml
from fr_core.config.methods import (
    DCQ,
    F2C,
    AdaFaceMargin,
    AnyMargin,
    AttFC,
    BaseMethod,
    BigFace,
    CurricularMargin,
    ElasticArcMargin,
    ElasticCosMargin,
    LDAMMargin,
    MagFaceMargin,
    Margin,
    UniFaceMargin,
    VirtualFC,
)
from fr_core.errors import UserError


def schedules(epochs: int, fast_epochs: int, fastface: list[str]) -> dict[str, list[str]]:
    """Return the overrides of each setting that FastFace (docs/methods/fastface.md) is compared with, by name.

    These are the recipe in full, cosine in fewer epochs, and FastFace in as few. All warm up as long as the recipe.

    Args:
        epochs: epochs of the recipe in full.
        fast_epochs: epochs of cosine and of FastFace.
        fastface: ``name=value`` of FastFace's schedule section.
    """
    fewer = f"train.epochs={fast_epochs}"
    return {
        "full": [f"train.epochs={epochs}"],
        "cosine": [fewer, "schedule.kind=cosine"],
        "fastface": [fewer, "schedule.kind=fastface", *(f"schedule.{setting}" for setting in fastface)],
    }


def heads(
    config: Config, steps: int, classes: int, flat: str, grouped: str, centres: int, scale: float
) -> dict[str, dict[str, list[str]]]:
    """Return the overrides of each setting in tables 1 to 5 of AttFC (arXiv 2025; docs/methods/attfc.md), by table.

    All share AttFC's loss, ArcFace with a margin of .5, and one scale; each keeps its other defaults. Virtual FC also
    trains on its class images, so it takes half the batch. Its rate, steps and warm-up are those of the others.

    Args:
        config: config of the recipe; all settings share its batch and epochs.
        steps: steps of a run with this batch and these epochs; with folds, of the shortest.
        classes: classes of the dataset; with folds, of the smallest.
        flat: flat shards, for FC and Partial FC.
        grouped: grouped shards of the same faces, for the other methods.
        centres: class centres of every method in table 5.
        scale: scale s of every margin.

    Raises:
        UserError: the batch is odd, the centres are no multiple of the batch or more than the classes, or the class
            matrix has a teacher.
    """
    batch = config.train.global_batch
    if batch % 2 or centres % batch or centres > classes:
        raise UserError(
            f"--centres {centres} must be a multiple of train.global_batch = {batch}, an even number, and at most the "
            f"{classes} classes"
        )
    if config.method.taught:
        raise UserError("heads are compared without a teacher: take a recipe without method.distill")
    arc = Margin(scale=scale, m2=0.5, m3=0)

    def on(shards: str, method: BaseMethod) -> list[str]:
        absent = [f"method.{name}=none" for name, value in method.model_dump().items() if value is None]
        return [f"data.path={shards}", f"method={as_toml(method.model_dump(exclude_none=True))}", *absent]

    def attfc(ratio: float = 0.3, count: int = 2, strategy: str = "attention") -> list[str]:
        fields = {"margin": arc, "size_ratio": ratio, "class_images": count, "strategy": strategy}
        return on(grouped, AttFC.model_validate(fields))

    virtual_fc = VirtualFC(margin=arc, anchors=centres)
    virtual = [
        f"train.global_batch={batch // 2}",
        f"train.max_steps={steps}",
        f"schedule.warmup_epochs={config.schedule.warmup_epochs / 2}",
        *([f"optim.reference_batch={meant_for // 2}"] if (meant_for := config.optim.reference_batch) else []),
    ]
    return {
        "1, 2: size of the queue": {
            "FC": on(flat, BigFace(margin=arc)),
            **{f"AttFC r={ratio}": attfc(ratio) for ratio in (0.1, 0.2, 0.3)},
        },
        "3: class images": {f"AttFC K={count}": attfc(count=count) for count in (2, 3, 4, 5)},
        "4: strategies": {
            "AttFC single": attfc(strategy="single"),
            "AttFC constant": attfc(strategy="constant"),
            "AttFC attention": attfc(),
        },
        "5: equal centres": {
            f"PFC {centres}": on(flat, BigFace(margin=arc, sample_rate=centres / classes)),
            f"VFC {centres}": [*on(grouped, virtual_fc), *virtual],
            f"DCQ {centres}": on(grouped, DCQ(margin=arc, queue_size=centres)),
            f"F2C {centres}": on(grouped, F2C(margin=arc, pool_size=centres)),
            f"AttFC {centres}": attfc(centres / classes),
        },
    }


def margins(config: Config) -> dict[str, list[str]]:
    """Return the overrides of each margin of a class matrix (docs/methods/margins.md), by name.

    All have the recipe's scale, and their other defaults. Sub-centres have ArcFace's margin.

    Raises:
        UserError: the recipe trains no class matrix.
    """
    if config.method.kind != "bigface":
        raise UserError(f"margins are compared on a class matrix: method.kind = {config.method.kind} has none")
    scale = config.method.margin.scale
    arcface = Margin(scale=scale, m2=0.5, m3=0)
    compared: dict[str, AnyMargin] = {
        "ArcFace": arcface,
        "CosFace": Margin(scale=scale),
        "AdaFace": AdaFaceMargin(scale=scale),
        "MagFace": MagFaceMargin(scale=scale),
        "CurricularFace": CurricularMargin(scale=scale),
        "ElasticFace-Arc": ElasticArcMargin(scale=scale),
        "ElasticFace-Cos": ElasticCosMargin(scale=scale),
        "UniFace": UniFaceMargin(scale=scale),
        "LDAM": LDAMMargin(scale=scale),
    }
    settings = {name: [f"method.margin={as_toml(margin.model_dump())}"] for name, margin in compared.items()}
    return settings | {"3 sub-centres": [*settings["ArcFace"], "method.subcentres=3"]}


# AttFC's published figure of each row (arXiv 2025): IJB-C TAR@FAR 1e-4; in table 5 the mean of four benchmarks.
PUBLISHED = {
    **{"FC": "96.18", "AttFC r=0.1": "95.20", "AttFC r=0.2": "95.43", "AttFC r=0.3": "95.78"},
    **{"AttFC K=2": "95.43", "AttFC K=3": "95.49", "AttFC K=4": "95.56", "AttFC K=5": "95.50"},
    **{"AttFC single": "94.93", "AttFC constant": "95.31", "AttFC attention": "95.78"},
    **{"PFC": "95.32", "VFC": "84.21", "DCQ": "93.86", "F2C": "93.80", "AttFC": "95.22"},
}


def named_settings(given: list[str]) -> dict[str, list[str]]:
    """Parse settings of the form ``NAME: key.path=value …``; values hold no spaces.

    Returns:
        The overrides of each setting, by name.

    Raises:
        UserError: there is no setting, one has no name, or two share a name.
    """
    settings: dict[str, list[str]] = {}
    for text in given:
        name, colon, overrides = text.partition(":")
        if not colon or not name.strip() or "=" in name:
            raise UserError(f"--setting {text!r}: write 'NAME: key.path=value …'")
        if name.strip() in settings:
            raise UserError(f"--setting {name.strip()} is given twice: use another name")
        settings[name.strip()] = overrides.split()
    if not settings:
        raise UserError("nothing to compare: give --setting 'NAME: key.path=value …', twice or more")
    return settings
