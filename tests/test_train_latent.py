"""train_latent.py and label.py as commands: one process or two, resuming, held-out episodes, refused settings."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import tyro
from torch.optim.optimizer import register_optimizer_step_pre_hook
from warm import call_on_ranks

import checkpoint
import common
import files
import label
import latent
import quantiser
import targets
import train_latent
from curves import read_log
from data import Dataset, open_dataset
from index import episode_steps, split_episodes

ONE = common.Ranks(0, 1, torch.device("cpu"))
SMALL_LAM = dict(image_size=24, width=16, num_blocks=1, code_dim=8, delta=5)
SMALL = {  # settings with which each command trains for a fraction of a second
    train_latent.LamTraining: SMALL_LAM,
    train_latent.TokenizerTraining: dict(num_codes=16, code_dim=16),
}
COMMANDS = tuple(SMALL)
BUILD = dict(zip(COMMANDS, (train_latent.build_lam, train_latent.build_tokenizer)))


def make_config(command, out, data, cache, **changes):
    """Return small settings of a command for one data set."""
    small = dict(max_steps=2, global_batch_size=8, val_fraction=0.25)
    return command(data=[data], out=out, cache=cache, **small | SMALL[command] | changes)


def lam_config(out, data, cache, **changes):
    """Return small settings of `train_latent.py lam`."""
    return make_config(train_latent.LamTraining, out, data, cache, **changes)


def read_weights(folder):
    """Return the tensors of a run's model."""
    return files.load_tensors(folder / "model.safetensors")[0]


def assert_same_weights(folder, expected):
    """Fail unless the models in two folders are the same in every bit."""
    tensors, expected = read_weights(folder), read_weights(expected)
    assert tensors.keys() == expected.keys()
    for name in tensors:
        assert torch.equal(tensors[name], expected[name]), name


# ----------------------------------------------------------------------------------------------------------------------
# One process and two


def train_quantiser(rank, world, kind):
    """Return the state after each of five updates in float64, with an initialisation and restarts.

    Rank r has the vectors r::world.
    """
    q = quantiser.QUANTISERS[kind](6, 3, patience=2).double()
    states = []
    for step in range(5):
        x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 5 * step
        valid = torch.arange(16).view(8, 2) % 5 > 0
        *_, loss = q(x[rank::world], valid[rank::world])
        if kind == "loss":
            (gradient,) = torch.autograd.grad(loss, q.codebook)
            with torch.no_grad():
                q.codebook -= common.all_mean(gradient)  # as DistributedDataParallel averages
        states.append({name: tensor.clone() for name, tensor in q.state_dict().items()})
    return states


