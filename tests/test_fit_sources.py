"""Rows that are walked block by block: what every format gives, what is refused, and how little is in memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from safetensors.torch import save_file

from softcurve.fit import DataError
from softcurve.fit.data.dataset import ArrayRows, SparseRows, places
from softcurve.fit.data.files.arrays import FileRows
from softcurve.fit.data.opening import open_source, open_source_for
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import Source
from softcurve.fit.data.subset import Subset, split_source
from softcurve.losses.topk import TopK

ROWS, WIDTH, CLASSES, K = 37, 5, 4, 3
RNG = np.random.default_rng(0)
FEATURES = RNG.integers(-64, 64, size=(ROWS, WIDTH)) / 8.0  # exact in bfloat16
LABELS = RNG.integers(0, CLASSES, size=ROWS)
NAMES = np.array(["été", "b", "c d", "a"])[LABELS]
SOFT = RNG.dirichlet(np.ones(CLASSES), size=ROWS)
INDICES = np.array([RNG.permutation(CLASSES)[:K] for _ in range(ROWS)])
LOG_PROBS = np.log(np.take_along_axis(SOFT, INDICES, axis=1))
TARGETS = {
    "labels": {"target": LABELS},
    "distributions": {"target": SOFT},
    "top_k": {"indices": INDICES, "log_probs": LOG_PROBS},
}
SIZES = [1, 7, 37]


def whole(source, at_most=1000):
    """All rows of a source, put together from copies of its blocks, which must be as they are promised."""
    features, targets, start = [], [], 0
    for block in source.blocks(at_most):
        assert block.start == start
        assert 0 < len(block) <= at_most
        assert block.features.dtype == (torch.float64 if source.double else torch.float32)
        features.append(block.features.clone())
        if isinstance(block.target, TopK):
            targets.append((block.target.indices.clone(), block.target.log_probs.clone()))
        elif block.target is not None:
            targets.append((block.target.clone(),))
        start += len(block)
    assert start == source.rows
    return torch.cat(features).numpy(), *(torch.cat(column).numpy() for column in zip(*targets, strict=True))


def check(source, kind, at_most, width=WIDTH):
    """The rows are those of the module's arrays."""
    assert isinstance(source, Source)
    assert (source.rows, source.width, source.kind) == (ROWS, width, kind)
    features, *target = whole(source, at_most)
    np.testing.assert_array_equal(features, FEATURES)
    if kind == "labels":
        assert source.classes in ((0, 1, 2, 3), ("a", "b", "c d", "été"))
        given = LABELS if isinstance(source.classes[0], int) else NAMES
        assert [source.classes[index] for index in target[0]] == given.tolist()
    elif kind == "distributions":
        np.testing.assert_allclose(target[0], SOFT, rtol=1e-6 if target[0].dtype == np.float32 else 1e-15)
    elif kind == "top_k":
        assert source.classes == (0, 1, 2, 3)
        np.testing.assert_array_equal(target[0], INDICES)
        np.testing.assert_array_equal(target[1], LOG_PROBS)


def npz(path, arrays):
    np.savez_compressed(path, **arrays)


def npy(path, arrays):
    np.save(path, arrays["features"])


def safetensors(path, arrays):
    save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, path)


def parquet(path, arrays):
    columns = {name: array.tolist() if array.ndim == 2 else array for name, array in arrays.items()}
    pq.write_table(pa.table(columns), path, row_group_size=11)


def parquet_columns(path, arrays):
    columns = {name: array.tolist() if array.ndim == 2 else array for name, array in arrays.items()}
    columns |= {f"x{number}": column for number, column in enumerate(arrays["features"].T)}
    del columns["features"]
    pq.write_table(pa.table(columns), path, row_group_size=11)


WRITERS = {npz: "npz", safetensors: "safetensors", parquet: "parquet", parquet_columns: "parquet"}


@pytest.mark.parametrize("at_most", SIZES)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("write", WRITERS)
def test_every_format_with_every_target(tmp_path, write, kind, at_most):
    path = tmp_path / f"data.{WRITERS[write]}"
    write(path, {"features": FEATURES} | TARGETS[kind])
    source = open_source(str(path))
    check(source, kind, at_most)
    check(source, kind, at_most)  # as often as wanted
    assert source.in_memory == (write is npz)
    assert source.double


