"""Efficient-DLM: autoregressive models become diffusion models that fill in one block after the other."""

from functools import cache
from itertools import pairwise
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.claims.framework import Paper, at_least, claim, equal, relative_difference, rounding
from saccade.claims.framework.sequence import SequenceNet
from saccade.ops import BlockDiffusion, Causal, Global
from saccade.training import choose_filled, hide_tokens, masked_token_loss, noise_tokens

PAPER = Paper(
    title="Efficient-DLM: From Autoregressive to Diffusion Language Models, and Beyond in Speed",
    arxiv="2512.14067",
    published="2025-12-16",
    summary="A pretrained autoregressive model goes on training as a masked-diffusion model whose attention is causal "
    "between blocks and two-sided inside them. Each noised block is conditioned on clean earlier blocks, all in "
    "one pass over both halves of a doubled sequence, and later tokens are hidden more often, as they are in decoding.",
    home=(
        "saccade.ops.BlockDiffusion",
        "saccade.mixers.BlockCausalAttention",
        "saccade.training.noise_tokens",
        "saccade.training.masked_token_loss",
        "saccade.training.choose_filled",
    ),
    missing=("the language models of 1.5B, 4B and 8B parameters",),
    differences=(
        "Recalled, not looked up: the weight 1 / t of the loss, that no token is shifted, and that clean tokens see "
        "their own block both ways; clean='token' is the causal variant.",
        "How many tokens a noise level hides is not stated: ours hides round(t L) of a block's L, at least one.",
    ),
)

MASK = "the training mask"
NOISE = "position-dependent masking"
LENGTH = 12


@claim("equivalence", "equal to 1e-5", rounding, source=MASK)
def one_pass_is_a_pass_for_each_block() -> dict[str, float]:
    """One pass over noised and clean tokens gives each block what a pass over the clean blocks before it and the
    block itself gives: logits of two layers, for blocks of one token (an autoregressive conditional, given a mask at
    its place), of three and four, and of all (masked diffusion of the whole sequence)."""
    net, tokens = SequenceNet(9, LENGTH).double(), torch.randint(8, (2, LENGTH))
    errors = {}
    for block in (1, 3, 4, LENGTH):
        noised = noise_tokens(tokens, 8, block)
        whole = net(noised.both, BlockDiffusion(block), _twice(LENGTH))[:, :LENGTH]
        parts = []
        for start, end in pairwise(range(0, LENGTH + 1, block)):
            given = torch.cat([tokens[:, :start], noised.both[:, start:end]], 1)
            parts.append(net(given, Causal(block))[:, start:])
        errors[f"B = {block}"] = relative_difference(whole, torch.cat(parts, 1))
    return errors


@claim("equivalence", {"B = 1": 0.0, "B = L": 0.0}, rounding, source=MASK)
def limits_are_the_two_families() -> dict[str, float]:
    """With B = 1 a hidden token is predicted from clean tokens before it alone, as torch's causal attention does with
    a mask at the end; with B = L the noised half is two-sided attention, as if there was no clean one."""
    net, tokens = SequenceNet(9, LENGTH).double(), torch.randint(8, (1, LENGTH))
    noised = torch.full_like(tokens, 8)
    both = torch.cat([noised, tokens], 1)
    single = net(both, BlockDiffusion(1), _twice(LENGTH))[:, :LENGTH]
    expected = torch.cat(
        [net(torch.cat([tokens[:, :n], noised[:, :1]], 1), Causal())[:, -1:] for n in range(LENGTH)], 1
    )
    full = net(both, BlockDiffusion(LENGTH), _twice(LENGTH))[:, :LENGTH]
    return {
        "B = 1": relative_difference(single, expected),
        "B = L": relative_difference(full, net(noised, Global())),
    }


@claim("property", {"another block's noise": 0.0, "own clean copy": 0.0, "later clean blocks": 0.0}, source=MASK)
def nothing_leaks() -> dict[str, float]:
    """The gradient of a noised block's outputs by noised tokens of other blocks, by the clean copy of its own block,
    and by later clean ones, in two layers: the largest entries."""
    net, block = SequenceNet(9, LENGTH).double(), 3
    tokens = torch.randint(8, (1, LENGTH))
    noised = noise_tokens(tokens, 8, block)
    embedded = net.embed(noised.both).detach().requires_grad_()
    x = embedded + net.position(_twice(LENGTH))
    for each in net.blocks:
        x = each(x, BlockDiffusion(block))
    largest = dict.fromkeys(("another block's noise", "own clean copy", "later clean blocks"), 0.0)
    for start in range(0, LENGTH, block):
        (grad,) = torch.autograd.grad(x[:, start : start + block].square().sum(), embedded, retain_graph=True)
        size = grad.abs().sum((0, 2))
        own = torch.arange(LENGTH) // block == start // block
        later = torch.arange(LENGTH) // block > start // block
        found = (size[:LENGTH][~own], size[LENGTH:][own], size[LENGTH:][later])
        for name, entries in zip(largest, found):
            largest[name] = max(largest[name], entries.max().item() if len(entries) else 0.0)
    return largest