def train_on_ranks(rank, world, out, config):
    """Save the states of both quantisers on each of `world` processes; train a whole model and label with it."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.save({kind: train_quantiser(rank, world, kind) for kind in ("ema", "loss")}, f"{out}/{world}-{rank}.pt")
    ranks = common.Ranks(rank, world, torch.device("cpu"))
    train_latent.train(replace(config, out=out / f"lam{world}"), ranks)
    labelling = label.Config(data=config.data[0], lam=out / "lam1", out=out / f"labels{world}", cache=config.cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "EPISODES_PER_PART", 3)  # of 8 episodes: three parts
        label.main(labelling, ranks)
    common.shutdown_distributed()


@pytest.fixture(scope="module")
def on_ranks(rlds, cache, tmp_path_factory):
    """The folder with what `train_on_ranks` wrote on one process and then on two."""
    out = tmp_path_factory.mktemp("ranks")
    config = lam_config(out, rlds, cache, max_steps=4, global_batch_size=16)
    train_on_ranks(0, 1, out, config)
    call_on_ranks(train_on_ranks, 2, out, config)
    return out


@pytest.mark.parametrize("kind", ("ema", "loss"))
def test_quantiser_on_two_processes_equals_one(kind, on_ranks):
    """Bit-equal on both, and 1e-9 from one process, through an initialisation and restarts."""
    one, first, second = (torch.load(on_ranks / f"{name}.pt")[kind] for name in ("1-0", "2-0", "2-1"))
    moved = [(a["codebook"] - b["codebook"]).norm(dim=1) for a, b in zip(one, one[1:])]
    assert max(step.max() for step in moved) > 4  # a restart
    for expected, state, other in zip(one, first, second, strict=True):
        for name in expected:
            assert torch.equal(state[name], other[name]), name
            assert torch.allclose(expected[name].double(), state[name].double(), rtol=0, atol=1e-9), name


def test_whole_model_on_two_processes_equals_one(on_ranks):
    """Losses, usage and the trained codebook; then the labels, which one model gives on one process and on two."""
    for one, two in zip(read_log(on_ranks / "lam1"), read_log(on_ranks / "lam2"), strict=True):
        assert one["usage"] == two["usage"]
        for name in ("loss", "reconstruction_loss", "quantisation_loss", "action_loss", "copy_error"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name
    codebooks = [read_weights(on_ranks / f"lam{world}")["codes.quantiser.codebook"] for world in (1, 2)]
    assert torch.allclose(*codebooks, atol=1e-4)
    one, one_metadata = files.load_tensors(on_ranks / "labels1")
    two, two_metadata = files.load_tensors(on_ranks / "labels2")
    assert one_metadata == two_metadata and all(torch.equal(one[name], two[name]) for name in one)
    assert not list(on_ranks.glob("*.parts"))


def test_trained_folders_are_complete_and_never_overwritten(rlds, cache, on_ranks, tokenizer):
    """A loadable model, the statistics of its data, one log line per update; a folder is never written to twice."""
    assert latent.load_tokenizer(tokenizer).config["chunk"] == 8
    for folder in (tokenizer, on_ranks / "lam1"):
        assert "q99" in (folder / "dataset_statistics.json").read_text()
    log = read_log(on_ranks / "lam1")
    assert [entry["step"] for entry in log] == [0, 1, 2, 3]
    assert {"usage", "perplexity", "lr", "samples_per_s", "reconstruction_loss"} <= log[0].keys()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        train_latent.train(lam_config(on_ranks / "lam1", rlds, cache), ONE)


# ----------------------------------------------------------------------------------------------------------------------
# Stages and held-out episodes


def test_video_without_actions_or_instructions_trains_both_stages(video, cache, t5, dino, tmp_path, capsys):
    """Stage 1 with T5 and DINOv2, stage 2 from it, labels: each command's last line names the next command."""
    settings = dict(features=str(dino), image_size=14, max_steps=1)
    first, second = tmp_path / "one", tmp_path / "two"
    train_latent.train(lam_config(first, video, cache, stage=1, text=str(t5), **settings), ONE)
    assert f"--stage 2 --init-from {first}" in capsys.readouterr().out
    train_latent.train(lam_config(second, video, cache, stage=2, init_from=first, action_fraction=0.5, **settings), ONE)
    assert f"Next: python label.py --data {video} --lam {second}" in capsys.readouterr().out
    (entry,) = read_log(second)
    assert "action_loss" not in entry and entry["loss"] > 0 and len(entry["usage"]) == len(entry["perplexity"]) == 4
    for folder in (first, second):
        out = tmp_path / f"{folder.name}.safetensors"
        label.main(label.Config(data=video, lam=folder, out=out, cache=cache), ONE)
        labels = targets.load_labels(open_dataset(video, cache), out, delta=5)
        assert labels.fingerprint == latent.fingerprint(folder) and labels.vectors.shape[1:] == (4, 8)
        assert labels.saw_actions == "no"