@pytest.mark.parametrize("at_most", SIZES)
@pytest.mark.parametrize("kind", ["labels", "distributions"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_with_a_target_file(tmp_path, kind, at_most, order):
    np.save(tmp_path / "x.npy", np.asarray(FEATURES, order=order))
    np.save(tmp_path / "y.npy", np.asarray(TARGETS[kind]["target"], order=order))
    check(open_source(str(tmp_path / "x.npy"), tmp_path / "y.npy"), kind, at_most)


@pytest.mark.parametrize("at_most", [4, 1000])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("write", WRITERS)
def test_a_directory_of_shards_is_its_files_by_natural_order(tmp_path, write, kind, at_most):
    arrays = {"features": FEATURES} | TARGETS[kind]
    # the tenth shard comes after the second, and shards are of any length
    for number, (start, stop) in {1: (0, 10), 2: (10, 11), 10: (11, 30), 11: (30, ROWS)}.items():
        write(
            tmp_path / f"shard-{number}.{WRITERS[write]}", {name: array[start:stop] for name, array in arrays.items()}
        )
    (tmp_path / "README.md").touch()
    (tmp_path / f".hidden.{WRITERS[write]}").touch()
    source = open_source(str(tmp_path))
    check(source, kind, at_most)
    assert not source.in_memory


@pytest.mark.parametrize("kind", ["labels", "distributions"])
def test_shards_with_one_target_file_for_all_among_them(tmp_path, kind):
    for number, rows in enumerate(np.array_split(FEATURES, 3)):
        np.save(tmp_path / f"x{number}.npy", rows)
    np.save(tmp_path / "target.npy", TARGETS[kind]["target"])
    check(open_source(str(tmp_path), tmp_path / "target.npy"), kind, 5)
    np.save(tmp_path / "target.npy", TARGETS[kind]["target"][1:])
    with pytest.raises(
        DataError, match=r"with its 3 shards has 37 rows but target .* has 36 rows; give one target a row"
    ):
        open_source(str(tmp_path), tmp_path / "target.npy")


@pytest.mark.parametrize("write", WRITERS)
def test_a_share_without_rows_reads_nothing(tmp_path, write):
    path = tmp_path / f"data.{WRITERS[write]}"
    write(path, {"features": FEATURES, "target": LABELS})
    source = open_source(str(path))
    path.unlink()
    assert list(source.data.features.read([5])) == []


def test_string_labels_over_shards(tmp_path):
    for number, half in enumerate(np.array_split(np.arange(ROWS), 2)):
        np.savez(tmp_path / f"{number}.npz", X=FEATURES[half], y=NAMES[half])
        parquet(tmp_path / f"{number}.parquet", {"features": FEATURES[half], "target": NAMES[half]})
    with pytest.raises(DataError, match=r"has shards in several formats, \.npz, \.parquet; keep one"):
        open_source(str(tmp_path))
    for suffix in ("npz", "parquet"):
        (tmp_path / suffix).mkdir()
        for number in range(2):
            (tmp_path / f"{number}.{suffix}").rename(tmp_path / suffix / f"{number}.{suffix}")
        # A directory may have a suffix that is no format.
        (tmp_path / suffix).rename(tmp_path / f"{suffix}.d")
        check(open_source(str(tmp_path / f"{suffix}.d")), "labels", 8)


def csr(array):
    return scipy.sparse.csr_matrix(array)


@pytest.mark.parametrize("at_most", SIZES)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", [np.asarray, np.asfortranarray, torch.from_numpy, csr, scipy.sparse.coo_array])
def test_arrays_in_memory(form, kind, at_most):
    target = TARGETS[kind].get("target")
    if kind == "top_k":
        target = TopK(torch.from_numpy(INDICES), torch.from_numpy(LOG_PROBS))
    source = to_source(form(FEATURES), target)
    check(source, kind, at_most)
    assert source.in_memory
    check(to_source(form(FEATURES), torch.from_numpy(SOFT)), "distributions", at_most)


def test_arrays_are_shared_where_they_can_be_and_left_as_they_are():
    features, soft = FEATURES.astype(np.float32), SOFT.astype(np.float32)
    source = to_source(features, soft)
    (block,) = source.blocks(ROWS)
    assert block.features.data_ptr() == features.ctypes.data
    np.testing.assert_array_equal(soft, SOFT.astype(np.float32))
    features.flags.writeable = False
    np.testing.assert_array_equal(whole(to_source(features, LABELS), 3)[0], features)


@pytest.mark.parametrize(
    ("dtype", "double"),
    [("f2", False), ("f4", False), ("f8", True), ("i1", False), ("u2", False), ("i4", True), ("u8", True), ("?", False), (">f4", False), (">f8", True), (">i8", True)],
)  # fmt: skip
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_other_types(tmp_path, dtype, double, order):
    features = np.asarray(np.abs(FEATURES).astype(dtype), order=order)
    np.save(tmp_path / "x.npy", features)
    for source in (open_source_for(str(tmp_path / "x.npy"), (0, 1), WIDTH), to_source(features)):
        assert source.double == double
        np.testing.assert_array_equal(whole(source, 8)[0], features.astype("f8"))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.bool]
)
def test_tensors_of_other_types(tmp_path, dtype):
    tensor = torch.from_numpy(FEATURES).to(dtype)
    save_file({"X": tensor, "y": torch.from_numpy(LABELS).short()}, tmp_path / "x.safetensors")
    for source in (open_source(str(tmp_path / "x.safetensors")), to_source(tensor, LABELS)):
        assert not source.double
        np.testing.assert_array_equal(whole(source, 8)[0], tensor.float().numpy())


