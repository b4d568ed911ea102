"""Calls that cannot be served, and work that fails: the exit status, and a line that says what to do instead."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch

import saccade
from saccade.cli import main
from saccade.training import read_checkpoint, save_checkpoint
from tests.data.pictures import write, write_class


@pytest.fixture
def complaint(capsys):
    """Call, see that it fails with this status and prints nothing else, and return the line on stderr."""

    def complain(*words, status=2):
        assert main([str(word) for word in words]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"saccade {words[0]}: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return complain


@pytest.fixture
def photos(tmp_path):
    for name in ("cats", "dogs"):
        write_class(tmp_path / "photos" / name, 4)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    left = [path.name for path in Path.cwd().iterdir()]
    assert not left, "a call that failed left something behind"


trains = pytest.mark.parametrize("command", ["study", "train"])


@trains
def test_no_such_folder(command, complaint):
    message = complaint(command, "nowhere")
    assert "there is no folder 'nowhere'" in message
    assert "give a folder with one subfolder of images for each class" in message


@trains
def test_nearest_bundled_set(command, complaint):
    assert "did you mean digits?" in complaint(command, "digit")


@trains
def test_no_classes(command, complaint, photos):
    message = complaint(command, photos / "cats")
    assert "has no classes: '0.png' and 3 more lie directly in it. Put the images into one folder a class" in message


@trains
def test_one_class(command, complaint, photos, tmp_path):
    (photos / "dogs").rename(tmp_path / "dogs")
    assert "has one class, 'cats': there is nothing to tell apart. Give two" in complaint(command, photos)


@trains
def test_empty_class(command, complaint, photos):
    (photos / "birds").mkdir()
    assert "the class 'birds' of photos has no readable image: add images or" in complaint(command, photos)


@trains
def test_a_class_of_unreadable_files(command, complaint, photos):
    (photos / "birds").mkdir()
    for name in ("text.png", "more.jpg"):
        (photos / "birds" / name).write_text("not an image")
    assert "the class 'birds' of photos has no readable image" in complaint(command, photos)


WRONG = {
    "study": [
        ("--mixers windov", "mixer is 'windov': did you mean window?"),
        ("--mixers window,pooling,window", "window, pooling, window: one is named twice. Name each once"),
        ("--mixers ''", "no mixer is named: give one or more of agent, aggregated, attention"),
        ("--mixers window(window_size=3", "mixer is 'window(window_size=3': write a name, or name(option=value)"),
        ("--mixers window(3)", "mixer is 'window(3)': write a name, or name(option=value)"),
        ("--mixers window(window_size=x)", "mixer is 'window(window_size=x)': write a name, or name(option=value)"),
        ("--mixers depthwise-conv", "mixer is 'depthwise-conv': did you mean depthwise_conv?"),
        ("--mixers neighborhood(window_size=99)", "at 32 pixels: window_size 99 with dilation 1 spans 99 tokens"),
        ("--mixers window(window_size=99)", "a window must fit into the map. Take a smaller window"),
        (
            "--mixers window(windowsize=3)",
            "WindowAttention has no option 'windowsize': did you mean window_size or num_windows?",
        ),
        ("--backbone study_xxx", "backbone is 'study_xxx': did you mean study_xxs"),
        ("--backbone convit_test,study_xxx", "backbone is 'study_xxx': did you mean study_xxs"),
        ("--backbone ,", "backbone is ',': choose one of agent"),
        ("--backbone convit_test,convit_test", "backbone is convit_test,convit_test: one is named twice"),
        ("--backbone study_xs,study_xxs", "study_xs and study_xxs take a mixer each, and mixers are compared in one"),
        ("--epochs 0", "epochs is 0: give a whole number of at least 1"),
        ("--seeds 0", "seeds is 0: give a whole number of at least 1"),
        ("--batch-size 0", "batch_size is 0: give a whole number of at least 1"),
        ("--image-size 0", "image_size is 0: give a number of pixels from 1"),
        ("--learning-rate 0", "learning_rate is 0, so nothing would be learnt: give a number above 0"),
        ("--augment ligth", "augment is 'ligth': did you mean light?"),
        ("--accelerator cup", "accelerator is 'cup': did you mean cpu"),
        ("--devices none", "devices is 'none': give a number from 1 up"),
        ("--strategy dp", "strategy is 'dp': did you mean ddp"),
    ],
    "train": [
        ("--mixer windov", "mixer is 'windov': did you mean window?"),
        ("--mixer window(window_size=99)", "a window must fit into the map. Take a smaller window"),
        ("--model resnet", "model is 'resnet': choose one of agent_cswin_base"),
        ("--epochs 0", "epochs is 0: give a whole number, 1 or more"),
        ("--seed -1", "seed is -1: give a whole number, 0 or more"),
    ],
}


@pytest.mark.parametrize(
    ("command", "options", "message"), [(c, *case) for c, cases in WRONG.items() for case in cases]
)
def test_options_that_cannot_be_served(command, options, message, complaint, photos):
    name, _, value = options.partition(" ")
    assert message in complaint(command, photos, name, value.strip("'"), *("--image-size", 32) * (name[2] != "i"))


def test_networks_that_the_images_or_mixers_do_not_fit(complaint, photos):
    message = complaint("study", photos, "--backbone", "moat_test,agent_pvt_test", "--image-size", 16)
    assert "agent_pvt_test at 16 pixels: images is (1, 3, 16, 16): give 32 x 32 pixels at least" in message
    for call in (
        ("study", "--backbone", "moat_test", "--mixers", "window,grid"),
        ("train", "--mixer=window", "--model=moat_test"),
    ):
        message = complaint(call[0], photos, *call[1:])
        assert "mixer is 'window', but moat_test has mixers of its own: leave the mixer out, or take a" in message
        assert "network into which one is put: study_s, study_xs, study_xxs" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study", "the following arguments are required: data. See saccade study --help"),
        ("study a --mixrs window", "there is no option --mixrs: did you mean --mixers? See saccade study --help"),
        ("study a --xyz", "there is no option --xyz: choose one of --accelerator, --augment,"),
        ("study a b", "unrecognized arguments: b. See"),
        ("study a --seeds", "argument --seeds: expected one argument. See"),
        ("study a --seeds two", "--seeds is 'two': give a whole number. See"),
        ("study a --epochs 1.5", "--epochs is '1.5': give a whole number. See"),
        ("study a --learning-rate fast", "--learning-rate is 'fast': give a number. See"),
        ("study a --config nowhere.yaml", "nowhere.yaml"),
        ("models x*", "no network matches 'x*': choose one of agent_cswin_base"),
        ("bench --operators windov", "operator is 'windov': did you mean window?"),
        ("bench --sides 7,x", "sides is '7,x': give whole numbers such as 14,28,56"),
        ("bench --sides 7,0", "side is 0: give a whole number of at least 1"),
        ("bench --heads 0", "heads is 0: give a whole number of at least 1"),
        ("bench --dtype float23", "dtype is 'float23': did you mean float32"),
        ("bench maks", "what is 'maks': did you mean masks"),
        ("bench masks --masks causl", "mask is 'causl': did you mean causal"),
        ("bench masks --lengths 7,x", "lengths is '7,x': give whole numbers such as 14,28,56"),
        ("bench masks --lengths 0", "length is 0: give a whole number of at least 1"),
        ("bench masks --peers dens", "peer is 'dens': did you mean dense"),
        ("bench masks --sides 7", "--sides is given to `saccade bench masks`, which has no use for it"),
        ("bench --lengths 7", "--lengths is given to `saccade bench operators`, which has no use for it"),
        ("bench --operators window --sides 2 --plot plot.doc", "plot is 'plot.doc': "),
        ("train a --nodes 2.5", "--nodes is '2.5': give a whole number"),
    ],
)
def test_wrong_calls(words, message, complaint):
    assert message in complaint(*words.split())


def test_machines_that_nobody_named(complaint, photos, tmp_path):
    message = complaint("train", photos, "--mixer", "pooling", "--nodes", 2, "--out", tmp_path / "out")
    assert "nodes is 2 and nothing says where the others are: start the program on each machine" in message


@pytest.mark.parametrize("command", ["stdy", "Study", "explian"])
def test_unknown_command(command, capsys):
    assert main([command]) == 2
    assert f"saccade: there is no command {command!r}: did you mean " in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = saccade.create_model("study_xxs", num_classes=2, mixer="pooling")
    config = {"model": "study_xxs", "options": {"mixer": "pooling"}, "classes": ["cat", "dog"]}
    return save_checkpoint(tmp_path / "net", model, {**config, "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3})


@pytest.fixture
def photo(tmp_path):
    return write(tmp_path / "photo ü.jpg")


class Code:
    """Pickles as a call that makes a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_pickled_code_is_refused_and_not_run(complaint, photo, tmp_path):
    torch.save({"state_dict": Code(tmp_path / "ran")}, tmp_path / "net.pth")
    message = complaint("explain", photo, "--model", tmp_path / "net.pth")
    assert re.search(r"net\.pth is refused: it is pickled with code in it \(\w+\.mkdir\)", message)
    assert "If you trust where it comes from, convert it once" in message
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_architecture(complaint, photo, checkpoint):
    state, config = read_checkpoint(checkpoint).state, read_checkpoint(checkpoint).config
    save_checkpoint(checkpoint, state, config | {"options": {"mixer": "window"}})
    message = complaint("explain", photo, "--model", checkpoint)
    assert "net.safetensors holds weights of another architecture; missing: stages.0.blocks.0.mixer." in message
    assert "Build the network with the options that it was trained with" in message
    save_checkpoint(checkpoint, state, config | {"model": "study_l"})
    assert "model is 'study_l': did you mean study_s" in complaint("explain", photo, "--model", checkpoint)