def test_labels_know_whether_their_model_saw_actions(tmp_path):
    """Its own action head counts, if it was trained, and that of a model it started from; one that is gone may have."""

    def model(name, stage=2, action_fraction=0.05, max_steps=9, init_from=None, action=("action",)):
        training = dict(stage=stage, action_fraction=action_fraction, max_steps=max_steps, init_from=init_from)
        (tmp_path / name).mkdir()
        content = {"training": training, "data": [{"spec": {}}, {"spec": {"action": action}}]}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    head, video = model("head"), model("video", action=())
    (tmp_path / "univla.ckpt").touch()
    assert label.saw_actions(head) == "yes" and label.saw_actions(video) == "no"
    assert label.saw_actions(model("first", stage=1)) == "no"
    without = {"action_fraction": 0.0}
    assert label.saw_actions(model("second", init_from=head, **without)) == "yes"
    assert label.saw_actions(model("third", init_from=video, **without)) == "no"
    assert label.saw_actions(model("fourth", init_from=str(tmp_path / "gone"), **without)) == "unknown"
    assert label.saw_actions(model("fifth", init_from=str(tmp_path / "univla.ckpt"), max_steps=0)) == "no"


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """File of a description of `rlds_latents`: an embodiment of five action dimensions, no gripper, one camera."""
    spec = {"embodiment": "five", "cameras": {"front": "observation/image"}, "action": ["action[0:5]"]}
    path = tmp_path_factory.mktemp("spec") / "five.json"
    path.write_text(json.dumps(spec | {"chunk": 6, "instruction": "language_instruction"}))
    return path


def train_mixture(rank, world, out, command, data, cache, five):
    """Train on data of two embodiments and video on each of `world` processes, one sample of each to a process."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    kept = len(data) if command is train_latent.LamTraining else 2
    config = make_config(command, out / f"{command.__name__}{world}", None, cache, chunk=6, seed=5)
    config = replace(config, data=data[:kept], spec=("libero", str(five), "")[:kept], global_batch_size=2, max_steps=6)
    if kept > 2:
        config = replace(config, action_fraction=0.3)
    train_latent.train(config, common.Ranks(rank, world, torch.device("cpu")))
    common.shutdown_distributed()


@pytest.mark.parametrize("command", COMMANDS)
def test_two_embodiments_and_video_train_together(command, rlds, rlds_latents, video, cache, five, tmp_path, capsys):
    """On one process and on two, whose batches hold one sample each: labelled or not, of one embodiment, or video."""
    data = [rlds, rlds_latents, video]
    train_mixture(0, 1, tmp_path, command, data, cache, five)
    text = capsys.readouterr().out
    call_on_ranks(train_mixture, 2, tmp_path, command, data, cache, five)
    one, two = (tmp_path / f"{command.__name__}{world}" for world in (1, 2))
    for entry, other in zip(read_log(one), read_log(two), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-3)
    saved = json.loads((one / "config.json").read_text())
    if command is train_latent.TokenizerTraining:
        assert latent.load_tokenizer(two).action_sizes == [7, 5]
        assert saved["model"]["embodiments"] == {"libero": 7, "five": 5}
        assert "On held-out episodes of five: " in text and f"--spec libero {five} --tokenizer {one}" in text
    else:
        losses = [entry["action_loss"] for entry in read_log(one)]
        assert min(losses) == 0 < max(losses)  # some batches have no labelled sample
        assert f"label.py --data {rlds} --spec libero --lam {one}" in text
    assert [entry["spec"]["embodiment"] for entry in saved["data"]][:2] == ["libero", "five"]
    if command is train_latent.LamTraining:
        for folder, spec, name in ((rlds_latents, str(five), "five"), (video, "", "video")):
            out = tmp_path / name
            label.main(label.Config(data=folder, lam=one, out=out, spec=spec, cache=cache), ONE)
            assert len(files.load_tensors(out)[0]["codes"]) == len(open_dataset(folder, cache, spec))


@pytest.mark.parametrize("command", COMMANDS)
def test_chunk_is_that_of_the_description(command, rlds, rlds_latents, cache, five, tmp_path):
    """It is kept with the model; descriptions that say different chunks need --chunk."""
    config = make_config(command, tmp_path / "out", rlds_latents, cache, spec=(str(five),))
    train_latent.train(config, ONE)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["training"]["chunk"] == 6 and saved["model"].get("chunk", 6) == 6
    config = replace(config, out=tmp_path / "no", data=[rlds_latents, rlds], spec=(str(five), ""))
    with pytest.raises(ValueError, match="different chunks, {'released': 6, 'made': 8}; choose one with --chunk"):
        train_latent.train(config, ONE)


def test_second_stage_reads_the_camera_of_the_first(rlds, cache, tmp_path):
    """The main one by its name or not; a different one is refused."""
    first = lam_config(tmp_path / "one", rlds, cache, stage=1)
    train_latent.train(first, ONE)
    second = replace(first, stage=2, init_from=first.out)
    train_latent.train(replace(second, out=tmp_path / "same", camera="image"), ONE)
    match = "camera of made is wrist_image, but .*one was trained on image"
    with pytest.raises(ValueError, match=match):
        train_latent.train(replace(second, out=tmp_path / "other", camera="wrist_image"), ONE)


@pytest.mark.parametrize("command", COMMANDS)
def test_held_out_episodes_are_measured_and_not_trained_on(command, rlds, cache, index, tmp_path, monkeypatch, capsys):
    """And late in its training the tokenizer's codebook is refitted once, to the training samples."""
    samples = {}

    def record(name, function):
        def recorded(first, *rest):
            assert name not in samples  # each is called once
            samples[name] = rest[0]
            return function(first, *rest)

        return recorded

    with monkeypatch.context() as patch:
        patch.setattr(train_latent, "run_training", record("training", train_latent.run_training))
        patch.setattr(train_latent, "measure", record("measured", train_latent.measure))
        patch.setattr(latent.ActionTokenizer, "refit", record("refit", latent.ActionTokenizer.refit))
        train_latent.train(make_config(command, tmp_path / "out", rlds, cache, seed=2), ONE)
    training, held_out = split_episodes(index, 0.25, 2)
    assert list(samples["training"].steps[0]) == episode_steps(index, training).tolist()
    assert list(samples["measured"].steps[0]) == episode_steps(index, held_out).tolist()
    refitted = samples["training"] if command is train_latent.TokenizerTraining else None
    assert samples.get("refit") is refitted
    assert "On held-out episodes" in capsys.readouterr().out
    train_latent.train(make_config(command, tmp_path / "all", rlds, cache, seed=2, val_fraction=0.0), ONE)
    text = capsys.readouterr().out
    assert "On training episodes" in text and "held-out" not in text


