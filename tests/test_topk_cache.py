"""A teacher's lists in files: what is written is read, a few rows at a time, and every damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import softcurve
import softcurve.files
from softcurve import TopK, TopKWriter
from softcurve.files.tensors import digest_of_all

CLASSES = 300


def lists(rows: int = 20, k: int = 3, classes: int = CLASSES, tail: Any = "bucket") -> TopK:
    """Rows with fillers, some of which have an index that no class has."""
    indices = torch.rand(rows, 40).topk(k).indices * (classes // 40)
    log_probs = torch.randn(rows, 40).log_softmax(-1)[:, :k]
    filler = torch.arange(k) >= torch.randint(1, k + 1, (rows, 1))
    return TopK(torch.where(filler, -1, indices), torch.where(filler, -torch.inf, log_probs), tail)


def assert_same(got: TopK, expected: TopK) -> None:
    """The listed classes and their log-probabilities; fillers may have any index."""
    assert torch.equal(got.listed_classes(), expected.listed_classes())
    assert torch.equal(got.log_probs, expected.log_probs)
    assert got.tail == expected.tail


@pytest.mark.parametrize(
    ("classes", "bytes_each"), [(300, 2), (2**16, 2), (2**16 + 1, 3), (2**24, 3), (2**24 + 1, 4), (10**9, 4)]
)
@pytest.mark.parametrize(("dtype", "tail"), [(torch.float16, "bucket"), (torch.float32, "renormalize")])
def test_what_is_written_is_read(classes: int, bytes_each: int, dtype: torch.dtype, tail: Any, tmp_path: Path) -> None:
    made, path = lists(classes=classes, tail=tail), tmp_path / "teacher.safetensors"
    made.indices[0, 0] = classes - 1
    made.save(path, classes=classes, dtype=dtype)
    cache = TopK.load(path)
    assert (cache.classes, cache.tail, cache.dtype, len(cache)) == (classes, tail, dtype, 20)
    assert_same(cache[:], made.to(dtype))
    assert cache[:].indices.dtype == torch.int32
    stored = load_file(path)
    assert stored.pop("checksums").nbytes == 8
    assert sum(t.nbytes for t in stored.values()) == 60 * (bytes_each + dtype.itemsize)
    first = path.read_bytes()
    made.save(path, classes=classes, dtype=dtype)
    assert path.read_bytes() == first
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_an_offline_distillation_is_three_lines_on_each_side(tmp_path: Path) -> None:
    x, w, v = torch.randn(12, 4), torch.randn(50, 4), torch.randn(50, 4)
    with TopKWriter(tmp_path / "cache", classes=50) as writer:
        for batch in x.split(5):
            writer.append(softcurve.linear_topk(batch, w, 8))
    cache = TopK.load(tmp_path / "cache")
    loss = softcurve.linear_kl_divergence(x[4:9], v, cache[4:9], reduction="none")
    assert torch.equal(
        loss, softcurve.linear_kl_divergence(x, v, softcurve.linear_topk(x, w, 8), reduction="none")[4:9]
    )


# --- rows ------------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[], Any]] = {
    "all": lambda: slice(None),
    "one": lambda: 7,
    "last": lambda: -1,
    "slice": lambda: slice(3, 17, 2),
    "none": lambda: slice(5, 5),
    "mask": lambda: torch.arange(20) % 3 == 0,
    "no row of a mask": lambda: torch.zeros(20, dtype=torch.bool),
    "repeated, in any order": lambda: torch.tensor([19, 0, 7, 7, -2, 3]),
    "a list": lambda: [4, 18, 1],
    "an empty list": list,
    "a list of a mask": lambda: [row % 4 == 1 for row in range(20)],
    "a range": lambda: range(2, 11, 3),
    "numbers of numpy": lambda: np.array([3, 19, -20], dtype=np.int16),
    "one of numpy": lambda: np.uint8(6),
    "a mask of numpy": lambda: np.arange(20) > 15,
    "a tensor of one": lambda: torch.tensor(11),
    "unsigned": lambda: torch.tensor([5, 0], dtype=torch.uint16),
    "two dimensions": lambda: torch.tensor([[1, 9], [15, 0]], dtype=torch.int32),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_of_the_list(name: str, tmp_path: Path) -> None:
    """Of shards of 5, 8 and 7 rows, whose lists are of different widths."""
    parts = [lists(5, 2), lists(8, 4), lists(7, 3)]
    with TopKWriter(tmp_path, classes=CLASSES, shard_rows=5) as writer:
        for part in parts:
            writer.append(part)
    assert len(list(tmp_path.iterdir())) == 3
    index, whole = ROWS[name](), TopK.cat(parts)
    as_torch = index.long() if isinstance(index, Tensor) and index.dtype == torch.uint16 else index
    got, expected = TopK.load(tmp_path)[index], whole[int(as_torch) if np.isscalar(as_torch) else as_torch]
    k = got.indices.shape[-1]
    assert (expected.log_probs[..., k:] == -torch.inf).all()
    assert_same(got, expected if k == 4 else TopK(expected.indices[..., :k], expected.log_probs[..., :k]))


def test_only_the_rows_asked_for_are_read(run_python: Callable[[str], Any], tmp_path: Path) -> None:
    """A hundred rows of a file of 64 MB take less than an eighth of it."""
    run_python(f"""
