"""A corpus that every Python installation contains, and a byte-level BPE tokenizer for it.

The documents are the topics of ``help()`` and, for each module of the standard library, its docstrings and comments.
Modules are parsed but never imported. A hash of its name assigns one document in twelve to the validation set, on which
the tokenizer is not trained.
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
SHORTEST = 200  # minimum number of characters of a document
COMMENT = re.compile(rb"^[ \t]*# ?(\S.*)$", re.MULTILINE)  # a line that contains only a comment
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo"} | {
    "pydoc_data",  # the topics themselves
    "encodings",  # tables
    "site-packages",
    "dist-packages",
}

Windows = Int[Tensor, "windows context"]


@dataclass(frozen=True)
class Text:
    """Training and validation windows of ``context`` tokens; ``lengths`` is the number of bytes of each token id."""

    train: Windows
    validation: Windows
    lengths: Float[Tensor, " vocab"]
    documents: int
    bytes_per_token: float

    def log_frequencies(self) -> Float[Tensor, " vocab"]:
        """Return the log-frequency of each token in the training windows, with add-one smoothing."""
        counts = torch.bincount(self.train.flatten(), minlength=len(self.lengths)) + 1.0
        return (counts / counts.sum()).log()

    def bytes_predicted(self, windows: Windows) -> float:
        """Return the number of bytes of the tokens that have a predecessor in their window; END has length 0."""
        return self.lengths[windows[:, 1:]].sum().item()


def documents() -> dict[str, str]:
    """Return the text of each document, sorted by name."""
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
    """Yield the docstrings of a module, its classes and its functions in order; none if the source does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the standard library contains invalid escape sequences
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
    """Return whether a document is for validation, independently of the seed and the Python version."""
    return hashlib.sha256(name.encode()).digest()[0] % 12 == 0


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with 256 bytes, an end-of-document token and the most frequent merges."""
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
    """Load the documents, train the tokenizer and cut the windows, independently of the seed."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for name, text in documents().items():
        parts[for_validation(name)].append(text)
    tokenizer = train_tokenizer(parts[False], vocab)
    train, validation = (windows(tokenizer, parts[held_out], context) for held_out in (False, True))
    # The name of a byte-level token has one character for each byte.
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lengths = torch.tensor([0.0 if name == END else float(len(name)) for name, _ in ordered])
    return Text(train, validation, lengths, sum(map(len, parts.values())), lengths[train].mean().item())


def windows(tokenizer: Tokenizer, texts: list[str], context: int) -> Windows:
    """Concatenate the documents and cut them into windows without overlap; a shorter last window is dropped."""
    end = tokenizer.token_to_id(END)
    stream: Tensor = torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (*text.ids, end)])
    return stream[: len(stream) // context * context].view(-1, context)