def test_second_stage_is_announced_with_the_flags_that_it_needs(tmp_path):
    """The printed command, parsed as the command line would be, has all settings of the first stage but those of its
    place and its kind, on as many processes."""
    settings = dict(stage=1, centre=False, text="t5", seed=3, learning_rate=1e-4, val_fraction=0.2, num_workers=2)
    config = lam_config(tmp_path / "one", tmp_path / "data", tmp_path, **settings, wandb_project="mine")
    command = train_latent.next_command(config, "lam", 1).split()
    assert command[:7] == ["python", "train_latent.py", "lam", "--stage", "2", "--init-from", str(tmp_path / "one")]
    parsed = tyro.cli(train_latent.LamTraining, args=command[3:])
    assert replace(parsed, stage=1, init_from=None, out=config.out, text="t5") == config
    on_eight = train_latent.next_command(config, "lam", 8).split()
    assert on_eight == ["torchrun", "--standalone", "--nproc-per-node", "8", *command[1:]]


@pytest.mark.parametrize("command", COMMANDS)
def test_quantiser_gets_patience_and_seed(command, dataset, tmp_path):
    """Those of the command line, in the image-based model and in the tokenizer."""
    config = make_config(command, tmp_path / "out", tmp_path, tmp_path, patience=7, seed=3, chunk=8)
    model, _ = BUILD[command](config, [dataset], ONE)
    made = model.codes.quantiser if command is train_latent.LamTraining else model.quantiser
    assert (made.patience, made.seed) == (7, 3)


def test_every_quantiser_is_a_choice_of_the_command_line():
    """And nothing else is."""
    required = ["--data", "d", "--out", "o", "--codebook"]
    for name in quantiser.QUANTISERS:
        assert tyro.cli(train_latent.LamTraining, args=[*required, name]).codebook == name
    with pytest.raises(SystemExit):
        tyro.cli(train_latent.LamTraining, args=[*required, "unknown"])


