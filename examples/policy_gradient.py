"""Policy gradients of a language model
====================================

Train a small language model by policy gradients, with log-probabilities and entropies of its head by softcurve.

The tokens are all strings of one to ten brackets and an end token. A prompt is four tokens that leave brackets open; an
answer is right if it closes all of them, so that the whole string is balanced. A recurrent network first learns from
right answers, and then from a reward of 1 for each right answer of its own. Answers to one prompt are compared with
each other: the advantage is the reward minus the mean of its group, divided by the standard deviation (GRPO). The loss
of a token is::

    −min(r A, clip(r, 0.8, 1.2) A) − 0.01 H,   r = exp(log p − log p_old),

with the entropy H of the softmax. ``softcurve.linear_log_probs`` computes ``log p`` and ``H`` without the logits. The
same training with dense logits starts from the same seeds. Both run in float64, because one token that is sampled
differently would change everything after it; the two reward curves are equal up to rounding.

Run it from the root of the repository::

    python examples/policy_gradient.py [--steps 60] [--pretraining 400] [--seed 0] [--out build/policy_gradient.png]

The example prints tables, followed by one line of JSON. The figure shows the reward, the entropy and the memory.

.. image:: /pictures/policy_gradient.png
   :alt: Reward, entropy and memory of the training
"""

# sphinx_gallery_thumbnail_path = "pictures/policy_gradient.png"

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import softcurve

LONGEST, PROMPT, ANSWER, WIDTH = 10, 4, 10, 64
PIECES = ["".join(piece) for n in range(1, LONGEST + 1) for piece in itertools.product("()", repeat=n)]
END, CLASSES = len(PIECES), len(PIECES) + 1
EXAMPLES, BATCH, RATE = 12_000, 64, 5e-3
PROMPTS, GROUP, EPOCHS, POLICY_RATE = 24, 8, 2, 1e-3
CLIP, BONUS, BUDGET = 0.2, 0.01, 16 * 2**20
STREAMED, DENSE = "streamed", "dense"
COLOURS = {STREAMED: "#1f62c4", DENSE: "#c2500c"}

Tokens = Int[Tensor, "n positions"]
PerToken = Float[Tensor, "n answer"]


@dataclass(frozen=True)
class Step:
    """The mean reward, the entropy (nats per token) and the loss of a step, of its first epoch."""

    reward: float
    entropy: float
    loss: float


# --- brackets --------------------------------------------------------------------------------------------------------


def depth_of(text: str) -> int | None:
    """Return how many brackets are open at the end, or None if one is closed that was not open."""
    depth = 0
    for bracket in text:
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return None
    return depth


def split(text: str, rng: random.Random) -> list[int]:
    """Split a string into random tokens; about half of them are single brackets."""
    numbers, start = [], 0
    while start < len(text):
        size = next((n for n in range(1, LONGEST) if rng.random() < 0.5), LONGEST)
        numbers.append(NUMBER[text[start : start + size]])
        start += size
    return numbers


def prompt(rng: random.Random) -> list[int]:
    """Return tokens that leave at least one bracket open."""
    while True:
        numbers = split("".join(rng.choices("()", (0.7, 0.3), k=12)), rng)[:PROMPT]
        if len(numbers) == PROMPT and depth_of(text_of(numbers)):
            return numbers


def example(rng: random.Random) -> list[int]:
    """Return a prompt and a right answer, filled up with end tokens."""
    while True:
        asked = prompt(rng)
        depth, answer = depth_of(text_of(asked)), ""
        while depth:
            answer += rng.choices("()", (0.3, 0.7))[0]
            depth += 1 if answer[-1] == "(" else -1
        numbers = split(answer, rng)
        if len(numbers) < ANSWER:
            return [*asked, *numbers, *[END] * (ANSWER - len(numbers))]


def text_of(numbers: list[int]) -> str:
    """Return the brackets up to the first end token."""
    return "".join(PIECES[number] for number in itertools.takewhile(lambda number: number != END, numbers))


def rewards(tokens: Tokens) -> Float[Tensor, " n"]:
    """Return 1 for each row that ends and is balanced, and 0 for the others."""
    return torch.tensor([float(END in row and depth_of(text_of(row)) == 0) for row in tokens.tolist()]).double()


def counts(tokens: Tokens) -> PerToken:
    """Return 1 for the tokens of the answers up to their first end token, and 0 after it."""
    ends = (tokens[:, PROMPT:] == END).int()
    return (ends.cumsum(1) - ends == 0).double()


NUMBER = {piece: number for number, piece in enumerate(PIECES)}

