"""Agent attention: a few pooled queries stand between queries and keys."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    claim,
    count_model_parameters,
    equal,
    measure_model_flops,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.claims.framework.experiment import train_on_digits
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters
from saccade.mixers import AgentAttention, Attention
from saccade.ops import agent_attention, agent_attention_weights, softmax_attention

PAPER = Paper(
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    arxiv="2312.08874",
    published="2023-12-14",
    summary="A small set of agent tokens, pooled queries, gathers from keys and values by softmax attention, and every "
    "query reads from the agents by a second softmax: cost is linear in the tokens, and the whole is a linear "
    "attention whose feature maps are the two softmax matrices. Position biases and a depthwise convolution of the "
    "values restore detail and rank.",
    home=(
        "saccade.mixers.AgentAttention",
        "saccade.ops.agent_attention",
        "saccade.backbones.AgentDeiT",
        "saccade.backbones.AgentPVT",
        "saccade.backbones.AgentSwin",
        "saccade.backbones.AgentCSwin",
    ),
    missing=("AgentSD, the training-free form for Stable Diffusion",),
    differences=(
        "Official code ignores its arguments qk_scale and, in windows, the mask of a shift; so does replay.",
        "Official biases of rows and columns fit one map; ours are resized to any other.",
        "Blocks of Agent-PVT without agents, which no published network has, are refused; the norm behind its patches "
        "has the eps 1e-5 of PVT's code (recalled).",
        "No outputs of whole networks are recorded: names, shapes, parameters and FLOPs are those of official code.",
    ),
)

REPOSITORY = "the repository's table"
CODE = "counted on the official code"
NETWORKS = {
    "DeiT-T": ("agent_deit_tiny", 6_015_640, 2_335_755_264),
    "DeiT-S": ("agent_deit_small", 22_647_112, 8_854_542_336),
    "DeiT-B": ("agent_deit_base", 87_204_904, 35_053_768_704),
    "PVT-T": ("agent_pvt_tiny", 11_570_352, 3_972_705_280),
    "PVT-S": ("agent_pvt_small", 20_635_066, 7_909_664_768),
    "PVT-M": ("agent_pvt_medium", 35_921_746, 13_998_522_368),
    "PVT-L": ("agent_pvt_large", 48_738_180, 20_678_980_096),
    "Swin-T": ("agent_swin_tiny", 28_902_964, 8_998_895_616),
    "Swin-S": ("agent_swin_small", 49_666_684, 17_402_873_856),
    "Swin-B": ("agent_swin_base", 88_095_096, 30_799_675_392),
    "CSwin-T": ("agent_cswin_tiny", 20_458_672, 8_584_281_088),
    "CSwin-S": ("agent_cswin_small", 32_814_100, 13_487_529_984),
    "CSwin-B": ("agent_cswin_base", 73_249_696, 29_739_847_680),
}
SHIFTED = ("Swin-S", "Swin-B")


@claim(
    "params",
    {"DeiT-T": 6.0, "DeiT-S": 22.7, "DeiT-B": 87.2, "PVT-T": 11.6, "PVT-S": 20.6, "PVT-M": 35.9, "PVT-L": 48.7},
    equal("one decimal is published, and 22.647 of DeiT-S was rounded up", within=0.06),
    source=REPOSITORY,
)
def networks_have_their_sizes() -> dict[str, float]:
    """Agent-DeiT and Agent-PVT have so many million parameters."""
    return {name: count / 1e6 for name, count in _count_parameters().items() if "win" not in name}


@claim(
    "params",
    {"Swin-T": 29.0, "Swin-S": 50.0, "Swin-B": 88.0, "CSwin-T": 21.0, "CSwin-S": 33.0, "CSwin-B": 73.0},
    equal("no decimal is published, and 20.46 of CSwin-T was rounded up", within=0.55),
    source=REPOSITORY,
)
def networks_of_windows_have_their_sizes() -> dict[str, float]:
    """Agent-Swin and Agent-CSwin have so many million parameters."""
    return {name: count / 1e6 for name, count in _count_parameters().items() if "win" in name}


@claim("params", {name: params for name, (_, params, _) in NETWORKS.items()}, source=CODE)
def networks_have_exact_sizes() -> dict[str, int]:
    """The networks have so many parameters; DeiT-B has agents in its first 4 of 12 blocks."""
    return _count_parameters()


@claim("params", 23_070_472, source=CODE)
def larger_images_have_longer_tables() -> int:
    """DeiT-S for images of 448 x 448 has so many parameters."""
    return count_model_parameters({"DeiT-S": "agent_deit_small"}, image_size=448)["DeiT-S"]


@claim("flops", {name: flops for name, (_, _, flops) in NETWORKS.items() if name not in SHIFTED}, source=CODE)
def networks_have_exact_cost() -> dict[str, int]:
    """The networks take so many FLOPs for an image of 224 x 224."""
    return _count_flops([name for name in NETWORKS if name not in SHIFTED])


@claim(
    "flops",
    {name: NETWORKS[name][2] for name in SHIFTED},
    equal(
        "shifted windows are smaller at the border: official code masks them, ours covers them by tiles", relative=0.01
    ),
    source=CODE,
)
def networks_of_shifted_windows_have_their_cost() -> dict[str, int]:
    """Agent-Swin S and B, whose third stage has shifted windows, take so many."""
    return _count_flops(SHIFTED)


@claim("flops", 35_283_044_352, source=CODE)
def cost_at_high_resolution() -> int:
    """DeiT-S takes so many FLOPs for an image of 448 x 448, four times those of 224 x 224."""
    return measure_model_flops(["agent_deit_small"], image_size=448)["agent_deit_small"]


@claim("params", (0, 0, 0), source="the layer's definition")
def biases_and_a_convolution_are_the_only_additions() -> tuple[int, ...]:
    """Beside softmax attention a block has 2 x 49 a + 2 a (h + w) bias numbers a head (2 a more with a class token) and
    10 C numbers of its convolution: what is left of three layers' parameters without these."""
    rest = []
    for dim, heads, agents, side, prefix in [(64, 2, 9, 56, 0), (320, 5, 49, 14, 0), (192, 3, 49, 14, 1)]:
        layer = AgentAttention(dim, heads, num_agents=agents, size=side, num_prefix=prefix)
        biases = heads * (2 * 49 * agents + 4 * agents * side + 2 * agents * prefix)
        rest.append(count_parameters(layer) - count_parameters(Attention(dim, heads)) - biases - 10 * dim)
    return tuple(rest)