def test_checkpoint_that_is_none(complaint, photo, checkpoint, tmp_path):
    assert "nowhere.pt is not there: give a .safetensors" in complaint("explain", photo, "--model", "nowhere.pt")
    assert "photo ü.jpg has the suffix '.jpg': expected" in complaint("explain", photo, "--model", photo)
    checkpoint.with_suffix(".json").unlink()
    assert "net.safetensors does not say which network it holds" in complaint("explain", photo, "--model", checkpoint)
    (tmp_path / "text.safetensors").write_text("not weights")
    assert "text.safetensors" in complaint("explain", photo, "--model", tmp_path / "text.safetensors")


def test_images_that_are_none(complaint, checkpoint, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    message = complaint("explain", tmp_path / "text.png", "--model", checkpoint)
    assert "text.png cannot be used: it is no image in a format that can be read" in message
    message = complaint("explain", "nowhere.jpg", "--model", checkpoint)
    assert "the image nowhere.jpg cannot be used: it cannot be opened (No such file or directory)" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "grad-cam"], "method is 'grad-cam': did you mean gradcam or grad_cam"),
        (["--method", "random,"], "method is '': choose one of attention_flow, attention_rollout"),
        (["--target", "dgo"], "target is 'dgo': did you mean dog?, or a number below 2"),
        (["--target", "2"], "target is '2': choose one of cat, dog, or a number below 2"),
        (["--target", "²"], "target is '²': choose one of cat, dog, or a number below 2"),
        (["--target", "-1"], "-1"),
    ],
)
def test_methods_and_targets_that_there_are_not(options, message, complaint, checkpoint, photo):
    assert message in complaint("explain", photo, "--model", checkpoint, *options)


