"""Next block prediction: every token of a block predicts the one at its own place in the next block."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.claims.framework import Case, Paper, at_least, claim, equal, relative_difference, rounding
from saccade.claims.framework.sequence import SequenceNet
from saccade.errors import InputError
from saccade.ops import Causal, next_block_pattern
from saccade.training import next_block

PAPER = Paper(
    title="Next Block Prediction: Video Generation via Semi-Autoregressive Modeling",
    arxiv="2502.07737",
    published="2025-02-11",
    summary="The tokens of a video are cut into blocks (a row, several rows, a frame). Attention is two-sided inside a "
    "block and causal between blocks, and each token predicts the one at its own place in the next block, so that a "
    "step of generation makes a whole block.",
    home=(
        "saccade.mixers.BlockCausalAttention",
        "saccade.ops.next_block_pattern",
        "saccade.training.next_block",
    ),
    missing=("the video models of 700M to 3B parameters, and the tokenizer that they stand on",),
    differences=(
        "Official sequences are cut to a multiple of the block; ours may end with a smaller one.",
        "Official attention passes a mask and is_causal together unless its configuration names the "
        "semi-autoregressive form; ours takes the pattern alone.",
        "The paper's numbers for the grid of latent tokens, 5 x 16 x 16, are recalled.",
    ),
)

SOURCE = "official code"
LENGTH, BLOCK, PREFIX = 24, 4, 3


@claim("equivalence", {"mask": 0, "no prefix": 0, "targets": 0}, source=SOURCE)
def blocks_of_one_are_causal_attention() -> dict[str, int]:
    """With b = 1 the mask is the causal one with a visible prefix, and the target is the next token: entries that
    differ."""
    rows, columns = torch.arange(9).view(-1, 1), torch.arange(9)
    causal = (columns <= rows) | (columns < 3)
    tokens = torch.randint(100, (2, 9))
    inputs, targets = next_block(tokens, 1)
    return {
        "mask": int((next_block_pattern(9, 1, prefix=3).mask((9,)) != causal).sum()),
        "no prefix": int((next_block_pattern(9, 1).mask((9,)) != Causal().mask((9,))).sum()),
        "targets": int((inputs[:, 1:] != targets[:, :-1]).sum() + (targets != tokens + 1).sum()),
    }


@claim("property", {"base": 0, "hybrid": 0}, source=SOURCE)
def pairs_follow_the_formula() -> dict[str, int]:
    """n = K b tokens behind P of condition see n P + b^2 K (K + 1) / 2 pairs, and in the hybrid form b (b - 1) / 2
    fewer, since the first block is causal: what counting differs by, over five sizes."""
    wrong = {"base": 0, "hybrid": 0}
    for prefix, block, blocks in [(0, 1, 7), (3, 4, 6), (2, 8, 3), (77, 16, 5), (1, 5, 1)]:
        tokens = block * blocks
        expected = prefix**2 + tokens * prefix + block**2 * blocks * (blocks + 1) // 2
        for name in wrong:
            pattern = next_block_pattern(prefix + tokens, block, prefix=prefix, hybrid=name == "hybrid")
            fewer = block * (block - 1) // 2 if name == "hybrid" else 0
            wrong[name] += abs(pattern.num_visible((prefix + tokens,)) - (expected - fewer))
    return wrong


@claim(
    "property",
    {"next token": 1280, "base": 80, "hybrid": 95},
    source="definition; 1280 tokens of 17 frames at 128 x 128 in rows of 16, recalled",
)
def steps_of_generation() -> dict[str, int]:
    """Steps that make 1280 tokens: one a block, and in the hybrid form one for each token of the first block."""

    def steps(block: int, hybrid: bool) -> int:
        mask = next_block_pattern(1280, block, hybrid=hybrid).mask((1280,))
        return len(mask.sum(-1).unique())  # the tokens of a step see the same number

    return {"next token": steps(1, False), "base": steps(16, False), "hybrid": steps(16, True)}


@claim("equivalence", "equal to 1e-5", rounding, source="definition")
def decoding_with_a_cache_is_one_masked_pass() -> dict[str, float]:
    """Block by block with a cache of keys and values, a transformer of two layers gives the logits of one pass under
    the mask: relative differences."""
    net, tokens = SequenceNet(11, LENGTH + PREFIX).double(), torch.randint(11, (2, LENGTH + PREFIX))
    lengths = {
        "base": [PREFIX, *[BLOCK] * 6],
        "hybrid": [PREFIX, *[1] * BLOCK, *[BLOCK] * 5],
    }
    return {
        name: relative_difference(
            net.decode(tokens, steps),
            net(tokens, next_block_pattern(LENGTH + PREFIX, BLOCK, prefix=PREFIX, hybrid=name == "hybrid")),
        )
        for name, steps in lengths.items()
    }


@claim("property", 0, source="definition")
def a_target_is_never_seen() -> int:
    """No input that a position sees is its target or comes after it, in both forms: pairs for which it does."""
    leaks = 0
    for hybrid in (False, True):
        tokens = torch.arange(LENGTH).unsqueeze(0)  # every token by its place
        inputs, targets = next_block(tokens, BLOCK, hybrid=hybrid)
        seen = next_block_pattern(LENGTH, BLOCK, hybrid=hybrid).mask((LENGTH,))
        leaks += int((seen & (inputs >= targets.mT)).sum())
    return leaks


@claim(
    "theory",
    {"next token": 1.0, "blocks of two": 0.5},
    equal("2000 draws of a model that is trained, not exact", within=0.05),
    source="independent sampling inside a block",
)
def coupled_neighbours_are_drawn_apart() -> dict[str, float]:
    """Of pairs of equal random bits, a trained model draws equal ones nearly always if it draws one bit after the
    other, and half of the time if it draws both at once."""
    return {"next token": _draw_equal_pairs(1), "blocks of two": _draw_equal_pairs(2)}


@claim(
    "accuracy",
    {"b = 8 over b = 1": 0.0, "b = 8 over b = 64": 0.0},
    at_least(-0.02, "the order is expected: rows are about as good as single tokens, and frames no better than rows"),
    source="an experiment that the paper suggests; nobody had measured it",
    slow=True,
)
def rows_are_as_good_as_tokens() -> dict[str, float]:
    """Of videos of 4 frames of 8 x 8 bits, in which a column moves by one a frame to either side, a transformer gets a
    share of the last frame's bits right, with the truth before them given: by how much it is larger for one that was
    trained for 150 steps to predict rows than for one of tokens, and for one of frames."""
    right = {block: _train_on_bars(block) for block in (1, 8, 64)}
    return {"b = 8 over b = 1": right[8] - right[1], "b = 8 over b = 64": right[8] - right[64]}


@claim(
    "accuracy",
    {"700M": {"UCF-101": 103.3, "K600": 25.5}, "3B": {"UCF-101": 55.3, "K600": 19.5}},
    source="abstract; FVD",
    needs="the video models and data sets",
)
def videos_are_close_to_real_ones() -> None:
    """FVD of the models on two data sets."""


@claim(
    "speed",
    {"frames a second": 8.89, "times faster": 11},
    source="abstract",
    needs="the video models and a GPU",
)
def generation_is_faster() -> None:
    """Frames of 128 x 128 a second, and how many times more than next-token prediction makes."""


def replay(case: Case) -> dict[str, Tensor]:
    """The masks of the base and the hybrid form; lengths are rounded down to whole blocks, as official code does."""
    if "mask" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows the masks alone")
    prefix, tokens = case.args["prefix length"], case.args["video tokens"]
    outputs = {}
    for name, expected in case.expected.items():
        found = re.fullmatch(r"out\.(base|hybrid)_(\d+)", name)
        if found is None:
            raise InputError(f"{case.key}/{case.name} has an output {name!r}: replay knows base_<b> and hybrid_<b>")
        block = int(found[2])
        length = prefix + tokens // block * block
        pattern = next_block_pattern(length, block, prefix=prefix, hybrid=found[1] == "hybrid")
        outputs[name] = pattern.mask((length,)).to(expected.dtype)
    return outputs


def _draw_equal_pairs(block: int) -> float:
    """Share of equal pairs among 2000 that a model draws, trained for 150 steps on equal ones."""
    net, pattern = SequenceNet(2 + block, 2, dim=16, depth=1), next_block_pattern(2, block)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        inputs, targets = next_block(torch.randint(2, (64, 1)).expand(-1, 2), block)
        loss = F.cross_entropy(net(inputs, pattern).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = torch.zeros(2000, 2, dtype=torch.long)
    with torch.no_grad():
        for start in range(0, 2, block):
            logits = net(next_block(drawn, block).inputs, pattern)[:, start : start + block, block:]
            drawn[:, start : start + block] = torch.distributions.Categorical(logits=logits).sample()
    return (drawn[:, 0] == drawn[:, 1]).double().mean().item()


def _draw_bars(videos: int) -> Tensor:
    """(B, 256) bits of 4 frames of 8 x 8: a bright column that moves by one a frame to the right or to the left."""
    start, step = torch.randint(8, (videos, 1)), torch.randint(2, (videos, 1)) * 2 - 1
    column = (start + step * torch.arange(4)) % 8  # (B, 4)
    frames = F.one_hot(column, 8).unsqueeze(2).expand(-1, -1, 8, -1)  # (B, 4, 8, 8)
    return frames.flatten(1)


def _train_on_bars(block: int) -> float:
    """Accuracy on the last frame of 64 new videos, all that is before it given."""
    net = SequenceNet(2 + block, 256, dim=32)
    pattern = next_block_pattern(256, block)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        inputs, targets = next_block(_draw_bars(16), block)
        loss = F.cross_entropy(net(inputs, pattern).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = next_block(_draw_bars(64), block)
        right = net(inputs, pattern).argmax(-1) == targets
    return right[:, -64:].double().mean().item()