# --- the model -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A recurrent network that returns features; its head computes a logit for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def features(self, tokens: Tokens) -> Float[Tensor, "n answer width"]:
        """Return the features from which each token of the answer is predicted."""
        states: Tensor = self.cell(self.embedding(tokens[:, :-1]))[0]
        return states[:, PROMPT - 1 :]

    @torch.no_grad()
    def sample(self, prompts: Tokens) -> Tokens:
        """Return the prompts, each followed by a sampled answer."""
        tokens, (_, state) = prompts, self.cell(self.embedding(prompts))
        for _ in range(ANSWER):
            chosen = torch.multinomial(self.head(state[0]).softmax(-1), 1)
            tokens = torch.cat([tokens, chosen], 1)
            _, state = self.cell(self.embedding(chosen), state)
        return tokens


def pretrain(model: Model, steps: int, rng: random.Random) -> float:
    """Learn right answers with Adam; return the mean loss of the last steps, in nats per token."""
    tokens = torch.tensor([example(rng) for _ in range(min(EXAMPLES, steps * BATCH))])
    optimizer, losses = torch.optim.Adam(model.parameters(), RATE), []
    for _ in range(steps):
        some = tokens[torch.randint(len(tokens), (BATCH,))]
        features, head = model.features(some), model.head
        loss = softcurve.linear_cross_entropy(
            features, head.weight, some[:, PROMPT:], linear_bias=head.bias, sample_weight=counts(some)
        )
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


# --- policy gradients ------------------------------------------------------------------------------------------------

LogProbs = Callable[[Tensor, nn.Linear, Tensor], tuple[PerToken, PerToken]]


def streamed(features: Tensor, head: nn.Linear, index: Tensor) -> tuple[PerToken, PerToken]:
    """Return the log-probability of each token and the entropy of its softmax, without the logits."""
    found = softcurve.linear_log_probs(features, head.weight, index, linear_bias=head.bias, memory_budget=BUDGET)
    assert found.log_probs is not None
    return found.log_probs, found.entropy


def dense(features: Tensor, head: nn.Linear, index: Tensor) -> tuple[PerToken, PerToken]:
    """Return the same from the logits."""
    log_p = head(features).log_softmax(-1)
    return log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


WAYS: dict[str, LogProbs] = {STREAMED: streamed, DENSE: dense}


def clipped_loss(
    found: tuple[PerToken, PerToken], before: PerToken, advantage: Float[Tensor, " n"], counted: PerToken
) -> tuple[Tensor, Tensor]:
    """Return the loss and the entropy, as means over the tokens that count."""
    log_probs, entropy = found
    ratio, advantage = (log_probs - before).exp(), advantage.unsqueeze(1)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    tokens = counted.sum()
    mean_entropy = (entropy * counted).sum() / tokens
    return -(gain * counted).sum() / tokens - BONUS * mean_entropy, mean_entropy


