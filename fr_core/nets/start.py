"""The config of a run that starts from weights: its net is theirs."""

from collections.abc import Iterable
from pathlib import Path

from fr_core.config import Config
from fr_core.config.nets import IResNetNet, MobileFaceNetNet, MoENet, Net, QuantisedNet, Residual
from fr_core.config.recipes import COMMAND_LINE, load_config
from fr_core.errors import UserError


def load_started(
    recipe: str | Path, overrides: Iterable[str] = (), setting: Iterable[str] = (), setting_source: str = COMMAND_LINE
) -> Config:
    """Return the config of a recipe, with the net of the weights in ``init.backbone`` if it names any.

    Overrides of the net still count. So weights that do not fit an override are refused when the run loads them.

    Args:
        recipe, overrides, setting, setting_source: As :func:`fr_core.config.recipes.load_config` takes them.

    Raises:
        UserError: As ``load_config``, or the weights cannot be read.
    """
    given = (recipe, list(overrides), list(setting), setting_source)
    config = load_config(*given)
    if not config.init.backbone:
        return config
    from fr_core.nets.names import option_named  # PyTorch takes a second to import, and a recipe alone needs none
    from fr_core.nets.open import find_weights

    try:
        with option_named("init.net="):
            found = find_weights(config.init.backbone, config.init.net, config.train.trust_code).net
    except UserError as error:
        raise type(error)(f"init.backbone: {error}") from None
    return load_config(*given, net=with_net_of(config.net, found))


def with_net_of(written: Net, found: Net) -> Net:
    """Return the section of a recipe with the net that some weights have.

    The dropout stays the recipe's. A mixture of experts and a quantised net are made of the net that was found.
    """
    match written, found:
        case _, QuantisedNet():
            return written
        case QuantisedNet(), IResNetNet() | MobileFaceNetNet():
            return written.model_copy(update={"net": found})
        case MoENet(), IResNetNet():
            return MoENet.model_validate(written.model_dump() | found.model_dump(exclude={"kind", "dropout"}))
        case Residual(), Residual():
            return found.model_copy(update={"dropout": written.dropout})
        case _:
            return found
