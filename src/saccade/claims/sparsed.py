"""SparseD: every head chooses its blocks of keys once, after the first denoising steps, and keeps them."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from saccade.claims.framework import Case, Paper, at_least, claim, equal, play, relative_difference, rounding
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.claims.framework.text import SYMBOLS, CharacterModel, draw_texts, train_on_text
from saccade.errors import InputError
from saccade.measure import count_flops
from saccade.mixers import Attention, ReusedBlocksAttention
from saccade.ops import (
    Neighborhood,
    ReuseState,
    choosing_step,
    kept_blocks,
    pool_attention,
    reuse_attention,
    select_block_share,
    select_blocks_by_weight,
)

PAPER = Paper(
    title="SparseD: Sparse Attention for Diffusion Language Models",
    arxiv="2509.24014",
    published="2025-09-28",
    summary="The attention of a denoising model differs between heads and hardly changes between steps, and its first "
    "steps decide the quality. So the first steps attend in full; then each head chooses, once, the blocks of keys "
    "with the largest mean weight, and all later steps see these alone.",
    home=(
        "saccade.mixers.ReusedBlocksAttention",
        "saccade.ops.block_weights",
        "saccade.ops.reuse_attention",
        "saccade.ops.select_blocks_by_weight",
    ),
    missing=("the diffusion language models in which it was measured",),
    differences=(
        "Official code chooses with logits scaled by (number of heads)^-0.5, where D^-0.5 must be meant; ours does "
        "with choosing_scale.",
        "Official code asks for one block more than there are when everything is kept; ours stops at all.",
        "Official code keeps the step and the masks inside the model and resets them at step 0; ours are an argument "
        "and a result.",
    ),
)

CODE = "official code"
ABSTRACT = "abstract"


@claim("equivalence", "identical", rounding, source="the operator's definition")
def keeping_all_or_skipping_all_is_full_attention() -> dict[str, float]:
    """With r = 1, and with skip = 1, every step is full attention: the largest relative difference over 6 steps."""
    query, key, value = random_inputs(5, 8)
    expected = dense_attention(query, key, value)
    found = {}
    for name, keep, skip in [("r = 1", 1.0, 0.0), ("skip = 1", 0.0, 1.0)]:
        choose = partial(select_blocks_by_weight, block_size=(2, 3), keep=keep)
        state, errors = ReuseState(), []
        for _ in range(6):
            out, state = reuse_attention(query, key, value, state, choose, choose_at=choosing_step(6, skip))
            errors.append(relative_difference(out, expected))
        found[name] = max(errors)
    return found


@claim("property", {"prompt": 0, "generated": 0, "chosen after all": 0}, source="isolated selection")
def prompt_and_generated_keys_have_quotas_of_their_own() -> dict[str, int]:
    """Each row keeps exactly int(r nG) + 1 of the nG generated blocks and at most int(r nK) + 1 of the prompt's, and of
    these none that the choice over all nK would not have taken: rows where it is not so, for 200 tokens in blocks of
    8, 77 of them generated."""
    query, key, _ = random_inputs(200)
    pairs = select_blocks_by_weight(query, key, 8, generated=77).pairs((200,))
    free = select_blocks_by_weight(query, key, 8).pairs((200,))
    first = 16  # the first block with no more than 77 tokens left
    prompt, generated = pairs[..., :first].sum(-1), pairs[..., first:].sum(-1)
    return {
        "prompt": int((prompt > kept_blocks(25, 0.3)).sum()),
        "generated": int((generated != kept_blocks(9, 0.3)).sum()),
        "chosen after all": int((pairs[..., :first] != free[..., :first]).any(-1).sum()),
    }


@claim(
    "property",
    {"small change": "same blocks", "heads": "as by chance"},
    equal("the words are taken as at least 0.9, and within 0.1 of chance"),
    source="observations",
)
def stable_attention_keeps_its_blocks() -> dict[str, str]:
    """With A_t = softmax(S + eps N_t) the blocks of one step are those of another while eps is small (0.05), and the
    blocks of one head are those of another as often as by chance: shares of 256 tokens' blocks of 8, r = 0.3."""
    logits = 2 * torch.randn(1, 8, 256, 256)

    def choose() -> Tensor:
        weights = (logits + 0.05 * torch.randn_like(logits)).softmax(-1)
        return select_block_share(pool_attention(weights, 8), 0.3, query_block=8, key_block=8).pairs((256,))

    chosen, later = choose(), choose()
    steps = _overlap(chosen, later)
    heads = _overlap(chosen[:, :4], chosen[:, 4:])
    chance = kept_blocks(32, 0.3) / 32
    return {
        "small change": "same blocks" if steps >= 0.9 else f"{steps:.2f}",
        "heads": "as by chance" if abs(heads - chance) <= 0.1 else f"{heads:.2f}",
    }


