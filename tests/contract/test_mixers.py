"""Laws of every exported mixer. A mixer that cannot keep one stands in exceptions.py, with the reason."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import create_mixer, describe_mixer
from tests.contract.exceptions import (
    AVERAGED,
    BEYOND,
    CHOOSES_ALL,
    IMAGES_ONLY,
    NO_PREFIX,
    NO_SOFTMAX,
    PREFIX_OPTION,
    TAUGHT_APART,
    VARIANTS,
)
from tests.contract.mixers import CASES, DIM, NAMES, every_mixer, every_name, make_input, make_mixer, reached, show


def test_exceptions_are_of_mixers_that_exist():
    for table in (
        VARIANTS,
        AVERAGED,
        BEYOND,
        CHOOSES_ALL,
        NO_PREFIX,
        PREFIX_OPTION,
        IMAGES_ONLY,
        NO_SOFTMAX,
        TAUGHT_APART,
    ):
        assert set(table) <= set(NAMES)


# Shapes


@every_mixer
@pytest.mark.parametrize("space", [(8, 8), (7, 9), (14, 5)], ids=str)
def test_the_output_has_the_shape_and_kind_of_the_input(name, options, space):
    x = make_input(*space)
    out = make_mixer(name, options)(x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert out.isfinite().all()


@every_name
@pytest.mark.parametrize("space", [(1, 1), (2, 3), (1, 11)], ids=str)
def test_defaults_serve_a_map_of_any_size(name, space):
    test_the_output_has_the_shape_and_kind_of_the_input(name, {}, space)


@every_name
@pytest.mark.parametrize("space", [(12,), (3, 4, 5)], ids=str)
def test_texts_and_videos_are_served_too(name, space):
    options = {}
    if name in IMAGES_ONLY:
        with pytest.raises(InputError, match=r"x is .*[Gg]ive \(B, H, W, 8\)"):
            make_mixer(name)(make_input(*space))
        return
    try:
        mixer = make_mixer(name, {"axes": len(space)})
        with pytest.raises(InputError, match=f"axes={len(space)}|{len(space)} axes"):
            make_mixer(name)(make_input(*space))  # built for images
    except InputError:  # a mixer without the option serves all
        mixer = make_mixer(name, options)
    x = make_input(*space)
    assert mixer(x).shape == x.shape
    with saccade.tap(mixer) as seen:
        mixer(x)
    assert seen[""].attention.shape[-2:] == (torch.Size(space).numel(),) * 2


@every_mixer
def test_an_empty_batch_gives_an_empty_batch(name, options):
    x = make_input(6, 8, batch=0)
    assert make_mixer(name, options)(x).shape == x.shape


@every_mixer
def test_strides_of_the_input_do_not_matter(name, options):
    mixer, x = make_mixer(name, options), make_input(6, 8)
    channels_first = x.permute(0, 3, 1, 2).contiguous()
    assert_close(mixer(channels_first.permute(0, 2, 3, 1)), mixer(x))


# Laws of values


@every_mixer
def test_images_of_a_batch_do_not_meet(name, options):
    mixer, x = make_mixer(name, options), make_input(7, 9, batch=3)
    assert_close(mixer(x), torch.cat([mixer(image) for image in x.split(1)]))


@every_mixer
def test_in_evaluation_the_same_input_gives_the_same_output(name, options):
    mixer, x = make_mixer(name, options, torch.float32), make_input(7, 9, dtype=torch.float32)
    assert torch.equal(mixer(x), mixer(x))


@every_mixer
def test_tokens_are_mixed(name, options):
    mixer, x = make_mixer(name, options), make_input(7, 9, batch=1).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[0, 3, 4].square().sum(), x)
    assert (grad.abs().sum(-1) > 0).sum() > 1


@every_mixer
def test_bfloat16_is_close_to_full_precision(name, options):
    """A handful of roundings of eps each, in the weights, the projections and the result, as a root mean square."""
    mixer = make_mixer(name, {**options, **CHOOSES_ALL.get(name, {})}, torch.bfloat16)
    x = make_input(7, 9, dtype=torch.bfloat16)
    out, full = mixer(x), copy.deepcopy(mixer).double()(x.double())
    assert out.dtype == torch.bfloat16
    error = (out - full).square().mean().sqrt() / full.square().mean().sqrt()
    assert error < 3 * torch.finfo(torch.bfloat16).eps


# Laws of gradients


@every_mixer
def test_every_parameter_gets_a_gradient(name, options):
    mixer, x = make_mixer(name, options), make_input(7, 9).requires_grad_()
    mixer(x).square().sum().backward()
    assert x.grad.abs().max() > 1e-6
    for parameter_name, parameter in reached(name, mixer).items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-6, parameter_name


@every_mixer
def test_gradients_are_those_of_finite_differences(name, options):
    mixer, x = make_mixer(name, options), make_input(3, 4, batch=1).requires_grad_()
    names, parameters = zip(*mixer.named_parameters()) if list(mixer.parameters()) else ((), ())

    def call(x, *parameters):
        return functional_call(mixer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(mixer, (x[..., :3, :].detach().requires_grad_(),))


# Keeping


@every_mixer
def test_a_saved_state_loads_into_a_fresh_mixer(name, options):
    mixer, x = make_mixer(name, options), make_input(7, 9)
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    fresh = make_mixer(name, options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_close(fresh(x), mixer(x))


@every_mixer
def test_copies_and_pickles_compute_the_same(name, options):
    mixer, x = make_mixer(name, options), make_input(7, 9)
    out = mixer(x)  # before copying, so that anything kept from a call is copied too
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(twin(x), out)


# Compilers


def check_compiled(name, mixer, spaces, **options):
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, **options)
    for space in spaces:
        x = make_input(*space).requires_grad_()
        leaves = [x, *reached(name, mixer).values()]
        out, expected = compiled(x), mixer(x)
        assert_close(out, expected)
        upstream = torch.randn_like(expected)
        assert_close(*(torch.autograd.grad(result, leaves, upstream) for result in (out, expected)))


@every_name
def test_compiled_whole_it_gives_the_same_at_two_sizes(name):
    check_compiled(name, make_mixer(name), [(7, 9), (8, 4)], backend="aot_eager", dynamic=False)


@pytest.mark.slow
@every_mixer
def test_compiled_with_sizes_found_to_vary_it_gives_the_same(name, options):
    check_compiled(name, make_mixer(name, options), [(7, 9), (8, 4), (6, 6)], backend="aot_eager")


@every_mixer
@pytest.mark.parametrize("space", [(7, 9), (8, 4)], ids=str)
def test_exported_it_gives_the_same(name, options, space):
    mixer = make_mixer(name, options)
    exported = torch.export.export(mixer, (make_input(*space),)).module()
    x = make_input(*space)
    assert_close(exported(x), mixer(x))


# Implementations


choosing = [case for case in CASES if hasattr(create_mixer(case[0], DIM), "impl")]


@pytest.mark.parametrize(("name", "options"), choosing, ids=[*map(show, choosing)])
def test_the_reference_gives_the_same(name, options):
    reference = make_mixer(name, {**options, "impl": "reference"})
    mixer, x = make_mixer(name, options), make_input(7, 9).requires_grad_()
    reference.load_state_dict(mixer.state_dict())
    out = [each(x) for each in (mixer, reference)]
    assert_close(*out)
    upstream = torch.randn_like(out[0])
    grads = [
        torch.autograd.grad(y, [x, *reached(name, each).values()], upstream) for y, each in zip(out, (mixer, reference))
    ]
    assert_close(*grads)


# Errors


@every_name
@pytest.mark.parametrize("shape", [(2, 7, 9, DIM + 1), (2, DIM, 7, 9), (2, DIM), (DIM,)], ids=str)
def test_inputs_of_another_width_or_with_channels_first(name, shape):
    with pytest.raises(InputError, match=r"x is \(.*\): .* takes \(B, \*space, 8\), channels last. Move the channels"):
        make_mixer(name)(torch.zeros(shape, dtype=torch.float64))


@every_name
def test_a_map_without_tokens(name):
    with pytest.raises(InputError, match=r"x is \(2, 0, 9, 8\): every axis of space needs at least one token"):
        make_mixer(name)(make_input(0, 9))


@every_name
@pytest.mark.parametrize("shape", [(2, DIM), (2, 3, DIM + 1), (1, 3, DIM), (2, 1, 3, DIM)], ids=str)
def test_a_prefix_of_another_shape(name, shape):
    with pytest.raises(InputError, match=r"prefix is \(.*\): give \(2, tokens, 8\)"):
        make_mixer(name)(make_input(7, 9), torch.zeros(shape, dtype=torch.float64))


@every_name
def test_an_option_that_does_not_exist(name):
    with pytest.raises(InputError, match=r"has no option 'windw_size': (did you mean|choose one of) "):
        create_mixer(name, DIM, windw_size=3)


@every_name
def test_every_mixer_says_in_a_sentence_what_it_does(name):
    assert 30 < len(describe_mixer(name)) < 200
    assert describe_mixer(name).endswith(".")


def test_a_mixer_that_does_not_exist():
    with pytest.raises(InputError, match="mixer is 'windov': did you mean window"):
        create_mixer("windov", DIM)