def test_pictures_that_cannot_be_written(complaint, checkpoint, photo):
    message = complaint("explain", photo, "--model", checkpoint, "--out", photo / "maps")
    assert "photo ü.jpg" in message
    assert "cannot be written" in message
    assert "Choose a folder in which you may write" in message


def test_failed_work_and_an_interrupt_have_their_own_status(complaint, monkeypatch):
    def fail(error):
        def run(_):
            raise error

        monkeypatch.setattr("saccade.cli.mixers.run", run)

    fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plot.svg"))
    message = complaint("mixers", status=1)
    assert "plot.svg: No space left on device. Check the path, its permissions and free space" in message
    fail(OSError("the disk is on fire"))
    assert "the disk is on fire. Check" in complaint("mixers", status=1)
    fail(KeyboardInterrupt())
    assert "stopped; the same command goes on where it was" in complaint("mixers", status=130)


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("mixers", {"window", "pooling"}),
        ("models study_x*", {"study_xs", "study_xxs"}),
        (
            "bench --operators window,global --sides 2,3",
            {"operator", "milliseconds", "dense", "speedups", "bounds", "exponent"},
        ),
        ("bench masks --masks causal --lengths 8 --peers dense", {"mask", "density", "tiled", "speedups", "tflops"}),
    ],
)
def test_json_is_all_that_is_printed(words, keys, capsys):
    assert main([*words.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert keys <= set(found[0] if isinstance(found, list) else found)


def test_bench_masks_prints_shares_times_and_what_is_missing(capsys):
    call = "bench masks --masks causal,document --lengths 16,32 --head-dim 8 --peers dense --backward"
    assert main(call.split()) == 0
    printed = capsys.readouterr()
    for words in ("mask", "density", "tiles", "computed", "ours", "dense (times ours)", "TFLOP/s", "document", "x)"):
        assert words in printed.out
    assert printed.err == "causal, 16 tokens\ncausal, 32 tokens\ndocument, 16 tokens\ndocument, 32 tokens\n"
    assert main(["bench", "masks", "--masks", "full", "--lengths", "4", "--peers", "none"]) == 0
    assert "times ours" not in capsys.readouterr().out


def test_train_leaves_a_checkpoint_and_names_what_it_left_out(photos, tmp_path, capsys):
    (photos / "cats" / "notes.jpg").write_text("not an image")
    options = ["--mixer", "neighborhood(window_size=(2, 1))", "--epochs", "1", "--image-size", "16"]
    call = ["train", str(photos), *options, "--out", str(tmp_path / "out")]
    assert main(call) == 0
    printed = capsys.readouterr()
    assert "% of 2 held-out images right after" in printed.out
    assert str(tmp_path / "out" / "model.safetensors") in printed.out
    assert "1 image could not be used:\n  cats/notes.jpg: it is no image" in printed.err
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["epoch"] for row in found["history"]] == [0]
    assert saccade.create_model("study_xxs", pretrained=found["checkpoint"]).num_classes == 2


def test_arguments_from_a_file(photos, tmp_path, capsys):
    (tmp_path / "call.yaml").write_text(f"data: {photos}\nepochs: 0\n")
    assert main(["train", "--config", str(tmp_path / "call.yaml")]) == 2
    assert "epochs is 0" in capsys.readouterr().err
    assert main(["study", "digits", "--print_config"]) == 0
    assert "seeds: 2" in capsys.readouterr().out
