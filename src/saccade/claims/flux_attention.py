"""Flux Attention: a small router in each layer decides for each sample whether the layer attends in full."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade.claims.framework import (
    Case,
    Paper,
    at_most,
    claim,
    equal,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.claims.framework.oracles import dense_attention
from saccade.claims.framework.text import CharacterModel, train_on_text
from saccade.errors import InputError, check_choice
from saccade.gates import LayerRouter, SparsityBudget, anneal_temperature
from saccade.mixers import RoutedAttention
from saccade.mixers.mixer import merge_heads, split_heads
from saccade.ops import gumbel, straight_through

PAPER = Paper(
    title="Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference",
    arxiv="2604.07394",
    published="2026-04",
    summary="One small router in each layer looks at the ends of the prompt, once, and decides whether the whole layer "
    "attends in full or to the first tokens and a local window. The routers alone are trained, by decisions that are "
    "hard in value and soft in gradient, under a share of sparse layers that multipliers enforce for each task.",
    home=(
        "saccade.gates.LayerRouter",
        "saccade.gates.SparsityBudget",
        "saccade.mixers.RoutedAttention",
        "saccade.ops.straight_through",
    ),
    missing=(
        "the other sparse forms: a dense end, top-k and antidiagonal scores",
        "the language models in which it was measured",
    ),
    differences=(
        "By default our router averages all tokens, for images have no ends; pool_size=100 is the published choice.",
        "Official ends of a segment shorter than pool_size reach out of it, and are lost where they begin before the "
        "prompt; ours stay inside, unless overrun=True asks for the official way.",
        "Official routers carry a temperature log_temp that their schedule replaces; ours leaves it out.",
        "The training file of official code fails in evaluation, for which it has another file; ours does both.",
    ),
)

ROUTER = "layer router"
SEGMENTS = {"first_token": (0, 1), "ctx_q": (2, 5), "q": (4, 5)}
"""Where range_ids has the first and the last token that a pooling mode spans."""


@claim("params", {"8": 2442, "64": 148546, "128": 592_002}, source=ROUTER + "; 36 D^2 + 17 D + 2")
def routers_have_their_size() -> dict[str, int]:
    """A router for heads of D channels has 36 D^2 + 17 D + 2 parameters."""
    return {str(dim): sum(p.numel() for p in LayerRouter(dim).parameters()) for dim in (8, 64, 128)}


@claim("equivalence", "exactly", rounding, source="hybrid attention")
def decisions_choose_between_full_and_sparse() -> dict[str, float]:
    """With z = 1 a layer is full attention, with z = 0 sinks and a local window, in training and in evaluation; and
    with a window as long as the sequence the sparse form is full attention too: relative differences."""
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    band = torch.ones(21, 21, dtype=torch.bool).tril()
    local = band & (~band.tril(-4) | (torch.arange(21) < 2))
    errors = {}
    for name, window, start, mask in [("z = 1", 4, 1e3, band), ("z = 0", 4, -1e3, local), ("window", 21, -1e3, band)]:
        layer = RoutedAttention(24, 3, window=window, sinks=2, causal=True, start=start).double()
        query, key, value = (split_heads(part, 3) for part in layer.qkv(x).chunk(3, -1))
        expected = layer.proj(merge_heads(dense_attention(query, key, value, mask)))
        errors[name] = max(relative_difference(layer.train(training)(x), expected) for training in (True, False))
    return errors


@claim("property", {"value": 0.0, "gradient": 0.0}, rounding, source="straight-through training")
def hard_values_have_soft_gradients() -> dict[str, float]:
    """In training decisions are 0 or 1, and the gradients of all parameters are those of the soft decision: the largest
    differences, over 100 samples."""
    router = _random_router()
    x = torch.randn(100, 5, 8, dtype=torch.float64)
    state = torch.random.get_rng_state()
    gate = router(x).flatten()
    torch.random.set_rng_state(state)
    logits = router.logits(router.features(router.pool(x)))
    soft = router.soften(logits, gumbel(torch.rand_like(logits)))
    upstream = torch.randn_like(soft)
    grads = [torch.autograd.grad(each, list(router.parameters()), upstream) for each in (gate, soft)]
    return {
        "value": (gate - gate.round()).abs().max().item(),
        "gradient": max(relative_difference(ours, theirs) for ours, theirs in zip(*grads)),
    }


@claim(
    "property",
    {"ascent": "at the target", "fixed": "missed"},
    equal("within 0.1 of the target is at it"),
    source="Lagrangian training",
)
def multipliers_find_the_target() -> dict[str, str]:
    """Four layers whose task loss wants full attention, with a target of half sparse: multipliers that ascend reach
    it, and fixed small ones do not. Mean share over the last 50 of 200 steps."""
    found = {}
    for name, rate in (("ascent", 0.02), ("fixed", 0.0)):
        share = _train_toy(rate)
        found[name] = "at the target" if abs(share - 0.5) <= 0.1 else "missed"
    return found


@claim("complexity", {"full": 4097 / 2, "sparse": 128 + 1024 - 127 / 2}, source="complexity of a layer")
def sparse_layers_cost_a_window() -> dict[str, float]:
    """A full layer computes S^2 / 2 pairs, a sparse one S (sink + window), up to the diagonal: of 4096 causal tokens
    one sees (S + 1) / 2 keys in the mean, and sink + window - (b - 1) / 2 beyond the first sink + window tokens, with
    128 + 1024 tokens in blocks of b = 128."""
    layer = RoutedAttention(32, window=1024, sinks=128, block_size=128, causal=True)
    full, sparse = (pattern.mask((4096,)).sum(-1).double() for pattern in (layer.full, layer.sparse))
    return {"full": full.mean().item(), "sparse": sparse[128 + 1024 :].mean().item()}


@claim("property", {"permuted": 0.0, "middle": 0.0}, rounding, source=ROUTER)
def routers_see_the_ends_alone() -> dict[str, float]:
    """Where tokens change places within the first P or within the last P tokens, and whatever the others are, the
    logits stay: relative differences."""
    router = _random_router(pool_size=6)
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    order = torch.cat([torch.randperm(6), torch.arange(6, 34), 34 + torch.randperm(6)])
    other = x.clone()
    other[:, 6:34] = torch.randn(2, 28, 8, dtype=torch.float64)
    before, permuted, middle = (router.logits(router.features(router.pool(each))) for each in (x, x[:, order], other))
    return {"permuted": relative_difference(permuted, before), "middle": relative_difference(middle, before)}


@claim(
    "accuracy",
    {"full layers, far": "one or more", "full layers, near": 0},
    source="an experiment of ours",
    slow=True,
)
def tasks_that_reach_far_keep_a_full_layer() -> dict[str, int | str]:
    """A causal model (32 tokens, 2 layers) is trained in full to repeat, as its first token says, what stands 14 (far)
    or 2 (near) places before. Then its routers alone learn, with targets of a quarter and of all sparse, where the
    sparse form sees one sink and 4 tokens: layers that most samples run in full, if less than 2 % of the accuracy was
    lost."""
    model, dense = _train_routers()
    found: dict[str, int | str] = {}
    for task, name in enumerate(dense):
        accuracy, gates = _accuracy(model, _draw_tasks(256, task))
        layers = int((gates.mean(0) > 0.5).sum())
        lost = dense[name] - accuracy
        found[f"full layers, {name}"] = layers if lost < 0.02 else f"{layers}, and {lost:.2f} of the accuracy lost"
    if isinstance(far := found["full layers, far"], int) and far >= 1:
        found["full layers, far"] = "one or more"
    return found


@claim(
    "speed",
    {"prefill": 2.8, "decode": 2.0},
    at_most(3, "the published factors are the largest"),
    source="abstract",
    needs="Qwen3 or Llama 3.1 on a GPU",
)
def language_models_get_faster() -> None:
    """Prefilling is up to 2.8 times as fast, and decoding up to 2.0 times."""


@claim("accuracy", "kept", source="abstract", needs="Qwen3 or Llama 3.1, and benchmarks of long contexts")
def accuracy_is_kept() -> None:
    """Long contexts are understood as well as with full attention."""


def replay(case: Case) -> dict[str, Tensor]:
    """AttentionRouter in both forms and every pooling mode, with the recorded constant in place of random numbers."""
    if "AttentionRouter" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows AttentionRouter alone")
    modes = case.args["pooling modes"]
    for mode in modes:
        check_choice(f"the pooling mode of {case.key}/{case.name}", mode, SEGMENTS)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for form in ("softmax", "sigmoid"):
            own = {
                f"router.{name.removeprefix(f'{form}.')}": tensor
                for name, tensor in state.items()
                if name.startswith(f"{form}.") and not name.endswith(".log_temp")
            }
            if not own:
                continue
            router = LayerRouter(case.args["d_feature"], pool_size=case.args["pool_size"], form=form, overrun=True)
            router.temperature.fill_(case.args["tau"])
            for mode in modes:
                segment = inputs["range_ids"][:, list(SEGMENTS[mode])]
                found = run_official(_Watched(router), own, inputs["x"].mean(2), segment)
                outputs |= {f"{form}.{mode}.{name}": tensor for name, tensor in found.items()}
        return outputs

    return play(case, forward)


class _Watched(nn.Module):
    """A router that returns all that it computes in training, with exp(-1) for every random number."""

    def __init__(self, router: LayerRouter) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, segment: Tensor) -> dict[str, Tensor]:
        features = self.router.features(self.router.pool(x, segment))
        logits = self.router.logits(features)
        soft = self.router.soften(logits, gumbel(torch.full_like(logits, -1).exp()))
        hard = straight_through((soft > 0.5).to(soft.dtype), soft)
        return {"features": features, "logits": logits, "soft": soft, "hard": hard, "entropy": -soft * soft.log()}


def _random_router(**options: int) -> LayerRouter:
    """In float64 and training mode, with weights away from their start."""
    router = LayerRouter(8, start=0.0, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return router


def _train_toy(rate: float) -> float:
    """The share of sparse decisions to which four routers are trained."""
    routers = [LayerRouter(8, start=0.0) for _ in range(4)]
    budget = SparsityBudget()
    nn.init.constant_(budget.linear, 0.05)
    nn.init.constant_(budget.quadratic, 0.05)
    parameters = [parameter for router in routers for parameter in router.parameters()]
    optimizer = torch.optim.Adam([{"params": parameters, "lr": 2e-3}, {"params": budget.parameters(), "lr": rate}])
    shares = []
    for step in range(200):
        x = torch.randn(32, 4, 8)
        for router in routers:
            router.temperature.fill_(anneal_temperature(step / 200))
        gates = torch.cat([router(x).flatten(1) for router in routers], 1)  # (B, layers)
        loss = 0.5 * (1 - gates).mean() + budget(gates, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(1 - gates.detach().mean().item())
    return sum(shares[-50:]) / 50


COPIES = torch.arange(3, 32, 3)  # in texts of the near task


def _draw_tasks(count: int, task: int | None = None) -> Tensor:
    """(count, 32) characters: the task, then 31 of 16 others. Task 0, far, repeats them every 14; in task 1, near,
    every third is that of two places before."""
    tasks = torch.randint(2, (count, 1)) if task is None else torch.full((count, 1), task)
    far = torch.randint(2, 18, (count, 14)).repeat(1, 3)[:, :31]
    near = torch.randint(2, 18, (count, 31))
    near[:, COPIES - 1] = near[:, COPIES - 3]
    return torch.cat([tasks, torch.where(tasks == 0, far, near)], 1)


def _task(texts: Tensor) -> tuple[Tensor, Tensor]:
    """What to predict: the characters that earlier ones foretell."""
    place = torch.arange(1, 32)
    foretold = torch.where(texts[:, :1] == 0, place > 14, torch.isin(place, COPIES))
    return texts[:, :-1], texts[:, 1:].masked_fill(~foretold, -1)


def _train_routers() -> tuple[CharacterModel, dict[str, float]]:
    """A model trained in full, with its accuracy then, and its routers alone; about half a minute."""
    model = CharacterModel(lambda dim: RoutedAttention(dim, 4, causal=True, pool_size=2), 32).eval()
    train_on_text(model, lambda: _task(_draw_tasks(64)), 400)
    dense = {name: _accuracy(model, _draw_tasks(256, task))[0] for task, name in enumerate(("far", "near"))}
    routers = [module for module in model.modules() if isinstance(module, LayerRouter)]
    budget = SparsityBudget(2)
    model.requires_grad_(False).train()
    parameters = [parameter.requires_grad_() for router in routers for parameter in router.parameters()]
    optimizer = torch.optim.Adam([{"params": parameters, "lr": 3e-3}, {"params": budget.parameters(), "lr": 1e-2}])
    for step in range(300):
        for router in routers:
            router.temperature.fill_(anneal_temperature(step / 300))
        texts = _draw_tasks(64)
        codes, targets = _task(texts)
        with saccade.tap(model, kinds=("gate",), detach=False) as seen:
            logits = model(codes)
        gates = torch.stack([each.gate.flatten() for each in seen.values() if each.gate is not None], 1)  # (B, layers)
        aims = torch.where(texts[:, 0] == 0, 0.25, 1.0)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss = loss + budget(gates, aims, texts[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), dense


def _accuracy(model: CharacterModel, texts: Tensor) -> tuple[float, Tensor]:
    """The share of characters that are foretold, and the decisions (B, layers)."""
    codes, targets = _task(texts)
    with saccade.tap(model, kinds=("gate",)) as seen, torch.no_grad():
        best = model(codes).argmax(-1)
    gates = torch.stack([each.gate.flatten() for each in seen.values() if each.gate is not None], 1)
    counted = targets >= 0
    return (best == targets)[counted].double().mean().item(), gates
