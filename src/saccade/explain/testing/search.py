"""A game of two players for the nearest misclassified image, played by Monte Carlo tree search (arXiv:1710.07859).

Player 1 picks a keypoint, player 2 pixels near it and a direction; the pixels change, and it is player 1's turn again.
The game ends where the class changes, or where the image is as far as the best one found. No gradient is asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier, check_images, check_whole, evaluating, read_target
from saccade.explain.testing.keypoints import Keypoints, find_keypoints, keypoint_saliency, pixel_distributions

__all__ = ["Misclassified", "nearest_misclassified"]

_FARTHER = 4.0  # times the best distance: a play goes on so far, because much of its change is taken back
_IDLE = 1000  # plays in a row that end before they ask the model: all that is near has been seen
_DISTANCES = {
    "l0": lambda change: (change != 0).any(-3).flatten(-2).sum(-1).double(),
    "l1": lambda change: change.abs().flatten(-3).sum(-1).double(),
    "l2": lambda change: change.square().flatten(-3).sum(-1).double().sqrt(),
}


@dataclass(frozen=True)
class Misclassified:
    """What `nearest_misclassified` found.

    Attributes:
        image: (C, H, W), the nearest misclassified image; None if none was found.
        distance: of it, in the norm that was asked for: an upper bound of the smallest; infinite if none was found.
        target: the class that was to be left.
        label: the class of `image`; None if none was found.
        queries: images that the model was asked about.
        record: (queries, distance) at each find that was nearer than those before.
        keypoints: that guided the search.
        saliency: (H, W), probability of each pixel.
    """

    image: Tensor | None
    distance: float
    target: int
    label: int | None
    queries: int
    record: tuple[tuple[int, float], ...]
    keypoints: Keypoints
    saliency: Tensor

    def best_after(self, queries: int) -> float:
        """The distance that was reached with this many queries."""
        return min((distance for asked, distance in self.record if asked <= queries), default=math.inf)


def nearest_misclassified(
    model: nn.Module,
    image: Tensor,
    *,
    target: int | None = None,
    norm: str = "l0",
    manipulation: str = "flip",
    step: float | None = None,
    bounds: tuple[float, float] | None = None,
    strategy: str = "mcts",
    player: str = "cooperative",
    rule: str = "ucb1",
    explore: float = 0.3,
    pixels: int | None = None,
    keypoints: Keypoints | str = "corners",
    spread: float = 0.0,
    within: float = math.inf,
    backtrack: Sequence[int] = (10, 1),
    queries: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
) -> Misclassified:
    """Search for the nearest image that the model puts into another class, knowing its answers alone.

    Each round goes down the tree of moves, adds one, and plays on at random, with keypoints and pixels drawn by
    saliency, until the class changes or the image is as far as the best one. The prefixes of that play are asked about
    in batches. From each find, groups of changed pixels are taken back while it stays misclassified.

    Args:
        model: maps (B, C, H, W) to logits (B, classes).
        image: (1, C, H, W), normalised floats.
        target: the class to leave; None takes the predicted one.
        norm: "l0", number of changed pixels; "l1", "l2", over all values of all channels.
        manipulation: of a pixel, all channels together: "flip" to the farther end of the range, "high" or "low" to that
            end, "step" up or down by `step`, again and again.
        step: tau; None takes an eighth of the range.
        bounds: the range of values; None takes the image's smallest and largest.
        strategy: "mcts"; "saliency" draws every move by saliency, without a tree; "uniform" draws pixels uniformly.
        player: the second one: "cooperative" helps to find the nearest image, "adversarial" hinders, "nature" draws.
        rule: how the tree is gone down: "ucb1", or "coded", the paper's code's draw from pi + sqrt(ln(visits of the
            child) / visits of the node), whose pi grows with what a move took from the class's probability.
        explore: weight of UCB1's term for seldom visits, beside values in 0..1.
        pixels: that change in a move; None takes a five-hundredth of the image's, the paper's code 100.
        keypoints: found before, or the detector of `find_keypoints`.
        spread: as in `keypoint_saliency`.
        within: images farther away do not count.
        backtrack: sizes of the groups that are taken back, one after the other; the paper's code takes 10. None at all
            if empty.
        queries: the most images that the model is asked about.
        batch_size: the most images in one forward pass.
        seed: same seed, same search.

    Raises: InputError for wrong arguments; WorkError when the model gives NaN.
    """
    check_images(image)
    if len(image) != 1:
        raise InputError(f"image holds {len(image)} images: search for one at a time, (1, C, H, W)")
    for name, given, choices in (
        ("norm", norm, _DISTANCES),
        ("manipulation", manipulation, ("flip", "high", "low", "step")),
        ("strategy", strategy, ("mcts", "saliency", "uniform")),
        ("player", player, ("adversarial", "cooperative", "nature")),
        ("rule", rule, ("coded", "ucb1")),
    ):
        check_choice(name, given, choices)
    height, width = image.shape[-2:]
    pixels = max(1, height * width // 500) if pixels is None else pixels
    check_whole("pixels", pixels, 1, height * width)
    check_whole("queries", queries)
    check_whole("batch_size", batch_size)
    for group in backtrack:
        check_whole("backtrack", group)
    low, high = (image.min().item(), image.max().item()) if bounds is None else bounds
    if not (low < high and low <= image.min() and image.max() <= high):
        raise InputError(f"bounds are {(low, high)}: give a range that holds the image's values, the lower end first")
    step = (high - low) / 8 if step is None else step
    if not 0 < step < math.inf:
        raise InputError(f"step is {step}: give the change of a value, above 0")
    points = find_keypoints(image, detector=keypoints) if isinstance(keypoints, str) else keypoints
    with evaluating(model, grad=False) as classify:
        label = int(read_target(target, classify, image, 1))
        game = _Game(classify, image[0].detach(), label, norm, queries, batch_size, within, tuple(backtrack))
        moves = _Moves(points, (height, width), manipulation, step, (low, high), pixels, spread, strategy, seed)
        _play(game, moves, strategy, player, rule, explore)
    return Misclassified(
        game.best,
        game.distance,
        label,
        game.label,
        game.asked,
        tuple(game.record),
        points,
        keypoint_saliency(points, (height, width), spread=spread),
    )


@dataclass(frozen=True)
class _Move:
    """Pixels (flat indices), and the direction in which they go."""

    keypoint: int
    places: tuple[int, ...]
    sign: int


@dataclass(eq=False)
class _Node:
    """Player 1's turn if `keypoint` is None, otherwise player 2's."""

    keypoint: int | None = None
    move: _Move | None = None
    visits: int = 0
    total: float = 0.0
    children: list["_Node"] = field(default_factory=list)
    prior: Tensor | None = None
    over: bool = False

    @property
    def value(self) -> float:
        return self.total / self.visits if self.visits else 0.0


class _Moves:
    """What the players may do."""

    def __init__(
        self,
        points: Keypoints,
        size: tuple[int, int],
        manipulation: str,
        step: float,
        bounds: tuple[float, float],
        pixels: int,
        spread: float,
        strategy: str,
        seed: int,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.near = pixel_distributions(points, size, spread)
        self.weights = points.weights.double()
        if strategy == "uniform":
            self.near, self.weights = torch.ones(1, size[0] * size[1], dtype=torch.float64), torch.ones(1).double()
        self.manipulation, self.step, self.bounds, self.pixels = manipulation, step, bounds, pixels

    def keypoint(self) -> int:
        return int(torch.multinomial(self.weights, 1, generator=self.generator))

    def draw(self, keypoint: int, taken: set[int]) -> _Move | None:
        """Pixels near a keypoint that are not taken; None if all are."""
        chances = self.near[keypoint] + 1e-12  # every pixel can be reached
        if self.manipulation != "step" and taken:
            chances[list(taken)] = 0
        count = min(self.pixels, int((chances > 0).sum()))
        if not count:
            return None
        places = torch.multinomial(chances, count, generator=self.generator).tolist()
        sign = 1 if self.manipulation != "step" else 1 - 2 * int(torch.randint(2, (), generator=self.generator))
        return _Move(keypoint, tuple(sorted(places)), sign)

    def apply(self, image: Tensor, move: _Move, original: Tensor) -> Tensor:
        changed = image.flatten(1).clone()
        low, high = self.bounds
        places = list(move.places)
        now = original.flatten(1)[:, places]
        if self.manipulation == "step":
            changed[:, places] = (changed[:, places] + move.sign * self.step).clamp(low, high)
        elif self.manipulation == "flip":
            changed[:, places] = torch.where(now - low > high - now, now.new_tensor(low), now.new_tensor(high))
        else:
            changed[:, places] = high if self.manipulation == "high" else low
        return changed.view_as(image)


class _Game:
    """The model behind a counter, and the best image so far."""

    def __init__(
        self,
        classify: Classifier,
        image: Tensor,
        target: int,
        norm: str,
        queries: int,
        batch_size: int,
        within: float,
        backtrack: tuple[int, ...],
    ) -> None:
        self.classify, self.image, self.target = classify, image, target
        self.measure, self.queries, self.batch_size = _DISTANCES[norm], queries, batch_size
        self.backtrack = backtrack
        self.asked, self.record = 0, list[tuple[int, float]]()
        self.best: Tensor | None = None
        self.label: int | None = None
        self.distance = math.inf
        self.limit = within  # no image farther away counts
        self.first = self.ask(image[None])[0].item()  # probability of the target before anything changed

    @property
    def left(self) -> int:
        return self.queries - self.asked

    def ask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(probability of the target, misclassified) of as many images as may still be asked about."""
        images = images[: self.left]
        if not len(images):
            return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        logits = torch.cat([self.classify(part) for part in images.split(self.batch_size)]).cpu().double()
        before, self.asked = self.asked, self.asked + len(images)
        labels = logits.argmax(1)
        wrong = labels != self.target
        distances = self.measure(images - self.image).cpu()
        for index in wrong.nonzero()[:, 0].tolist():
            near = distances[index].item()
            if near < self.distance and near <= self.limit:
                self.best, self.distance, self.label = images[index].clone(), near, int(labels[index])
                self.record.append((before + index + 1, near))
        return logits.softmax(1)[:, self.target], wrong

    def shorten(self, start: Tensor) -> float:
        """Take back groups of changed pixels from a misclassified image while it stays so; the distance left."""
        for size in self.backtrack:
            while self.left:
                changed = (start != self.image).any(0).flatten().nonzero()[:, 0]
                if len(changed) <= size:
                    break
                groups = changed.split(size)
                chance, wrong = self.ask(torch.stack([self._restore(start, [group]) for group in groups]))
                harmless = [groups[i] for i in chance.argsort().tolist() if wrong[i]]
                if not harmless:
                    break
                tries = [self._restore(start, harmless[:count]) for count in range(len(harmless), 0, -1)]
                again = self.ask(torch.stack(tries[:-1]))[1] if len(tries) > 1 else wrong[:0]
                start = tries[int(again.nonzero()[0])] if again.any() else tries[-1]
        return float(self.measure(start - self.image))

    def _restore(self, start: Tensor, groups: Sequence[Tensor]) -> Tensor:
        made = start.flatten(1).clone()
        back = torch.cat(list(groups))
        made[:, back] = self.image.flatten(1)[:, back]
        return made.view_as(start)


