"""Features and targets from every format, what they become, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from softcurve.fit import DataError
from softcurve.fit.data.opening import open_source_for

from .gathered import load_rows, load_rows_for, make_rows, split

FEATURES = np.array([[0.5, 1.0, -2.0], [1.5, 0.25, 3.0], [0.0, -1.0, 4.0], [2.0, 8.0, 0.125], [7.0, 5.0, 6.0]])
NUMBERS = np.array([7, -3, 7, 40, -3])
WORDS = np.array(["cat", "été", "cat", "a b", "été"])
SOFT = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.125, 0.125, 0.75], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]])


def npz(path, target):
    np.savez(path.with_suffix(".npz"), features=FEATURES, target=target)
    return str(path.with_suffix(".npz")), None


def npz_aliases(path, target):
    np.savez_compressed(path.with_suffix(".npz"), X=FEATURES.astype(np.float32), y=target, other=np.zeros(2))
    return str(path.with_suffix(".npz")), None


def npy(path, target):
    np.save(path.with_suffix(".npy"), FEATURES)
    np.save(path.with_name("targets.npy"), target)
    return str(path.with_suffix(".npy")), path.with_name("targets.npy")


def safetensors(path, target):
    save_file(
        {"X": torch.tensor(FEATURES, dtype=torch.bfloat16), "target": torch.tensor(target)},
        path.with_suffix(".safetensors"),
    )
    return str(path.with_suffix(".safetensors")), None


def parquet_columns(path, target):
    columns = {
        "first": FEATURES[:, 0],
        "target": target.tolist(),
        "b": FEATURES[:, 1],
        "last": FEATURES[:, 2],
    }
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=2)
    return str(path.with_suffix(".parquet")), None


def parquet_lists(path, target):
    columns = {"note": ["x"] * 5, "X": FEATURES.tolist(), "y": target.tolist()}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=2)
    return str(path.with_suffix(".parquet")), None


def parquet_fixed_lists_and_categories(path, target):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.ravel().astype(np.float32)), 3)
    column = pa.array(target.tolist()) if target.ndim == 2 else pa.array(target.tolist()).dictionary_encode()
    pq.write_table(pa.table({"features": lists, "target": column}), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet")), None


WRITERS = [
    npz, npz_aliases, npy, safetensors, parquet_columns, parquet_lists, parquet_fixed_lists_and_categories
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_integer_labels_from_every_format(tmp_path, write):
    rows = load_rows(*write(tmp_path / "data", NUMBERS))
    assert rows.classes == (-3, 7, 40)
    assert rows.target.tolist() == [1, 0, 1, 2, 0]
    assert not rows.soft
    np.testing.assert_array_equal(rows.features, FEATURES)  # all of them are exact in bfloat16


@pytest.mark.parametrize("write", [write for write in WRITERS if write is not safetensors])
def test_string_labels_from_every_format_that_has_strings(tmp_path, write):
    rows = load_rows(*write(tmp_path / "data", WORDS))
    assert rows.classes == ("a b", "cat", "été")
    assert rows.target.tolist() == [1, 2, 1, 0, 2]


@pytest.mark.parametrize("write", WRITERS)
def test_distributions_from_every_format(tmp_path, write):
    rows = load_rows(*write(tmp_path / "data", SOFT))
    assert rows.soft
    assert rows.classes == (0, 1, 2)
    np.testing.assert_array_equal(rows.target, SOFT)


@pytest.mark.parametrize("write", WRITERS)
def test_predicting_needs_no_target_and_uses_the_classes_of_the_head(tmp_path, write):
    data, target = write(tmp_path / "data", NUMBERS)
    rows = load_rows_for(data, (40, 99, -3, 7), 3, target)
    np.testing.assert_array_equal(rows.features, FEATURES)
    assert rows.target.tolist() == [3, 2, 3, 0, 2]
    if target is not None:
        source = open_source_for(data, (40, -3, 7), 3)
        assert source.kind is None
        assert sum(len(block) for block in source.blocks(2)) == 5


def test_digits_are_scaled_to_one():
    rows = load_rows("digits")
    assert rows.features.shape == (1797, 64)
    assert (rows.features.min(), rows.features.max()) == (0.0, 1.0)
    assert rows.classes == tuple(range(10))
    np.testing.assert_array_equal(rows.target, load_digits().target)


def test_a_target_file_takes_the_place_of_the_target_in_the_data(tmp_path):
    data, _ = npz(tmp_path / "data", NUMBERS)
    np.save(tmp_path / "soft.npy", SOFT)
    assert load_rows(data, tmp_path / "soft.npy").soft


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([True, False, True, True, False]), (False, True)),
        (np.array([1.0, 0.0, 1.0, -2.0, 0.0]), (-2, 0, 1)),
        (np.array([2**63 + 1, 5, 5, 5, 5], dtype=np.uint64), (5, 2**63 + 1)),
        (np.array([1, 2, 3, 4, 5], dtype=np.uint8), (1, 2, 3, 4, 5)),
    ],
)
def test_labels_of_other_number_types(labels, classes):
    rows = make_rows(FEATURES, labels)
    assert rows.classes == classes
    assert [classes[index] for index in rows.target.tolist()] == labels.tolist()


def test_half_precision_distributions_are_rescaled():
    exact = np.random.default_rng(0).dirichlet(np.ones(7), size=5)
    rows = make_rows(FEATURES, exact.astype(np.float16))
    np.testing.assert_allclose(rows.target.sum(axis=1), 1.0, rtol=0, atol=1e-15)
    np.testing.assert_allclose(rows.target, exact, rtol=2e-3)


def test_split_is_a_division_that_the_seed_alone_decides():
    rows = make_rows(np.arange(20.0)[:, None], np.arange(20) % 3)
    train, held = split(rows, 0.25, seed=3)
    again, _ = split(rows, 0.25, seed=3)
    other, _ = split(rows, 0.25, seed=4)
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train.features[:, 0], *held.features[:, 0]]) == list(range(20))
    assert (train.features == again.features).all()
    assert (train.features != other.features).any()
    assert (train.target == train.features[:, 0] % 3).all()
    assert train.classes == held.classes == (0, 1, 2)


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.5, 2.0, 0.05, 0.95, float("nan"), float("inf")])
def test_split_refuses_an_empty_side(holdout):
    with pytest.raises(DataError, match="must leave rows on both sides"):
        split(make_rows(FEATURES, NUMBERS), holdout, seed=0)


def changed(array, row, column, value):
    copy = array.astype(np.float64)
    copy[row, column] = value
    return copy


@pytest.mark.parametrize(
    ("features", "target", "message"),
    [
        (FEATURES[:, 0], NUMBERS, r"features must have shape \(n, d\); got \(5,\): reshape to \(n, 1\)"),
        (np.zeros((5, 2, 2)), NUMBERS, r"got \(5, 2, 2\): flatten every row"),
        (FEATURES[:0], NUMBERS[:0], r"features is empty, of shape \(0, 3\)"),
        (FEATURES[:, :0], NUMBERS, r"features is empty, of shape \(5, 0\)"),
        (FEATURES.astype(complex), NUMBERS, "features must be real numbers; got dtype complex128"),
        (WORDS[:, None], NUMBERS, "features must be real numbers; got dtype <U3"),
        (
            changed(FEATURES, 2, 1, np.nan),
            NUMBERS,
            "features must be finite; 1 entry .*nan, in row 2, column 1",
        ),
        (
            changed(FEATURES, 4, 0, -np.inf),
            NUMBERS,
            "features must be finite; 1 entry .*-inf, in row 4, column 0",
        ),
        (FEATURES, NUMBERS[:4], "features has 5 rows but target has 4 rows"),
        (FEATURES, SOFT[:3], "features has 5 rows but target has 3 rows"),
        (FEATURES, np.array(3), "target has a single value"),
        (FEATURES, np.full(5, 9), "target has one class only, 9"),
        (FEATURES, np.full(5, "x"), "target has one class only, 'x'"),
        (FEATURES, FEATURES[:, 0], "target is one-dimensional but not whole numbers"),
        (FEATURES, np.array([0, 1, np.nan, 1, 0]), "target is one-dimensional but not whole numbers"),
        (
            FEATURES,
            np.array([1, 2, 3, 4, 5], dtype="M8[D]"),
            r"labels of dtype datetime64\[D\]; they must be",
        ),
        (FEATURES, np.array([b"a", b"b", b"a", b"b", b"a"]), "labels of dtype .S1; they must be"),
        (FEATURES, NUMBERS[:, None], r"distributions of shape \(n, C\) with C of 2 or more; got \(5, 1\)"),
        (FEATURES, SOFT[:, :, None], r"got \(5, 3, 1\)"),
        (FEATURES, WORDS[:, None].repeat(2, axis=1), "target must be probabilities; got dtype <U3"),
        (FEATURES, changed(SOFT, 1, 2, np.nan), "target must be finite; .*in row 1, column 2"),
        (FEATURES, changed(changed(SOFT, 1, 2, -0.5), 1, 1, 1.5), "-0.5, in row 1, column 2: .*exponential"),
        (FEATURES, np.log(SOFT + 0.1), "-0.51.*, in row 0, column 0: .*exponential"),
        (
            FEATURES,
            changed(SOFT, 3, 1, 0.5),
            "sum to 1 in every row; 1 of rows 0 to 4 is wrong, the first, 1.5, in row 3",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(features, target, message):
    with pytest.raises(DataError, match=message):
        make_rows(features, target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            np.array([7, -3, 8, 40, -3]),
            r"labels of the head's 3 classes \(-3, 7, 40\); 1 of rows .* 8, in row 2: leave",
        ),
        (WORDS, "the first, 'cat', in row 0"),
        (
            SOFT[:, :2] / SOFT[:, :2].sum(axis=1, keepdims=True),
            "distributions over 2 classes, the head has 3",
        ),
        (NUMBERS[:2], "has 5 rows but .* has 2 rows"),
    ],
)
def test_targets_foreign_to_the_head_are_refused(tmp_path, target, message):
    data, _ = npz(tmp_path / "data", target)
    with pytest.raises(DataError, match=message):
        load_rows_for(data, (-3, 7, 40), 3)


def test_features_of_another_width_than_the_head_are_refused(tmp_path):
    data, _ = npz(tmp_path / "data", WORDS)
    with pytest.raises(DataError, match=r"array 'features' of .*npz must have 4 columns, .*; got 3"):
        load_rows_for(data, (-3, 7, 40), 4)


def write_text(path):
    path.write_text("not what its suffix says\n")


def write_pickle(path):
    np.savez(path, features=np.array([{"a": 1}], dtype=object), target=np.zeros(1), allow_pickle=True)


def renamed(suffix, write):
    def write_elsewhere(path):
        write(path.with_suffix(suffix))
        path.with_suffix(suffix).rename(path)

    return write_elsewhere


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.npz", lambda path: None, "there is no file .*none.npz"),
        ("folder.npz", lambda path: path.mkdir(), "is not a file"),
        ("empty.npz", lambda path: path.touch(), r"is empty \(0 bytes\)"),
        ("empty.safetensors", lambda path: path.touch(), r"is empty \(0 bytes\)"),
        ("text.npz", write_text, "text.npz cannot be read as an .npz archive"),
        ("text.npy", write_text, "text.npy cannot be read as an .npy array"),
        ("text.safetensors", write_text, "text.safetensors cannot be read as a .safetensors file"),
        ("text.parquet", write_text, "text.parquet cannot be read as a .parquet table"),
        (
            "text.tsv",
            write_text,
            "has suffix '.tsv'; it must be the word digits or a file that ends in .npz, .npy",
        ),
        ("text", write_text, "has no suffix"),
        ("digit", lambda path: None, "digit has no suffix; it must be the word digits"),
        ("objects.npz", write_pickle, "pickled objects, which are never loaded"),
        (
            "names.npz",
            lambda path: np.savez(path, a=FEATURES, b=NUMBERS),
            "no array named features or X; it has 'a', 'b': choose one by --features-key",
        ),
        (
            "both.npz",
            lambda path: np.savez(path, X=FEATURES, features=FEATURES, y=NUMBERS),
            "has both 'features' and 'X'; keep one array",
        ),
        (
            "alone.npz",
            lambda path: np.savez(path, X=FEATURES),
            r"has no targets \(no array named target, y or labels, and no --target-key\)",
        ),
        (
            "alone.npy",
            lambda path: np.save(path, FEATURES),
            r"has no targets \(it is one array\); give them in an .npy file by --target",
        ),
        (
            "alone.safetensors",
            lambda path: save_file({"weight": torch.zeros(2, 2)}, path),
            "no tensor named features or X; it has 'weight'",
        ),
        ("archive.npy", renamed(".npz", lambda path: np.savez(path, X=FEATURES)), "rename it to .npz"),
        ("array.npz", renamed(".npy", lambda path: np.save(path, FEATURES)), "rename it to .npy"),
        ("text.parquet", table(a=[1.0, 2.0], name=["x", "y"], target=[0, 1]), "column 'name' .*holds text"),
        (
            "dates.parquet",
            table(a=pa.array([1, 2], pa.date32()), target=[0, 1]),
            "column 'a' .*holds datetime64",
        ),
        ("lists.parquet", table(a=[[1.0], [2.0]], target=[0, 1]), "column 'a' .*holds lists"),
        ("nulls.parquet", table(a=[1.0, None], target=[0, 1]), "column 'a' .* has 1 null"),
        ("nulls.parquet", table(X=[[1.0], [None]], target=[0, 1]), "the lists in column 'X' .* has 1 null"),
        ("ragged.parquet", table(X=[[1.0], [2.0, 3.0]], target=[0, 1]), "lists of 1 to 2 entries"),
        (
            "alone.parquet",
            table(a=[1.0, 2.0]),
            r"has no targets \(no column named target, y or labels, and no --target-key\)",
        ),
        ("targets.parquet", table(target=[0, 1]), "has no feature columns; its columns are 'target'"),
        (
            "none.parquet",
            table(a=pa.array([], pa.float64()), target=pa.array([], pa.int64())),
            "is empty, of shape",
        ),
        (
            "none.parquet",
            table(X=pa.array([], pa.list_(pa.float64())), y=pa.array([], pa.int64())),
            "is empty",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(DataError, match=message):
        load_rows(str(path))


@pytest.mark.parametrize("write", WRITERS)
def test_a_damaged_file_is_refused_wherever_it_is_cut(tmp_path, write):
    data, _ = write(tmp_path / "data", NUMBERS)
    with open(data, "rb") as file:
        whole = file.read()
    for length in range(1, len(whole), max(1, len(whole) // 40)):
        with open(data, "wb") as file:
            file.write(whole[:length])
        with pytest.raises(DataError, match=r"cannot be read as|has no"):
            load_rows(data)


def test_a_target_file_must_be_an_npy_array(tmp_path):
    data, _ = npz(tmp_path / "data", NUMBERS)
    with pytest.raises(DataError, match=r"target: .*targets.csv must be an .npy file"):
        load_rows(data, tmp_path / "targets.csv")
    with pytest.raises(DataError, match="target: there is no file"):
        load_rows(data, tmp_path / "targets.npy")
