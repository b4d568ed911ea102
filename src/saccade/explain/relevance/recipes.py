"""Recipes: which operation is served by which rule. A recipe is an ordered list, and the first entry that fits decides.

A function here makes a recipe, and its name is the recipe's. A user's entries go in front:
`recipe.with_rules(On(...))`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.explain.relevance import rules
from saccade.explain.relevance.families import FAMILIES
from saccade.explain.relevance.rules import Rule
from saccade.explain.relevance.tape import Node

__all__ = [
    "On",
    "Recipe",
    "alpha_beta",
    "attn_lrp",
    "cp_lrp",
    "dynamic_lrp",
    "epsilon",
    "epsilon_plus",
    "flat",
    "gamma",
    "gradient",
    "official_dynamic_lrp",
    "official_salient_relevance",
    "read_recipe",
    "relp",
    "salient_relevance",
    "z_box",
    "z_plus",
]

POSITIONS = ("any", "first", "middle", "last")
RELP_RULES = ("LN-rule", "Identity-rule", "Half-rule", "AH-rule")


@dataclass(frozen=True)
class On:
    """An entry: operations, and their rule.

    Attributes:
        op: a family ("convolution", "dense", "add", "norm" ...; see `families`) or the aten name of one operation.
        rule: from `rules`.
        position: among the network's convolutions and dense layers, in the order in which they run: "first", "last",
            "middle" (neither), "any", or a pair of fractions of the depth, (0, 1 / 3). Other operations have none.
        weight: pattern of the names of the parameters that the operation reads, such as "layer4.*".
    """

    op: str
    rule: Rule
    position: str | tuple[float, float] = "any"
    weight: str = "*"

    def fits(self, node: Node, count: int | None = None) -> bool:
        """Whether it serves a node; without the `count` of weighted maps, whether it may."""
        if self.op not in (node.op, node.family):
            return False
        if self.weight != "*":
            names = [name for value in node.inputs for name in value.names]
            if not any(fnmatchcase(name, self.weight) for name in names):
                return False
        if self.position == "any":
            return True
        if node.index is None:
            return False
        if count is None:
            return True
        if isinstance(self.position, tuple):
            low, high = self.position
            return low <= node.index / max(1, count - 1) <= high
        first, last = node.index == 0, node.index == count - 1
        return {"first": first, "last": last, "middle": not first and not last}[self.position]


@dataclass(frozen=True)
class Recipe:
    """An ordered list of entries.

    Attributes:
        name: of the function that made it.
        entries: first to last; operations that no entry serves have the rule `unknown`.
        message: "relevance", or "coefficient" c with relevance x c.
    """

    name: str
    entries: tuple[On, ...]
    message: str = "relevance"

    def with_rules(self, *entries: On) -> "Recipe":
        """The same with entries in front."""
        for entry in entries:
            check_choice(
                "op", entry.op, [*FAMILIES, "product", "gate", *(op for ops in FAMILIES.values() for op in ops)]
            )
            if isinstance(entry.position, str):
                check_choice("position", entry.position, POSITIONS)
        return replace(self, entries=(*entries, *self.entries))

    def rule(self, node: Node, count: int) -> Rule:
        """The rule that serves a node of a network with `count` weighted maps."""
        return next((entry.rule for entry in self.entries if entry.fits(node, count)), _UNKNOWN[self.message])

    def needs(self, node: Node) -> tuple[bool, bool]:
        """Whether a rule that may serve the node reads its inputs, and its output."""
        if node.output.dtype.is_complex or any(value.dtype.is_complex for value in node.inputs if value.active):
            return True, True
        inputs = output = False
        for entry in self.entries:
            if entry.fits(node):
                inputs, output = inputs or entry.rule.inputs, output or entry.rule.output
                if entry.position == "any":
                    return inputs, output
        return True, True


_UNKNOWN = {"relevance": rules.unknown(), "coefficient": rules.coefficient()}
_POOL = On("max_pool2d_with_indices", replace(rules.move(), output=True))
_COMMON = (
    _POOL,
    On("move", rules.move()),
    On("winner", rules.winner()),
    On("embedding", rules.embedding()),
    On("activation", rules.identity()),
    On("scale", rules.identity()),
    On("log_softmax", rules.identity()),
)


def _recipe(name: str, *entries: On, eps: float = rules.EPS) -> Recipe:
    """Entries in front of what all recipes of relevance share."""
    return Recipe(
        name,
        (
            *entries,
            *_COMMON,
            On("convolution", rules.epsilon_map(eps)),
            On("dense", rules.epsilon_map(eps)),
            On("add", rules.terms(eps)),
            On("mix", rules.epsilon(eps)),
            On("statistic", rules.epsilon(eps)),
            On("blend", rules.blend(eps)),
            On("sampler", rules.first_operand(eps)),
            On("step", rules.absorb("step")),
            On("norm", rules.affine(eps)),
            On("softmax", rules.softmax_taylor()),
            On("attention", rules.attention_by_equation(eps)),
            On("product", rules.half(eps)),
            On("gate", rules.half(eps)),
        ),
    )


def _maps(rule: Rule) -> tuple[On, On]:
    return On("convolution", rule), On("dense", rule)


def epsilon(eps: float = rules.EPS) -> Recipe:
    """Shares in proportion to what each operand adds, everywhere; attention as in `attn_lrp`, norms as affine maps.

    On a network of ReLUs without biases it is input times gradient.
    """
    return _recipe("epsilon", eps=eps)


def gamma(gamma: float = 0.25) -> Recipe:
    """`epsilon`, with the gamma rule in convolutions and dense layers."""
    return _recipe("gamma", *_maps(rules.gamma(gamma)))


def z_plus() -> Recipe:
    """`epsilon`, with the z+ rule in convolutions and dense layers."""
    return _recipe("z_plus", *_maps(rules.z_plus()))


def alpha_beta(alpha: float = 2.0, beta: float = 1.0) -> Recipe:
    """`epsilon`, with the alpha-beta rule in convolutions and dense layers."""
    if abs(alpha - beta - 1) > 1e-6:
        raise InputError(f"alpha {alpha} - beta {beta} is not 1: relevance would grow or fade with every layer")
    return _recipe("alpha_beta", *_maps(rules.alpha_beta(alpha, beta)))


def z_box(low: float | Tensor = -3.0, high: float | Tensor = 3.0) -> Recipe:
    """Deep Taylor: z+ everywhere, and in the first layer the rule for inputs between `low` and `high`."""
    first = tuple(replace(entry, position="first") for entry in _maps(rules.z_box(low, high)))
    return _recipe("z_box", *first, *_maps(rules.z_plus()))


def flat() -> Recipe:
    """`epsilon_plus`, spread evenly in the first layer."""
    first = tuple(replace(entry, position="first") for entry in _maps(rules.flat()))
    return replace(epsilon_plus(), name="flat", entries=(*first, *epsilon_plus().entries))


def epsilon_plus(eps: float = 1e-6) -> Recipe:
    """z+ in convolutions, epsilon in dense layers, norms passed: the composite of that name in other libraries."""
    return _recipe("epsilon_plus", On("convolution", rules.z_plus(eps)), On("norm", rules.identity()), eps=eps)


def attn_lrp(gamma: float | None = None) -> Recipe:
    """AttnLRP (Achtibat et al., 2024): softmax expanded, products halved, norms passed.

    Args:
        gamma: of the gamma rule in convolutions and dense layers; None is epsilon.
    """
    maps = () if gamma is None else _maps(rules.gamma(gamma))
    return _recipe("attn_lrp", *maps, On("norm", rules.identity()))


def cp_lrp() -> Recipe:
    """CP-LRP (Ali et al., 2022): attention weights and the scales of norms held fixed, the values take all."""
    return _recipe(
        "cp_lrp",
        On("softmax", rules.absorb("detached_softmax")),
        On("attention", rules.attention_by_equation(values_only=True)),
        On("product", rules.signal()),
        On("gate", rules.signal()),
    )


def dynamic_lrp(conv_gamma: float | None = None, dense_gamma: float | None = None) -> Recipe:
    """DynamicLRP (2025): biases, sums, gates and means by magnitude, norms passed, attention to the values.

    Its rules without the faults of its code: softmax is expanded unmasked, and a matrix product of two operands is
    counted once.

    Args:
        conv_gamma, dense_gamma: of the gamma rule; None is epsilon. Published for ViT-B/16: 130 and 0.001; for VGG-16:
            125 and None.
    """
    return _dynamic("dynamic_lrp", conv_gamma, dense_gamma)


def _dynamic(name: str, conv_gamma: float | None, dense_gamma: float | None, *entries: On) -> Recipe:
    eps = 1e-11

    def map_rule(gamma: float | None) -> Rule:
        if gamma is None:
            return rules.epsilon_map(eps, bias="magnitude")
        return rules.gamma(gamma, eps, bias="magnitude")

    return _recipe(
        name,
        *entries,
        On("convolution", map_rule(conv_gamma)),
        On("dense", map_rule(dense_gamma)),
        *(On(op, rules.even()) for op in ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")),
        *(On(op, rules.magnitude(eps)) for op in ("add", "sub", "rsub", "gate", "sum", "mean", "scale")),
        On("norm", rules.identity()),
        On("attention", rules.attention_by_equation(eps, values_only=True)),
        eps=eps,
    )


def official_dynamic_lrp(
    *,
    gamma: tuple[float | None, float | None] | None = None,
    z_plus: bool = False,
    bilinear: bool = False,
    keep: float = 1.0,
) -> Recipe:
    """DynamicLRP as its published code behaves.

    Softmax reads the lower triangle of its logits, products of two operands give all to both, and sub gives half to
    each side.

    Args:
        gamma: of convolutions and of matrix products; None leaves the rule off.
        z_plus: weights clamped; the result is recomputed with them in matrix products, and not in convolutions.
        bilinear: a matrix product leaves half of its relevance with its second operand, a weight or not.
        keep: fraction of the largest relevance of each sample that goes on below a map.
    """
    eps, times = 1e-11, 2.0 if bilinear else 1.0
    conv, dense = gamma or (None, None)

    def map_rule(value: float | None, *, recompute: bool, times: float) -> Rule:
        if value is not None:
            return rules.gamma(value, eps, bias="magnitude", keep=keep)
        if z_plus:
            return rules.clamped(eps, recompute=recompute, bias="magnitude", keep=keep)
        return rules.epsilon_map(eps, times=times, bias="magnitude", keep=keep)

    return _dynamic(
        "official_dynamic_lrp",
        None,
        None,
        On("convolution", map_rule(conv, recompute=False, times=1.0)),
        On("dense", map_rule(dense, recompute=True, times=times)),
        On("product", rules.product_to_both(eps, times=times)),
        On("softmax", rules.softmax_taylor(causal=True)),
        On("sub", rules.even()),
    )


def salient_relevance(eps: float = 1e-9) -> Recipe:
    """The first half of Salient Relevance (Li et al., 2017): z+ in dense layers, whose biases take nothing, `epsilon`
    in convolutions, all to the winner of a pooling."""
    return _recipe("salient_relevance", On("dense", rules.z_plus(eps, bias="none")), eps=eps)


def official_salient_relevance(eps: float = 1e-9) -> Recipe:
    """`salient_relevance` as its published code behaves: epsilon is added without the sign of what it is added to, and
    of poolings whose windows share a winner one alone counts."""
    return _recipe(
        "official_salient_relevance",
        On("dense", rules.clamped(eps, recompute=True, bias="none")),
        On("convolution", rules.epsilon_map(eps, signed=False)),
        On("max_pool2d_with_indices", rules.unpool(eps)),
        eps=eps,
    )


def gradient() -> Recipe:
    """Every operation's own derivative: input times gradient, on the tape."""
    return Recipe("gradient", (_POOL, *_derivatives()), message="coefficient")