@claim("complexity", 0, source="the operator's definition")
def cost_of_a_run_is_counted() -> int:
    """With t0 + 1 full steps of S and the share d of blocks, a run costs (t0 + 1) + (S - t0 - 1) d of full attention,
    and the queries' products with the keys once more for choosing: what counting adds to that, in FLOPs."""
    query = torch.randn(1, 2, 512, 16)
    steps, at = 20, choosing_step(20, 0.2)

    def run() -> None:
        state = ReuseState()
        for _ in range(steps):
            _, state = reuse_attention(
                query, query, query, state, partial(select_blocks_by_weight, block_size=32), choose_at=at
            )

    full, density = 4 * 2 * 512**2 * 16, kept_blocks(16, 0.3) / 16
    return int(count_flops(run).total - full * (at + 1 + (steps - at - 1) * density + 0.5))


@claim("complexity", 0.44, equal("two decimals are stated", within=0.005), source="0.2 + 0.8 * 0.3")
def cost_of_a_long_run() -> float:
    """With skip 0.2 and r = 0.3 a run of 1024 steps on 64 thousand tokens in blocks of 128 takes 0.44 of full
    attention's cost, choosing apart."""
    full = (choosing_step(1024, 0.2) + 1) / 1024
    return full + (1 - full) * kept_blocks(512, 0.3) / 512


@claim(
    "property",
    "larger errors",
    at_least(1, "the order is stated, not the figures"),
    source="observations; an experiment of ours",
    slow=True,
)
def choosing_early_is_worse_and_so_is_a_window() -> dict[str, float]:
    """A masked model of characters (64 tokens, 2 layers, 4 heads) fills in the second half of texts in 16 steps.
    Characters that differ from those of full attention, over those with skip 0.2: with skip 0, and with a sliding
    window of the same density (blocks of 4, two of 16 kept)."""
    model = _train_masked()
    texts = draw_texts(256, 64, held_out=True)
    hidden = texts.index_fill(1, torch.arange(32, 64), SYMBOLS)
    full = _fill_in(model, hidden, [ReuseState()] * 2, 99)
    early, late = (_fill_in(model, hidden, [ReuseState()] * 2, choosing_step(16, skip)) for skip in (0.0, 0.2))
    window = _fill_in(model, hidden, [ReuseState(0, Neighborhood(8))] * 2, 99)
    errors = [(each != full).double().mean().item() for each in (early, late, window)]
    return {"skip 0": errors[0] / errors[1], "window": errors[2] / errors[1]}


@claim(
    "accuracy",
    "near-lossless",
    source=ABSTRACT,
    needs="LLaDA-1.5 and Dream-7B, and their benchmarks",
)
def accuracy_is_kept() -> None:
    """The diffusion language models answer about as well as with full attention."""


@claim("speed", 1.5, source=ABSTRACT + "; over FlashAttention", needs="LLaDA-1.5 or Dream-7B on a GPU")
def long_contexts_get_faster() -> None:
    """With 64 thousand tokens of context and 1024 steps generation is up to 1.5 times as fast."""


def replay(case: Case) -> dict[str, Tensor]:
    """create_attention_block_mask: from an attention map to blocks, and what tokens see of them."""
    if "create_attention_block_mask" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows create_attention_block_mask")

    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return case.build(partial(_choose_blocks, inputs["attn"]))

    return play(case, forward)


def _choose_blocks(attention: Tensor, block_size: int = 128, keep_ratio: float = 0.3) -> dict[str, Tensor]:
    """With the arguments of official code, whose view of tokens has every third of the first image and head."""
    queries, keys = attention.shape[2:]
    blocks: dict[str, Any] = {"query_block": block_size, "key_block": block_size, "key_size": (keys,), "ragged": True}
    chosen = select_block_share(pool_attention(attention, block_size), keep_ratio, **blocks)
    return {
        "mask": chosen.pairs((queries,)).byte(),
        "token_view": chosen.mask((queries,))[0, 0, ::3, ::3].byte(),
    }


def _overlap(left: Tensor, right: Tensor) -> float:
    """Share of the pairs of one choice that the other has too."""
    return ((left & right).sum() / left.sum()).item()


@cache
def _train_masked() -> CharacterModel:
    """A model that fills in hidden characters, trained with full attention; about half a minute."""

    def hide() -> tuple[Tensor, Tensor]:
        texts = draw_texts(32, 64)
        hidden = torch.rand(texts.shape) < torch.rand(len(texts), 1)
        return texts.masked_fill(hidden, SYMBOLS), texts.masked_fill(~hidden, -1)

    full = CharacterModel(lambda dim: Attention(dim, 4), 64)
    train_on_text(full, hide, 1200)
    model = CharacterModel(lambda dim: ReusedBlocksAttention(dim, 4, block_size=4, keep=0.1), 64)
    model.load_state_dict(full.state_dict())
    return model.eval()


@torch.no_grad()
def _fill_in(model: CharacterModel, codes: Tensor, states: list[ReuseState], choose_at: int) -> Tensor:
    """Fill in hidden characters, in each step the two of which the model is surest."""
    while (codes == SYMBOLS).any():
        x, after = model.start(codes), []
        for block, state in zip(model.blocks, states):
            mixed, state = block.mixer.step(block.norm1(x), state, choose_at=choose_at)  # type: ignore[operator, union-attr]
            x = x + mixed
            x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
            after.append(state)
        states = after
        sure, best = model.head(x).softmax(-1).max(-1)
        chosen = sure.masked_fill(codes != SYMBOLS, -1).topk(2, -1).indices
        codes = codes.scatter(1, chosen, best.gather(1, chosen))
    return codes
