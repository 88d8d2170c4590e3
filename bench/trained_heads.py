"""Heads trained on text that Python carries: ``python -m bench.trained_heads tiny_lm FILE [--steps 240]``.

``tiny_lm`` is the teacher of ``examples/tiny_lm.py``, with the schedule of the example if it takes 240 steps.
``masked_tokens`` is the encoder of ``examples/masked_tokens.py``, whose decoder is tied to its 30,522 embeddings; it
needs the extra ``integration``. First the transformation and the bias are trained, as in the example, and then, with
``--unfrozen``, all weights for as many steps. The file has the head, and features and class indices of windows that
were trained on and of held-out ones.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import softcurve as sc
from bench.trained import PARTS
from softcurve.files.atomic import replacing

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROWS = 4096  # of each part
VOCAB, CONTEXT, WIDTH, LAYERS, HEAD_WIDTH, BATCH, RATE = 16_384, 128, 192, 4, 32, 8, 2e-3  # of tiny_lm.py
DOCUMENTS, WINDOW, WINDOWS = 400, 64, 16  # of masked_tokens.py
UNFROZEN_RATE = 3e-4  # of the weights of the encoder

# Features and class indices of some windows of tokens.
Rows = Callable[[Tensor], tuple[Tensor, Tensor]]


def tiny_lm(steps: int, *, unfrozen: bool) -> dict[str, Tensor]:
    """Train the language model of the example and return its tensors; none of its weights is frozen."""
    from tiny_lm import text as texts
    from tiny_lm.model import Shape, TinyLM
    from tiny_lm.objectives import OBJECTIVES
    from tiny_lm.training import Learner, Schedule

    text = texts.load(VOCAB, CONTEXT)
    torch.manual_seed(0)
    model = TinyLM(Shape(VOCAB, WIDTH, LAYERS, HEAD_WIDTH), text.log_frequencies())
    schedule = Schedule(steps, BATCH, 0, RATE)
    learner = Learner(model, schedule)
    for tokens in schedule.batches(text.train):
        learner.step(OBJECTIVES["plain"].streamed, tokens, tokens)

    def rows(windows: Tensor) -> tuple[Tensor, Tensor]:
        return model(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten()

    return tensors(model.head, rows, (text.train, text.validation))


def masked_tokens(steps: int, *, unfrozen: bool) -> dict[str, Tensor]:
    """Train the masked-token head of the example, or after it the whole encoder, and return its tensors."""
    import masked_tokens as example
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer, model = AutoTokenizer.from_pretrained(example.folder_of_encoder()), example.encoder(0)
    windows = example.load(argparse.Namespace(documents=DOCUMENTS, context=WINDOW), tokenizer)
    decoder, transform = model.get_output_embeddings(), model.cls.predictions.transform
    counts = torch.bincount(windows[0].flatten(), minlength=len(decoder.bias)) + 1.0
    decoder.bias.data.copy_((counts / counts.sum()).log())
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=example.MASKED, seed=0)

    def rows(windows: Tensor) -> tuple[Tensor, Tensor]:
        batch = collate([{"input_ids": ids} for ids in windows])
        masked = batch["labels"] != -100
        features = model.base_model(input_ids=batch["input_ids"]).last_hidden_state[masked]
        return transform(features), batch["labels"][masked]

    def train(rate: float) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            input, target = rows(windows[0][torch.randint(len(windows[0]), (WINDOWS,))])
            loss = sc.linear_cross_entropy(input, decoder.weight, target, linear_bias=decoder.bias)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    train(example.RATE)
    if unfrozen:
        model.requires_grad_(True)
        train(UNFROZEN_RATE)
    return tensors((decoder.weight, decoder.bias), rows, windows)


@torch.no_grad()
def tensors(head: tuple[Tensor, Tensor], rows: Rows, windows: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file. Masks are random, so that few windows are used several times."""
    weight, bias = (tensor.detach().contiguous() for tensor in head)
    contents = {"linear_weight": weight, "linear_bias": bias}
    for part, some in zip(PARTS, windows, strict=True):
        shuffled = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(1))]
        batches = []
        for batch in itertools.cycle(shuffled.split(WINDOWS)):
            batches.append(rows(batch))
            if sum(len(target) for _, target in batches) >= ROWS:
                break
        input, target = (torch.cat(each)[:ROWS] for each in zip(*batches, strict=True))
        contents |= {f"{part}.input": input, f"{part}.target": target}
    return contents


HEADS = {"tiny_lm": tiny_lm, "masked_tokens": masked_tokens}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the head that is named and write its file."""
    parser = argparse.ArgumentParser(description="Train a head on text that every Python installation contains.")
    parser.add_argument("head", choices=HEADS)
    parser.add_argument("file", type=Path, help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=240, help="number of training steps (240)")
    parser.add_argument("--unfrozen", action="store_true", help="train the whole encoder for as many steps afterwards")
    chosen = parser.parse_args(arguments)
    sys.path.insert(0, str(EXAMPLES))
    contents = HEADS[chosen.head](chosen.steps, unfrozen=chosen.unfrozen)
    with replacing(chosen.file) as file:
        file.write(save(contents))


if __name__ == "__main__":
    main()
