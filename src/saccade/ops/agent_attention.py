"""Agent attention (Han et al., 2023, arXiv:2312.08874): a few agents stand between queries and keys."""

from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention
from saccade.ops.softmax_attention import attention_weights, softmax_attention

__all__ = ["agent_attention", "agent_attention_weights"]


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Let agents gather from the keys by softmax attention, and queries read from the agents by another.

    Cost is linear in N and M at a fixed number of agents. It is a linear attention whose feature maps are the two
    softmax matrices: out = (softmax(query agent) softmax(agent key)) value.

    Args:
        query: (B, heads, N, D).
        key: (B, heads, M, D).
        value: (B, heads, M, E).
        agent: (B, heads, agents, D), usually pooled queries.
        agent_bias: added to the agents' logits, broadcastable to (B, heads, agents, M).
        query_bias: added to the queries' logits, broadcastable to (B, heads, N, agents).
        scale: factor of both products, D^-0.5 by default.
        impl: "reference" forms the N x M token matrix and defines what is right; "linear" never
            does; "auto" is "linear".

    Returns: (B, heads, N, E) in the dtype of the inputs.
    Raises: InputError for shapes that do not fit.

    >>> import torch
    >>> x = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> agent_attention(torch.zeros(1, 1, 2, 1), x, x, torch.zeros(1, 1, 3, 1)).flatten()  # agents without preference
    tensor([1.5000, 1.5000])
    """
    check_attention(query, key, value, axes=1)
    check_choice("impl", impl, ("auto", "linear", "reference"))
    if agent.ndim != 4 or agent.shape[:2] != query.shape[:2] or agent.shape[-1] != query.shape[-1]:
        raise InputError(f"agent is {tuple(agent.shape)} but query is {tuple(query.shape)}: both share B, heads and D")
    if impl == "reference":
        weights = agent_attention_weights(query, key, agent, agent_bias=agent_bias, query_bias=query_bias, scale=scale)
        return (weights @ value.to(weights.dtype)).to(query.dtype)
    gathered = softmax_attention(agent, key, value, bias=agent_bias, scale=scale)
    return softmax_attention(query, agent, gathered, bias=query_bias, scale=scale)


def agent_attention_weights(
    query: Tensor,
    key: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Form the token matrix of agent attention, (B, heads, N, M): rows sum to 1, rank at most the agents."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention_weights(query, agent, query_bias, scale) @ attention_weights(agent, key, agent_bias, scale)