def relp(patched: Iterable[str] = RELP_RULES[:3]) -> Recipe:
    """Relevance patching (RelP, 2025): derivatives, but for the nonlinear parts named here.

    Args:
        patched: of "LN-rule" (the scale of norms is held fixed), "Identity-rule" (c f(x) / x of elementwise functions
            but ReLU), "Half-rule" (half to each factor of a gate) and "AH-rule" (attention weights are held fixed).
    """
    patched = tuple(patched)
    for each in patched:
        check_choice("patched", each, RELP_RULES)
    norm, elementwise, gate, heads = (each in patched for each in RELP_RULES)
    entries = [_POOL, On("relu", rules.coefficient())]
    if norm:
        entries.append(On("norm", rules.norm_coefficient()))
    if elementwise:
        entries += [On(op, rules.identity_coefficient()) for op in _BENDS]
    entries.append(On("gate", rules.coefficient(0.5 if gate else 1.0, hold_norms=norm)))
    if heads:
        entries.append(On("softmax", rules.absorb("detached_softmax")))
    entries.append(On("attention", rules.attention_coefficient(values_only=heads)))
    return Recipe("relp", (*entries, *_derivatives()), message="coefficient")


_BENDS = ("gelu", "silu", "mish", "elu", "celu", "selu", "hardswish", "leaky_relu", "_prelu_kernel", "relu6", "tanh")


def _derivatives() -> tuple[On, ...]:
    plain = rules.coefficient()
    light = replace(plain, inputs=False, output=False)  # linear operations need no values
    bends = "winner activation softmax log_softmax norm statistic product gate sampler step blend"
    return (
        On("attention", rules.attention_coefficient()),
        On("embedding", rules.embedding_coefficient()),
        *(On(family, light) for family in ("convolution", "dense", "add", "scale", "mix", "move")),
        *(On(family, plain) for family in bends.split()),
    )


_RECIPES = {
    make.__name__: make
    for make in (
        alpha_beta,
        attn_lrp,
        cp_lrp,
        dynamic_lrp,
        epsilon,
        epsilon_plus,
        flat,
        gamma,
        gradient,
        official_dynamic_lrp,
        official_salient_relevance,
        relp,
        salient_relevance,
        z_box,
        z_plus,
    )
}


def read_recipe(recipe: "str | Recipe") -> Recipe:
    """A recipe, or the one of that name with its defaults."""
    if isinstance(recipe, Recipe):
        return recipe
    check_choice("recipe", recipe, _RECIPES)
    made: Recipe = _RECIPES[recipe]()
    return made
