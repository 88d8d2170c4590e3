"""Files that people have: tables in CSV, archives with arrays of any names, and pickles, which are refused."""

from __future__ import annotations

import csv
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from softcurve.cli.main import app
from softcurve.fit import DataError
from softcurve.fit.data.dataset import Keys
from softcurve.fit.data.opening import open_source, open_source_for

from .cli_output import run_json

RNG = np.random.default_rng(3)
FEATURES = RNG.normal(size=(17, 3))
WORDS = np.array(['a "b", c', "één", "line\nbreak"])[np.arange(17) % 3]
HEADER = ["x", "with, comma", "z"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_csv(path, header, *columns):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))
    return path


def contents(source):
    (block,) = source.blocks(1000)
    return block.features.numpy(), block.target


@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("name", ["target", "y", "labels", "species"])
def test_a_table_in_csv_is_what_was_written(place, name):
    columns, header = [*FEATURES.T], list(HEADER)
    columns.insert(place, WORDS)
    header.insert(place, name)
    keys = Keys(target=name if name == "species" else None)
    features, target = contents(source := open_source(write_csv("d.csv", header, *columns), keys=keys))
    np.testing.assert_array_equal(features, FEATURES)  # csv writes the shortest decimal that reads back the same
    assert [source.classes[index] for index in target] == WORDS.tolist()
    without = open_source_for(write_csv("x.csv", HEADER, *FEATURES.T), source.classes, 3)
    np.testing.assert_array_equal(contents(without)[0], FEATURES)
    assert without.kind is None


def test_integers_stay_integers_however_late_a_fraction_comes():
    count = 200_000  # more than a block of the reader, which would take all for integers
    late = np.zeros(count)
    late[-1] = 0.5
    source = open_source(write_csv("d.csv", ["a", "b", "y"], np.arange(count), late, np.arange(count) % 2))
    assert source.classes == (0, 1)
    features = torch.cat([block.features.clone() for block in source.blocks(50_000)]).numpy()
    np.testing.assert_array_equal(features, np.stack([np.arange(count), late], 1))


def test_a_column_named_y_is_a_feature_beside_a_target_of_another_name():
    path = write_csv("d.csv", ["x", "y", "class"], *FEATURES.T[:2], WORDS)
    np.testing.assert_array_equal(contents(open_source(path, keys=Keys(target="class")))[0], FEATURES[:, :2])


def test_shards_in_csv_are_concatenated():
    Path("shards").mkdir()
    for number, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, 17))):
        write_csv(f"shards/{number}.csv", [*HEADER, "y"], *FEATURES[rows].T, np.arange(17)[rows] % 3)
    source = open_source("shards")
    features = torch.cat([block.features.clone() for block in source.blocks(9)]).numpy()
    np.testing.assert_array_equal(features, FEATURES)