@claim("complexity", tuple(8 * tokens * 49 * 64 for tokens in (196, 784, 3136)), source="cost of the layer")
def cost_is_linear_in_the_tokens() -> tuple[int, ...]:
    """Attention takes 4 N a C multiply-adds, 8 N a C FLOPs: a = 49 agents, C = 64 channels and N = 196, 784, 3136
    tokens, counted while it runs."""
    return tuple(_count_agent(tokens) for tokens in (196, 784, 3136))


@claim("flops", {"agent": 4.0, "softmax": 16.0}, source="cost at high resolution")
def four_times_the_tokens() -> dict[str, float]:
    """With 4 N tokens the products of agent attention cost 4 times as much, those of softmax attention 16 times."""
    return {"agent": _count_agent(784) / _count_agent(196), "softmax": _count_softmax(784) / _count_softmax(196)}


@claim("equivalence", "equal to 1e-6", rounding, source="generalized linear attention")
def generalized_linear_attention() -> float:
    """(phi_q phi_k^T) v, formed with all N x N entries from the two softmax matrices, is what the two steps give."""
    query, key, value, agent, *biases = _inputs()
    two_steps, dense = (
        agent_attention(query, key, value, agent, agent_bias=biases[0], query_bias=biases[1], impl=impl)
        for impl in ("linear", "reference")
    )
    return relative_difference(two_steps, dense)


@claim(
    "property",
    {"row sums": 1.0, "negative": 0, "rank": 9, "rank of softmax": 64},
    equal("what float64 loses to rounding", within=1e-10),
    source="generalized linear attention",
)
def token_matrix() -> dict[str, float]:
    """The matrix phi_q phi_k^T has rows that sum to 1, no negative entry, and no more than the rank of the agents (9 of
    them, 64 tokens), where that of softmax attention has full rank."""
    query, key, _, agent, *biases = _inputs()
    weights = agent_attention_weights(query, key, agent, agent_bias=biases[0], query_bias=biases[1])
    sums = weights.sum(-1)
    softmax = softmax_attention(query, key, torch.eye(64, dtype=torch.float64).expand(2, 3, 64, 64))
    return {
        "row sums": sums.flatten()[(sums - 1).abs().argmax()].item(),
        "negative": int((weights < 0).sum()),
        "rank": int(torch.linalg.matrix_rank(weights).max()),
        "rank of softmax": int(torch.linalg.matrix_rank(softmax).max()),
    }


@claim("equivalence", "equal", rounding, source="the layer's definition")
def one_agent_says_the_same_to_every_query() -> float:
    """With a = 1 every query gets the same output, before the convolution."""
    query, key, value, agent, *_ = _inputs(agents=1)
    out = agent_attention(query, key, value, agent)
    return relative_difference(out, out[:, :, :1].expand_as(out))


