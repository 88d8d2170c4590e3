"""What the system or a file refuses: one line that names path, argument and remedy, exit code 2, old outputs as before."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from numpy.lib import format as npy_format
from safetensors.torch import save_file
from typer.testing import CliRunner

from softcurve.cli.interrupt import remember_interrupts, stop_if_interrupted
from softcurve.cli.main import app
from softcurve.files.atomic import replacing_all
from softcurve.fit import DataError
from softcurve.fit.data.opening import open_source
from softcurve.fit.outputs import check_outputs
from softcurve.fit.saved_head import SavedHead

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(60, 5)).astype(np.float32)
LABELS = np.arange(60) % 3
OUTPUTS = ("o.safetensors", "o.json", "o.html")
FIT = ("--out", "o.safetensors", "--overwrite")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Rows, a head, and older files in the places of all outputs."""
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", features=FEATURES, target=LABELS)
    np.save("f.npy", FEATURES)
    np.save("y.npy", LABELS)
    SavedHead(torch.ones(3, 5), torch.zeros(3), (0, 1, 2), "cross_entropy", 1.0).save("h.safetensors")
    for name in (*OUTPUTS, "p.npz", "p.csv", "p.npy", "p.parquet", "s.png", "s.svg"):
        Path(name).write_text("old")
    return tmp_path


@pytest.fixture
def without_pages(monkeypatch):
    """For fits whose report nobody reads."""
    monkeypatch.setattr("softcurve.cli.report.render_report", lambda report: "<!DOCTYPE html>")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def kept():
    """Names, permissions and content of all files here; of a large one, which is sparse, its size."""
    files = [path for path in sorted(Path().rglob("*")) if os.path.isfile(path)]
    return {
        path: (path.stat().st_mode, path.read_bytes() if path.stat().st_size < 2**20 else path.stat().st_size)
        for path in files
    }