def improve(model: Model, way: LogProbs, steps: int, seed: int) -> list[Step]:
    """Train by policy gradients from the given seed."""
    torch.manual_seed(seed)
    rng, curve = random.Random(seed), []
    optimizer = torch.optim.Adam(model.parameters(), POLICY_RATE)
    for _ in range(steps):
        asked = torch.tensor([prompt(rng) for _ in range(PROMPTS)]).repeat_interleave(GROUP, 0)
        tokens = model.sample(asked)
        reward, counted = rewards(tokens), counts(tokens)
        groups = reward.view(PROMPTS, GROUP)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        with torch.no_grad():
            before, _ = way(model.features(tokens), model.head, tokens[:, PROMPT:])
        for epoch in range(EPOCHS):
            found = way(model.features(tokens), model.head, tokens[:, PROMPT:])
            loss, entropy = clipped_loss(found, before, advantage, counted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch == 0:
                curve.append(Step(reward.mean().item(), entropy.item(), loss.item()))
    return curve


# --- memory ----------------------------------------------------------------------------------------------------------


def print_memory(name: str) -> None:
    """Print by how many megabytes one loss and its gradients increase the peak memory of this process."""
    head, generator = nn.Linear(WIDTH, CLASSES).double(), torch.Generator().manual_seed(0)
    features = torch.randn(PROMPTS * GROUP, ANSWER, WIDTH, generator=generator).double().requires_grad_()
    index = torch.randint(CLASSES, (PROMPTS * GROUP, ANSWER), generator=generator)

    def once(n: int) -> None:
        found, ones = WAYS[name](features[:n], head, index[:n]), torch.ones(n, ANSWER).double()
        clipped_loss(found, found[0].detach(), ones[:, 0], ones)[0].backward()

    once(2)  # loads what a call needs
    before = size_of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    once(len(features))
    print(size_of_process("VmHWM") - before)


def size_of_process(field: str) -> float:
    """Return the resident set of this process or its high-water mark, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def memory() -> dict[str, float | None]:
    """Measure each way in a fresh process; None where the system does not report a peak that can be reset."""
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(WAYS)
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of"]
    done = {name: subprocess.run([*command, name], capture_output=True, text=True, check=True) for name in WAYS}
    return {name: float(process.stdout) for name, process in done.items()}


# --- the picture -----------------------------------------------------------------------------------------------------


def curves(axes: Axes, found: dict[str, list[Step]], field: str, title: str) -> None:
    """Plot a figure over the steps; the dashed curve lies on the other."""
    for name, dashes in ((STREAMED, "-"), (DENSE, "--")):
        width = 3.5 if name == STREAMED else 1.5
        values = [getattr(step, field) for step in found[name]]
        axes.plot(values, dashes, color=COLOURS[name], linewidth=width, label=name)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.legend(frameon=False)


def draw(found: dict[str, list[Step]], megabytes: dict[str, float | None]) -> Figure:
    """Draw the reward, the entropy and the memory."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    curves(left, found, "reward", "Fraction of answers that are right")
    curves(middle, found, "entropy", "Entropy, nats per token")
    right.bar(list(megabytes), [size or 0 for size in megabytes.values()], color=[COLOURS[name] for name in megabytes])
    right.set_title("Memory of one loss and its gradients, MB", loc="left")
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write to a temporary file and rename it, so that an incomplete figure is never visible."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


# --- the command line ------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Parse and check the command line before any computation."""
    parser = argparse.ArgumentParser(description="Train a language model by policy gradients, streamed and dense.")
    parser.add_argument("--steps", type=int, default=60, help="number of steps of policy gradients (60)")
    parser.add_argument("--pretraining", type=int, default=400, help="number of batches of right answers (400)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for weights, prompts and answers (0)")
    parser.add_argument("--out", type=Path, default=Path("build/policy_gradient.png"), help="output file")
    parser.add_argument("--memory-of", choices=tuple(WAYS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for name in ("steps", "pretraining"):
        if getattr(chosen, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(chosen, name)}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"argument --seed: must be at least 0 and below 2^63, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror}); give another")
    return chosen


def show(found: dict[str, list[Step]]) -> None:
    """Print about ten steps."""
    print(f"\n{'step':>4s}{'reward':>20s}{'entropy':>20s}{'loss':>20s}")
    print(f"{'':4s}" + 3 * "".join(f"{name:>10s}" for name in found))
    steps = len(found[STREAMED])
    for number in range(0, steps, max(1, steps // 10)):
        pairs = [getattr(curve[number], field.name) for field in fields(Step) for curve in found.values()]
        print(f"{number:4d}" + "".join(f"{value:10.4f}" for value in pairs))


def main() -> None:
    """Pretrain a model, improve two copies of it, compare them, and write the figure and the report."""
    chosen = arguments()
    if chosen.memory_of:
        print_memory(chosen.memory_of)
        return
    torch.set_num_threads(1)  # the tensors are too small for a second thread to pay off
    torch.manual_seed(chosen.seed)
    start = time.perf_counter()
    model = Model().double()
    loss = pretrain(model, chosen.pretraining, random.Random(chosen.seed))
    print(f"{CLASSES} tokens; pretraining ended at {loss:.3f} nats per token after {time.perf_counter() - start:.1f} s")
    found, seconds = {}, {}
    for name, way in WAYS.items():
        began = time.perf_counter()
        found[name] = improve(copy.deepcopy(model), way, chosen.steps, chosen.seed)
        seconds[name] = time.perf_counter() - began
    show(found)
    pairs = list(zip(found[STREAMED], found[DENSE], strict=True))
    differences = {f.name: max(abs(getattr(a, f.name) - getattr(b, f.name)) for a, b in pairs) for f in fields(Step)}
    print("\nLargest difference:", ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    megabytes = memory()
    for name, size in megabytes.items():
        said = "not measured" if size is None else f"{size:.0f} MB"
        print(f"{name:10s}{seconds[name]:6.1f} s; memory of one loss and its gradients: {said}")
    save(draw(found, megabytes), chosen.out)
    print(f"\nThe picture is at {chosen.out}")
    report = {
        **{name: value for name, value in vars(chosen).items() if name != "memory_of"},
        "out": str(chosen.out),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "pretraining_loss": loss,
        "megabytes": megabytes,
        "largest_difference": differences,
        "curves": {name: [asdict(step) for step in curve] for name, curve in found.items()},
    }
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