def _play(game: _Game, moves: _Moves, strategy: str, player: str, rule: str, explore: float) -> None:
    root, idle = _Node(prior=moves.weights.clone()), 0
    while game.left and game.distance > 0 and not root.over and idle < _IDLE:
        before = game.asked
        path, image, taken, added = [root], game.image, set[int](), None
        if strategy == "mcts":
            path, image, taken, added = _descend(root, moves, player, rule, explore, game.image)
        reward = _roll_out(game, moves, image, taken, path, added, rule)
        for node in path:
            node.visits += 1
            node.total += reward
        idle = idle + 1 if game.asked == before else 0


def _descend(
    root: _Node, moves: _Moves, player: str, rule: str, explore: float, original: Tensor
) -> tuple[list[_Node], Tensor, set[int], _Move | None]:
    """Down to a node without children, and one move on: the path, its image, the changed pixels, the new move."""
    node, path, image, taken = root, [root], original, set[int]()
    while True:
        if not node.children:
            node.prior = moves.weights.clone() if node.prior is None else node.prior
            node.children = [_Node(keypoint=index) for index in range(len(moves.weights))]
        chosen = _pick_keypoint(node, moves, rule, explore)
        if chosen is None:  # all moves from here are over: so is the one that leads here
            node.over = True
            return path, image, taken, None
        path.append(chosen)
        added = _widen(chosen, moves, taken)
        child = added or _pick_move(chosen, moves, player, explore)
        if child is None:
            chosen.over = True
            path.pop()
            continue
        assert child.move is not None
        path.append(child)
        image = moves.apply(image, child.move, original)
        taken = taken | set(child.move.places)
        if added is not None:
            return path, image, taken, child.move
        node = child