@claim("property", "different", at_least(0.1, "rounding is 1e-16"), source="the layer's definition")
def it_does_not_reduce_to_softmax_attention() -> float:
    """With the queries themselves as agents, no pooling and no biases, it is a product of two softmax matrices and not
    softmax attention: the relative difference of the two."""
    query, key, value, *_ = _inputs()
    return relative_difference(agent_attention(query, key, value, query), softmax_attention(query, key, value))


@claim("property", {"without": 4, "with": 16}, source="diversity restored by the convolution")
def convolution_raises_the_rank() -> dict[str, int]:
    """The depthwise convolution of v raises the rank of a head's output above a = 4, to its D = 16 columns (N = 64)."""
    layer = AgentAttention(16, 1, num_agents=4, size=8).double()
    nn.init.eye_(layer.proj.weight)
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    ranks = {"with": _rank(layer(x))}
    for parameter in layer.dwc.parameters():
        nn.init.zeros_(parameter)
    return {"without": _rank(layer(x)), **ranks}


@claim("property", 0, source="global receptive field")
def every_output_depends_on_every_token() -> int:
    """One layer reaches the whole map, unlike window attention: pairs of output and input token without gradient."""
    layer = AgentAttention(16, 2, num_agents=4, size=7).double()
    x = torch.randn(1, 7, 7, 16, dtype=torch.float64, requires_grad=True)
    outputs = layer(x).sum(-1).flatten()
    grads = [torch.autograd.grad(out, x, retain_graph=True)[0].abs().sum(-1) for out in outputs]
    return int((torch.stack(grads) == 0).sum())


@claim(
    "accuracy",
    {"Agent-DeiT-T": 74.9, "Agent-PVT-S": 82.2, "Agent-Swin-T": 82.6, "Agent-CSwin-T": 83.1},
    source=REPOSITORY + "; ImageNet top-1",
    needs="ImageNet, and the weights of the authors",
)
def networks_are_more_accurate_than_their_hosts() -> None:
    """On ImageNet the networks are more accurate than those with softmax attention: DeiT-T 74.9 % against 72.2 %
    (recalled)."""


@claim(
    "accuracy",
    "FID 28.84 to 27.77, 1.45 times faster at r = 20 %, 1.84 times at 50 %",
    source=REPOSITORY,
    needs="Stable Diffusion's weights, and AgentSD, which saccade does not have yet",
)
def stable_diffusion_gets_faster_without_training() -> None:
    """AgentSD makes Stable Diffusion faster and its images better, without training."""


@claim("flops", 8.0, source="an experiment of ours")
def an_eighth_of_the_products() -> float:
    """256 tokens and 16 agents: softmax attention's products over agent attention's."""
    return _count_softmax(256) / _count_agent(256, agents=16)


@claim(
    "accuracy",
    "close to softmax attention",
    at_least(-0.03, "twice the standard error of the difference of two accuracies of 97 % on 359 images"),
    source="an experiment of ours",
    slow=True,
)
def agents_are_about_as_accurate_as_softmax() -> float:
    """One block trained on digits (8 x 8 tokens): the accuracy with 16 agents minus that of softmax attention."""
    agents = train_on_digits(lambda dim: AgentAttention(dim, 2, num_agents=16, size=8))
    return agents - train_on_digits(lambda dim: Attention(dim, 2))


@claim(
    "accuracy",
    "above linear attention",
    source="an experiment of ours",
    needs="a mixer of linear attention (elu + 1), which saccade does not have yet",
)
def agents_are_more_accurate_than_linear_attention() -> None:
    """On the same digits, without the convolution, agents are more accurate than linear attention."""


def replay(case: Case) -> dict[str, Tensor]:
    """The AgentAttention of agent_swin, agent_deit, agent_pvt and agent_cswin."""
    host = next((host for host in _HOSTS if f"{host}.AgentAttention" in case.cls), None)
    if host is None:
        raise InputError(
            f"{case.key}/{case.name} is a case of {case.cls}: replay serves AgentAttention of {', '.join(_HOSTS)}"
        )
    layer = case.build(_HOSTS[host])

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = next(tensor for name, tensor in inputs.items() if not name.startswith("cotangent"))
        return {"y": run_official(layer, _rename(state), x)}

    return play(case, forward)


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: PVT keeps the query's projection apart, and CSwin calls its convolution get_v."""
    state = dict(state)
    if "q.weight" in state and "sr.weight" not in state:
        for kind in [name[2:] for name in state if name.startswith("q.")]:
            state[f"qkv.{kind}"] = torch.cat([state.pop(f"q.{kind}"), state.pop(f"kv.{kind}")])
    return {"layer." + name.replace("get_v.", "dwc."): tensor for name, tensor in state.items()}


