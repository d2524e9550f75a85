"""The net that MLflow serves is the net that bigface opens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from fr_core.config.sections import Tracking
from fr_core.data.decode import resized
from fr_core.data.synthetic import render_face
from fr_core.nets.open import open_net
from fr_core.train.logged_net import log_net
from tests.helpers.runs import config_of, run


@pytest.fixture(scope="module")
def logged(dataset, mlflow_database, tmp_path_factory):
    """A run whose net is registered: its folder, MLflow's client, and the model's folder."""
    place = tmp_path_factory.mktemp("logged")
    shutil.copy(mlflow_database, place / "mlflow.db")
    uri = f"sqlite:///{place}/mlflow.db"
    config = config_of(dataset, f"tracking.uri={uri}", "tracking.register_as=faces@champion", "train.max_steps=2")
    run(config, place / "run")
    client = MlflowClient(uri)
    source = client.get_model_version_by_alias("faces", "champion").source
    return place / "run", client, Path(source.removeprefix("file://"))


def faces(count, size):
    """Drawn faces of ``size`` pixels: uint8 [N, H, W, 3], and their PNG files."""
    images = [render_face(identity, 0, size=size)[0] for identity in range(count)]
    return np.stack(images), [cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in images]


def test_the_loaded_model_gives_what_the_run_embeds(logged):
    out, _, source = logged
    recogniser = open_net(out)
    images, files = faces(3, 48)
    wanted = recogniser.embed(np.stack([resized(image, recogniser.net.input_size) for image in images]))
    model = mlflow.pyfunc.load_model(str(source))
    assert model.predict(pd.DataFrame({"image": files})) == pytest.approx(wanted, abs=1e-6)


def test_it_is_served_where_bigface_is_not_installed(logged, tmp_path):
    """Its own code opens it, from a folder that holds no other."""
    out, _, source = logged
    script = (
        "import sys, mlflow, json; from pathlib import Path; sys.path = [p for p in sys.path if p != sys.argv[3]]; "
    )
    script += "m = mlflow.pyfunc.load_model(sys.argv[1]); import fr_core; assert sys.argv[1] in fr_core.__file__; "
    script += "print(json.dumps(m.predict(m.input_example).tolist()))"
    here = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(source), "x", here],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    recogniser = open_net(out)
    face = faces(1, recogniser.net.input_size)[0]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(recogniser.embed(face), abs=1e-6)


def test_a_bad_image_is_one_clear_error(logged):
    model = mlflow.pyfunc.load_model(str(logged[2]))
    good = faces(1, 32)[1][0]
    with pytest.raises(MlflowException, match=r"row 1: not a readable image: ") as error:
        model.predict(pd.DataFrame({"image": [good, b"no image"]}))
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"


def test_the_model_is_listed_with_its_run_and_registered_once(logged):
    """Also if its letter is delivered a second time."""
    out, client, source = logged
    run_id = json.loads((out / "run.json").read_text())["run_id"]
    weights = out / "checkpoints" / "step_00000002" / "backbone.safetensors"
    log_net(client, run_id, weights, 2, "faces@champion")
    [output] = client.get_run(run_id).outputs.model_outputs
    assert output.step == 2
    assert client.get_logged_model(output.model_id).status == "READY"
    assert [version.source for version in client.search_model_versions("name = 'faces'")] == [f"file://{source}"]


def test_a_model_that_cannot_be_written_leaves_none(logged, tmp_path):
    """A later try makes another one."""
    out, client, _ = logged
    run_id = json.loads((out / "run.json").read_text())["run_id"]
    damaged = tmp_path / "backbone.safetensors"
    damaged.write_bytes(b"no weights")
    with pytest.raises(Exception, match="backbone"):
        log_net(client, run_id, damaged, 7, None)
    assert [model.step for model in client.get_run(run_id).outputs.model_outputs] == [2]


@pytest.mark.parametrize("name", ["a/b", "faces@v2", "faces@latest", "faces@", "a@b@c", ""])
def test_names_that_mlflow_refuses(name):
    with pytest.raises(ValidationError, match="write NAME or NAME@ALIAS"):
        Tracking(register_as=name)