import pathlib, torch, softcurve
from softcurve.losses.topk_shards import write_shard
path = pathlib.Path({str(tmp_path / "large.safetensors")!r})
write_shard(path, torch.zeros(2**20, 16, dtype=torch.int16), torch.zeros(2**20, 16).half() - 3, tail="bucket", classes=9)
softcurve.TopK(torch.zeros(1, 1).int(), torch.zeros(1, 1)).save(path.with_name("small"), classes=2)
softcurve.TopK.load(path.with_name("small"))[:]
pathlib.Path("/proc/self/clear_refs").write_text("5")
def field(name): return int(pathlib.Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024
before = field("VmRSS")
cache = softcurve.TopK.load(path)
rows = cache[700_000:700_100]
assert len(rows) == 100
assert field("VmHWM") - before < 8, field("VmHWM") - before
""")


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [(20, IndexError, "0 … 19, got 20"), ([3, -21], IndexError, "0 … 19"), ((1, 2), IndexError, r"cache\[rows\]"),
     (1.5, TypeError, "integer"), ([True, False], TypeError, "integer"), (-21, IndexError, "0 … 19, got -21"),
     (True, TypeError, r"mask of its 20 rows, got shape \(\), torch.bool"), (None, TypeError, "integer.* got NoneType"),
     ("rows", TypeError, "got str"), (torch.ones(20, 1, dtype=torch.bool), TypeError, r"got shape \(20, 1\)"),
     (torch.ones(20, dtype=torch.uint8), TypeError, "uint8; convert numbers with .long"),
     (torch.tensor([0.0]), TypeError, "float32"), (..., TypeError, "got ellipsis"),
     (slice(None, None, -1), ValueError, "in steps >= 1"), (slice(0.5), TypeError, "integer"),
     (np.array([2, 25]), IndexError, "0 … 19, got 25")],
)  # fmt: skip
def test_wrong_rows(index: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    lists().save(tmp_path / "a", classes=CLASSES)
    with pytest.raises(error, match=words):
        TopK.load(tmp_path / "a")[index]


# --- the writer ------------------------------------------------------------------------------------------------------


def test_a_stopped_teacher_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was appended before an error is there; a shard is whole or absent, and its rows are counted."""
    made = lists(30)

    def stopped() -> None:
        with TopKWriter(tmp_path, classes=CLASSES, shard_rows=8) as writer:
            for part in (made[:7], made[7:11], made[11:14]):
                writer.append(part)
            assert [each.name for each in tmp_path.iterdir()] == ["topk-000000.safetensors"]
            assert len(writer) == 14
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with TopKWriter(tmp_path, classes=CLASSES) as writer:
        assert len(writer) == 14
        writer.append(made[len(writer) :])
        writer.append(made[:0])
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"topk-00000{i}.safetensors" for i in range(3)]
    assert_same(TopK.load(tmp_path)[:], made)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "a", lists()
    made.save(path, classes=CLASSES)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*(os, "fsync", full) if step == "fsync" else (Path, "replace", full))
        with pytest.raises(ValueError, match=r"cannot be written \(No space left.*; free some space"):
            lists(9).save(path, classes=CLASSES)
        writer = TopKWriter(tmp_path / "many", classes=CLASSES)
        writer.append(made)
        with pytest.raises(ValueError, match=r"topk-000000\.safetensors cannot be written"):
            writer.flush()
    assert path.read_bytes() == before
    assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")) == ["a", "many"]


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a class that does not exist": (lambda p: lists().save(p, classes=10), "TopK indices must hold classes in 0 … 9"),
    "a class twice": (lambda p: TopK(torch.zeros(1, 2).int(), torch.zeros(1, 2) - 1).save(p, classes=9), "distinct"),
    "no classes": (lambda p: lists().save(p, classes=0), "classes must be a whole number >= 1"),
    "classes beyond int32": (
        lambda p: lists().save(p, classes=2**31),
        "classes must be at most 2147483647.*got 2147483648",
    ),
    "a writer of classes beyond int32": (lambda p: TopKWriter(p, classes=2**40), "classes must be at most 2147483647"),
    "more entries than classes": (
        lambda p: TopK(torch.arange(3)[None], torch.full((1, 3), -2.0)).save(p, classes=2),
        "k <= 2 besides fillers",
    ),
    "one row": (lambda p: lists()[0].save(p, classes=CLASSES), "single row"),
    "a folder that is not there": (lambda p: lists().save(p / "b" / "c", classes=CLASSES), "cannot be written"),
    "a directory inside none": (lambda p: TopKWriter(p / "b" / "c", classes=CLASSES), "cannot be written"),
    "no list": (lambda p: TopKWriter(p, classes=9).append(torch.zeros(3)), "lists"),  # type: ignore[arg-type]
    "a row of a writer": (lambda p: TopKWriter(p, classes=9).append(lists()[0]), r"topk\[None\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_written(name: str, tmp_path: Path) -> None:
    function, words = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=words):
        function(tmp_path / "new")
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_a_writer_takes_lists_that_are_alike(tmp_path: Path) -> None:
    with TopKWriter(tmp_path, classes=CLASSES) as writer:
        writer.append(lists())
        for other in (lists(tail="renormalize"), lists(6)[torch.arange(6).view(3, 2)]):
            with pytest.raises(ValueError, match="lists must have the tail 'bucket' and rows of shape"):
                writer.append(other)
    for options in ({"classes": 9}, {"classes": CLASSES, "dtype": torch.float16}):
        with pytest.raises(ValueError, match=r"classes and dtype must be 300 and torch\.float32"):
            TopKWriter(tmp_path, **options)  # type: ignore[arg-type]