def test_distributions_in_half_precision_sum_to_one_in_float64(tmp_path):
    save_file({"X": torch.from_numpy(FEATURES), "y": torch.from_numpy(SOFT).half()}, tmp_path / "x.safetensors")
    _, target = whole(open_source(str(tmp_path / "x.safetensors")), 8)
    np.testing.assert_allclose(target.sum(axis=1), 1.0, rtol=0, atol=1e-15)
    np.testing.assert_allclose(target, SOFT, rtol=2e-3)


def test_mixed_shards_come_in_the_wider_type(tmp_path):
    np.savez(tmp_path / "1.npz", X=FEATURES[:20].astype("f4"), y=LABELS[:20])
    np.savez(tmp_path / "2.npz", X=FEATURES[20:], y=LABELS[20:])
    source = open_source(str(tmp_path))
    assert source.double
    check(source, "labels", 6)


@pytest.mark.parametrize(
    ("view", "column"),
    [
        (lambda mapped: mapped, FileRows),
        (lambda mapped: mapped[3:-1], FileRows),
        (lambda mapped: np.asarray(mapped)[5:], FileRows),
        (lambda mapped: mapped.T, FileRows),
        (lambda mapped: mapped[::3], FileRows),
        (lambda mapped: mapped[:, 1:3], FileRows),
        (lambda mapped: mapped + 0, ArrayRows),
    ],
)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_memory_maps_are_read_from_their_file(tmp_path, view, column, mode):
    np.save(tmp_path / "x.npy", FEATURES)
    mapped = view(np.load(tmp_path / "x.npy", mmap_mode=mode))
    source = to_source(mapped)
    assert type(source.data.features) is column
    np.testing.assert_array_equal(whole(source, 4)[0], np.array(mapped))


def test_a_private_map_is_read_as_it_was_changed(tmp_path):
    np.save(tmp_path / "x.npy", FEATURES)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    mapped[3] = 99.0
    np.testing.assert_array_equal(whole(to_source(mapped), 4)[0], np.array(mapped))


def test_sparse_rows_are_not_made_dense_at_once():
    wide = scipy.sparse.random_array((100, 10**9), density=1e-9, format="csr", rng=0)
    assert isinstance(to_source(scipy.sparse.csr_array(FEATURES)).data.features, SparseRows)
    assert SparseRows(wide, "wide").shape == (100, 10**9)


def test_the_number_of_classes_of_lists(tmp_path):
    npz(
        tmp_path / "x.npz",
        {"features": FEATURES, "indices": np.where(INDICES == 3, 9, INDICES), "log_probs": LOG_PROBS},
    )
    assert open_source(str(tmp_path / "x.npz")).classes == tuple(range(10))
    assert open_source(str(tmp_path / "x.npz"), class_count=12).classes == tuple(range(12))
    with pytest.raises(
        DataError,
        match=r"array 'indices' of .*x.npz must be classes from 0 to 6; .* the first, 9, in row \d+, column \d:",
    ):
        open_source(str(tmp_path / "x.npz"), class_count=7)
    npz(tmp_path / "labels.npz", {"features": FEATURES, "target": LABELS})
    with pytest.raises(DataError, match="these targets are labels: leave it out"):
        open_source(str(tmp_path / "labels.npz"), class_count=7)
    npz(tmp_path / "soft.npz", {"features": FEATURES, "target": SOFT})
    with pytest.raises(DataError, match="distributions over 4 classes, class_count is 7"):
        open_source(str(tmp_path / "soft.npz"), class_count=7)


