"""Codebook features: activations replaced by the mean of a few codes, so that a hidden state is a set of integers."""

from functools import cache
from math import comb
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    play,
    relative_difference,
    replay_parts,
    rounding,
)
from saccade.claims.framework.sequence import SequenceNet
from saccade.errors import InputError
from saccade.explain.dictionaries import Codebook, CodedModel, CodeIndex, force_codes
from saccade.ops import Causal

PAPER = Paper(
    title="Codebook Features: Sparse and Discrete Interpretability for Neural Networks",
    arxiv="2310.17230",
    published="2023-10-26",
    summary="After attention heads and MLPs an activation is replaced by the mean of its k best codes, and the network "
    "is tuned with that bottleneck. Hidden states become small sets of integers, which can be searched for and forced.",
    home=(
        "saccade.explain.dictionaries.Codebook",
        "saccade.explain.dictionaries.CodedModel",
        "saccade.explain.dictionaries.force_codes",
    ),
    differences=(
        "The paper sums the k codes, official code takes their mean; so do we.",
        "The draw of the activation to its codes is not divided by the number of tokens in official code, the draw of "
        "codes to activations is, so that their balance depends on the batch; ours is the same.",
        "The regulariser counts each code that fired once; whether official code counts occurrences is not recorded "
        "(uncertain). It is off by default.",
    ),
)

LAYER = "the layer's definition"
MACHINE = "a finite state machine of ours: 40 states with 3 successors each, 2 layers of 32 channels, 96 codes, k = 1"


@claim("property", {"k = 1": True, "k = 2": True}, source=LAYER)
def output_takes_few_values() -> dict[str, bool]:
    """Of 2000 activations and 5 codes, the output takes no more values than there are sets of k codes, and with k = 1
    every value is a code."""
    x = torch.randn(2000, 6, dtype=torch.float64)
    single, double = (Codebook(6, 5, k=k).double().eval() for k in (1, 2))
    rows = single(x)
    return {
        "k = 1": bool((rows[:, None] == single.codes[0]).all(-1).any(-1).all()),
        "k = 2": len(double.decode(double.encode(x).sort(-1).values).unique(dim=0)) <= comb(5, 2),
    }


@claim("property", 0.0, rounding, source=LAYER)
def codes_of_mean_zero_stay() -> float:
    """With k = 1 and inner products, a second pass returns what the first gave, where codes have mean 0 as what is
    normalised has: the largest relative difference."""
    book = Codebook(6, 5).double().eval()
    with torch.no_grad():
        book.codes.sub_(book.codes.mean(-1, keepdim=True))
        once = book(torch.randn(200, 6, dtype=torch.float64))
        return relative_difference(book(once), once)


@claim("property", {"inner": 0.0, "euclidean": 0.0}, rounding, source=LAYER)
def gradient_goes_straight_through() -> dict[str, float]:
    """With the gradient "base", the gradient of the input is that of the norm alone with what comes from above: the
    largest relative difference."""
    found = {}
    for similarity in ("inner", "euclidean"):
        book = Codebook(8, 9, k=3, groups=2, similarity=similarity, gradient="base").double()
        x, upstream = torch.randn(2, 30, 8, dtype=torch.float64)
        x.requires_grad_()
        (ours,) = torch.autograd.grad(book(x), x, upstream)
        (norm,) = torch.autograd.grad(F.layer_norm(x.unflatten(-1, (2, 4)), (4,)).flatten(-2), x, upstream)
        found[similarity] = relative_difference(ours, norm)
    return found


@claim("property", 0.0, rounding, source=LAYER)
def scale_and_shift_of_an_activation_do_not_matter() -> float:
    """The output of a x + b is that of x, for a > 0 and a number b of each activation: the largest relative
    difference."""
    book = Codebook(8, 9, k=2).double().eval()
    x, b = torch.randn(200, 8, dtype=torch.float64), torch.randn(200, 1, dtype=torch.float64)
    return relative_difference(book((0.5 + torch.rand_like(b)) * x + b), book(x))


