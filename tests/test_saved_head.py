"""A head written and read again; damage found and named; nothing half-written."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from softcurve.files.atomic import check_writable, replacing
from softcurve.fit import DataError
from softcurve.fit.saved_head import SavedHead

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype=torch.float64)
BIAS = torch.tensor([0.125, -0.125], dtype=torch.float64)
METADATA = {
    "format": "softcurve.head",
    "format_version": "1",
    "classes": '["a", "b"]',
    "loss": "cross_entropy",
    "C": "1.0",
}


@pytest.mark.parametrize("classes", [("été", 'quote " and , comma'), (-5, 2**63 + 1), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_head_comes_back_as_it_was(tmp_path, classes, dtype):
    path = tmp_path / "head.safetensors"
    SavedHead(WEIGHT.to(dtype), BIAS.to(dtype), classes, "reverse_kl", 0.1).save(path)
    head = SavedHead.load(path)
    assert head.weight.dtype == dtype
    assert torch.equal(head.weight, WEIGHT.to(dtype))
    assert torch.equal(head.bias, BIAS.to(dtype))
    assert (head.classes, head.loss, head.C) == (classes, "reverse_kl", 0.1)
    assert [type(label) for label in head.classes] == [type(label) for label in classes]
    assert os.listdir(tmp_path) == ["head.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert json.loads(file.metadata()["classes"]) == list(classes)


def test_a_view_is_saved_whole(tmp_path):
    wide = torch.arange(12.0).view(3, 4)
    SavedHead(wide.T[:2], wide[0, :2], (0, 1), "cross_entropy", 1.0).save(tmp_path / "head.safetensors")
    assert torch.equal(SavedHead.load(tmp_path / "head.safetensors").weight, wide.T[:2])


def test_equal_heads_are_equal_bytes(tmp_path):
    for name in ("a", "b", "c", "d"):
        SavedHead(WEIGHT, BIAS, ("ä", 7), "js", 0.1).save(tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c", "d")}) == 1
    assert SavedHead.load(tmp_path / "d").classes == ("ä", 7)
    assert (tmp_path / "a").read_bytes()[8:].startswith(b'{"__metadata__":{"C":"0.1","classes":')


def test_to_linear_is_the_head_as_a_trainable_copy():
    state = torch.get_rng_state()
    linear = SavedHead(WEIGHT, BIAS, ("a", "b"), "cross_entropy", 1.0).to_linear()
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, WEIGHT, BIAS))
    assert (linear.in_features, linear.out_features) == (3, 2)
    before = WEIGHT.clone()
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(WEIGHT, before)
    assert linear.weight.requires_grad


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": WEIGHT}, {}, r"must hold the tensors 'bias' and 'weight', and holds \['weight'\]"),
        ({"weight": WEIGHT, "bias": BIAS, "more": BIAS}, {}, r"and holds \['bias', 'more', 'weight'\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(3)}, {}, r"they have \(2, 3\) and \(3,\)"),
        ({"weight": WEIGHT[:1], "bias": BIAS[:1]}, {}, r"C of 2 or more; they have \(1, 3\) and \(1,\)"),
        ({"weight": WEIGHT[:, :0], "bias": BIAS}, {}, r"they have \(2, 0\) and \(2,\)"),
        ({"weight": WEIGHT * torch.inf, "bias": BIAS}, {}, "'weight' has entries that are not finite"),
        ({"weight": WEIGHT, "bias": BIAS * torch.nan}, {}, "'bias' has entries that are not finite"),
        ({"weight": WEIGHT.int(), "bias": BIAS.int()}, {}, "both tensors must be float32 or float64"),
        ({"weight": WEIGHT, "bias": BIAS.float()}, {}, "'bias' is torch.float32"),
        ({}, {"format": "else"}, "must say format 'softcurve.head', .*and says 'else', '1'"),
        ({}, {"format_version": "2"}, "and says 'softcurve.head', '2'"),
        ({}, {"classes": '["a"'}, "'classes' must be a JSON list of labels"),
        ({}, {"classes": '{"a": 1, "b": 2}'}, "'classes' must be a JSON list of labels"),
        ({}, {"classes": '["a", null]'}, "'classes' must be a JSON list of labels"),
        ({}, {"classes": '["a", "b", "c"]'}, "must name 2 classes, and names 3"),
        ({}, {"classes": '["a", "a"]'}, "must name 2 classes, and names 1"),
        (
            {},
            {"loss": "hinge"},
            "'loss' must be one of cross_entropy, forward_kl, reverse_kl, js, and is 'hinge'",
        ),
        ({}, {"C": "much"}, "'C' must be a positive number, and is 'much'"),
        ({}, {"C": "-1"}, "'C' must be a positive number"),
    ],
)
def test_damage_is_named(tmp_path, tensors, metadata, message):
    path = tmp_path / "head.safetensors"
    contents = {name: tensor.clone() for name, tensor in (tensors or {"weight": WEIGHT, "bias": BIAS}).items()}
    save_file(contents, path, METADATA | metadata)
    with pytest.raises(DataError, match=message):
        SavedHead.load(path)


def test_a_file_without_metadata_is_no_head(tmp_path):
    save_file({"weight": WEIGHT, "bias": BIAS}, tmp_path / "head.safetensors")
    with pytest.raises(DataError, match=r"must say format 'softcurve.head'"):
        SavedHead.load(tmp_path / "head.safetensors")


def test_a_flipped_bit_is_named_wherever_it_is(tmp_path):
    """Of the digest's name alone it is not: then the file is one of the first version, with the same content."""
    path = tmp_path / "head.safetensors"
    SavedHead(WEIGHT, BIAS, ("a", "b"), "cross_entropy", 1.0).save(path)
    whole = path.read_bytes()
    size, name = 8 + int.from_bytes(whole[:8], "little"), whole.index(b'"digest"') + 1
    skipped = {*range(name, name + 6), *range(len(whole[:size].rstrip(b" ")), size)}
    for at in (at for at in range(len(whole)) if at not in skipped):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"head\.safetensors"):
            SavedHead.load(path)


def test_a_head_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "head.safetensors"
    SavedHead(WEIGHT, BIAS, ("a", "b"), "cross_entropy", 1.0).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is no safetensors file|is empty"):
            SavedHead.load(path)


def test_a_missing_head_is_named(tmp_path):
    with pytest.raises(DataError, match=r"head: there is no file .*head.safetensors"):
        SavedHead.load(tmp_path / "head.safetensors")


def test_what_stood_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail_midway():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_midway()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_is_followed_and_permissions_are_those_of_any_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    check_writable(tmp_path / "link", "--out")
    with replacing(tmp_path / "link") as file:
        file.write(b"whole")
    (tmp_path / "plain").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"whole"
    assert (tmp_path / "there" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_found_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--out: .* is a folder"):
        check_writable(tmp_path, "--out")
    with pytest.raises(DataError, match="--out: there is no folder"):
        check_writable(tmp_path / "none" / "head", "--out")
    with pytest.raises(DataError, match="--out: there is no folder"):
        check_writable(tmp_path / "file" / "head", "--out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"--out: .* is not a regular file"):
        check_writable(tmp_path / "pipe", "--out")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "head", "--out")