# --- for a head --------------------------------------------------------------------------------------------------


def test_targets_in_terms_of_the_classes_of_a_head(tmp_path):
    safetensors(tmp_path / "x.safetensors", {"features": FEATURES, "target": LABELS})
    source = open_source_for(str(tmp_path / "x.safetensors"), (9, 3, 2, 1, 0), WIDTH)
    assert source.classes == (9, 3, 2, 1, 0)
    assert whole(source, 7)[1].tolist() == (4 - LABELS).tolist()
    with pytest.raises(
        DataError, match=f"of the head's 3 classes .* the first, 3, in row {int((LABELS == 3).argmax())}:"
    ):
        open_source_for(str(tmp_path / "x.safetensors"), (0, 1, 2), WIDTH)
    with pytest.raises(DataError, match=r"x.safetensors must have 6 columns, .* fitted to; got 5"):
        open_source_for(str(tmp_path / "x.safetensors"), (0, 1, 2), 6)
    parquet(tmp_path / "soft.parquet", {"features": FEATURES, "target": SOFT})
    with pytest.raises(DataError, match="distributions over 4 classes, the head has 3"):
        open_source_for(str(tmp_path / "soft.parquet"), (0, 1, 2), WIDTH)
    parquet(tmp_path / "lists.parquet", {"features": FEATURES} | TARGETS["top_k"])
    assert open_source_for(str(tmp_path / "lists.parquet"), (*"abcde",), WIDTH).classes == (*"abcde",)
    source = open_source_for(str(tmp_path / "lists.parquet"), (*"abc",), WIDTH)
    with pytest.raises(DataError, match=r"'indices' of .*lists.parquet must be classes from 0 to 2"):
        whole(source)
    np.save(tmp_path / "x.npy", FEATURES)
    source = open_source_for(str(tmp_path / "x.npy"), (0, 1), WIDTH)
    assert (source.kind, source.classes) == (None, ())
    (features,) = whole(source, 6)
    np.testing.assert_array_equal(features, FEATURES)


# --- what is damaged ---------------------------------------------------------------------------------------------


