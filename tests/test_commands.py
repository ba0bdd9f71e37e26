"""Commands that are printed, as the next step or as a remedy: a shell takes them, and they say where all lies."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from data_helpers import copy_rlds

import card
import label
import results
import train
import train_latent
from common import Ranks
from files import shell_command

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def spaced(rlds, tmp_path):
    """A data set, and a folder for all else, whose paths have blanks."""
    folder = tmp_path / "my data"
    folder.mkdir()
    return copy_rlds(rlds, folder), tmp_path / "my runs"


def commands_in(text):
    """Return [[words]] of the commands in a text, as a shell splits them."""
    found = re.findall(r"(?:python|torchrun[-\w ]*?) ((?:train|train_latent|label|eval)\.py .*?)(?: &&|$)", text, re.M)
    return [shlex.split(command) for command in found]


def test_words_flags_and_empty_options():
    """By their names; what is empty is left out, a number 0 is not."""
    options = {"data": [Path("a b"), "c"], "init_from": "it's", "spec": (), "cache": None, "text": "", "delta": 0}
    words = shlex.split(shell_command("python", "label.py", **options, centre=False, blind=True))
    assert words[:8] == ["python", "label.py", "--data", "a b", "c", "--init-from", "it's", "--delta"]
    assert words[8:] == ["0", "--no-centre", "--blind"]


def test_next_command_of_a_run(tmp_path, capsys):
    """Evaluation, or Python where no simulator has the robot; how to continue an interrupted run."""
    model = {"action_size": 7}
    description = {"data": [{"embodiment": "libero"}], "model": model}
    assert shlex.split(card.next_command(Path("my runs/a"), description)) == ["python", "eval.py", "my runs/a"]
    arm = {"data": [{"embodiment": "arm"}], "model": model}
    assert 'Policy("my runs/a")' in card.next_command(Path("my runs/a"), arm)
    card.finish_run(SimpleNamespace(run=tmp_path / "a run", steps=9), 4, True)
    (again,) = re.findall("--out .*", capsys.readouterr().out)
    assert shlex.split(again) == ["--out", str(tmp_path / "a run"), "--resume"]
    (tmp_path / "a run").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        results.load_results(tmp_path / "a run")
    assert commands_in(str(caught.value)) == [["eval.py", str(tmp_path / "a run")]]


def test_commands_for_missing_targets(spaced, train_config, tmp_path):
    """They name data, description and cache of the run; the labels' model is trained on all of its data sets."""
    rlds, out = spaced
    other = shutil.copytree(rlds, out / "other")
    both = dict(data=(rlds, other), spec=("libero", "libero"), cache=tmp_path / "my cache", labels=(), tokenizer="")
    with pytest.raises(FileNotFoundError) as caught:
        train.main(train_config(tmp_path / "run", variant="la_cond", **both))
    lam, labelling = commands_in(str(caught.value))
    parsed = tyro.extras.subcommand_cli_from_dict({"lam": train_latent.LamTraining}, args=lam[1:])
    assert (parsed.data, parsed.spec, parsed.cache) == ([rlds, other], ("libero", "libero"), both["cache"])
    parsed = tyro.cli(label.Config, args=labelling[1:])
    assert (parsed.data, parsed.spec, parsed.cache) == (rlds, "libero", both["cache"])
    assert parsed.out.parent.parent == both["cache"]
    with pytest.raises(FileNotFoundError) as caught:
        train.main(train_config(tmp_path / "run", variant="la_tok", **both))
    (made,) = commands_in(str(caught.value))
    parsed = tyro.extras.subcommand_cli_from_dict({"tokenizer": train_latent.TokenizerTraining}, args=made[1:])
    assert (parsed.data, parsed.out, parsed.cache) == ([rlds, other], rlds / "tokenizer", both["cache"])


def test_commands_after_latent_training(spaced, capsys):
    """What `train_latent.py` and `label.py` print is taken by the next command, as it is."""
    rlds, out = spaced
    small = dict(data=[rlds], cache=out / "cache", max_steps=1, global_batch_size=4)
    sizes = dict(image_size=24, width=16, num_blocks=1, delta=4)
    train_latent.train(train_latent.LamTraining(out=out / "lam", **small, **sizes), ONE)
    (labelling,) = commands_in(capsys.readouterr().out)
    config = tyro.cli(label.Config, args=labelling[1:])
    label.main(config, ONE)
    (training,) = commands_in(capsys.readouterr().out)
    parsed = tyro.cli(train.Config, args=training[1:])
    assert parsed.data == (rlds,) and parsed.labels[0].exists() and parsed.cache == out / "cache"
    of_tokenizer = dict(num_codes=16, code_dim=16, chunk=5)
    train_latent.train(train_latent.TokenizerTraining(out=out / "tok", **of_tokenizer, **small), ONE)
    (training,) = commands_in(capsys.readouterr().out)
    parsed = tyro.cli(train.Config, args=training[1:])
    assert (
        parsed.variant == "la_tok"
        and parsed.chunk == 5
        and parsed.tokenizer == str(out / "tok")
        and parsed.data == (rlds,)
    )
    config = train_latent.LamTraining(out=out / "lam", stage=1, centre=False, **small, **sizes)
    words = shlex.split(train_latent.next_command(config, "lam", 1))
    parsed = tyro.extras.subcommand_cli_from_dict({"lam": train_latent.LamTraining}, args=words[2:])
    assert parsed.init_from == out / "lam" and not parsed.centre and parsed.width == 16 and parsed.data == [rlds]
