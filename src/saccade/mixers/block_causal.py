"""Softmax attention that is causal between blocks and two-sided inside them (NBP, 2025, arXiv:2502.07737; block
diffusion, as in Efficient-DLM, 2025, arXiv:2512.14067)."""

from math import prod

from torch import Tensor

from saccade.errors import InputError
from saccade.mixers.attention import PatternAttention
from saccade.mixers.mixer import Mixer
from saccade.ops import BlockDiffusion, Pattern, next_block_pattern
from saccade.ops.check import check_positive

__all__ = ["BlockCausalAttention"]


class BlockCausalAttention(PatternAttention):
    """Softmax attention over blocks of tokens in reading order: each token sees its own block and all before it.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        block_size: tokens of a block. None takes a row of the map, all tokens of its last axis; of a sequence, one.
        prefix: tokens of a condition at the beginning of the sequence, which all see, and which see one another alone.
        hybrid: the first block after the condition is causal inside.
        noised: the map holds a noised sequence and then, from the middle of its first axis on, the clean one: see
            `saccade.ops.BlockDiffusion`. It excludes a condition and `hybrid`.
        options: as for PatternAttention.

    Class and register tokens, which see all and are seen by all, would carry the future into the past, and are refused.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        block_size: int | None = None,
        prefix: int = 0,
        hybrid: bool = False,
        noised: bool = False,
        **options,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        check_positive(block_size=1 if block_size is None else block_size)
        if prefix < 0 or (noised and (prefix or hybrid)):
            raise InputError(
                f"prefix is {prefix}, hybrid {hybrid} and noised {noised}: give a prefix of 0 or more tokens, and none "
                "of the two to a noised sequence"
            )
        self.block_size = block_size
        self.prefix = prefix
        self.hybrid = hybrid
        self.noised = noised

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        block = self.block_size or (space[-1] if len(space) > 1 else 1)
        if not self.noised:
            return next_block_pattern(prod(space), block, prefix=self.prefix, hybrid=self.hybrid)
        if space[0] % 2:
            raise InputError(f"the map is {space}: noised and clean share its first axis. Give an even length")
        return BlockDiffusion(block)

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        return Mixer.mix_with_prefix(self, x, prefix)