def changed(array, row, column, value):
    copy = array.astype(np.float64)
    copy[row, column] = value
    return copy


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": changed(FEATURES, 30, 2, np.nan), "target": LABELS}, r"b\..* must be finite; 1 entry .* nan, in row 30, column 2"),
        ({"features": changed(FEATURES, 9, 0, np.inf), "target": LABELS}, "must be finite; 1 entry .* inf, in row 9, column 0"),
        ({"features": FEATURES, "target": changed(SOFT, 20, 1, 0.9 + SOFT[20, 1])}, r"'target' of .*b\..* the first, 1.9, in row 20"),
        ({"features": FEATURES, "target": changed(SOFT, 21, 1, -0.5)}, "'target' of .* -0.5, in row 21, column 1"),
        ({"features": FEATURES, "target": changed(SOFT, 22, 3, np.nan)}, "'target' of .* nan, in row 22, column 3"),
        ({"features": FEATURES, "indices": INDICES - 5, "log_probs": LOG_PROBS}, r"'indices' of .* must be classes from 0 to"),
        ({"features": FEATURES, "indices": INDICES * 0, "log_probs": LOG_PROBS}, r"'indices' of .* distinct classes in each row; .* in row 0:"),
        ({"features": FEATURES, "indices": INDICES, "log_probs": changed(LOG_PROBS, 13, 0, 0.7)}, r"'log_probs' of .* mass of at most 1 a row; .* in row 13:"),
        ({"features": FEATURES, "indices": INDICES, "log_probs": changed(LOG_PROBS, 13, 0, np.nan)}, "'log_probs' of .* nan, in row 13"),
        ({"features": FEATURES, "indices": INDICES + 0.5, "log_probs": LOG_PROBS}, "'indices' of .* must be numbers of classes; got dtype float64"),
        ({"features": FEATURES, "indices": INDICES, "log_probs": INDICES.copy()}, "'log_probs' of .* must be log-probabilities; got dtype int64"),
        ({"features": FEATURES, "indices": INDICES[:, :2], "log_probs": LOG_PROBS}, r"one shape \(n, k\); got \(37, 2\) and \(37, 3\)"),
        ({"features": FEATURES, "indices": INDICES, "log_probs": LOG_PROBS, "target": LABELS}, "both 'target' and indices and log_probs; keep one"),
        ({"features": FEATURES, "indices": INDICES, "other": LOG_PROBS}, "has no targets|holds lists"),
    ],
)  # fmt: skip
def test_wrong_entries_are_named_by_file_and_row(tmp_path, write, arrays, message):
    path = tmp_path / f"b.{WRITERS[write]}"
    write(path, arrays)
    with pytest.raises(DataError, match=message):
        whole(open_source(str(path)), 8)
    kind = "top_k" if "indices" in arrays else "labels" if arrays["target"] is LABELS else "distributions"
    if "other" not in arrays:
        write(tmp_path / f"a.{WRITERS[write]}", {"features": FEATURES} | TARGETS[kind])
        with pytest.raises(DataError, match=message):
            whole(open_source(str(tmp_path)), 8)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"features": FEATURES[:, :4], "target": LABELS},
            r"2\..* has 4 features with labels, and .*1\..* has 5 features with labels; all shards",
        ),
        ({"features": FEATURES, "target": SOFT}, r"2\..* with distributions over 4 classes, and .*1\..* with labels"),
        ({"features": FEATURES} | TARGETS["top_k"], r"2\..* with a teacher's lists of 3, and .*1\..* with labels"),
        (
            {"features": FEATURES},
            r"2\..* with no targets \(no .* named target, y or labels, and no --target-key\), and .*1\..* with labels",
        ),
        ({"features": FEATURES, "target": LABELS[:-1]}, r"2\..* has 37 rows but .* has 36 rows"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_a_shard_that_does_not_go_with_the_first_is_named(tmp_path, write, second, message):
    if write in (parquet, parquet_columns) and len({len(array) for array in second.values()}) > 1:
        pytest.skip("a table has one length")
    write(tmp_path / f"1.{WRITERS[write]}", {"features": FEATURES, "target": LABELS})
    write(tmp_path / f"2.{WRITERS[write]}", second)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


def test_shards_with_other_classes_or_labels_are_named(tmp_path):
    np.savez(tmp_path / "1.npz", X=FEATURES, y=SOFT)
    np.savez(tmp_path / "2.npz", X=FEATURES, y=SOFT[:, :3])
    with pytest.raises(
        DataError, match=r"2\.npz .* with distributions over 3 classes, and .*1\.npz .* over 4 classes; all shards"
    ):
        open_source(str(tmp_path))
    np.savez(tmp_path / "1.npz", X=FEATURES, y=LABELS)
    np.savez(tmp_path / "2.npz", X=FEATURES, y=NAMES)
    with pytest.raises(DataError, match=r"2\.npz has text for labels, and .*1\.npz has numbers"):
        open_source(str(tmp_path))


def test_an_empty_directory_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"the directory .* has no files that end in \.npz, \.npy"):
        open_source(str(tmp_path))


def opened(path, folder):
    np.save(folder.parent / "target.npy", np.tile(LABELS, len(list(folder.iterdir()))))
    return open_source(str(path), folder.parent / "target.npy")


@pytest.mark.parametrize("write", [npz, npy, safetensors, parquet])
def test_a_shard_that_is_cut_short_is_named_at_opening(tmp_path, write):
    folder = tmp_path / "shards"
    folder.mkdir()
    suffix = WRITERS.get(write, "npy")
    for number in (1, 2):
        write(folder / f"{number}.{suffix}", {"features": FEATURES, "target": LABELS})
    content = (folder / f"2.{suffix}").read_bytes()
    for length in (0, 5, 60, len(content) // 2, len(content) - 1):
        (folder / f"2.{suffix}").write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"shards/2\.{suffix} (cannot be read as|is empty)"):
            opened(folder, folder)


def test_a_header_that_lies_is_refused(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "1.npy", FEATURES)
    content = (folder / "1.npy").read_bytes()
    (folder / "2.npy").write_bytes(content.replace(b"(37, 5)", b"(36, 5)"))
    with pytest.raises(
        DataError, match=r"2\.npy cannot .*: its header says \(36, 5\) of float64, which are 1440 bytes, and 1480 "
    ):
        opened(folder, folder)
    (folder / "2.npy").write_bytes(content.replace(b"<f8", b"|O8"))
    with pytest.raises(DataError, match=r"2\.npy .* pickled objects, which are never loaded"):
        opened(folder, folder)
    (folder / "2.npy").write_bytes(content[:6] + b"\x03\x00" + content[8:])
    with pytest.raises(DataError, match=r"2\.npy cannot be read as .*: EOF: reading array header, expected \d+ bytes"):
        opened(folder, folder)


