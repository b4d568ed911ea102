"""Light Forcing: videos made chunk by chunk attend sparsely to their past, more so from chunk to chunk."""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.claims.framework import Paper, at_least, at_most, claim, relative_difference, rounding
from saccade.claims.framework.oracles import dense_attention, moving_photo, random_inputs
from saccade.measure import count_flops
from saccade.mixers import ChunkedHistoryAttention
from saccade.mixers.mixer import split_heads
from saccade.ops import grow_sparsity, select_history, sparse_attention
from saccade.ops.selection import block_order

PAPER = Paper(
    title="Light Forcing: Accelerating Autoregressive Video Diffusion via Sparse Attention",
    arxiv="2602.04789",
    published="2026-02-04",
    summary="A video is made chunk by chunk, and each chunk attends to itself and to all before. Early chunks, whose "
    "errors all others inherit, stay denser than late ones at the same cost, and each block of queries finds what it "
    "needs of the past in two steps: frames first, then blocks inside these.",
    home=("saccade.mixers.ChunkedHistoryAttention", "saccade.ops.grow_sparsity", "saccade.ops.select_history"),
    missing=("the video diffusion models, and how sparse attention is tuned into them",),
    differences=(
        "There is no official code. Not known are: how far a chunk is trusted (an argument, which falls evenly by "
        "default), the highest sparsity (the middle between the mean and 1), how many of the first and last frames are "
        "always chosen (one each), and whether the chunk's own blocks compete with those of the past (they do).",
        "Blocks are pooled from queries and keys as they are given: with rotary embedding, after it (uncertain).",
    ),
)

ABSTRACT = "a reading note on the paper"
MECHANISM = "the mechanism"
CHUNKS, TARGET = 8, 0.75
VBENCH = {"dense": 84.1, "STA": 83.6, "VMoBA": 83.6, "SLA": 83.2, "Radial": 73.7, "Light Forcing": 84.5}