# --- damage ----------------------------------------------------------------------------------------------------------


def three_shards(folder: Path, **options: Any) -> None:
    with TopKWriter(folder, classes=CLASSES, shard_rows=1, **options) as writer:
        for rows in (4, 5, 6):
            writer.append(lists(rows))


def replaced(folder: Path, **options: Any) -> None:
    """Put the second shard of another cache in the place of the second shard."""
    with TopKWriter(folder / "other", **({"classes": CLASSES, "shard_rows": 1} | options)) as writer:
        for rows in (4, 7):
            writer.append(lists(rows))
    shutil.move(folder / "other" / "topk-000001.safetensors", folder / "topk-000001.safetensors")
    shutil.rmtree(folder / "other")


def foreign(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str) -> None:
    """Write a file that another program made, with a digest that agrees with the rest."""
    known = {
        "format": "softcurve.topk", "format_version": "1", "tail": "bucket", "classes": "300", "first_row": "4",
        "block_rows": "500",
    }  # fmt: skip
    content = load_file(path) | (tensors or {})
    stated = known | metadata
    digest = digest_of_all({"checksums": content["checksums"]}, stated)
    save_file(content, path, metadata={"digest": digest} | stated)


SECOND = "topk-000001.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda p: os.truncate(p / SECOND, 150), f"{SECOND} cannot be read as a file of top-k lists.*write it again"),
    "cut off in its header": (lambda p: os.truncate(p / SECOND, 20), f"{SECOND} cannot be read"),
    "empty": (lambda p: os.truncate(p / SECOND, 0), f"{SECOND} is empty"),
    "noise": (lambda p: (p / SECOND).write_bytes(b"noise" * 99), f"{SECOND} cannot be read"),
    "missing": (lambda p: (p / SECOND).unlink(), f"{SECOND} is missing, and topk-000002.safetensors is there; restore"),
    "a folder": (lambda p: [(p / SECOND).unlink(), (p / SECOND).mkdir()], f"{SECOND} is not a file"),
    "another program's": (
        lambda p: save_file({"weight": torch.zeros(3)}, p / SECOND), f"{SECOND} is no file of top-k lists.*TopKWriter",
    ),
    "of a later format": (lambda p: foreign(p / SECOND, format_version="9"), f"{SECOND} is no file of top-k.*'9'"),
    "other tensors": (lambda p: foreign(p / SECOND, {"more": torch.zeros(3)}), f"{SECOND}.*'indices' and 'log_probs', and"),
    "another digest": (lambda p: foreign(p / SECOND, digest="0"), f"{SECOND}.*do not agree with the digest"),
    "no block": (lambda p: foreign(p / SECOND, block_rows="0"), f"{SECOND}.*'block_rows' must be a whole number.*'0'"),
    "other dtypes": (
        lambda p: foreign(p / SECOND, {"indices": torch.zeros(2, 3), "log_probs": torch.zeros(2, 3)}),
        f"{SECOND}.*uint16.*float32",
    ),
    "no tail": (lambda p: foreign(p / SECOND, tail="?"), f"{SECOND}.*'tail' must be 'bucket' or 'renormalize'"),
    "no classes": (lambda p: foreign(p / SECOND, classes="many"), f"{SECOND}.*'classes' must be a whole number.*'many'"),
    "of other classes": (lambda p: replaced(p, classes=400), f"{SECOND} belongs to another cache.*classes must be 300, got 400"),
    "of another dtype": (lambda p: replaced(p, dtype=torch.float16), f"{SECOND} belongs to another cache.*float32"),
    "of other rows before": (
        lambda p: foreign(p / SECOND, first_row="9"), f"{SECOND} belongs to another cache.*first row must be 4, got 9",
    ),
    "of other rows": (replaced, "topk-000002.safetensors belongs to another cache.*first row must be 11, got 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    three_shards(tmp_path)
    assert len(TopK.load(tmp_path)) == 15
    damage, words = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(softcurve.files.DataError, match=words):
        TopK.load(tmp_path)


def test_a_flipped_bit_is_named_wherever_it_is(tmp_path: Path) -> None:
    """In every byte of a small file: its header, its checksums, its entries; also where the entry stays a valid one."""
    file = tmp_path / "teacher.safetensors"
    made = TopK(torch.tensor([[4, 2], [7, 1]]), torch.tensor([[-0.5, -1.5], [-0.25, -2.0]]))
    made.save(file, classes=9)
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    padding = range(len(whole[:size].rstrip(b" ")), size)
    for at in (at for at in range(len(whole)) if at not in padding):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(softcurve.files.DataError, match=r"teacher\.safetensors"):
            TopK.load(file)[:]


def test_damaged_rows_are_named_when_they_are_read(tmp_path: Path) -> None:
    """Blocks of 8 KiB have their own checksums, so that the rows of others are read."""
    file, made = tmp_path / "teacher.safetensors", lists(3000)
    made.save(file, classes=CLASSES)
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = 8 + size + json.loads(content[8 : 8 + size])["log_probs"]["data_offsets"][0]
    content[start + 1000 * 12] ^= 1  # the last bit of the first entry of row 1000
    file.write_bytes(content)
    cache = TopK.load(file)
    words = r"teacher.safetensors is damaged: its rows 910 to 1364 do not agree with the checksum"
    for rows in (1000, [0, 910], slice(None), torch.tensor([1364])):
        with pytest.raises(softcurve.files.DataError, match=words):
            cache[rows]
    for rows in ([0, 909], slice(1365, None)):
        assert_same(cache[rows], made[rows])


def test_shards_without_the_first_are_not_overwritten(tmp_path: Path) -> None:
    three_shards(tmp_path)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    first = min(before)
    (tmp_path / first).unlink()
    with pytest.raises(softcurve.files.DataError, match=first):
        softcurve.TopKWriter(tmp_path, classes=9)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {
        name: content for name, content in before.items() if name != first
    }


def test_a_file_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    """It is named, and not read beyond its new end."""
    three_shards(tmp_path)
    cache = TopK.load(tmp_path)
    os.truncate(tmp_path / SECOND, 100)
    assert len(cache[:4]) == 4
    with pytest.raises(ValueError, match=f"{SECOND} has changed since it was opened"):
        cache[3:6]
    for path, words in (
        (tmp_path / "nowhere", "there is no file"),
        (tmp_path.parent, r"has no topk-000000.safetensors.*flush\(\)"),
    ):
        with pytest.raises(ValueError, match=words):
            TopK.load(path)


def test_without_safetensors_the_error_names_the_extra(run_python: Callable[[str], Any], tmp_path: Path) -> None:
    run_python(f"""
import sys, torch; sys.modules["safetensors"] = None
import softcurve
topk = softcurve.TopK(torch.zeros(1, 1).int(), torch.zeros(1, 1))
for call in (lambda: topk.save({str(tmp_path / "a")!r}, classes=2), lambda: softcurve.TopK.load("a"),
             lambda: softcurve.TopKWriter({str(tmp_path / "b")!r}, classes=2)):
    try:
        call()
    except ImportError as error:
        assert "extra 'fit'" in str(error), error
    else:
        raise AssertionError
""")