@claim(
    "property",
    {"L = 16, t = 0": 10 ** (15 / 16), "L = 64, t = 0": 10 ** (63 / 64), "L = 4, t = 0.3": 10 ** (0.7 * 3 / 4)},
    equal("a ratio of two counts in 400 000 draws, four standard deviations and more", relative=0.1),
    source=NOISE,
)
def later_tokens_are_hidden_more_often() -> dict[str, float]:
    """Where one token of L is hidden, the last is hidden exp(beta (1 - t) (L - 1)) times as often as the first, with
    exp(-beta L) = 0.1: about 10 times at t = 0, for any L."""
    found = {}
    for length, level in [(16, 0.0), (64, 0.0), (4, 0.3)]:
        counts = _count_single(length, level)
        found[f"L = {length}, t = {level:g}"] = (counts[-1] / counts[0]).item()
    return found


@claim("property", {"uniform": 1.0, "t = 1": 1.0}, equal("as above", relative=0.1), source=NOISE)
def without_bias_all_are_alike() -> dict[str, float]:
    """With lambda = 1, and with any lambda towards t = 1, the first and the last token are hidden equally often: ratios
    of counts, the second at t = 0.93, where 15 of 16 are hidden."""
    counts = _count_single(16, 0.0, last_to_first=1.0)
    near = hide_tokens(torch.full((20000,), 0.93), 16).double().mean(0)  # all but one are hidden
    return {"uniform": (counts[-1] / counts[0]).item(), "t = 1": (near[-1] / near[0]).item()}


@claim("property", {"hidden": 0, "empty blocks": 0}, source=NOISE)
def the_level_sets_how_many_are_hidden() -> dict[str, int]:
    """round(t L) tokens are hidden, and never none: blocks where it is otherwise, and where nothing is hidden."""
    level = torch.rand(5000, dtype=torch.float64)
    hidden = hide_tokens(level, 16).sum(-1)
    return {
        "hidden": int((hidden != (level * 16).round().clamp(min=1)).sum()),
        "empty blocks": int((hide_tokens(torch.zeros(100), 16).sum(-1) == 0).sum()),
    }


@claim(
    "complexity",
    {"fewest": True, "most": True, "equal to no cache": True},
    source="cached decoding",
)
def decoding_fills_between_one_and_all_of_a_block() -> dict[str, bool]:
    """A step of cached decoding runs on B tokens against all keys before them; with a threshold above 1 it fills one
    token, with 0 all B, and what it fills is what a pass without a cache fills."""
    net, block = SequenceNet(9, 24).double(), 4
    prompt = torch.randint(8, (1, 8))
    slow, steps_slow = _decode(net, prompt, 24, block, threshold=2.0)
    fast, steps_fast = _decode(net, prompt, 24, block, threshold=0.0)
    again, _ = _decode(net, prompt, 24, block, threshold=2.0, cached=False)
    return {
        "fewest": steps_slow == 16,
        "most": steps_fast == 16 // block and fast.shape == (1, 24),
        "equal to no cache": bool((slow == again).all()),
    }


@claim(
    "accuracy",
    "clean over noised over the whole sequence",
    at_least(0.0, "the order is expected; the sizes are not known"),
    source="an experiment that the paper's argument suggests; nobody had measured it",
    slow=True,
)
def clean_blocks_convert_better() -> dict[str, float]:
    """A model of characters that was trained for 200 steps to predict the next one goes on for 100 as a diffusion
    model: by how much the cross-entropy of hidden characters is lower with blocks of 8 and clean context than with
    noised context, and with that than with attention over the whole sequence."""
    loss = {name: result[0] for name, result in _conversions().items()}
    return {"clean over noised": loss["noised"] - loss["clean"], "noised over whole": loss["whole"] - loss["noised"]}


@claim(
    "property",
    "smaller change",
    at_least(0.0, "the order is expected; the sizes are not known"),
    source="the argument of the paper, measured in an experiment of ours",
    guess="in so few steps weights move about as far as the loss falls, and attention over the whole sequence learns "
    "less: two seeds and a learning rate of a third show the same; the paper converts large models with 10 billion "
    "tokens and more",
    slow=True,
)
def clean_blocks_change_the_weights_less() -> float:
    """In the same experiment, the mean relative change of weight matrices under attention over the whole sequence, less
    that with clean context."""
    drift = {name: result[1] for name, result in _conversions().items()}
    return drift["whole"] - drift["clean"]


