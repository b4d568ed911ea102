"""Long-Context Attention Benchmark: the same masks for every kernel and every way to share a long sequence."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from saccade.claims.framework import Paper, at_most, claim, equal, relative_difference, rounding
from saccade.claims.framework.oracles import dense_attention
from saccade.measure import count_flops, measure_time
from saccade.ops import (
    MASKS,
    Causal,
    Documents,
    MaskLayout,
    Pattern,
    StaticPattern,
    build_mask,
    merge_attention,
    pattern_cost,
    sparse_attention,
)
from saccade.ops.parallel_attention import PatternPart

PAPER = Paper(
    title="Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism",
    arxiv="2510.17896",
    published="2025-10-19",
    summary="One harness times attention kernels under twelve static and two dynamic masks, and schemes that share a "
    "long sequence among GPUs, with one convention of FLOPs and one set of rules, where published comparisons mostly "
    "use one mask and one framework.",
    home=(
        "saccade.ops.MASKS",
        "saccade.ops.build_mask",
        "saccade.measure.bench_masks",
        "saccade.ops.parallel_attention",
    ),
    missing=(
        "FlashAttention, cuDNN, FlashMask, FlashInfer and VSA among the kernels: torch's own are compared with",
        "USP and LoongTrain's double ring on several machines: they run here as simulations",
    ),
    differences=(
        "The number on arXiv and the exact list of masks are recalled: those are taken as they are usually defined.",
        "A double ring sends as much as a ring, in another order, so the simulations do not tell them apart.",
    ),
)

DEFINITION = "definitions of the masks and schemes"
LENGTH = 48
Inputs = tuple[Tensor, Tensor, Tensor]
SCHEMES = {"Ulysses": (4, 1), "ring": (1, 4), "USP": (2, 2)}  # processes that share heads, and tokens


@claim("equivalence", "equal to 1e-5", rounding, source=DEFINITION)
def every_mask_gives_what_its_predicate_says() -> dict[str, float]:
    """On all 14 masks the tiled engine gives dense attention under a mask written as a predicate of two numbers (the
    drawn ones: under their own): the largest relative difference of outputs and gradients."""
    errors = {}
    for name in MASKS:
        layout = MaskLayout(LENGTH, block_size=8)
        pattern = MASKS[name](layout)
        inputs, upstream = _random_inputs()
        mask = _predicate(name, layout) if name in _PREDICATES else pattern.mask((LENGTH,))[0, 0]
        outputs = sparse_attention(*inputs, pattern), dense_attention(*inputs, mask=mask)
        grads = [torch.autograd.grad(out, inputs, upstream) for out in outputs]
        pairs = [outputs, *zip(*grads)]
        errors[name] = max(relative_difference(ours, theirs) for ours, theirs in pairs)
    return errors


@claim("equivalence", "equal to 1e-5", rounding, source=DEFINITION)
def every_scheme_gives_the_whole_result() -> dict[str, float]:
    """Ulysses, ring and USP on four simulated processes, contiguous and in zigzag order, give on all static masks what
    one process gives: the largest relative difference of outputs and gradients."""
    errors = dict.fromkeys(SCHEMES, 0.0)
    for name, (by_heads, by_tokens) in SCHEMES.items():
        for mask in _PREDICATES:
            pattern = build_mask(mask, LENGTH, block_size=8)
            inputs, upstream = _random_inputs()
            whole = dense_attention(*inputs, mask=pattern.mask((LENGTH,)))
            expected = [whole, *torch.autograd.grad(whole, inputs, upstream)]
            for share in (_contiguous, _zigzag):
                out, _ = _simulate(inputs, pattern, share(LENGTH, by_tokens), by_heads)
                found = [out, *torch.autograd.grad(out, inputs, upstream)]
                errors[name] = max(errors[name], *map(relative_difference, found, expected))
    return errors


@claim(
    "property",
    dict.fromkeys(("full", "causal", "causal_sliding_window", "document", "causal_document"), 0),
    source=DEFINITION,
)
def pairs_have_closed_forms() -> dict[str, int]:
    """Pairs that may attend: N^2, N (N + 1) / 2, (w + 1) N - w (w + 1) / 2, the sum of n_i^2 and of n_i (n_i + 1) / 2.
    What counting differs by at N = 4096, without an N x N mask."""
    layout = MaskLayout(4096, documents=(1000, 1, 3000, 95), window=100)
    number, window = layout.length, layout.reach
    expected = {
        "full": number**2,
        "causal": number * (number + 1) // 2,
        "causal_sliding_window": (window + 1) * number - window * (window + 1) // 2,
        "document": sum(n**2 for n in layout.parts),
        "causal_document": sum(n * (n + 1) // 2 for n in layout.parts),
    }
    return {name: pattern_cost(MASKS[name](layout), (number,)).pairs - pairs for name, pairs in expected.items()}


@claim(
    "property",
    {"contiguous": 2 - 1 / 8, "zigzag": 1.0},
    equal("a process has a row of its diagonal more or less", within=0.01),
    source=DEFINITION,
)
def zigzag_balances_causal_attention() -> dict[str, float]:
    """Under a causal mask, the largest share of the pairs that one of R = 8 processes computes over the mean, at 2048
    tokens: 2 - 1 / R for contiguous shares, 1 where a process holds chunks r and 2 R - 1 - r."""
    balance = {}
    for name, share in (("contiguous", _contiguous), ("zigzag", _zigzag)):
        every = tuple(range(2048))
        pairs = [PatternPart(Causal(), (2048,), mine, every).num_visible((len(mine),)) for mine in share(2048, 8)]
        balance[name] = max(pairs) / (sum(pairs) / 8)
    return balance


@claim(
    "complexity",
    {"Ulysses": 4 / 4 * 3 / 4, "ring": 2 * 3 / 4, "USP": 4 / 4 * 1 / 2 + 2 / 2 * 1 / 2},
    source=DEFINITION,
)
def what_travels() -> dict[str, float]:
    """Numbers that each of R = 4 processes sends, over N d for all heads, as counted in the simulation: Ulysses
    4 / R (R - 1) / R, a ring (and a gather of all keys and values, at once) 2 (R - 1) / R, and USP of 2 x 2 between."""
    inputs, _ = _random_inputs()
    sent = {}
    for name, (by_heads, by_tokens) in SCHEMES.items():
        _, count = _simulate(inputs, Causal(), _contiguous(LENGTH, by_tokens), by_heads)
        sent[name] = count / inputs[0][0].numel()
    return sent


@claim("flops", 2.5, source="convention of the benchmark; five products for two")
def backward_takes_two_and_a_half_times_as_many() -> float:
    """FLOPs of the backward pass of fused attention over those of its forward pass, counted."""
    inputs = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
    forward, both = (
        count_flops(torch.nn.functional.scaled_dot_product_attention, *inputs, backward=backward).total
        for backward in (False, True)
    )
    return both / forward - 1


@claim(
    "complexity",
    "sum n_i^2 / N^2",
    at_most(1.137, "a tile of 64 queries at each of two borders computes both documents: up to 2 * 64 * 2048 more"),
    source=DEFINITION,
)
def documents_cost_their_squares() -> dict[str, float]:
    """Pairs that the tiled engine computes under a document mask, over the sum of n_i^2: documents of 1024, 512 and 512
    tokens, and of 100, 900 and 1048."""
    found = {}
    for lengths in ((1024, 512, 512), (100, 900, 1048)):
        computed = pattern_cost(Documents(lengths), (2048,)).computed
        found[", ".join(map(str, lengths))] = computed / sum(n**2 for n in lengths)
    return found


@claim(
    "speed",
    1 / 16,
    at_most(0.25, "small parts fill a processor less, their keys are gathered, and other programs run beside"),
    source=DEFINITION + "; sum n_i^2 / N^2",
    slow=True,
)
def documents_save_their_time() -> float:
    """Time of the tiled engine under a mask of 16 equal documents over that of the whole sequence of 4096 tokens."""
    query, key, value = torch.randn(3, 1, 4, 4096, 32)

    def seconds(pattern: Pattern) -> float:
        return measure_time(lambda: sparse_attention(query, key, value, pattern), repeats=7).low

    return seconds(Documents((256,) * 16)) / seconds(build_mask("full", 4096))


@claim(
    "speed",
    "the tables of the benchmark",
    source="the paper; its figures are not known here",
    needs="up to 96 H100 GPUs and the kernels that it compares; `saccade bench masks --device cuda` times torch's",
)
def kernels_and_schemes_compare() -> None:
    """TFLOP/s of seven dense and five sparse kernels up to 64 K tokens and more, and of five schemes up to 768 K."""


def _random_inputs() -> tuple[Inputs, Tensor]:
    """Query, key and value, (2, 4, 48, 8) with a gradient, and what comes from above."""
    query, key, value, upstream = torch.randn(4, 2, 4, LENGTH, 8, dtype=torch.float64)
    return (query.requires_grad_(), key.requires_grad_(), value.requires_grad_()), upstream


def _predicate(name: str, layout: MaskLayout) -> Tensor:
    rows = torch.arange(layout.length).view(-1, 1)
    return _PREDICATES[name](rows, rows.mT, layout).expand(layout.length, layout.length)


def _document(place: Tensor, layout: MaskLayout) -> Tensor:
    """Number of the document of each token."""
    return torch.searchsorted(torch.tensor(list(accumulate(layout.parts))), place.contiguous(), right=True)


def _together(i: Tensor, j: Tensor, layout: MaskLayout) -> Tensor:
    return _document(i, layout) == _document(j, layout)


def _inside(place: Tensor, layout: MaskLayout) -> tuple[Tensor, Tensor]:
    """The place of each token in its document, and the length of its prefix."""
    lengths = torch.tensor(layout.parts)
    document = _document(place, layout)
    starts = torch.tensor([0, *accumulate(layout.parts)])
    return place - starts[document], (lengths * layout.prefix).long().clamp(min=1)[document]


def _answer(place: Tensor, layout: MaskLayout) -> Tensor:
    """Number of the answer of each token, -1 in a question; answers share a document's rest in three."""
    inside, prefix = _inside(place, layout)
    rest = torch.tensor(layout.parts)[_document(place, layout)] - prefix
    ends = torch.stack([rest * n // 3 for n in (1, 2, 3)])
    return ((inside - prefix) >= ends).sum(0).where(inside >= prefix, -1)


def _share_question(i: Tensor, j: Tensor, layout: MaskLayout) -> Tensor:
    visible = (_answer(j, layout) == -1) | (_answer(i, layout) == _answer(j, layout))
    return (j <= i) & _together(i, j, layout) & visible


def _prefix_document(i: Tensor, j: Tensor, layout: MaskLayout) -> Tensor:
    inside, prefix = _inside(j, layout)
    return _together(i, j, layout) & ((j <= i) | (inside < prefix))


_PREDICATES: dict[str, Callable[[Tensor, Tensor, MaskLayout], Tensor]] = {
    "full": lambda i, j, layout: (i >= 0) & (j >= 0),
    "causal": lambda i, j, layout: j <= i,
    "sliding_window": lambda i, j, layout: (i - j).abs() <= layout.reach,
    "causal_sliding_window": lambda i, j, layout: (i - j >= 0) & (i - j <= layout.reach),
    "document": _together,
    "causal_document": lambda i, j, layout: (j <= i) & _together(i, j, layout),
    "share_question": _share_question,
    "causal_blockwise": lambda i, j, layout: (
        (j <= i) & (_together(i, j, layout) | (_document(i, layout) == len(layout.parts) - 1))
    ),
    "prefix": lambda i, j, layout: (j <= i) | (j < int(layout.length * layout.prefix)),
    "prefix_document": _prefix_document,
    "global_sliding_window": lambda i, j, layout: (
        ((i - j).abs() <= layout.reach) | (i < len(layout.first)) | (j < len(layout.first))
    ),
    "block_causal_document": lambda i, j, layout: (
        _together(i, j, layout) & (j // layout.block_size <= i // layout.block_size)
    ),
}
"""Whether query i sees key j, of the static masks."""


def _contiguous(length: int, ranks: int) -> list[tuple[int, ...]]:
    """The tokens of each process, one stretch after the other."""
    return [tuple(each.tolist()) for each in torch.arange(length).chunk(ranks)]


def _zigzag(length: int, ranks: int) -> list[tuple[int, ...]]:
    """Process r holds chunks r and 2 R - 1 - r."""
    chunks = torch.arange(length).chunk(2 * ranks)
    return [tuple(torch.cat([chunks[r], chunks[-1 - r]]).tolist()) for r in range(ranks)]


def _simulate(inputs: Inputs, pattern: Pattern, shares: list[tuple[int, ...]], by_heads: int) -> tuple[Tensor, float]:
    """Attention of processes that share heads and tokens; and how many numbers of one sequence each of them sends.

    Processes of a group trade tokens for heads among themselves, and keys and values travel in rings of the groups.
    """
    assert isinstance(pattern, StaticPattern)
    space, sent, outputs = (inputs[0].shape[2],), 0, []
    groups = [x.chunk(by_heads, 1) for x in inputs]  # of heads
    for query, key, value in zip(*groups):
        parts = []
        for mine in shares:
            results = []
            for theirs in shares:  # one after the other, as they arrive
                q, k, v = query[:, :, mine], key[:, :, theirs], value[:, :, theirs]
                results.append(sparse_attention(q, k, v, PatternPart(pattern, space, mine, theirs), return_lse=True))
                sent += k[0].numel() + v[0].numel() if theirs != mine else 0
            parts.append(merge_attention(results).out)
            # of its own tokens, a share of each group's: all heads but those of the group come and go
            others = parts[-1][0].numel() // by_heads * (by_heads - 1)
            sent += 4 * others
        back = torch.tensor([place for share in shares for place in share]).argsort()
        outputs.append(torch.cat(parts, 2)[:, :, back])
    return torch.cat(outputs, 1), sent / (by_heads * len(shares))