def test_a_parquet_row_group_that_is_damaged_is_named_while_reading(tmp_path):
    parquet(tmp_path / "x.parquet", {"features": FEATURES, "target": SOFT})
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    place = len(content) // 4
    content[place : place + 200] = b"\xff" * 200
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet|lists in column"):
        whole(open_source(str(tmp_path / "x.parquet")))


def test_lists_that_change_length_within_a_file_are_named(tmp_path):
    table = pa.table({"X": [*FEATURES.tolist()[:30], [1.0, 2.0]], "y": LABELS[:31]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    source = open_source(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match=r"column 'X' of .*x\.parquet has lists of 2 to 5 entries"):
        whole(source, 4)


@pytest.mark.parametrize("write", [npz, npy, safetensors, parquet])
def test_a_file_that_changes_between_walks_is_named(tmp_path, write):
    folder = tmp_path / "shards"
    folder.mkdir()
    path = folder / f"1.{WRITERS.get(write, 'npy')}"
    other = folder / f"2.{WRITERS.get(write, 'npy')}"
    write(path, {"features": FEATURES, "target": LABELS})
    shutil.copy(path, other)
    source = opened(folder, folder)
    whole(source)
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(DataError, match=r"1\..* has changed since it was opened \(200 bytes, \d+ before\)"):
        whole(source)
    path.unlink()
    with pytest.raises(DataError, match=r"there is no file .*1\.\w+; check the path"):
        whole(source)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    np.save(tmp_path / "x.npy", FEATURES)
    source, threads = open_source_for(str(tmp_path / "x.npy"), (0, 1), WIDTH), threading.active_count()
    walk = source.walk(10)
    next(walk)
    os.truncate(tmp_path / "x.npy", 600)
    with pytest.raises(DataError, match=r"x\.npy has changed since it was opened \(600 bytes, 1608 before\)"):
        list(walk)
    assert threading.active_count() == threads


def test_blocks_of_no_rows_are_refused():
    with pytest.raises(DataError, match="at_most must be 1 row or more; got 0"):
        to_source(FEATURES).blocks(0)


# --- subsets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_most", SIZES)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_subset_is_the_rows_of_its_mask(tmp_path, kind, at_most):
    safetensors(tmp_path / "x.safetensors", {"features": FEATURES} | TARGETS[kind])
    source = open_source(str(tmp_path / "x.safetensors"))
    mask = np.random.default_rng(1).random(ROWS) < 0.3
    mask[4:12] = True  # a whole block
    subset = Subset(source, mask)
    for found, all_rows in zip(whole(subset, at_most), whole(source), strict=True):
        np.testing.assert_array_equal(found, all_rows[mask])
    assert isinstance(subset, Source)
    assert (subset.rows, subset.classes, subset.kind) == (mask.sum(), source.classes, kind)
    numbers = [block.number(row) for block in subset.blocks(at_most) for row in range(len(block))]
    assert numbers == np.flatnonzero(mask).tolist()
    inner = Subset(subset, np.arange(subset.rows) % 3 == 0)
    numbers = [block.number(row) for block in inner.blocks(at_most) for row in range(len(block))]
    assert numbers == np.flatnonzero(mask)[::3].tolist()
    assert subset.fingerprint not in (source.fingerprint, Subset(source, ~mask).fingerprint)


def test_a_split_divides_the_rows_by_the_seed():
    source = to_source(np.arange(20.0)[:, None], np.arange(20) % 3)
    train, held = split_source(source, 0.25, seed=3)
    assert (train.rows, held.rows) == (15, 5)
    assert sorted([*whole(train)[0][:, 0], *whole(held)[0][:, 0]]) == list(range(20))
    assert set(whole(held)[0][:, 0]) == set(np.random.default_rng(3).permutation(20)[:5])
    for holdout in (0.0, 1.0, -0.5, 0.02, float("nan")):
        with pytest.raises(DataError, match="must leave rows on both sides"):
            split_source(source, holdout, seed=0)
    with pytest.raises(DataError, match="mask must have an entry for each of the 20 rows; got 3"):
        Subset(source, np.ones(3, dtype=bool))


# --- fingerprints ------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_rows_and_not_the_path(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    seen = set()
    for write, suffix in WRITERS.items():
        for folder in folders:
            folder.mkdir(exist_ok=True)
            features = FEATURES if folder.name != "c" else changed(FEATURES, 18, 2, 1000.0)
            write(folder / f"x.{suffix}", {"features": features, "target": LABELS})
        a, b, c = (open_source(str(folder / f"x.{suffix}")).fingerprint for folder in folders)
        assert a == b != c
        seen |= {a, c}
    seen.clear()  # those of arrays may be those of an archive of the same
    for target in (
        LABELS,
        SOFT,
        NAMES,
        np.roll(LABELS, 1),
        TopK(torch.from_numpy(INDICES), torch.from_numpy(LOG_PROBS)),
    ):
        first, again = to_source(FEATURES, target).fingerprint, to_source(FEATURES.copy(), target).fingerprint
        assert first == again
        assert first not in seen
        seen.add(first)


def mapped(path, rows):
    np.save(path, rows)
    return np.load(path, mmap_mode="r")


def in_a_file(write):
    def held(path, rows):
        file = path.with_suffix(f".{WRITERS[write]}")
        write(file, {"features": rows})
        return open_source_for(str(file), (0, 1), rows.shape[1])

    return held


HOLDERS = {
    "array": lambda path, rows: to_source(rows),
    "Fortran order": lambda path, rows: to_source(np.asfortranarray(rows)),
    "sparse": lambda path, rows: to_source(scipy.sparse.csr_matrix(rows)),
    "map": lambda path, rows: to_source(mapped(path.with_suffix(".npy"), rows)),
    "columns of a map": lambda path, rows: to_source(mapped(path.with_suffix(".npy"), rows)[:, ::3]),
    **{write.__name__: in_a_file(write) for write in WRITERS},
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_fingerprint_changes_with_every_entry(tmp_path, holder):
    rows = np.random.default_rng(0).normal(size=(700, 30 if holder == "parquet_columns" else 300))
    altered = [None, (5, 0), (349, 12), (694, 27)]
    seen = {
        HOLDERS[holder](tmp_path / str(number), rows if place is None else changed(rows, *place, 7.0)).fingerprint
        for number, place in enumerate(altered)
    }
    assert len(seen) == len(altered)
    assert HOLDERS[holder](tmp_path / "again", rows.copy()).fingerprint in seen


@pytest.mark.parametrize(
    ("length", "most", "piece"), [(0, 9, 4), (9, 9, 4), (100, 100, 7), (101, 100, 7), (10**6, 50, 80)]
)
def test_a_digest_is_of_all_or_of_a_bounded_part_with_both_ends(length, most, piece):
    covered = [place for start, count in places(length, most, piece) for place in range(start, start + count)]
    if length <= most:
        assert covered == list(range(length))
    else:
        assert most / 2 < len(covered) <= most
        assert max(np.diff(sorted(set(covered)))) <= 2 * length / (most / piece)
        assert covered[0] == 0
        assert covered[-1] == length - 1


# --- memory ------------------------------------------------------------------------------------------------------

WALK = """
import json, numpy as np, torch
from bench.measure import extra_peak_of
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.opening import open_source, open_source_for
from softcurve.fit.data.subset import split_source
torch.set_num_threads(1)

def walk(source):
    total = 0.0
    for block in source.blocks(6000):
        total += float(block.features[:, 0].double().sum())
    assert total == source.rows, total

def measure(source):
    print(json.dumps(extra_peak_of(lambda: walk(source))))

measure(open_source_for(PATH, (0, 1), 500))
measure(to_source(np.load(PATH, mmap_mode="r")))
measure(to_source(np.load(PATH, mmap_mode="r")[:, :400]))
measure(to_source(np.memmap(PATH, np.float32, "r", 128, (200_000, 500), "F")))
measure(split_source(to_source(np.load(PATH, mmap_mode="r"), np.arange(200_000) % 7), 0.2, 0)[0])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """400 MB of ones, without writing them twice."""
    path = tmp_path_factory.mktemp("large") / "ones.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (200_000, 500))
    rows[:] = 1.0
    rows.flush()
    del rows
    yield path
    path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_a_file_of_400_mb_takes_two_blocks_of_memory(large, run_python):
    done = run_python(f"PATH = {str(large)!r}{WALK}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    assert max(found) < 80