def _widen(node: _Node, moves: _Moves, taken: set[int]) -> _Node | None:
    """A new move of player 2, if the square of their number is at most that of the visits, or all others are over."""
    if len(node.children) ** 2 > node.visits and not all(child.over for child in node.children):
        return None
    if moves.pixels == 1 and moves.manipulation != "step":
        taken = taken.union(*(child.move.places for child in node.children if child.move is not None))
    known = {(child.move.places, child.move.sign) for child in node.children if child.move is not None}
    for _ in range(5):
        move = moves.draw(node.keypoint or 0, taken)
        if move is not None and (move.places, move.sign) not in known:
            node.children.append(_Node(move=move))
            return node.children[-1]
    return None


def _pick_keypoint(node: _Node, moves: _Moves, rule: str, explore: float) -> _Node | None:
    options = [child for child in node.children if not child.over]
    if not options:
        return None
    assert node.prior is not None
    prior = torch.stack([node.prior[child.keypoint or 0] for child in options])
    if rule == "coded":
        rare = torch.tensor([math.sqrt(math.log(max(1, child.visits)) / max(1, node.visits)) for child in options])
        chances = prior + rare
        chances = chances if chances.sum() > 0 else torch.ones_like(chances)
        return options[int(torch.multinomial(chances, 1, generator=moves.generator))]
    new = [index for index, child in enumerate(options) if not child.visits]
    if new:
        chances = prior[new] if prior[new].sum() > 0 else torch.ones(len(new))
        return options[new[int(torch.multinomial(chances, 1, generator=moves.generator))]]
    return max(options, key=lambda child: _bound(child, node, explore, 1))


