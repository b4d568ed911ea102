"""Replay of NATTEN, the official code of several papers on neighborhood attention."""

from typing import Any

import torch
from torch import Tensor

from saccade.claims.framework.recorded import Case, parse_args, play, replay_parts, run_official
from saccade.mixers import NeighborhoodAttention
from saccade.ops import Neighborhood, sparse_attention

__all__ = ["replay"]


def replay(case: Case) -> dict[str, Tensor]:
    """NATTEN: its modules, its functions na1d, na2d and na3d (heads last), and the masks of its reference."""
    if "NeighborhoodAttention" in case.cls:
        layer = case.build(_from_natten)
        return play(case, lambda state, inputs: {"y": run_official(layer, state, inputs["x"])})
    parts = {f"case{row['case']}": row for row in case.record.get("cases", ())}
    masks = {f"out.mask{row['mask']}": parse_args(row) for row in case.record.get("masks", ())}
    results = replay_parts(case, parts, _replay_function) if parts else _replay_function(case)
    return results | {name: _pattern(**row).mask(row["layout"]).to(torch.uint8) for name, row in masks.items()}


def _replay_function(case: Case) -> dict[str, Tensor]:
    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        heads_first = {name: tensor.movedim(-2, 1) for name, tensor in inputs.items()}
        result = sparse_attention(
            heads_first["q"],
            heads_first["k"],
            heads_first["v"],
            _pattern(**case.args),
            extra_key=heads_first.get("additional_keys"),
            extra_value=heads_first.get("additional_values"),
            scale=case.args.get("scale") or None,
            return_lse=True,
        )
        outputs = {"out": result.out.movedim(1, -2), "lse": result.lse.movedim(1, -1)}
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


def _pattern(
    kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False, **_sizes_and_scale: object
) -> Neighborhood:
    return Neighborhood(kernel_size, stride, dilation, is_causal)


def _from_natten(
    embed_dim: int,
    num_heads: int,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    proj_drop: float = 0.0,
) -> NeighborhoodAttention:
    """The layer with the arguments of NATTEN's NeighborhoodAttention1D, 2D and 3D."""
    return NeighborhoodAttention(
        embed_dim,
        num_heads,
        window_size=kernel_size,
        stride=stride,
        dilation=dilation,
        causal=is_causal,
        qkv_bias=qkv_bias,
        scale=qk_scale or None,
        proj_drop=proj_drop,
    )
