"""The trained net as an MLflow model, which MLflow lists with its run, registers by name, and serves."""

import logging
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import cv2
import numpy as np

import fr_core
from fr_core.config.nets import QuantisedNet
from fr_core.data.store import AnyPath, local_copy
from fr_core.data.synthetic import render_face
from fr_core.nets import served
from fr_core.nets.open import open_net

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "net"  # of the model in its run
NEEDS = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "pydantic", "safetensors", "simplejpeg", "torch")


def log_net(client: "MlflowClient", run_id: str, weights: AnyPath, step: int, register: str | None) -> None:
    """Log a net as an MLflow model of a run, unless this step's net is logged already, and register it if asked.

    The model holds the weights and the code that opens them, so it is served where bigface is not installed.

    Args:
        weights: file of the net's weights, as a checkpoint has it.
        step: step of the run that the weights are of.
        register: name in the model registry, ``NAME`` or ``NAME@ALIAS``. None: not registered.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    known = {model.step: model.model_id for model in run.outputs.model_outputs} if run.outputs else {}
    if step not in known:
        model = client.create_logged_model(run.info.experiment_id, NAME, run_id)
        try:
            with TemporaryDirectory() as folder, local_copy(weights) as file:
                path = Path(folder) / NAME
                _write_model(file, path, run_id, model.model_id)
                client.log_model_artifacts(model.model_id, str(path))
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        except BaseException:
            client.delete_logged_model(model.model_id)
            raise
        known[step] = model.model_id
    if register:
        _register(client, run_id, known[step], *register.split("@"))


def _write_model(weights: Path, path: Path, run_id: str, model_id: str) -> None:
    """Write the folder of an MLflow model: weights, code, signature, requirements, and a drawn face as the example."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    opened = open_net(weights)
    net, needs = opened.net, [*NEEDS, *(["brevitas"] if isinstance(opened.config, QuantisedNet) else [])]
    for name in ("mlflow.models", "mlflow.pyfunc"):  # they tell how they check the example
        logging.getLogger(name).setLevel(logging.WARNING)
    face = render_face(0, 0, size=net.input_size)[0]
    _, png = cv2.imencode(".png", face[:, :, ::-1])
    save_model(
        str(path),
        loader_module=served.__name__,
        data_path=str(weights),
        code_paths=[str(Path(fr_core.__file__).parent)],
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        signature=ModelSignature(
            Schema([ColSpec(DataType.binary, served.IMAGE)]),
            Schema([TensorSpec(np.dtype("float32"), (-1, net.embedding))]),
        ),
        input_example=pd.DataFrame({served.IMAGE: [png.tobytes()]}),
        pip_requirements=[f"mlflow=={version('mlflow')}", *(f"{name}=={version(name)}" for name in needs)],
    )


def _register(client: "MlflowClient", run_id: str, model_id: str, name: str, alias: str | None = None) -> None:
    """Make a model the newest version of a registered one, unless it is that already. Let an alias name it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = client.get_logged_model(model_id).artifact_location  # of "models:/ID", a client asks the default server
    found = [one.version for one in client.search_model_versions(f"name = '{name}'") if one.source == source]
    made = found or [client.create_model_version(name, source, run_id, model_id=model_id).version]
    if alias:
        client.set_registered_model_alias(name, alias, made[0])
