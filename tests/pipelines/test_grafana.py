"""The Grafana dashboard against the names and labels that runs export; tests/pipelines/test_jobs.py scrapes these."""

import itertools
import json
import re
from pathlib import Path

from pipelines.gauges import DESCRIPTIONS, Gauges

DASHBOARD = json.loads((Path(__file__).parents[2] / "pipelines/cluster/grafana.json").read_text())
PANELS = DASHBOARD["panels"]
QUERY = re.compile(r'\w+ by \(([\w, ]+)\) \(ray_bigface_\w+\{(\w+)=~"\$run"\}\)')
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_gauge_has_a_panel_and_every_panel_a_gauge():
    shown = [re.findall(r"ray_\w+", query) for query in QUERIES]
    assert sorted(itertools.chain(*shown)) == sorted(f"ray_bigface_{name}" for name in DESCRIPTIONS)
    (query,) = (one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query")
    assert re.fullmatch(r"label_values\(ray_bigface_step, run\)", query)


def test_queries_and_legends_use_labels_that_the_gauges_have():
    labels = set(Gauges("run", 0).gauges["step"].info["tag_keys"])
    for panel in PANELS:
        for target in panel["targets"]:
            by, selected = QUERY.fullmatch(target["expr"]).groups()
            assert {*by.split(", "), selected} <= labels
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == set(by.split(", "))


def test_panels_lie_side_by_side():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    fields = [{(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
              for g in (panel["gridPos"] for panel in PANELS)]  # fmt: skip
    assert len(set().union(*fields)) == sum(map(len, fields))
    assert max(x for field in fields for x, _ in field) < 24  # Grafana's width
    sources = {one["name"] for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)
    assert sources == {"datasource"}