@claim(
    "accuracy",
    {"8B over Dream 7B": 5.4, "8B over Qwen3 4B": 2.7},
    source="abstract; points of accuracy",
    needs="the language models",
)
def models_are_more_accurate() -> None:
    """Accuracy of the 8B model above two others."""


@claim(
    "speed",
    {"8B over Dream 7B": 4.5, "8B over Qwen3 4B": 2.7},
    source="abstract; ratios of throughput",
    needs="the language models and a GPU",
)
def models_are_faster() -> None:
    """Tokens a second of the 8B model over those of two others."""


@claim(
    "accuracy",
    {"clean over noised context": 9.46, "hiding later tokens more often": 4.38},
    source="secondary notes on the paper",
    needs="the language models",
)
def both_ideas_count() -> None:
    """Points of accuracy that clean context, and hiding by position at 5.6 tokens a step, bring."""


def _twice(length: int) -> Tensor:
    return torch.arange(length).repeat(2)


def _count_single(length: int, level: float, last_to_first: float = 0.1) -> Tensor:
    """How often each token is the one that is hidden, in 400 000 draws at a level that hides one."""
    hidden = hide_tokens(torch.full((400_000,), level), length, last_to_first=last_to_first)
    assert (hidden.sum(-1) == 1).all()
    return hidden.double().sum(0)


def _decode(
    net: SequenceNet, prompt: Tensor, length: int, block: int, *, threshold: float, cached: bool = True
) -> tuple[Tensor, int]:
    """Fill in (1, length) tokens behind a prompt of whole blocks, the surest first; also the steps that it took."""
    tokens, steps, cache = prompt, 0, None
    if cached:
        for places in torch.arange(prompt.shape[1]).split(block):
            _, cache = net.step(prompt[:, places], places, cache)
    while tokens.shape[1] < length:
        places = torch.arange(tokens.shape[1], tokens.shape[1] + block)
        filled = torch.full((1, block), 8)
        while (filled == 8).any():
            if cached:
                logits, _ = net.step(filled, places, cache)
            else:
                logits = net(torch.cat([tokens, filled], 1), Causal(block))[:, -block:]
            confidence, guess = logits[..., :8].softmax(-1).max(-1)
            filled = guess.where(choose_filled(confidence, filled == 8, threshold=threshold), filled)
            steps += 1
        if cached:
            _, cache = net.step(filled, places, cache)  # the finished block, once more, for its keys and values
        tokens = torch.cat([tokens, filled], 1)
    return tokens, steps


def _read_text() -> Tensor:
    """English prose that comes with Python, as numbers of 0 .. 95; 96 stands for a hidden character."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.tensor([min(max(ord(character) - 31, 0), 95) for character in text])


def _draw_text(text: Tensor, batch: int) -> Tensor:
    start = torch.randint(len(text) - 64, (batch, 1))
    return text[start + torch.arange(64)]


@cache
def _conversions() -> dict[str, tuple[float, float]]:
    """Cross-entropy of hidden characters, and how far the weight matrices of the blocks moved, of three conversions."""
    torch.manual_seed(0)
    text = _read_text()
    start = SequenceNet(97, 64, dim=64)
    optimizer = torch.optim.Adam(start.parameters(), lr=3e-3)
    for _ in range(200):
        tokens = _draw_text(text, 32)
        logits = start(tokens, Causal())
        _step(optimizer, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    kinds = {"whole": (64, True), "noised": (8, False), "clean": (8, True)}
    return {name: _convert(start, text, *kind) for name, kind in kinds.items()}


def _convert(start: SequenceNet, text: Tensor, block: int, clean: bool) -> tuple[float, float]:
    net = SequenceNet(97, 64, dim=64)
    net.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def loss(batch: int, last_to_first: float) -> Tensor:
        tokens = _draw_text(text, batch)
        noised = noise_tokens(tokens, 96, block, last_to_first=last_to_first)
        if clean:
            logits = net(noised.both, BlockDiffusion(block), _twice(64))[:, :64]
        else:
            logits = net(noised.both[:, :64], Causal(block))
        return masked_token_loss(logits, tokens, noised.hidden, noised.level, smallest_level=1 / block)

    torch.manual_seed(1)
    for _ in range(100):
        _step(optimizer, loss(16, 0.1))
    with torch.no_grad():
        final = loss(256, 1.0).item()
    pairs = zip(net.layers.parameters(), start.layers.parameters())
    moved = [(after - before).norm() / before.norm() for after, before in pairs if before.ndim > 1]
    return final, torch.stack(moved).mean().item()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