@claim(
    "property",
    {"base": 0.0, "aeloss": 0.0, "vqvae": 0.0, "fullaeloss": 0.0},
    rounding,
    source="the losses' definitions, by autograd on copies that stop gradients",
)
def gradients_are_those_of_the_losses() -> dict[str, float]:
    """Gradients of activations, norm and codes are those of the task through n + stop(y - n), of the task through y, of
    mean |y - stop(n)|^2 and of beta sum |stop(y) - n|^2, as each loss has them: the largest relative difference."""
    found = {}
    for kind in ("base", "aeloss", "vqvae", "fullaeloss"):
        book = Codebook(8, 9, k=2, groups=2, gradient=kind, beta=0.3).double()
        x, upstream = torch.randn(2, 30, 8, dtype=torch.float64)
        x.requires_grad_()
        wanted = (x, *book.parameters())
        ours = torch.autograd.grad(book(x), wanted, upstream)
        n, ids = book.normalise(x), book.encode(x)
        y = book.decode(ids).view_as(n)
        upstream = upstream.view_as(n)
        loss = ((n + (y - n).detach()) * upstream).sum() + 0 * y.sum()
        if kind != "vqvae":
            loss = loss + (y * upstream).sum()
        if kind != "base":
            loss = loss + (y - n.detach()).square().sum() / len(x)
        if kind in ("vqvae", "fullaeloss"):
            loss = loss + 0.3 * (y.detach() - n).square().sum()
        theirs = torch.autograd.grad(loss, wanted)
        found[kind] = max(map(relative_difference, ours, theirs))
    return found


@claim(
    "accuracy",
    "small",
    at_most(0.1, "a bound of ours, in valid transitions"),
    source=f"a small loss against the plain model; {MACHINE}",
    slow=True,
)
def codebooks_cost_little_accuracy() -> float:
    """Share of valid transitions that the plain model predicts, less that of its copy with codebooks after both MLPs,
    tuned."""
    found = _machine()
    return found.valid(found.plain, found.prompts) - found.valid(found.coded, found.prompts)


@claim(
    "property",
    "the model goes on as if in the forced state",
    at_least(0.5, "a bound of ours; three of 40 states are successors"),
    source=MACHINE,
    slow=True,
)
def forced_codes_move_the_state() -> float:
    """With the code of best F1 for a state forced at the last token after both MLPs, how often the prediction is a
    successor of that state, less how often it is one without: prompts that end in other states, a mean over states."""
    found, prompts = _machine(), _machine().prompts[:50]
    moved = []
    for state in range(STATES):
        others = prompts[prompts[:, -1] != state]
        codes = {place: int(best[state]) for place, best in found.detectors().items()}
        with found.coded.editing({place: force_codes(code, position=-1) for place, code in codes.items()}):
            forced = found.valid(found.coded, others, state)
        moved.append(forced - found.valid(found.coded, others, state))
    return sum(moved) / STATES


@claim(
    "property",
    "some codes have precision 1, though states outnumber neurons",
    at_least(1, "one such state is some; here there are 8 more states than channels"),
    source=MACHINE,
    slow=True,
)
def states_have_codes_of_precision_one() -> int:
    """States that have a code, after one of the MLPs, which fires in that state alone, and at least 20 times in 10000
    tokens."""
    found = _machine()
    exact = torch.zeros(STATES, dtype=torch.bool)
    for place in found.coded.places:
        often = found.codes.fired(place).flatten(0, -2).sum(0) >= 20
        exact |= (found.codes.match(place, found.prompts).precision[often] == 1).any(0)
    return int(exact.sum())


@claim("accuracy", "small loss on Pythia and TinyStories", source="the abstract", needs="the language models")
def language_models_keep_their_accuracy() -> None:
    """Language models with 10000 codes a head and k = 8 lose little accuracy."""


def replay(case: Case) -> dict[str, Tensor]:
    """CodebookLayer and GroupCodebookLayer of any size, number of codes, k, loss, similarity and number of groups, in
    training: output, ids (groups, ..., k) and gradients."""
    parts = case.record.get("cases")
    return replay_parts(case, parts, _replay_one) if parts else _replay_one(case)