def refused(*arguments):
    """The single line of a run that must be refused, and leave every file as it was."""
    before = kept()
    done = run(*arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert kept() == before
    return done.stderr


# --- files that are not what they should be ----------------------------------------------------------------------


def archive(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape):
    buffer = io.BytesIO()
    npy_format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def sparse_file(path, shape):
    Path(path).write_bytes(header(shape))
    os.truncate(path, os.path.getsize(path) + int(np.prod(shape, dtype=object)) * 4)


def loop(path):
    os.symlink(path, f"other-{path}")
    os.symlink(f"other-{path}", path)


def lists_with(index):
    np.savez(
        "x.npz", features=FEATURES, indices=np.stack([LABELS, np.full(60, index)], 1), log_probs=np.full((60, 2), -2.0)
    )


def shards_with_a_dangling_link():
    Path("shards").mkdir()
    os.symlink("../d.npz", "shards/1.npz")
    os.symlink("nowhere.npz", "shards/2.npz")


BY_TARGET = ("--target", "y.npy")
FAULTS = {
    "members of text": (lambda: archive("x.npz", features="hello there", target="x"), ["fit", "x.npz"], "no array"),
    "a member of text beside an array": (
        lambda: archive("x.npz", features=npy(FEATURES), target="hello there"),
        ["predict", "h.safetensors", "x.npz"],
        r"x\.npz cannot .* member 'target\.npy' is no array",
    ),
    "a member of objects": (
        lambda: archive("x.npz", features=npy(np.array([{}] * 60)), target=npy(LABELS)),
        ["spectrum", "h.safetensors", "x.npz"],
        "pickled objects, which are never loaded",
    ),
    "a member that claims more than it has": (
        lambda: archive("x.npz", features=header((10**12, 5)) + FEATURES.tobytes(), target=npy(LABELS)),
        ["fit", "x.npz"],
        r"member 'features\.npy' says \(1000000000000, 5\) of float32, .* and has 1200",
    ),
    "a negative shape": (
        lambda: Path("x.npy").write_bytes(header((-60, -5)) + FEATURES.tobytes()),
        ["fit", "x.npy", *BY_TARGET],
        r"x\.npy cannot be read as an \.npy array .*: negative dimensions",
    ),
    "more rows than memory": (
        lambda: (sparse_file("x.npy", (10**11, 5)), sparse_file("t.npy", (10**11,))),
        ["fit", "x.npy", "--target", "t.npy"],
        r"x\.npy has 100000000000 rows; .* GiB of memory: correct its shape",
    ),
    "more features than memory": (
        lambda: sparse_file("x.npy", (60, 10**10)),
        ["fit", "x.npy", *BY_TARGET],
        r"with 10000000000 features .* GiB of memory: correct",
    ),
    "an index of two billion": (lambda: lists_with(2**31), ["fit", "x.npz"], "makes 2147483649 classes; .*correct the"),
    "the largest index": (lambda: lists_with(2**63 - 1), ["fit", "x.npz"], "makes 9223372036854775808 classes"),
    "a class count of 25 digits": (
        lambda: lists_with(5),
        ["fit", "x.npz", "--class-count", "9" * 25],
        "--class-count makes 9+ classes; .*give fewer classes",
    ),
    "a loop of links": (lambda: loop("x.npz"), ["fit", "x.npz"], r"data: x\.npz .*\(Too many levels .*: mend them"),
    "a loop for a target": (lambda: loop("x.npy"), ["fit", "f.npy", "--target", "x.npy"], r"target: x\.npy .* levels"),
    "a loop for a head": (
        lambda: loop("x.safetensors"),
        ["predict", "x.safetensors", "d.npz"],
        r"head: x\.safetensors cannot be read \(Too many",
    ),
    "a loop for an output": (
        lambda: loop("x.json"),
        ["fit", "d.npz", "--record", "x.json"],
        r"--record: x\.json cannot be written \(Too many levels .*mend them",
    ),
    "a shard that is not there": (shards_with_a_dangling_link, ["fit", "shards"], r"no file shards/2\.npz"),
    "a name that is too long": (lambda: None, ["fit", "x" * 300 + ".npz"], r"data: x+\.npz .*too long\); give a short"),
    "an output whose name is too long": (
        lambda: None,
        ["fit", "d.npz", "--report", "x" * 300 + ".html"],
        r"--report: x+\.html cannot be written \(.*too long\)",
    ),
    "a pipe for a head": (
        lambda: os.mkfifo("x.safetensors"),
        ["spectrum", "x.safetensors", "d.npz"],
        r"head: x\.safetensors is not a file",
    ),
    "a device for an output": (
        lambda: os.symlink("/dev/full", "x.csv"),
        ["predict", "h.safetensors", "d.npz", "--out", "x.csv"],
        r"--out: x\.csv is not a regular file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used_is_one_line(fault):
    make, arguments, message = FAULTS[fault]
    make()
    output = () if arguments[0] != "fit" else FIT
    assert re.search(message, refused(*arguments, *output))


def test_labels_that_are_too_many_classes_are_refused(monkeypatch):
    monkeypatch.setattr("softcurve.fit.data.row_source.available_memory", lambda: 900)
    assert "makes 3 classes; with 5 features a fit to them takes" in refused("fit", "d.npz", *FIT)


@pytest.mark.parametrize("write", ["npz", "safetensors", "parquet"])
def test_a_target_may_be_called_labels(write):
    with_labels = {"features": FEATURES, "labels": LABELS}
    if write == "npz":
        np.savez("x.npz", **with_labels)
    elif write == "safetensors":
        save_file({name: torch.tensor(array) for name, array in with_labels.items()}, "x.safetensors")
    else:
        columns = {f"x{number}": column for number, column in enumerate(FEATURES.T)}
        pq.write_table(pa.table(columns | {"labels": LABELS}), "x.parquet")
    source = open_source(f"x.{write}")
    assert (source.width, source.kind, source.classes) == (5, "labels", (0, 1, 2))


def test_a_link_to_a_shard_elsewhere_is_a_shard():
    Path("shards").mkdir()
    for number in (1, 2):
        os.symlink("../d.npz", f"shards/{number}.npz")
    assert open_source("shards").rows == 120


# --- parquet checksums -------------------------------------------------------------------------------------------


def flipped(path, value):
    """Change a bit of the stored ``value``; everything else is as it was, and the table can be decoded."""
    content = bytearray(Path(path).read_bytes())
    content[content.index(np.float64(value).tobytes())] ^= 1
    Path(path).write_bytes(content)


def test_a_page_whose_checksum_is_wrong_is_refused():
    features = FEATURES.astype(np.float64)
    table = pa.table({"features": features.tolist(), "target": LABELS})
    pq.write_table(table, "x.parquet", write_page_checksum=True, compression="none", use_dictionary=False)
    flipped("x.parquet", features[7, 2])
    assert pq.read_table("x.parquet")["features"][7].as_py() != features[7].tolist()  # nobody else finds it
    assert "data: x.parquet cannot be read as a .parquet table: " in refused("fit", "x.parquet", *FIT)


def test_predictions_have_checksums():
    assert run("predict", "h.safetensors", "d.npz", "--out", "p.parquet", "--overwrite").exit_code == 0
    flipped("p.parquet", 1 / 3)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile("p.parquet", page_checksum_verification=True).read()


# --- outputs -----------------------------------------------------------------------------------------------------


def fail_at(monkeypatch, step, number):
    """The ``number``-th file beside an output is on a full disk: a write, the flush to the disk, or a rename fails."""
    calls = iter(range(100))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_open, real_sync, real_replace = os.open, os.fsync, Path.replace

    def opened(name, flags, mode=0o777, **options):
        found = real_open(name, flags, mode, **options)
        if os.fsdecode(name).endswith(".part") and next(calls) == number:
            os.close(found)
            return real_open("/dev/full", os.O_WRONLY)
        return found

    def synced(file):
        if next(calls) == number:
            raise full
        real_sync(file)

    def replaced(path, target):
        if path.suffix == ".part" and next(calls) == number:
            raise full
        return real_replace(path, target)

    target, name, stand_in = {
        "write": (os, "open", opened), "flush": (os, "fsync", synced), "rename": (Path, "replace", replaced)
    }[step]  # fmt: skip
    monkeypatch.setattr(target, name, stand_in)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("step", ["write", "flush", "rename"])
def test_either_all_outputs_are_replaced_or_none(monkeypatch, step, number):
    os.remove("o.json")  # one that is new, between two that are old
    before = kept()
    outputs = dict(zip(("--out", "--record", "--report"), map(Path, OUTPUTS), strict=True))
    option, path = list(outputs.items())[number]
    fail_at(monkeypatch, step, number)

    def write():
        with replacing_all(outputs) as files:
            for file in files.values():
                file.write(b"new" * 10000)

    with pytest.raises(DataError, match=rf"^{option}: {path} cannot be written \(No space .*\); free some space"):
        write()
    assert kept() == before


COMMANDS = {
    "--record: o.json": ["fit", "d.npz", *FIT],
    "--out: p.npz": ["predict", "h.safetensors", "d.npz", "--out", "p.npz", "--overwrite"],
    "--out: p.csv": ["predict", "h.safetensors", "d.npz", "--out", "p.csv", "--overwrite"],
    "--out: p.npy": ["predict", "h.safetensors", "d.npz", "--out", "p.npy", "--overwrite"],
    "--out: p.parquet": ["predict", "h.safetensors", "d.npz", "--out", "p.parquet", "--overwrite"],
    "--out: s.png": [
        "spectrum",
        "h.safetensors",
        "d.npz",
        "--probes",
        "1",
        "--steps",
        "4",
        "--out",
        "s.png",
        "--overwrite",
    ],
}


@pytest.mark.parametrize("named", COMMANDS)
def test_a_full_disk_names_option_path_and_remedy(monkeypatch, named):
    fail_at(monkeypatch, "write", 3 + 1 if named.startswith("--record") else 1)  # after the trials of each place
    assert refused(*COMMANDS[named]) == (
        f"softcurve: {named} cannot be written (No space left on device); free some space there, or give a path on "
        "another disk\n"
    )


@pytest.mark.usefixtures("without_pages")
def test_existing_permissions_are_kept():
    os.chmod("o.safetensors", 0o640)
    os.chmod("o.json", 0o600)
    os.remove("o.html")
    assert run("fit", "d.npz", *FIT).exit_code == 0
    Path("plain").touch()
    modes = [Path(name).stat().st_mode & 0o777 for name in (*OUTPUTS, "plain")]
    assert modes == [0o640, 0o600, modes[3], modes[3]]


@pytest.mark.parametrize(
    ("link", "name", "arguments", "message"),
    [
        (os.symlink, "o.safetensors", ["fit", "d.npz", *FIT, "--record", "x.json"], "--record: x.json is also an out"),
        (os.link, "o.html", ["fit", "d.npz", *FIT, "--record", "x.json"], "--report: o.html is also an output"),
        (os.link, "o.html", ["fit", "d.npz", *FIT, "--checkpoint", "x.json"], "--checkpoint: x.json is also an output"),
        (os.symlink, "not-yet.json", ["fit", "d.npz", "--out", "not-yet.safetensors", "--report", "x.html"], "--report"),
        (os.link, "d.npz", ["fit", "d.npz", *FIT, "--record", "x.json"], "--record: x.json is also an input (DATA)"),
        (os.symlink, "y.npy", ["fit", "d.npz", *BY_TARGET, *FIT, "--report", "x.html"], "also an input (--target)"),
        (os.link, "d.npz", ["predict", "h.safetensors", "d.npz", "--out", "x.npz"], "--out: x.npz is also an input"),
        (os.link, "shards/1.npz", ["predict", "h.safetensors", "shards", "--out", "x.npz"], "one of the shards"),
        (os.symlink, "d.npz", ["predict", "h.safetensors", "shards", "--out", "x.npz"], "one of the shards"),
        (os.link, "h.safetensors", ["spectrum", "h.safetensors", "d.npz", "--out", "x.png"], "also an input (MODEL)"),
        (os.symlink, "m.py", ["spectrum", "m.py:made", "--out", "x.png"], "--out: x.png is also an input (MODEL)"),
    ],
)  # fmt: skip
def test_one_file_under_two_names_is_refused(link, name, arguments, message):
    Path("m.py").touch()
    Path("shards").mkdir()
    os.symlink("../d.npz", "shards/0.npz")
    np.savez("shards/1.npz", features=FEATURES, target=LABELS)
    link(name, next(argument for argument in arguments if argument.startswith("x.")))
    assert message in refused(*arguments)


def test_an_output_through_another_folder_is_the_same_file(folder):
    os.symlink(folder, "alias")
    with pytest.raises(DataError, match=r"--record: alias/new\.json is also an output \(--out\)"):
        check_outputs({"--out": Path("new.json"), "--record": Path("alias/new.json")}, {})


# --- names and labels that are not UTF-8 -------------------------------------------------------------------------


def test_names_that_are_not_utf8_lose_nothing():
    save_file({"features": torch.tensor(FEATURES), "target": torch.tensor(LABELS)}, "d.safetensors")
    pq.write_table(pa.table({"features": FEATURES.tolist(), "target": LABELS}), "d.parquet")
    out, data = os.fsdecode(b"o\xff.safetensors"), os.fsdecode(b"d\xff.")
    for suffix in ("npz", "safetensors", "parquet"):
        os.rename(f"d.{suffix}", data + suffix)
        features = next(open_source(data + suffix).blocks(60)).features
        np.testing.assert_array_equal(features, FEATURES)
    done = run("fit", data + "npz", "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["data"], record["head"]) == (data + "npz", out)
    assert json.loads(Path(record["record"]).read_text("ascii"))["data"] == data + "npz"
    assert r"d\udcff.npz" in Path(record["report"]).read_text("utf-8").replace("&#92;", "\\")
    assert run("predict", out, data + "parquet", "--out", os.fsdecode(b"p\xff.csv")).exit_code == 0


def test_labels_with_lone_surrogates_lose_nothing():
    names = np.array(["a", "b\udcff", "\ud800"])
    np.savez("words.npz", features=FEATURES, target=names[LABELS])
    assert run("fit", "words.npz", *FIT).exit_code == 0
    assert r"b\udcff" in Path("o.html").read_text("utf-8").replace("&#92;", "\\")
    for suffix in ("npz", "csv", "npy", "parquet"):
        done = run("predict", "o.safetensors", "words.npz", "--out", f"p.{suffix}", "--overwrite")
        assert done.exit_code == 0, done.output
    with np.load("p.npz") as written:
        assert sorted(written["classes"].tolist()) == sorted(names.tolist())
        labels = [label.encode("utf-8", "backslashreplace").decode() for label in written["label"].tolist()]
    assert pq.read_table("p.parquet")["label"].to_pylist() == labels


# --- streams, memory, interrupts ---------------------------------------------------------------------------------


MODEL = """
import torch

def make():
    data = [(torch.randn(6, 3), torch.arange(6) % 3)]
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()), torch.nn.Linear(2, 3), data
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands share one import of torch by forking")
def test_as_processes_of_their_own():
    """Also with streams that are closed or full: the exit code is that of the work, and 2 where its output is lost."""
    np.savez("words.npz", features=FEATURES, target=np.array(["één", "[red]two", "three"])[LABELS])
    Path("model.py").write_text(MODEL)
    no_file = "softcurve: data: there is no file none.npz; check the path\n"
    lost = "softcurve: standard output cannot be written "
    out, full = "stdout.{}", "/dev/full"
    predict = ["predict", "h.safetensors", "d.npz"]
    cases = [
        (["fit", "words.npz", "--out", "words.safetensors"], out, 0, ""),
        (["predict", "words.safetensors", "words.npz"], out, 0, ""),
        (["spectrum", "model.py:make", "--probes", "1", "--out", "s.png", "--overwrite"], out, 0, ""),
        (["fit", "none.npz"], out, 2, no_file),
        (["fit", "none.npz"], out, 2, None),
        (["fit", "none.npz"], out, 2, full),
        (predict, None, 2, f"{lost}(Bad "),
        (predict, full, 2, f"{lost}(No"),
        (["--help"], full, 2, f"{lost}(No space left on dev"),
    ]
    commands = [
        (arguments, stdout and stdout.format(number), f"stderr.{number}" if message not in (None, full) else message)
        for number, (arguments, stdout, _, message) in enumerate(cases)
    ]
    warnings = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]  # of fork itself, if there are threads
    script = [sys.executable, *warnings, str(ROOT / "tests" / "forked_cli.py"), json.dumps(commands)]
    # The names of the classes have letters that the encoding of the streams lacks.
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=True, env=environment)
    assert [int(code) for code in done.stdout.split()] == [code for _, _, code, _ in cases], done.stderr
    assert done.stderr == ""
    for number, (arguments, stdout, code, message) in enumerate(cases):
        if stdout == out and code == 0:
            record = json.loads(Path(f"stdout.{number}").read_text("ascii"))
            assert record["command"] == arguments[0]
            assert record.get("converged", True)
        elif stdout == out:
            assert Path(f"stdout.{number}").read_text() == ""
        if message not in (None, full):
            said = Path(f"stderr.{number}").read_text()
            assert said.startswith(message), arguments
            assert said.count("\n") == bool(message), (arguments, said)
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("allocate", [lambda: np.empty(2**58), lambda: torch.empty(2**58), lambda: bytearray(2**60)])
@pytest.mark.parametrize(
    ("place", "arguments", "remedy"),
    [
        ("fitting.fit_head", ["fit", "d.npz", *FIT], "give a smaller --memory, fewer samples"),
        (
            "predicting._predict",
            ["predict", "h.safetensors", "d.npz", "--out", "p.npz", "--overwrite"],
            "store DATA as .npy",
        ),
        (
            "spectrum._compute",
            ["spectrum", "h.safetensors", "d.npz", "--out", "s.png", "--overwrite"],
            "a smaller --batch-size",
        ),
    ],
)
def test_memory_that_runs_out(monkeypatch, place, arguments, remedy, allocate):
    monkeypatch.setattr(f"softcurve.cli.{place}", lambda *_, **__: allocate())
    message = refused(*arguments)
    assert re.match(rf"softcurve: {arguments[0]} \S+: out of memory", message)
    assert remedy in message


@pytest.fixture
def remembered():
    before = signal.getsignal(signal.SIGINT)
    remember_interrupts()
    yield
    remember_interrupts()
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("remembered")
def test_an_interrupt_that_python_forgets_is_remembered(monkeypatch):
    forgotten = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: forgotten.append(ignored.exc_type))

    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    stop_if_interrupted()
    Held()  # which raises in its destructor, and goes on
    assert forgotten == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt) as raised:
        stop_if_interrupted()
    assert raised.value.args == (signal.SIGINT,)


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("named", ["--record: o.json", "--out: s.png"])
@pytest.mark.parametrize("becomes", [None, ImportError])
def test_an_interrupt_while_a_figure_is_drawn(monkeypatch, named, becomes):
    """It may get lost in a callback, or end an import: the exit code is 130 all the same."""
    real = Figure.savefig

    def interrupted(self, *arguments, **options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes("initialization failed") from None
        real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", interrupted)
    before = kept()
    done = run(*COMMANDS[named])
    assert done.exit_code == 130, done.output
    assert kept() == before
