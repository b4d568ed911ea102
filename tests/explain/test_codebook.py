"""Codebooks: laws of the layer, its gradients, dead codes, edits; models that have them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain.dictionaries import Codebook, CodedModel, forbid_codes, force_codes


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_book(**options):
    torch.manual_seed(0)
    book = Codebook(6, 9, **{"k": 2, "groups": 2} | options).double()
    nn.init.normal_(book.norm_weight)
    nn.init.normal_(book.norm_bias)
    return book


def by_hand(book, row):
    """Ids and output of one activation, literally."""
    ids, out = [], []
    for group, part in enumerate(row.view(book.groups, -1)):
        n = (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt()
        n = n * book.norm_weight[group] + book.norm_bias[group]
        near = [
            (n @ code / code.norm()).item() if book.similarity == "inner" else -(n - code).norm().item()
            for code in book.codes[group]
        ]
        chosen = sorted(range(book.num_codes), key=lambda code: -near[code])[: book.k]
        ids.append(chosen)
        out.append(sum(book.codes[group, code] for code in chosen) / book.k)
    return ids, torch.cat(out)


# Laws


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
@pytest.mark.parametrize(("k", "groups"), [(1, 1), (2, 3), (9, 2)])
def test_the_layer_is_the_loop_by_hand(similarity, k, groups):
    book, x = make_book(similarity=similarity, k=k, groups=groups).eval(), rows(2, 5, 6)
    ids, y = book.encode(x), book(x)
    for row, own, out in zip(x.view(-1, 6), ids.view(-1, groups, k), y.view(-1, 6)):
        expected, mean = by_hand(book, row)
        assert own.tolist() == expected
        assert_close(out, mean)
    assert_close(book.decode(ids), y)


@pytest.mark.parametrize("gradient", ["aeloss", "base", "fullaeloss", "vqvae"])
def test_groups_are_codebooks_of_their_own(gradient):
    book, x, upstream = make_book(gradient=gradient), rows(7, 6).requires_grad_(), rows(7, 6, seed=1)
    whole = torch.autograd.grad(book(x), (x, book.codes, book.norm_weight), upstream)
    for group, channels in enumerate((slice(3), slice(3, 6))):
        single = Codebook(3, 9, k=2, gradient=gradient).double()
        for name, parameter in single.named_parameters():
            parameter.data = getattr(book, name)[group : group + 1].data
        part = x[:, channels].detach().requires_grad_()
        own = torch.autograd.grad(single(part), (part, single.codes, single.norm_weight), upstream[:, channels])
        assert_close(own, (whole[0][:, channels], whole[1][group : group + 1], whole[2][group : group + 1]))


def test_tokens_do_not_see_one_another_and_heads_may_come_apart():
    book, x = make_book().eval(), rows(4, 5, 6)
    assert_close(book(x)[1:3], book(x[1:3]))
    assert_close(book(x.unflatten(-1, (2, 3))), book(x).unflatten(-1, (2, 3)))


def test_half_precision_stays_half():
    assert Codebook(6, 9)(rows(4, 6).bfloat16()).dtype == torch.bfloat16


# Codes that nothing uses, and where codes start


def test_dead_codes_become_activations():
    book, x = make_book(), rows(4, 6)
    with pytest.raises(InputError, match="no code was used"):
        book.replace_dead(x)
    book.eval()(x)
    assert book.active == 0  # evaluation counts nothing
    before = book.train().codes.detach().clone()
    book(x)
    used = book.uses > 0
    assert book.active == used.double().mean() < 1
    assert book.uses.sum() == 4 * 2 * 2
    assert book.replace_dead(x) == (~used).sum()
    assert_close(book.codes[used], before[used])
    n = book.normalise(x)
    for group, code in (~used).nonzero().tolist():
        assert (book.codes[group, code] - n[:, group]).abs().sum(-1).min() < 1e-12
    assert not book.uses.any()
    book(x)
    book.replace_dead(x, noise=0.5, generator=torch.Generator().manual_seed(0))
    assert book.codes.isfinite().all()


def test_codes_start_at_centres():
    book, centres = make_book(k=1, groups=1), rows(9, 6)
    x = centres.repeat(20, 1)
    book.initialise(x)
    assert_close(book.eval()(x), book.normalise(x).flatten(-2))  # nine distinct activations are nine centres
    with pytest.raises(InputError, match="8 of them distinct, are too few for 9"):
        book.initialise(x[:8])


def test_penalty_counts_a_code_once():
    book = make_book(groups=1)
    ids = torch.tensor([[[0, 3]], [[3, -1]]])
    assert_close(book.penalty(ids, order=2), book.codes[0, [0, 3]].norm(dim=-1).sum())


# Edits


def test_forced_and_forbidden_codes():
    book, x = make_book().eval(), rows(3, 5, 6)
    free = book(x)
    forced = book(x, force_codes(4, position=-1, group=1))
    assert_close(forced[:, :-1], free[:, :-1])
    assert_close(forced[:, -1, :3], free[:, -1, :3])
    assert_close(forced[:, -1, 3:], book.codes[1, 4].expand(3, 3))
    pair = book(x, force_codes([4, 7]))
    assert_close(pair[..., :3], book.codes[0, [4, 7]].mean(0).expand(3, 5, 3))
    ids = book.encode(x)
    first = int(ids[0, 0, 0, 0])
    left = book(x, forbid_codes(first))[0, 0, :3]
    assert_close(left, book.codes[0, int(ids[0, 0, 0, 1])] / 2)  # the mean is still over two


def test_errors():
    book, x = make_book(), rows(3, 5, 6)
    for make, words in {
        lambda: Codebook(6, 9, groups=4): "groups that divides dim",
        lambda: Codebook(6, 9, k=10): "k is 10",
        lambda: Codebook(6, 9, similarity="cosine"): "similarity is 'cosine'",
        lambda: Codebook(6, 9, gradient="ste"): "gradient is 'ste'",
        lambda: book(rows(3, 5)): r"activations are torch.float64 of shape \(3, 5\): .* \(..., 6\) or \(..., 2, 3\)",
        lambda: book(rows(2, 3)): r"of shape \(2, 3\)",
        lambda: book(x, force_codes(9)): "0 to 8, and -1",
        lambda: book(x, force_codes([1, 2, 3])): "3 codes are forced where 2",
        lambda: book(x, forbid_codes(0, group=2)): "group is 2",
        lambda: book(x, lambda ids: ids[:1]): "ids are torch.int64 of shape",
        lambda: book.decode(torch.zeros(3, 1, 2, dtype=torch.long)): "2 group",
    }.items():
        with pytest.raises(InputError, match=words):
            make()


# Models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6))
        self.proj = nn.Linear(6, 7)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.proj(x + self.mlp(x))


def make_net():
    torch.manual_seed(0)
    net = Net().double()
    return net, torch.randint(7, (4, 5))


def test_the_original_stays_as_it_is():
    net, tokens = make_net()
    before = net(tokens)
    coded = CodedModel(net, {"mlp": make_book(groups=1), "proj:in": make_book()})
    books = coded.eval().codebooks
    x = coded.model.embed(tokens)
    by_hand = coded.model.proj(books["proj:in"](x + books["mlp"](coded.model.mlp(x))))
    assert_close(coded(tokens), by_hand)
    loss = coded.train()(tokens).square().sum()
    loss.backward()
    with torch.no_grad():
        for parameter in coded.parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    assert_close(net(tokens), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in coded.modules())
    shared = CodedModel(net, {"mlp": make_book(groups=1)}, copy=False)
    assert shared.model is net
    assert_close(net(tokens), before)


def test_a_coded_model_saves_and_loads():
    net, tokens = make_net()
    one, two = (CodedModel(net, {"mlp": make_book(groups=1)}).eval() for _ in range(2))
    nn.init.normal_(two.codebooks["mlp"].codes)
    two.load_state_dict(one.state_dict())
    assert_close(one(tokens), two(tokens))


def test_codes_are_found_where_they_fired():
    net, tokens = make_net()
    coded = CodedModel(net, {"mlp": make_book(groups=1), "proj:in": make_book()})
    index = coded.index(tokens.split(3))
    assert coded.training
    ids = index.ids["proj:in"]
    assert ids.shape == (4, 5, 2, 2)
    code = int(ids[2, 3, 1, 0])
    hits = index.find("proj:in", code, group=1).tolist()
    assert hits == [[b, n] for b in range(4) for n in range(5) if code in ids[b, n, 1].tolist()]
    assert [2, 3] in hits
    matches = index.match("mlp", tokens)  # without attention an MLP's codes depend on the token alone
    assert set(matches.recall.unique().tolist()) == {0.0, 1.0}
    for bad, words in {
        lambda: index.find("mlp", 9): "codes 0 to 8",
        lambda: index.find("mpl", 0): "did you mean mlp",
        lambda: index.find("mlp", 0, group=1): "group is 1",
        lambda: index.match("mlp", tokens[:2]): r"labels are \(2, 5\)",
        lambda: coded.index([]): "no inputs",
    }.items():
        with pytest.raises(InputError, match=words):
            bad()


def test_edits_last_as_long_as_the_with_and_reading_sees_them():
    net, tokens = make_net()
    coded = CodedModel(net, {"mlp": make_book(groups=1)}).eval()
    free = coded(tokens)
    with coded.editing({"mlp": force_codes(5, position=2)}):
        forced = coded(tokens)
        assert (coded.read(tokens)["mlp"][:, 2] == 5).all()
    assert_close(coded(tokens), free)
    book = coded.codebooks["mlp"]
    expected = coded.model.proj(coded.model.embed(tokens[:, 2]) + book.codes[0, 5])
    assert_close(forced[:, 2], expected)
    with pytest.raises(InputError, match="place is 'mpl'"), coded.editing({"mpl": force_codes(5)}):
        pass


def test_maps_have_their_channels_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU()).double()
    coded, images = CodedModel(net, {"0": make_book()}, axis=1).eval(), rows(2, 3, 5, 4)
    maps = coded.codebooks["0"](net[0](images).movedim(1, -1)).movedim(-1, 1)
    assert_close(coded(images), maps.relu())
    assert coded.read(images)["0"].shape == (2, 4, 3, 2, 2)


def test_starting_and_replacing_codes_of_a_model():
    net, tokens = make_net()
    coded = CodedModel(net, {"mlp": Codebook(6, 4).double(), "proj:in": Codebook(6, 3).double()})
    coded.initialise(torch.arange(7)[None])
    centres = coded.codebooks["mlp"].codes.detach().clone()
    coded(tokens)
    dead = (coded.codebooks["mlp"].uses == 0).sum()
    assert coded.replace_dead(tokens)["mlp"] == dead
    assert (coded.codebooks["mlp"].codes != centres).any(-1).sum() == dead


def test_places_that_cannot_be_read_are_named():
    net, tokens = make_net()
    for make, words in {
        lambda: CodedModel(net, {}): "no codebooks",
        lambda: CodedModel(net, {"mlq": make_book()}): "did you mean mlp",
        lambda: CodedModel(nn.Sequential(net.mlp, net.mlp), {"0": make_book()}).read(rows(2, 6)): "more than once",
        lambda: CodedModel(net, {"mlp": Codebook(5, 3)})(tokens): "this codebook reads",
    }.items():
        with pytest.raises(InputError, match=words):
            make()
    net.unused = nn.Linear(6, 6)
    with pytest.raises(InputError, match="'unused' did not run"):
        CodedModel(net, {"unused": make_book()}).read(tokens)
