"""Patterns and spaces that tests of the engine run over: a table of the telling ones, and a strategy for any."""

from math import prod

from hypothesis import strategies as st

from saccade.ops import (
    BlockDiffusion,
    Causal,
    Complement,
    Documents,
    ElasticSpan,
    Global,
    GlobalTokens,
    Grid,
    Halo,
    Intersection,
    Neighborhood,
    Sinks,
    SlidingWindow,
    Union,
    Window,
)

CASES = [
    (Global(), (7,)),
    (Global(), (3, 5)),
    (Global(), (2, 3, 2)),
    (Window(4), (8,)),
    (Window((2, 3)), (4, 9)),
    (Window(4, shift=2), (8, 12)),
    (Window((4, 3), shift=(1, 2)), (8, 9)),
    (Window(4, shift=3, ragged=True), (7, 10)),
    (Window(5, shift=2, ragged=True), (3, 4)),
    (Window(2, shift=(1, 0, 1)), (4, 2, 6)),
    (Window(5, ragged=True, causal=True), (13,)),
    (Window((3, 4), shift=1, ragged=True, causal=True), (7, 10)),
    (Grid(2), (6,)),
    (Grid((2, 3)), (4, 9)),
    (Grid(4, ragged=True), (7, 10)),
    (Grid(2), (4, 2, 6)),
    (Halo(4, 1), (8,)),
    (Halo((2, 3), (1, 0)), (4, 9)),
    (Halo(1, 2), (5, 6)),
    (Halo(4, 2, padded=True), (8, 12)),
    (Halo(4, 1, query_stride=2), (4, 6)),
    (Halo(4, 3, padded=True, query_stride=2), (4, 6)),
    (Halo(4, 1, ragged=True), (7, 10)),
    (Halo(4, 2, padded=True, ragged=True), (5, 3)),
    (Halo(2, 1), (4, 2, 6)),
    (Neighborhood(3), (9,)),
    (Neighborhood(7), (40,)),
    (Neighborhood(4), (9, 11)),
    (Neighborhood(5), (17, 19)),
    (Neighborhood((3, 1)), (3, 4)),
    (Neighborhood((3, 5), stride=(2, 3)), (9, 11)),
    (Neighborhood(4, stride=4), (8, 12)),
    (Neighborhood(6, stride=4), (12, 10)),
    (Neighborhood(3, dilation=2), (9, 7)),
    (Neighborhood(2, dilation=3), (7,)),
    (Neighborhood(5, stride=2, dilation=(1, 2), causal=(True, False)), (11, 13)),
    (Neighborhood(3, stride=3, dilation=3, causal=True), (25,)),
    (Neighborhood(5, causal=True), (5, 6)),
    (Neighborhood(3, causal=(True, False, False)), (4, 5, 6)),
    (ElasticSpan(-2, 0.5, 2), (13,)),
    (ElasticSpan(1.5, 0.25, 1), (7, 10)),
    (SlidingWindow(2), (9,)),
    (SlidingWindow((1, 2), (0, 1), dilation=(1, 2)), (5, 9)),
    (SlidingWindow(1, 1), (3, 4, 2)),
    (Causal(), (70,)),
    (Causal(4), (3, 5)),
    (Documents((3, 1, 5)), (9,)),
    (Documents((40, 2, 38)), (8, 10)),
    (GlobalTokens((0, 5)), (12,)),
    (Sinks(3), (4, 5)),
    (BlockDiffusion(3), (20,)),
    (BlockDiffusion(4, clean="token"), (2, 6, 5)),
    (BlockDiffusion(50), (2, 99)),
    (Union((Window(4), GlobalTokens((3,)))), (4, 8)),
    (Union((SlidingWindow(2), Sinks(1), GlobalTokens((299,)))), (300,)),
    (Intersection((Neighborhood(3), Causal())), (6, 7)),
    (Intersection((Union((SlidingWindow(3), Sinks(2))), Causal(2), Documents((30, 11)))), (41,)),
    (Complement(Window(2)), (4, 6)),
    (Intersection((Grid(2), Complement(Window(3)))), (6, 6)),
    (Intersection((Window(2), Complement(Window(2)))), (4,)),  # nothing at all
]
IDS = [f"{pattern} on {'x'.join(map(str, space))}" for pattern, space in CASES]


@st.composite
def patterns(draw, max_tokens=150):
    """Any pattern of one to three axes, and a space that it can serve."""
    axes = draw(st.integers(1, 3))
    longest = {1: 40, 2: 14, 3: 7}[axes]
    space = draw(st.tuples(*[st.integers(1, longest)] * axes).filter(lambda space: prod(space) <= max_tokens))
    return _any(draw, space, composed=2), space


def _any(draw, space, composed):
    """A pattern of the kinds below, with compositions of compositions up to `composed` deep."""
    kinds = [_global, _window, _grid, _halo, _neighborhood, _sliding, _causal, _documents, _global_tokens, _sinks]
    if not composed:
        return draw(st.sampled_from([kind for kind in kinds if kind is not _halo]))(draw, space)
    ways = {_united: Union, _cut: Intersection, _inverted: Complement}
    way = draw(st.sampled_from([*kinds, *ways]))
    return way(draw, space, composed - 1) if way in ways else way(draw, space)


def _united(draw, space, composed):
    return Union(tuple(_any_square(draw, space, composed) for _ in range(2)))


def _cut(draw, space, composed):
    return Intersection(tuple(_any_square(draw, space, composed) for _ in range(2)))


def _inverted(draw, space, composed):
    return Complement(_any_square(draw, space, composed))


def _any_square(draw, space, composed):
    """A pattern whose keys have the axes of the queries, so that it composes."""
    pattern = _any(draw, space, composed)
    return pattern if pattern.key_space(space) == space else Sinks(1)


def _sliding(draw, space):
    return SlidingWindow(_each(draw, 0, space), _each(draw, 0, space), dilation=_each(draw, 1, [3] * len(space)))


def _causal(draw, space):
    return Causal(draw(st.integers(1, 5)))


def _documents(draw, space):
    lengths, left = [], prod(space)
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    return Documents(tuple(lengths))


def _global_tokens(draw, space):
    return GlobalTokens(tuple(draw(st.sets(st.integers(0, prod(space) - 1), min_size=1, max_size=3))))


def _sinks(draw, space):
    return Sinks(draw(st.integers(1, 4)))


def _each(draw, low, highs):
    return tuple(draw(st.integers(low, high)) for high in highs)


def _global(draw, space):
    return Global()


def _window(draw, space):
    sizes = _each(draw, 1, [length + 1 for length in space])
    shift = _each(draw, 0, [size - 1 for size in sizes])
    return Window(sizes, shift=shift, ragged=True, causal=draw(st.booleans()))


def _grid(draw, space):
    return Grid(_each(draw, 1, [length + 1 for length in space]), ragged=True)


def _halo(draw, space):
    stride = _each(draw, 1, [2] * len(space))
    size = tuple(s * per for s, per in zip(stride, _each(draw, 1, space)))
    halo = _each(draw, 0, [3] * len(space))
    return Halo(size, halo, padded=draw(st.booleans()), query_stride=stride, ragged=True)


def _neighborhood(draw, space):
    window = _each(draw, 1, space)
    dilation = _each(draw, 1, [length // w for length, w in zip(space, window)])
    causal = tuple(draw(st.booleans()) for _ in space)
    return Neighborhood(window, stride=_each(draw, 1, window), dilation=dilation, causal=causal)