def _replay_one(case: Case) -> dict[str, Tensor]:
    book = case.build(_official)
    single = not any(name.startswith("codebook.0.") for name in case.shapes)
    if single and book.groups > 1:
        raise InputError(f"{case.key}/{case.name} has {book.groups} codebooks, but a state of one")
    names = [""] if single else [f"codebook.{group}." for group in range(book.groups)]

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {
            ours: torch.stack([state[f"{name}{theirs}"] for name in names])
            for ours, theirs in (("codes", "codebook.weight"), ("norm_weight", "ln.weight"), ("norm_bias", "ln.bias"))
        }
        x = inputs["x"]
        y = functional_call(book, own, x)
        with torch.no_grad():
            ids = functional_call(_Ids(book), {f"book.{name}": each for name, each in own.items()}, x)
        return {"y": y, "ids": ids.movedim(-2, 0)}

    return play(case, forward, lambda outputs, inputs: (outputs["y"] * inputs["grad_out"]).sum())


class _Ids(nn.Module):
    def __init__(self, book: Codebook) -> None:
        super().__init__()
        self.book = book

    def forward(self, x: Tensor) -> Tensor:
        return self.book.encode(x)


def _official(
    dim: int,
    num_codes: int,
    kcodes: int = 1,
    loss: str = "aeloss",
    similarity: str = "euc",
    num_codebooks: int = 1,
    cls: str = "",
) -> Codebook:
    """Our module for the official arguments; "vqvae-0.5" is a loss and its beta."""
    kinds = {"ip": "inner", "euc": "euclidean"}
    if similarity not in kinds:
        raise InputError(f"similarity is {similarity!r}: replay serves {' and '.join(kinds)}")
    gradient, _, beta = loss.partition("-")
    return Codebook(
        dim,
        num_codes,
        k=kcodes,
        groups=num_codebooks,
        similarity=kinds[similarity],
        gradient=gradient,
        beta=float(beta or 0.25),
    )


STATES, CHANNELS, LENGTH = 40, 32, 10


class _Machine(NamedTuple):
    """Two models of a random state machine, and what the one with codebooks shows on 1000 walks.

    Attributes:
        successors: (states, 3).
        prompts: (1000, 10) walks.
        codes: that fired on them.
    """

    successors: Tensor
    plain: nn.Module
    coded: CodedModel
    prompts: Tensor
    codes: CodeIndex

    @torch.no_grad()
    def valid(self, model: nn.Module, prompts: Tensor, state: int | None = None) -> float:
        """How often the prediction after a prompt is a successor of its last state, or of another one."""
        following = self.successors[prompts[:, -1] if state is None else state]
        return (following == model(prompts)[:, -1].argmax(-1)[:, None]).any(-1).double().mean().item()

    def detectors(self) -> dict[str, Tensor]:
        """Place -> (states,) the code of best F1."""
        return {place: self.codes.match(place, self.prompts).best()[1] for place in self.coded.places}


class _CausalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SequenceNet(STATES, LENGTH, dim=CHANNELS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens, Causal())
        return logits


@cache
def _machine() -> _Machine:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        successors = torch.stack([torch.randperm(STATES)[:3] for _ in range(STATES)])
        plain = _train(_CausalNet(), successors)
        books = {f"net.layers.{layer}.mlp": Codebook(CHANNELS, 96) for layer in range(2)}
        coded = CodedModel(plain, books)
        coded.initialise(_walk(successors, 256))
        _train(coded, successors)
        prompts = _walk(successors, 1000)
        return _Machine(successors, plain, coded, prompts, coded.index([prompts]))


def _walk(successors: Tensor, count: int) -> Tensor:
    """(count, LENGTH) states."""
    states = [torch.randint(STATES, (count,))]
    for _ in range(LENGTH - 1):
        states.append(successors[states[-1], torch.randint(3, (count,))])
    return torch.stack(states, 1)


def _train(model: nn.Module, successors: Tensor, steps: int = 500) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        tokens = _walk(successors, 64)
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if isinstance(model, CodedModel) and step % 100 == 50 and step < steps / 2:
            model.replace_dead(tokens)
    return model.eval()
