"""The text that every Python carries, and a byte-level BPE of it.

The documents are the topics of ``help()`` and what the standard library's modules say of themselves: docstrings, then
comments, a document a module. Modules are parsed, never imported. One document in twelve, by a hash of its name, is for
validation; the BPE sees none of those.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|end|>"
SHORTEST = 200  # characters that make a document
COMMENT = re.compile(rb"^[ \t]*# ?(\S.*)$", re.MULTILINE)  # a line of its own
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo"} | {
    "pydoc_data",  # the topics themselves
    "encodings",  # tables
    "site-packages",
    "dist-packages",
}

Windows = Int[Tensor, "windows context"]


@dataclass(frozen=True)
class Text:
    """Windows of ``context`` tokens, to train on and to validate; ``lengths`` are the bytes of each kind of token."""

    train: Windows
    validation: Windows
    lengths: Float[Tensor, " vocab"]
    documents: int
    bytes_per_token: float

    def log_frequencies(self) -> Float[Tensor, " vocab"]:
        """Of each token in the training windows, one occurrence added to all."""
        counts = torch.bincount(self.train.flatten(), minlength=len(self.lengths)) + 1.0
        return (counts / counts.sum()).log()

    def bytes_predicted(self, windows: Windows) -> float:
        """Bytes of the tokens that have a predecessor in their window; a document's end has none."""
        return self.lengths[windows[:, 1:]].sum().item()


def documents() -> dict[str, str]:
    """The text of each document, in the order of their names."""
    found = {f"help({name!r})": text for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not LEFT_OUT.intersection(name.parts):
            source = path.read_bytes()
            text = "\n\n".join((*docstrings(source), b"\n".join(COMMENT.findall(source)).decode(errors="replace")))
            if len(text) >= SHORTEST:
                found[name.as_posix()] = text
    return dict(sorted(found.items()))


def docstrings(source: bytes) -> Iterator[str]:
    """Of the module, its classes and its functions, from the first to the last; none of what does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library's own escapes, which are not ours to mend
            yield from _docstrings(ast.parse(source))
    except (SyntaxError, ValueError):
        return


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield text
    for statements in ("body", "handlers", "orelse", "finalbody"):
        inner = getattr(node, statements, ())
        for statement in inner if isinstance(inner, list) else ():  # a lambda's body is one expression
            yield from _docstrings(statement)


def for_validation(name: str) -> bool:
    """One document in twelve, the same whatever the seed and the Python."""
    return hashlib.sha256(name.encode()).digest()[0] % 12 == 0


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-pair encoding on bytes: 256 of them, the end of a document, and the merges that are most frequent."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(
            f"--vocab must be at least 257 and at most what this Python's texts give, {tokenizer.get_vocab_size()} "
            f"tokens; got {vocab}"
        )
    return tokenizer


def load(vocab: int, context: int) -> Text:
    """Documents, tokenizer, windows: the same for every seed."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for name, text in documents().items():
        parts[for_validation(name)].append(text)
    tokenizer = train_tokenizer(parts[False], vocab)
    train, validation = (windows(tokenizer, parts[held_out], context) for held_out in (False, True))
    # A byte-level token is written with one character for each of its bytes.
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lengths = torch.tensor([0.0 if name == END else float(len(name)) for name, _ in ordered])
    return Text(train, validation, lengths, sum(map(len, parts.values())), lengths[train].mean().item())


def windows(tokenizer: Tokenizer, texts: list[str], context: int) -> Windows:
    """One document after another, cut into windows that do not overlap; the last, shorter one is dropped."""
    end = tokenizer.token_to_id(END)
    stream: Tensor = torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (*text.ids, end)])
    return stream[: len(stream) // context * context].view(-1, context)