def _pick_move(node: _Node, moves: _Moves, player: str, explore: float) -> _Node | None:
    """Player 2: helps, hinders or draws; a move is over where what follows it is."""
    options = [child for child in node.children if not child.over]
    if not options:
        return None
    if player == "nature":
        return options[int(torch.randint(len(options), (), generator=moves.generator))]
    return max(options, key=lambda child: _bound(child, node, explore, 1 if player == "cooperative" else -1))


def _bound(child: _Node, parent: _Node, explore: float, sign: int) -> float:
    """UCB1 (Auer et al., 2002), for a player who wants large values or, with -1, small ones."""
    if not child.visits:
        return math.inf
    return sign * child.value + explore * math.sqrt(2 * math.log(max(2, parent.visits)) / child.visits)


def _roll_out(
    game: _Game, moves: _Moves, image: Tensor, taken: set[int], path: list[_Node], added: _Move | None, rule: str
) -> float:
    """Play on at random, each keypoint in one direction.

    Returns: the reward, from 0.5 up to 1 if the class changed, which is for the nearest distance so far; otherwise up
    to 0.5, for what the target's probability lost.
    """
    best = min(game.distance, game.limit + 1e-9)
    images: list[Tensor] = []
    if added is not None:
        if game.measure(image - game.image) >= best:
            path[-1].over = True
            return 0.0
        images.append(image)
    going, lost, signs, stride = True, 0.0, dict[int, int](), 1
    first = added is not None
    farthest = min(_FARTHER * best, game.limit + 1e-9)
    while going and game.left:
        while going and len(images) < min(game.batch_size, game.left):
            for _ in range(stride):
                move = moves.draw(moves.keypoint(), taken)
                if move is None:
                    going = False
                    break
                image = moves.apply(image, replace(move, sign=signs.setdefault(move.keypoint, move.sign)), game.image)
                taken = taken | set(move.places)
            going = going and bool(game.measure(image - game.image) < farthest)
            if going or stride > 1:
                images.append(image)
        if not images:
            break
        chances, wrong = game.ask(torch.stack(images))
        if first and rule == "coded":
            _learn(path, added, game.first - chances[0].item())
        if wrong.any():
            if first and wrong[0]:
                path[-1].over = True  # the game ends with this move
            reached = game.shorten(images[int(wrong.nonzero()[0])])
            return 0.5 + 0.5 * game.distance / max(reached, game.distance)
        lost = max(lost, 1 - chances.min().item() / max(game.first, 1e-12))
        first, images, stride = False, [], min(2 * stride, 16)
    return 0.5 * lost


def _learn(path: list[_Node], added: _Move | None, fall: float) -> None:
    """The coded rule: what the move took from the class's probability, over its depth, goes to the keypoint's prior."""
    prior = path[-3].prior
    assert prior is not None
    assert added is not None
    prior[added.keypoint] = max(0.0, prior[added.keypoint].item() + fall / (len(path) // 2))
    if prior.sum() > 0:
        prior /= prior.sum()