@pytest.mark.parametrize("command", COMMANDS)
def test_rates_and_clipping_of_the_updates(command, dataset, cache, tmp_path):
    """One update of 11 is warm-up, then a cosine to 1 %; gradients, here ten times as large, are scaled to norm 1."""
    config = make_config(command, tmp_path, tmp_path, cache, max_steps=11, chunk=8)
    model, make_samples = BUILD[command](config, [dataset], ONE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: 10 * gradient)
    norms = []

    def record(optimizer, *_):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    with register_optimizer_step_pre_hook(record):
        train_latent.run_training(model, make_samples(None), config, ONE)
    log = read_log(tmp_path)
    cosine = [1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / 10)) / 2) for step in range(10)]
    assert [entry["lr"] for entry in log] == pytest.approx([5e-4, *cosine])
    logged = [entry["grad_norm"] for entry in log]
    assert max(logged) > 2 and norms == pytest.approx([min(norm, 1) for norm in logged], rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted training


def test_resumed_training_ends_bit_identically(rlds, cache, tmp_path, monkeypatch):
    """Interrupted after a save and continued, or not: the same weights, codebook counts included, and the same log."""
    whole = lam_config(tmp_path / "whole", rlds, cache, max_steps=4)
    train_latent.train(whole, ONE)
    part = replace(whole, out=tmp_path / "part", save_every=2, resume=True)

    def save_and_interrupt(*arguments):
        checkpoint.save_training(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_latent, "save_training", save_and_interrupt)
        train_latent.train(part, ONE)
    assert list(checkpoint.training_saves(part.out)) == [2]
    train_latent.train(part, ONE)
    assert [entry["step"] for entry in read_log(part.out)] == [0, 1, 2, 3]
    assert_same_weights(part.out, whole.out)
    with pytest.raises(ValueError, match="trained with other settings: learning_rate 0.001 .now 0.1."):
        train_latent.train(replace(part, learning_rate=0.1), ONE)


def test_no_updates_copy_the_model_that_training_starts_from(rlds, cache, tmp_path):
    """As a checkpoint of UniVLA is made a folder for label.py; only the same split can start from a model."""
    whole = lam_config(tmp_path / "whole", rlds, cache)
    train_latent.train(whole, ONE)
    copied = replace(whole, out=tmp_path / "copied", init_from=whole.out, max_steps=0)
    train_latent.train(copied, ONE)
    assert_same_weights(copied.out, whole.out)
    match = r"seed are \(0.25, 1\), but .*whole was trained on the same data with \(0.25, 0\)"
    with pytest.raises(ValueError, match=match):
        train_latent.train(replace(copied, out=tmp_path / "other", seed=1), ONE)


@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_saves_and_the_rest_is_the_same(command, rlds, cache, tmp_path, monkeypatch, capsys):
    """Ended by a scheduler after two updates, its newest save then damaged: weights and log of a whole training."""
    whole = make_config(command, tmp_path / "whole", rlds, cache, max_steps=5, save_every=1)
    train_latent.train(whole, ONE)
    part = replace(whole, out=tmp_path / "part", resume=True)
    tick = common.Meter.tick

    def tick_and_signal(meter, *arguments):
        if len(meter.times) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return tick(meter, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(common.Meter, "tick", tick_and_signal)
        train_latent.train(part, ONE)
    assert "SIGTERM: saved. Go on: the same command with --resume" in capsys.readouterr().out
    newest, _ = checkpoint.training_saves(part.out).values()
    newest.write_bytes(newest.read_bytes()[:-1])
    train_latent.train(part, ONE)
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert_same_weights(part.out, whole.out)
    for a, b in zip(read_log(whole.out), read_log(part.out), strict=True):
        assert a | {"samples_per_s": 0} == b | {"samples_per_s": 0} and a["grad_norm"] > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_loss_that_is_not_finite_ends_the_training(command, rlds, cache, tmp_path):
    """Without a save, naming the update and its samples."""
    config = make_config(command, tmp_path / "out", rlds, cache, max_steps=30, learning_rate=1e36)
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*tfrecord-\S+: step \d+ of episode \d+; /"):
        train_latent.train(config, ONE)
    assert not checkpoint.training_saves(tmp_path / "out")


def test_resuming_from_a_changed_first_stage_is_refused(rlds, cache, tmp_path):
    """Also where a different model has taken the folder of the first one."""
    first = lam_config(tmp_path / "one", rlds, cache, stage=1)
    train_latent.train(first, ONE)
    train_latent.train(replace(first, out=tmp_path / "changed", learning_rate=2e-3), ONE)
    second = lam_config(tmp_path / "two", rlds, cache, stage=2, init_from=first.out, resume=True)
    train_latent.train(second, ONE)
    shutil.rmtree(first.out)
    (tmp_path / "changed").rename(first.out)
    with pytest.raises(ValueError, match="contents of the targets"):
        train_latent.train(second, ONE)


# ----------------------------------------------------------------------------------------------------------------------
# Labelling


def test_an_interrupted_labelling_continues(rlds, cache, index, on_ranks, tmp_path):
    """Parts of the same model, data and delta are kept; others are made again."""
    out = tmp_path / "labels"
    config = label.Config(data=rlds, lam=on_ranks / "lam1", out=out, cache=cache)
    _, metadata = files.load_tensors(on_ranks / "labels1")
    marked = {
        "codes": torch.full((len(index), 4), 7, dtype=torch.uint8),
        "vectors": torch.zeros(len(index), 4, 8).half(),
    }
    for part_metadata, kept in ((metadata | {"lam": "of a different model"}, False), (metadata, True)):
        folder = tmp_path / "labels.parts"
        folder.mkdir()
        files.save_tensors(folder / "0.safetensors", marked, **part_metadata)
        label.main(config, ONE)
        codes = files.load_tensors(out)[0]["codes"]
        assert bool((codes == 7).all()) == kept and not folder.exists()
        out.unlink()


def test_labels_without_out_lie_where_training_looks(tmp_path, rlds, on_ranks, capsys):
    """A second labelling, other data or another delta is refused."""
    config = label.Config(data=rlds, lam=on_ranks / "lam1", cache=tmp_path / "cache")
    label.main(config, ONE)
    text = capsys.readouterr().out
    assert "codes in use" in text and "train.py --variant la_align" in text
    dataset = open_dataset(rlds, tmp_path / "cache")
    path = targets.label_path(dataset, rlds)
    labels = targets.load_labels(dataset, path, delta=5)
    assert (labels.num_codes, labels.fingerprint) == (16, latent.fingerprint(on_ranks / "lam1"))
    with pytest.raises(ValueError, match="labels the data set with fingerprint"):
        targets.load_labels(Dataset(replace(dataset.index, fingerprint="other"), dataset.spec), path)
    with pytest.raises(ValueError, match="made with delta 5"):
        targets.load_labels(dataset, path, delta=8)
    with pytest.raises(FileExistsError, match="exists. Delete it"):
        label.main(config, ONE)


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_bad_settings_are_refused_before_anything_is_written(rlds, video, cache, tmp_path):
    """With the name and the value of the setting."""
    out = tmp_path / "out"

    def refused(match, error=ValueError, **changes):
        with pytest.raises(error, match=match):
            train_latent.train(lam_config(out, rlds, cache, **changes), ONE)

    refused("stage is 2 but init_from is not given", stage=2)
    refused("chunk is -1; it must be at least 0", chunk=-1)
    refused("spec has 2 entries for 1 data sets", spec=("libero", "libero"))
    refused("delta is 99, but the longest episode of made has", delta=99)
    refused("num_codes is 257", num_codes=257)
    refused("code_dim is 0; it must be at least 1", code_dim=0)
    refused("patch_size is 0", patch_size=0)
    refused("width is 20; it must be a multiple of 2 x heads, 8", width=20)
    refused("max_steps is 0; it must be at least 1", max_steps=0)
    refused("action_fraction is 2", action_fraction=2.0)
    refused("init_from .*nothing does not exist", FileNotFoundError, init_from=tmp_path / "nothing", stage=2)
    with pytest.raises(ValueError, match=r"two data sets of one name, \['made', 'made'\]"):
        train_latent.train(replace(lam_config(out, rlds, cache), data=[rlds, rlds]), ONE)
    with pytest.raises(ValueError, match="video, as described by .*spec.json, has no actions; the action tokenizer"):
        train_latent.train(make_config(train_latent.TokenizerTraining, out, video, cache), ONE)
    with pytest.raises(ValueError, match="code_dim is 30; it must be a multiple of the 4 heads"):
        train_latent.train(make_config(train_latent.TokenizerTraining, out, rlds, cache, code_dim=30), ONE)
    assert not out.exists()
