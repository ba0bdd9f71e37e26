"""Helpers of the tests of LeRobot data sets: changed copies of those that the official package made."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT

SETS = ROOT / "tests/fixtures/lerobot"
FRONT, WRIST, SIDE = (f"observation.images.{name}" for name in ("front", "wrist", "side"))
SPEC = {
    "embodiment": "toy",
    "cameras": {"front": FRONT, "wrist": WRIST, "side": SIDE},
    "state": ["observation.state"],
    "action": ["action"],
    "instruction": "task",
    "image_fit": "pad",
}
TABLE = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.wrist/chunk-000/file-000.mp4"
LENGTHS = [7, 12, 19, 9, 15]


def copy_set(name, target):
    """Copy a data set into the folder `target`, with a description; return the copy's folder."""
    folder = shutil.copytree(SETS / name, target / name, copy_function=shutil.copyfile)
    (folder / "spec.json").write_text(json.dumps(SPEC))
    return folder


def change_json(folder, change, file="meta/info.json"):
    """Let change(content) change a JSON file, or return what takes its place."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(content) or content))


def change_table(folder, file, **columns):
    """Replace columns of a Parquet file by function(list of the values, or None) -> arrow array; None removes them."""
    table = pq.read_table(folder / file)
    for name, change in columns.items():
        name = name.replace("__", ".").replace("_of_", "/")
        if change is None:
            table = table.drop_columns(name)
        else:
            values = change(table[name].to_pylist())
            if not isinstance(values, pa.Array):
                values = pa.array(values, table.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, folder / file)


def expected_of(name):
    """Return what the official package reads of a data set: {name: array}."""
    with np.load(SETS / "expected" / f"{name}.npz") as arrays:
        return dict(arrays)