@claim("equivalence", "equal", rounding, source=MECHANISM)
def seeing_everything_is_dense_attention() -> dict[str, float]:
    """With all frames and a density of 1, a chunk of 2 frames after 3 others attends as it does to all five densely,
    and a video of 4 chunks, without sparsity, as under a mask that hides later chunks."""
    query, key, value = random_inputs(5, 4, 3)
    chosen = select_history(query[:, :, 3:], key, 2, density=1, frames=None)
    chunk = dense_attention(query, key, value)[:, :, 3:]
    layer, x = _layer(sparsity=0.0, base=0.0), _random_video()
    q, k, v = (split_heads(part, 3) for part in layer.qkv(x).chunk(3, -1))
    number = (torch.arange(8) // 2).repeat_interleave(12)
    mixed = dense_attention(q, k, v, number.unsqueeze(1) >= number).movedim(1, -2).flatten(-2)
    return {
        "chunk": relative_difference(sparse_attention(query[:, :, 3:], key, value, chosen), chunk),
        "video": relative_difference(layer(x), layer.proj(mixed)),
    }


@claim("equivalence", "equal", rounding, source=MECHANISM)
def a_video_can_be_made_chunk_by_chunk() -> float:
    """Each chunk with the keys and values that those before it left gives what the whole video gives at once."""
    layer, x, history, outs = _layer(frames=1), _random_video(), None, []
    for start, stop, sparsity in layer.schedule(8):
        out, history = layer.extend(x[:, start:stop], history, sparsity=sparsity)
        outs.append(out)
    return relative_difference(torch.cat(outs, 1), layer(x))


@claim("property", {"first": 0.0, "mean": 0.0}, rounding, source="chunk-aware growth")
def sparsity_costs_what_was_asked() -> dict[str, float]:
    """The first chunk is dense, and the mean of the others, weighted by the keys that they see, is the target, also
    where so much trust is given that chunks are clamped to dense: how far it is off."""
    off = []
    for trust in (None, (9, 3, 1, 0.5, 0.2, 0.1, 0)):
        sparsities = grow_sparsity(CHUNKS, TARGET, trust=trust)
        costs = torch.arange(2, CHUNKS + 1, dtype=torch.float64)
        off.append(abs((costs @ torch.tensor(sparsities[1:], dtype=torch.float64) / costs.sum()).item() - TARGET))
    return {"first": grow_sparsity(CHUNKS, TARGET)[0], "mean": max(off)}


@claim("property", "above 0", at_least(1e-6, "every chunk is sparser than the one before"), source="chunk-aware growth")
def sparsity_grows_from_chunk_to_chunk() -> float:
    """Sparsity grows along the video: the smallest step of 8 chunks."""
    return torch.tensor(grow_sparsity(CHUNKS, TARGET)).diff().min().item()


@claim(
    "property",
    "below 1",
    at_most(0.99, "clearly below; nobody had measured it"),
    source="an experiment that the paper suggests",
)
def growing_sparsity_loses_less() -> dict[str, float]:
    """Eight chunks of 2 frames of 6 x 6 tokens, each read by attention from the frames so far, with noise added: the
    error of the last one against dense attention, with sparsity that grows, over that with the same sparsity
    for all and over that with sparsity that falls, at equal cost. Means over 10 videos."""
    costs = [float(i) for i in range(1, CHUNKS)]  # chunks of history that are read
    falling = [i / (CHUNKS - 1) for i in range(1, CHUNKS)]
    grown = _error_of_the_last(grow_sparsity(CHUNKS, TARGET, cost=costs))
    return {
        "even": grown / _error_of_the_last(grow_sparsity(CHUNKS, TARGET, base=TARGET, cost=costs)),
        "falling": grown / _error_of_the_last(grow_sparsity(CHUNKS, TARGET, cost=costs, trust=falling)),
    }


@claim(
    "complexity",
    {"formula": 1.0, "flat": 0.5},
    at_most(1.0, "frames that are chosen in any case are not scored"),
    source="hierarchical sparse attention",
)
def two_steps_score_fewer_pairs() -> dict[str, float]:
    """A query block takes F scores of frames and one for each block of those chosen, instead of F times the blocks of a
    frame: FLOPs of choosing (24 frames of 64 blocks, 6 chosen besides 6 always) over that formula and over one step."""
    query, key = torch.randn(1, 1, 4, 16, 16, 8), torch.randn(1, 1, 24, 16, 16, 8)
    counted = {
        frames: count_flops(lambda: select_history(query, key, 2, density=0.1, frames=frames)).total  # noqa: B023
        for frames in (6, None)
    }
    formula = 4 * 64 * (24 + 12 * 64) * 8 * 2
    return {"formula": counted[6] / formula, "flat": counted[6] / counted[None]}


@claim(
    "property",
    "not much lower",
    at_least(0.85, "what is much is not said"),
    source="hierarchical sparse attention",
)
def two_steps_find_nearly_as_much() -> dict[str, float]:
    """On a moving photo, of the blocks with the most attention of dense attention, and of this attention itself, two
    steps (2 of 4 frames besides the first, the last and the chunk's own two) find nearly as much as one step over all
    blocks at equal density: the ratios, at a density of 0.1 and of 0.25."""
    query, key, _ = moving_photo()
    query = query[:, :, 6:]
    weights = (query.flatten(2, -2) @ key.flatten(2, -2).mT * query.shape[-1] ** -0.5).softmax(-1)
    rows, columns = (block_order((frames, 16, 16), (1, 4, 4), torch.device("cpu")) for frames in (2, 8))
    tokens = weights[:, :, rows.flatten()][..., columns.flatten()]
    held = tokens.unflatten(3, tuple(columns.shape)).sum(-1).unflatten(2, tuple(rows.shape)).sum(3)
    ratios = {}
    for density in (0.1, 0.25):
        best = torch.zeros_like(held).scatter(-1, held.topk(round(density * held.shape[-1])).indices, 1.0)
        two, one = (
            select_history(query, key, 4, density=density, frames=frames).pairs((2, 16, 16)) for frames in (2, None)
        )
        ratios[f"blocks, {density}"] = ((two * best).sum() / (one * best).sum()).item()
        ratios[f"attention, {density}"] = ((two * held).sum() / (one * held).sum()).item()
    return ratios


@claim("accuracy", VBENCH, source=ABSTRACT + "; VBench total, Self Forcing 1.3B", needs="the video model and VBench")
def videos_are_as_good() -> None:
    """Videos of 5 seconds score as high as those of dense attention, and higher than with other sparse attention."""


@claim(
    "accuracy",
    {"one step": 73.0, "and tuning": 82.8, "and growth": 83.2, "and two steps": 84.5},
    source=ABSTRACT + "; VBench total",
    needs="the video model and VBench",
)
def every_part_helps() -> None:
    """Tuning, growing sparsity and choosing in two steps each add to the score."""


@claim(
    "speed",
    {"dense": 9.61, "STA": 8.27, "VMoBA": 7.42, "SLA": 7.71, "Radial": 7.39, "Light Forcing": 7.39},
    source=ABSTRACT + "; seconds for a video of 5 s",
    needs="the video model, and a GPU with the authors' kernels",
)
def videos_are_made_faster() -> None:
    """A video is made 1.30 times as fast, and its attention runs 3.79 times as fast."""


def _layer(**options: float) -> ChunkedHistoryAttention:
    """A layer of 24 channels and 3 heads, for chunks of 2 frames."""
    return ChunkedHistoryAttention(24, 3, chunk_frames=2, block_size=2, **options).double()  # type: ignore[arg-type]


def _random_video() -> Tensor:
    return torch.randn(2, 8, 4, 3, 24, dtype=torch.float64)


def _error_of_the_last(sparsities: tuple[float, ...]) -> float:
    errors = []
    for seed in range(10):
        dense, sparse = (_roll_out(each, seed)[:, :, -2:] for each in ((0.0,) * CHUNKS, sparsities))
        errors.append(_relative_error(sparse, dense))
    return sum(errors) / len(errors)


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _roll_out(sparsities: tuple[float, ...], seed: int) -> Tensor:
    """(1, 1, 16, 6, 6, 16): chunk i + 1 is what the tokens of chunk i read from all frames so far, with noise."""
    rng = torch.Generator().manual_seed(seed)
    dim, chunk = 16, (1, 1, 2, 6, 6, 16)
    to_query = torch.randn(dim, dim, generator=rng, dtype=torch.float64) / dim**0.5
    to_key = to_query + 0.5 * torch.randn(dim, dim, generator=rng, dtype=torch.float64) / dim**0.5
    video = torch.randn(chunk, generator=rng, dtype=torch.float64)
    for sparsity in sparsities[1:]:
        noise = torch.randn(chunk, generator=rng, dtype=torch.float64)
        query, key = 1.5 * video[:, :, -2:] @ to_query, video @ to_key
        chosen = select_history(query, key, 3, density=1 - sparsity, frames=None)
        read = sparse_attention(query, key, video, chosen)
        video = torch.cat([video, F.layer_norm(read, (dim,)) + 0.3 * noise], 2)
    return video