class _Tokens(nn.Module):
    """A layer on tokens (B, N, C) in row-major order, after a class token if it takes one."""

    def __init__(self, size: tuple[int, int], *args: Any, **options: Any) -> None:
        super().__init__()
        self.size = size
        self.layer = AgentAttention(*args, size=size, **options)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.num_prefix
        space = x[:, first:].unflatten(1, self.size)
        if not first:
            return self.layer(space).flatten(1, 2)
        out, prefix = self.layer(space, x[:, :first])
        return torch.cat([prefix, out.flatten(1, 2)], 1)


class _Stripes(nn.Module):
    """A layer on each stripe of a square map, with query, key and value from outside: (3, B, N, C) to (B, N, C)."""

    def __init__(self, side: int, size: tuple[int, int], *args: Any, **options: Any) -> None:
        super().__init__()
        self.grid = side // size[0], side // size[1]
        self.size = size
        self.layer = AgentAttention(*args, size=size, **options)
        self.layer.qkv = self.layer.proj = nn.Identity()  # type: ignore[assignment]

    def forward(self, qkv: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.grid, self.size
        tokens = torch.cat(list(qkv), -1).unflatten(1, (rows, height, columns, width))
        stripes = tokens.transpose(2, 3).flatten(0, 2)  # (B rows columns, height, width, 3 C)
        out = self.layer.mix(stripes).unflatten(0, (-1, rows, columns))
        return out.transpose(2, 3).flatten(1, 4)


def _swin(
    dim: int,
    window_size: tuple[int, int],
    num_heads: int,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    shift_size: int = 0,
    agent_num: int = 49,
) -> nn.Module:
    return _Tokens(window_size, dim, num_heads, num_agents=agent_num, qkv_bias=qkv_bias)


def _deit(
    dim: int,
    num_heads: int = 8,
    qkv_bias: bool = False,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    agent_num: int = 49,
    window: int = 14,
) -> nn.Module:
    return _Tokens((window, window), dim, num_heads, num_agents=agent_num, num_prefix=1, qkv_bias=qkv_bias)


def _pvt(
    dim: int,
    num_patches: int,
    num_heads: int = 8,
    qkv_bias: bool = False,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    sr_ratio: int = 1,
    agent_num: int = 49,
    H: int = 0,  # of the call, where the recorded arguments name it
    W: int = 0,
) -> nn.Module:
    size = (math.isqrt(num_patches),) * 2
    return _Tokens(size, dim, num_heads, num_agents=agent_num, sr_ratio=sr_ratio, qkv_bias=qkv_bias)


def _cswin(
    dim: int,
    resolution: int,
    idx: int,
    split_size: int = 7,
    dim_out: int | None = None,
    num_heads: int = 8,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    agent_num: int = 49,
    qk_scale: float | None = None,
) -> nn.Module:
    size = {-1: (resolution, resolution), 0: (resolution, split_size), 1: (split_size, resolution)}[idx]
    return _Stripes(resolution, size, dim, num_heads, num_agents=agent_num)


_HOSTS: dict[str, Callable[..., nn.Module]] = {
    "agent_swin": _swin,
    "agent_deit": _deit,
    "agent_pvt": _pvt,
    "agent_cswin": _cswin,
}


def _count_parameters() -> dict[str, int]:
    return count_model_parameters({name: model for name, (model, _, _) in NETWORKS.items()})


def _count_flops(names: Sequence[str]) -> dict[str, int]:
    return {name: measure_model_flops([NETWORKS[name][0]])[NETWORKS[name][0]] for name in names}


def _inputs(agents: int = 9) -> list[Tensor]:
    """Query, key, value, agents and both biases: 2 x 3 heads of 16 channels, 64 tokens."""
    shapes = [(64, 16)] * 3 + [(agents, 16), (agents, 64), (64, agents)]
    return [torch.randn(2, 3, *shape, dtype=torch.float64) for shape in shapes]


def _count_agent(tokens: int, agents: int = 49) -> int:
    """FLOPs of agent attention with 4 heads of 16 channels."""
    x, agent = torch.zeros(1, 4, tokens, 16), torch.zeros(1, 4, agents, 16)
    return count_flops(agent_attention, x, x, x, agent).total


def _count_softmax(tokens: int) -> int:
    return count_flops(softmax_attention, *[torch.zeros(1, 4, tokens, 16)] * 3).total


def _rank(output: Tensor) -> int:
    return int(torch.linalg.matrix_rank(output.detach().flatten(1, 2)))