CSV_FAULTS = {
    "no header": ("1.5,2,0\n2.5,3,1\n", "the first row of d.csv must be a header .* add a header row"),
    "an index of pandas": (",a,y\n0,1,0\n", r"column 1 of d.csv has no name .* \(index=False in pandas\)"),
    "semicolons": ("a;b;y\n1;2;0\n", "must be separated by commas; its first row is 'a;b;y'"),
    "no rows": ("a,b,y\n", "a header row and no other rows; give at least one sample"),
    "a missing value": ("a,y\n1,0\n,1\n", "column 'a' of d.csv has 1 null .*fill them or drop the rows"),
    "a ragged row": ("a,y\n1,0\n1\n", "d.csv cannot be read as a .csv table: .*Expected 2 columns, got 1"),
    "a name that comes twice": ("a,a,y\n1,2,0\n", "more than one column 'a'; rename one"),
    "text": ("a,b,y\n1,red,0\n", "column 'b' of d.csv holds text; .*encode it as numbers, choose it as the target by"),
    "another encoding": ("a,y\n1,\xe9\n".encode("latin-1"), "column 'y' of d.csv is not UTF-8 text; convert"),
    "no target": ("a,b\n1,2\n", r"d.csv has no targets \(no column named target, y or labels, and no --target-key"),
    "nothing": ("", r"d.csv is empty \(0 bytes\)"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_a_csv_file_that_cannot_be_used_is_refused(fault):
    content, message = CSV_FAULTS[fault]
    Path("d.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        open_source("d.csv")


def test_columns_that_pandas_has_numbered_are_columns():
    assert open_source_for(write_csv("d.csv", "012", *FEATURES.T), (0, 1), 3).rows == 17
    assert open_source(write_csv("d.csv", "135", *FEATURES.T[:2], WORDS), keys=Keys(target="5")).width == 2


def test_iris_in_csv_from_fit_to_prediction():
    iris = load_iris()
    names = iris.target_names[iris.target]
    write_csv("iris.csv", [*iris.feature_names, "species"], *iris.data.T, names)
    options = ("--target-key", "species", "--holdout", 0, "--tol", 1e-8)
    record = run_json("fit", "iris.csv", *options)
    assert (record["rows"], record["features"], record["classes"]) == (150, 4, 3)
    expected = LogisticRegression(tol=1e-10, max_iter=10_000).fit(iris.data, names).coef_
    np.testing.assert_allclose(load_file("head.safetensors")["weight"].numpy(), expected, atol=1e-4)
    scored = run_json("predict", "head.safetensors", "iris.csv", "--target-key", "species", "--out", "p.csv")
    assert scored["accuracy"] == record["train_accuracy"]
    with open("p.csv", encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert np.mean(np.array(labels) == names) == scored["accuracy"]


# --- names of arrays ---------------------------------------------------------------------------------------------


def arrays():
    return {"a": FEATURES, "b": 2 * FEATURES, "first": np.arange(17) % 3, "second": np.arange(17) % 4}


def write_arrays(suffix):
    if suffix == "npz":
        np.savez("d.npz", **arrays())
    elif suffix == "safetensors":
        save_file({name: torch.tensor(array) for name, array in arrays().items()}, "d.safetensors")
    else:
        columns = {name: array.tolist() for name, array in arrays().items()}
        pq.write_table(pa.table(columns), "d.parquet")
    return f"d.{suffix}"


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_keys_choose_among_arrays(suffix):
    path = write_arrays(suffix)
    for features, target in (("a", "second"), ("b", "first")):
        source = open_source(path, keys=Keys(features, target))
        chosen, index = contents(source)
        np.testing.assert_array_equal(chosen, arrays()[features])
        np.testing.assert_array_equal(index, arrays()[target])
    with pytest.raises(DataError, match=r"^--target-key: d.* has no .* named 'third'; it has 'a', 'b', 'first', 'sec"):
        open_source(path, keys=Keys("a", "third"))


KEY_FAULTS = [
    (["digits", "--target-key", "y"], "--target-key: digits has no arrays with names to choose from; leave 'y' out"),
    (["x.npy", "--features-key", "y"], "--features-key: x.npy has no arrays with names"),
    (["d.npz", "--target", "y.npy", "--target-key", "y"], "--target-key: the target is in y.npy (--target); leave 'y'"),
    (["d.npz", "--features-key", "X"], "--features-key: d.npz has no array named 'X'; it has 'a', 'b', 'first', 'sec"),
    (
        ["d.csv", "--features-key", "a"],
        "--features-key: the features of d.csv are all of its columns except the target",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), KEY_FAULTS)
def test_a_key_that_cannot_be_used_is_refused(arguments, message):
    write_arrays("npz")
    write_csv("d.csv", [*HEADER, "y"], *FEATURES.T, WORDS)
    np.save("x.npy", FEATURES)
    np.save("y.npy", np.arange(17))
    done = CliRunner().invoke(app, ["fit", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"softcurve: {message}")


# --- pickles -----------------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("loaded"),)


PICKLES = [
    (["fit", "d.pt"], "data: d.pt is a pickle, .*torch.load.* content as .npz: numpy.savez"),
    (["fit", "d.pkl"], "data: d.pkl is a pickle, .*pickle.load"),
    (["fit", "digits", "--target", "d.pt"], "target: d.pt is a pickle, .*content as .npy: numpy.save"),
    (["predict", "d.pt", "digits"], "head: d.pt is a pickle, .*SavedHead"),
    (["spectrum", "d.pt", "digits"], "model: d.pt is a pickle, .*FILE.py:function"),
]


@pytest.mark.parametrize(("arguments", "message"), PICKLES)
def test_a_pickle_is_not_loaded_and_the_message_says_how_to_convert_it(arguments, message):
    name = next(argument for argument in arguments if argument.startswith("d."))
    Path(name).write_bytes(pickle.dumps(Harmful()))
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)
    assert not Path("loaded").exists()
