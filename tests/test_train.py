"""train.py: a real run and its files; accumulation, processes and resuming change nothing; bad input harms nothing."""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT
from torch.utils.data import default_collate, get_worker_info
from warm import descendants, is_running, running, wait_for

import batches
import checkpoint
import common
import files
import label
import latent
import policy as policies
import prepare
import targets
import train
import train_latent
from curves import read_log
from index import split_episodes

ONE = common.Ranks(0, 1, torch.device("cpu"))


def column(log, name):
    """One value of every step."""
    return [entry[name] for entry in log]


def contents(folder):
    """{path: hash} of all files in a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def prepare_run_of(config, ranks):
    """Return the `Setup` of a run, as train.py prepares it."""
    return prepare.prepare(config, ranks, train.FREE_TO_CHANGE)


# ----------------------------------------------------------------------------------------------------------------------
# A run


def test_run_writes_what_it_promises(run, dataset):
    """The named files, one object per step with the named keys, statistics by data set, the next command."""
    assert {p.name for p in run.folder.iterdir()} == {
        "config.json",
        "dataset_statistics.json",
        "model.safetensors",
        "training-35.safetensors",
        "training-40.safetensors",
        "log.jsonl",
        "curves.png",
        "README.md",
    }
    log = read_log(run.folder)
    assert column(log, "step") == list(range(40))
    assert all({"step", "loss", "action_loss", "latent_loss", "lr", "samples_per_s"} <= entry.keys() for entry in log)
    assert all(
        math.isclose(e["loss"], e["action_loss"] + e["latent_loss"], rel_tol=1e-6) and e["samples_per_s"] > 0
        for e in log
    )
    assert "val_action_l1" in log[-1]
    config = json.loads((run.folder / "config.json").read_text())
    assert (
        config["train"]["variant"] == config["model"]["variant"] == "la_align"
        and config["train"]["global_batch_size"] == 4
    )
    (entry,) = config["data"]
    assert (entry["name"], entry["fingerprint"]) == ("made", dataset.fingerprint) and list(entry["cameras"]) == [
        "image",
        "wrist_image",
    ]
    assert (entry["suite"], entry["tasks"], entry["widen"], entry["seeds"]) == (
        "libero_goal",
        [1, 8],
        pytest.approx(0.06),
        [10_000, 10_007],
    )
    stats = json.loads((run.folder / "dataset_statistics.json").read_text())
    assert stats.keys() == {"made"} and stats["made"]["num_transitions"] == len(dataset)
    assert f"python eval.py {run.folder}" in run.text


def test_training_learns(run):
    """Within 40 steps both losses of the last ten are below those of the first ten."""
    log = read_log(run.folder)
    for name in ("action_loss", "latent_loss"):
        assert np.mean(column(log, name)[-10:]) < 0.95 * np.mean(column(log, name)[:10]), name


def test_wandb_gets_the_log_on_request(tmp_path, monkeypatch):
    """An offline wandb run appears beside log.jsonl, and only when a project is named."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for project, runs in (("", 0), ("latent-actions", 1)):
        log = common.Log(tmp_path, wandb_project=project, config={"seed": 0})
        log.write(step=0, loss=1.0)
        log.close()
        assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == runs
    assert read_log(tmp_path) == [{"step": 0, "loss": 1.0}]


def test_learning_rates_in_the_log(run):
    """The default schedule: a cosine from the peak at the first step to 1 % of it after the last."""
    lrs = column(read_log(run.folder), "lr")
    assert np.allclose(lrs, [1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * s / 40)) / 2) for s in range(40)])


def test_saved_model_is_the_trained_one(train_config, tmp_path):
    """Loaded twice, a run predicts bit-identically; its error on held-out steps is that of training, and by hand."""
    train.main(train_config(tmp_path / "run", variant="la_align", max_steps=3))
    (first, _), (second, _) = policies.load_vla(tmp_path / "run"), policies.load_vla(tmp_path / "run")
    setup = prepare_run_of(train_config(tmp_path / "other", variant="la_align", max_steps=3), ONE)
    dataset, held_out = setup.dataset, setup.held_out
    ((source, steps),) = held_out
    batch = default_collate([dataset.sample(source, step) for step in steps])
    with torch.no_grad():
        actions = first.predict(batch)[0]
        assert torch.equal(actions, second.predict(batch)[0])
    logged = read_log(tmp_path / "run")[-1]["val_action_l1"]
    assert train.validate(first.eval(), dataset, held_out, ONE) == logged
    error = (actions - batch["actions"]).abs().numpy()[batch["valid"].numpy()]
    assert len(steps) > 20 and logged == pytest.approx(error.mean(), rel=1e-5)


@pytest.mark.parametrize("variant, image_aug", (("la_direct", True), ("la_direct", False), ("la_tok", True)))
def test_first_loss_is_that_of_the_first_batch(variant, image_aug, train_config, tmp_path):
    """Step 0 sees samples 0..3 of the seeded stream, augmented or not, with the seeded weights and their targets."""
    flags = dict(variant=variant, image_aug=image_aug, max_steps=1)
    train.main(train_config(tmp_path / "run", **flags))
    setup = prepare_run_of(train_config(tmp_path / "other", **flags), ONE)
    vla = setup.vla
    batch = default_collate([setup.dataset[p] for p in range(4)])
    assert (setup.tokenizer is None) == (variant == "la_direct")
    if setup.tokenizer:
        batch = targets.add_action_codes(batch, setup.tokenizer)
    without_draws = {name: value for name, value in batch.items() if name != "draws"}
    with torch.no_grad():
        augmented, centred = vla(batch), vla(without_draws)
    assert augmented["loss"] != centred["loss"]
    (logged,) = read_log(tmp_path / "run")
    for name, value in (augmented if image_aug else centred).items():
        if torch.is_tensor(value):
            assert logged[name] == pytest.approx(value.item(), rel=1e-5), name


def test_updates_by_hand(train_config, tmp_path):
    """Three updates as plain arithmetic makes them: gradients scaled down to the norm, AdamW at the scheduled rate,
    decay of matrices alone. The weights for evaluation are the moving average; training goes on from its own."""
    flags = dict(variant="la_direct", max_steps=3, max_grad_norm=0.5, weight_decay=0.5, warmup_ratio=0.34)
    run = train.main(train_config(tmp_path / "run", **flags))
    setup = prepare_run_of(train_config(tmp_path / "other", **flags), ONE)
    weights = {name: p for name, p in setup.vla.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    average = {name: p.detach().clone() for name, p in weights.items()}
    norms = []
    for step, lr in enumerate((0.5e-3, 1e-3, 1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2))):
        setup.vla.zero_grad()
        setup.vla(default_collate([setup.dataset[4 * step + n] for n in range(4)]))["loss"].backward()
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in weights.values())))
        with torch.no_grad():
            for name, p in weights.items():
                gradient = p.grad * min(1, 0.5 / norms[-1])
                first[name].lerp_(gradient, 0.1)
                second[name].lerp_(gradient.square(), 0.001)
                p *= 1 - lr * 0.5 * (p.ndim >= 2 and "queries" not in name)
                scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p -= lr * first[name] / (1 - 0.9 ** (step + 1)) / scale
                average[name].lerp_(p, 1 - (1 + step) / (10 + step))
    assert min(norms) > 0.5 and max(norms) > 1.2 * min(norms)  # or the scale would not matter to AdamW
    assert column(read_log(run), "grad_norm") == pytest.approx(norms, rel=1e-3)
    evaluated, saved = (files.load_tensors(run / f"{name}.safetensors")[0] for name in ("model", "training-3"))
    for name, p in weights.items():
        assert torch.allclose(saved[name], p, atol=1e-5) and torch.allclose(evaluated[name], average[name], atol=1e-5)
        assert torch.equal(saved[f"average.{name}"], evaluated[name])
    assert any(not torch.allclose(average[name], p, atol=1e-4) for name, p in weights.items())


def test_epochs_replace_max_steps(train_config, tmp_path, dataset):
    """0.1 epochs of the training episodes, rounded up to whole batches."""
    train.main(train_config(tmp_path / "run", variant="baseline", epochs=0.1, max_steps=99))
    kept, _ = split_episodes(dataset, 0.25, 0)
    samples = sum(np.diff(dataset.starts)[kept])
    assert len(read_log(tmp_path / "run")) == math.ceil(0.1 * samples / 4)


def test_la_tok_targets_do_not_depend_on_what_lies_past_the_end(tokenizer):
    """The codes of a chunk are the tokenizer's own for the actions inside the episode."""
    frozen = latent.load_tokenizer(tokenizer)
    actions, valid = torch.rand(6, 8, 7) * 2 - 1, torch.arange(8).expand(6, 8) < 5
    inside, outside = actions * valid[..., None], torch.where(valid[..., None], actions, 0.9)
    batch = {"actions": outside, "valid": valid, "embodiment": torch.zeros(6, dtype=torch.long)}
    found = targets.add_action_codes(batch, frozen)
    codes, vectors = frozen.encode(inside)
    assert torch.equal(found["codes"], codes[:, :, None]) and torch.equal(found["vectors"], vectors[:, :, None])


def test_two_data_sets_keep_their_own_statistics(rlds, rlds_latents, train_config, tmp_path):
    """Trained on both, a run knows both statistics, and prediction must say whose to use."""
    train.main(
        train_config(
            tmp_path / "run",
            variant="baseline",
            data=(rlds, rlds_latents),
            labels=(),
            data_weights=(1.0, 0.5),
            max_steps=1,
        )
    )
    with pytest.raises(ValueError, match=r"has statistics of \['made', 'released'\], not of ''"):
        policies.Policy(tmp_path / "run")
    black = np.zeros((96, 96, 3), np.uint8)
    observation = {"images": {"image": black, "wrist_image": black}, "state": np.zeros(8)}
    observation["instruction"] = "put the bowl on the plate"
    made, released = (policies.Policy(tmp_path / "run", name) for name in ("made", "released"))
    assert not np.allclose(made(observation), released(observation), atol=1e-3)


def test_policy_answers_in_the_units_of_the_data(run, dataset):
    """A prediction is the network's, un-normalised by hand: metres and radians, and the gripper as in the data or as
    robosuite commands it, here both -1 open and 1 closed."""
    policy = policies.Policy(run.folder)
    images = {camera: dataset.image(camera, 7) for camera in ("image", "wrist_image")}
    proprio = dataset.state([7])
    texts = [dataset.instruction(7)]
    observation = {"images": images, "state": proprio[0], "instruction": texts[0]}
    actions = policy(observation)
    command = policy(observation, gripper="robosuite")
    stats = policy.stats["proprio"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    normalised = torch.from_numpy(np.clip(2 * (proprio - low) / (high - low + 1e-8) - 1, -1, 1)).float()
    normalised[:, low == high] = 0  # a state that never moves
    views = [policy.stored(name, image) for name, image in images.items()]
    batch = {"images": [torch.from_numpy(view[None]) for view in views], "text": texts, "proprio": normalised}
    with torch.no_grad():
        (raw,) = policy.vla.predict(batch)[0].numpy()
    low, high = np.array(policy.stats["action"]["q01"]), np.array(policy.stats["action"]["q99"])
    assert actions.shape == (8, 7) and np.allclose(actions[:, 6], 1 - 2 * raw[:, 6], atol=1e-6)
    assert np.allclose(actions[:, :6], ((raw + 1) / 2 * (high - low) + low)[:, :6], atol=1e-5)
    assert np.array_equal(command[:, 6], np.sign(actions[:, 6])) and np.array_equal(command[:, :6], actions[:, :6])


# ----------------------------------------------------------------------------------------------------------------------
# The same losses however the work is cut


LOSSES = ("loss", "action_loss", "latent_loss", "grad_norm")


@pytest.fixture(scope="module")
def whole(train_config, tmp_path_factory):
    """Log of four steps of 16 samples at once, and its changes to the small config."""
    changes = dict(variant="la_cond", global_batch_size=16, max_steps=4)
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(train_config(out, **changes))
    return read_log(out), changes


def assert_same_losses(log, expected):
    """Losses, gradient norms and the held-out error agree to rounding at every step."""
    for name in LOSSES:
        assert np.allclose(column(log, name), column(expected, name), rtol=2e-4), name
    assert log[-1]["val_action_l1"] == pytest.approx(expected[-1]["val_action_l1"], rel=1e-3)


def test_accumulation_equals_the_big_batch(whole, train_config, tmp_path):
    """4 x 4 samples instead of 16."""
    train.main(train_config(tmp_path / "run", **whole[1], per_device_batch_size=4))
    assert_same_losses(read_log(tmp_path / "run"), whole[0])


def test_two_processes_equal_one(whole, rlds, cache, labels, script, tmp_path):
    """Each of two processes accumulates 2 x 4 samples, with workers that decode."""
    inputs = ("--data", rlds, "--cache", cache, "--labels", labels, "--val-fraction", 0.25, "--max-steps", 4)
    batch = ("--global-batch-size", 16, "--per-device-batch-size", 4)
    done = script("train.py", "--variant", "la_cond", *inputs, *batch, "--out", tmp_path / "run", ranks=2)
    assert done.code == 0, done.text
    assert_same_losses(read_log(tmp_path / "run"), whole[0])


def test_killed_run_resumes_bit_identically(run, script, tmp_path):
    """Killed after a save and resumed, with other workers: every loss and every weight of the uninterrupted run."""
    out = tmp_path / "run"
    with running([*run.flags, "--out", out], tmp_path / "output") as (process,):
        while not checkpoint.training_saves(out) and process.is_alive():
            time.sleep(0.005)
        process.kill()
    assert process.exitcode == -9 and max(checkpoint.training_saves(out)) < 40
    done = script(*run.flags, "--out", out, "--resume", "--num-workers", 0)
    assert done.code == 0, done.text
    assert column(read_log(out), "step") == list(range(40))
    for name in (*LOSSES, "lr"):
        assert column(read_log(out), name) == column(read_log(run.folder), name), name
    tensors, _ = files.load_tensors(out / "model.safetensors")
    for name, tensor in files.load_tensors(run.folder / "model.safetensors")[0].items():
        assert torch.equal(tensor, tensors[name]), name


def test_checkpointing_and_compiling_change_nothing(train_config, tmp_path, monkeypatch):
    """The same losses, with evaluations on held-out steps in between and no graph made twice.

    Dynamo's own backend stands in for the one that writes C++, which takes minutes.
    """
    changes = dict(variant="la_cond", global_batch_size=4, max_steps=3, val_every=1)
    train.main(train_config(tmp_path / "eager", **changes))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train.main(train_config(tmp_path / "fast", **changes, gradient_checkpointing=True, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same_losses(read_log(tmp_path / "fast"), read_log(tmp_path / "eager"))


def test_resume_before_the_first_save_starts_over(train_config, tmp_path):
    """A run that was killed before it saved anything is trained from the start."""
    train.main(train_config(tmp_path / "run", variant="baseline"))
    expected = column(read_log(tmp_path / "run"), "loss")
    for name in ("model.safetensors", "training-2.safetensors"):
        (tmp_path / "run" / name).unlink()
    train.main(train_config(tmp_path / "run", variant="baseline", resume=True))
    assert column(read_log(tmp_path / "run"), "loss") == expected and (tmp_path / "run" / "model.safetensors").exists()


def test_resume_of_a_finished_run_leaves_its_weights(train_config, tmp_path):
    """The file stays as it is, because results are known by its hash; one that is missing, damaged, or older, as a kill
    amid the last save leaves it, is made from that save."""
    config = train_config(tmp_path / "run", variant="baseline", max_steps=2)
    weights = train.main(config) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    train.main(replace(config, resume=True))
    assert weights.stat().st_mtime_ns == written
    tensors, _ = files.load_tensors(weights)
    for spoil in (
        weights.unlink,
        lambda: weights.write_bytes(b"x"),
        lambda: files.save_tensors(weights, {name: 0 * tensor for name, tensor in tensors.items()}, step=1),
    ):
        spoil()
        train.main(replace(config, resume=True))
        again, info = files.load_tensors(weights)
        assert info == {"step": "2"} and all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong on the way

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def assert_bit_equal(log, expected):
    """Every loss, norm and learning rate of every step."""
    assert column(log, "step") == column(expected, "step")
    for name in (*LOSSES, "lr"):
        assert column(log, name) == column(expected, name), name


def damage(path):
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two(run, script, tmp_path_factory):
    """Folder of `run` on two processes without data workers."""
    out = tmp_path_factory.mktemp("runs") / "two"
    done = script(*run.flags, "--num-workers", 0, "--out", out, ranks=2)
    assert done.code == 0, done.text
    return out


def test_torchrun_restarts_a_killed_rank(run, two, script, tmp_path):
    """Without --resume, and with workers: every loss of the uninterrupted run, although torchrun starts three, of which
    two can share the batch. Then the newest save is damaged: both processes take the one before."""
    out = tmp_path / "run"
    words = [sys.executable, *TORCHRUN, "3", "--max-restarts=1", *map(str, run.flags), "--out", str(out)]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as launcher:
        while not checkpoint.training_saves(out) and launcher.poll() is None:
            time.sleep(0.005)
        os.kill(descendants(launcher.pid)[0], signal.SIGKILL)
        text = launcher.stderr.read()
    assert launcher.returncode == 0 and "exitcode: -9" in text and "forcefully exiting" not in text, text
    assert_bit_equal(read_log(out), read_log(two))
    damage(out / "training-40.safetensors")
    done = script(*run.flags, "--out", out, "--resume", "--num-workers", 0, ranks=2)
    assert done.code == 0 and "training-40.safetensors is damaged" in done.text, done.text
    assert_bit_equal(read_log(out), read_log(two))


def test_killed_launcher_takes_its_ranks_along(run, tmp_path):
    """A rank that torchrun leaves behind would write into the run that is started again."""
    words = [sys.executable, *TORCHRUN, "2", *map(str, run.flags), "--out", str(tmp_path / "run")]
    words[words.index("40")] = "4000"
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as launcher:
        while not checkpoint.training_saves(tmp_path / "run") and launcher.poll() is None:
            time.sleep(0.01)
        below = descendants(launcher.pid)
        launcher.kill()
    assert len(below) >= 2
    wait_for(lambda: not any(map(is_running, below)))


def test_resumed_on_another_number_of_processes(two, train_config, tmp_path):
    """The last five steps of two processes by one: equal to rounding."""
    out = shutil.copytree(two, tmp_path / "run")
    (out / "training-40.safetensors").unlink()
    train.main(train_config(out, variant="la_align", max_steps=40, resume=True))
    assert_same_losses(read_log(out), read_log(two))


def test_damaged_newest_save(run, train_config, tmp_path, capsys):
    """The run goes on from the one before and ends alike; a missing model.safetensors is made again."""
    out = shutil.copytree(run.folder, tmp_path / "run")
    damage(out / "training-40.safetensors")
    (out / "training-45.safetensors.tmp").write_text("left by a kill")
    again = train_config(out, variant="la_align", max_steps=40, save_every=5, resume=True)
    train.main(again)
    assert "training-40.safetensors is damaged" in capsys.readouterr().err
    assert_bit_equal(read_log(out), read_log(run.folder))
    assert contents(out).keys() == contents(run.folder).keys()
    (out / "model.safetensors").unlink()
    train.main(again)
    for name in ("model.safetensors", "training-40.safetensors"):
        ours, theirs = (files.load_tensors(folder / name)[0] for folder in (out, run.folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


@contextlib.contextmanager
def two_ranks(run, out, *more):
    """The two processes of a long run, each in a process group with its data workers, once steps are logged.

    What they print is in OUT.txt.
    """
    words = [*run.flags, "--out", out, "--max-steps", 100_000, *more]
    with running(words, out.with_suffix(".txt"), ranks=2) as ranks:
        wait_for(lambda: not ranks[0].is_alive() or ((out / "log.jsonl").exists() and read_log(out)))
        yield ranks


def test_sigterm_saves_and_ends(run, tmp_path):
    """Sent to one process and its data workers, it ends both with status 0 after the same step, which is saved."""
    out = tmp_path / "run"
    with two_ranks(run, out, "--num-workers", 1, "--save-every", 100_000) as ranks:
        workers = descendants(ranks[1].pid)
        os.killpg(ranks[1].pid, signal.SIGTERM)
        for rank in ranks:
            rank.join(60)
        text = out.with_suffix(".txt").read_text()
        assert [rank.exitcode for rank in ranks] == [0, 0], text
        assert workers and not any(map(is_running, workers))
    (step,) = checkpoint.training_saves(out)
    assert f"SIGTERM: saved after {step} of 100000 steps. Continue: the same command with --out {out} --resume" in text
    assert column(read_log(out), "step") == list(range(step)) and (out / "model.safetensors").exists()


def test_a_rank_that_hangs_ends_the_job(run, tmp_path):
    """The other one gives up after --timeout and says so."""
    with two_ranks(run, tmp_path / "run", "--num-workers", 0, "--timeout", 3) as ranks:
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[0].join(60)
    assert ranks[0].exitcode == 1
    text = (tmp_path / "run.txt").read_text()
    assert "another process died, perhaps for lack of memory, or hangs (--timeout is 3 s)" in text


@pytest.mark.parametrize("fault, message", (
    (lambda: os.kill(os.getpid(), 9), r"DataLoader worker \(pid\S* \d+\)(?s:.)*--num-workers is 1\S* .*memory"),
    (lambda: time.sleep(300), r"DataLoader timed out after 2 seconds(?s:.)*--timeout is 2 s"),
), ids=("dies", "hangs"))  # fmt: skip
def test_a_data_worker_that(fault, message, train_config, tmp_path, monkeypatch):
    """Ends the run with an error that names it and what to do, and no process stays."""
    sample = batches.ActionChunks.sample
    monkeypatch.setattr(
        batches.ActionChunks, "sample", lambda *given: (get_worker_info() and fault(), sample(*given))[1]
    )
    with pytest.raises(RuntimeError, match=message):
        train.main(train_config(tmp_path / "run", variant="baseline", num_workers=1, timeout=2))
    wait_for(lambda: not multiprocessing.active_children())


def poisoned(value, where, monkeypatch, times=10**9):
    """Let the actions of the sample at step `where` of a data set be `value`, the first `times` times."""
    sample, left = batches.ActionChunks.sample, [times]

    def spoiled(self, number, step):
        item = sample(self, number, step)
        if step == where and left[0] > 0:
            left[0] -= 1
            item["actions"] = torch.full_like(item["actions"], value)
        return item

    monkeypatch.setattr(batches.ActionChunks, "sample", spoiled)


@pytest.fixture
def fifth(train_config, tmp_path):
    """The step, in the data set, of sample 5 of the stream: it is in the second batch of four."""
    setup = prepare_run_of(train_config(tmp_path / "other", variant="baseline"), ONE)
    return setup.dataset.place(5)[1]


@pytest.mark.parametrize("value", (math.inf, math.nan))
def test_a_loss_that_is_not_finite_changes_nothing(value, fifth, train_config, tmp_path, monkeypatch):
    """Weights, moments and step counts stay bit-identical over that step; it is counted, and the next one learns.

    An infinite target has an infinite L1 loss, but finite gradients.
    """
    poisoned(value, fifth, monkeypatch)
    flags = dict(variant="baseline", max_steps=3, save_every=1, keep=3)
    train.main(train_config(tmp_path / "run", **flags))
    log = read_log(tmp_path / "run")
    assert column(log, "skipped") == [0, 1, 0] and not math.isfinite(log[1]["loss"] + log[1]["grad_norm"])
    saves = [files.load_tensors(tmp_path / "run" / f"training-{step}.safetensors")[0] for step in (1, 2, 3)]
    followed = [name for name in saves[0] if not name.startswith("average.")]  # the average of the weights goes on
    assert len(followed) > 400 and all(torch.equal(saves[0][name], saves[1][name]) for name in followed)
    assert not any(torch.equal(saves[1][name], saves[2][name]) for name in saves[0] if name.endswith(".step"))
    assert all(tensor.isfinite().all() for tensor in saves[2].values()) and math.isfinite(log[2]["loss"])


@pytest.mark.parametrize("times, listed", ((10**9, 1), (1, 4)))
def test_too_many_steps_that_are_not_finite(times, listed, dataset, fifth, train_config, tmp_path, monkeypatch):
    """The run stops and says which samples of the last step are to blame: all when each alone is sound."""
    poisoned(math.nan, fifth, monkeypatch, times)
    flags = dict(variant="baseline", max_steps=3, max_skipped=1)
    with pytest.raises(FloatingPointError, match=r"1 updates in a row \(--max-skipped\)") as caught:
        train.main(train_config(tmp_path / "run", **flags))
    episode = int(np.searchsorted(dataset.starts, fifth, "right")) - 1
    found = re.findall(r"tfrecord-\S+: step (\d+) of episode (\d+)", str(caught.value))
    assert len(found) == listed and (str(fifth - dataset.starts[episode]), str(episode)) in found
    assert not checkpoint.training_saves(tmp_path / "run")


SPOILED = """
import math, sys
sys.path.insert(0, {root!r})
import torch, tyro
import batches, train
sample = batches.ActionChunks.sample
def spoiled(self, number, step):
    item = sample(self, number, step)
    if step == {step}:
        item["actions"] = torch.full_like(item["actions"], math.nan)
    return item
batches.ActionChunks.sample = spoiled
train.main(tyro.cli(train.Config))
"""  # train.py, but one sample is not finite


def test_a_step_is_skipped_on_all_processes(run, fifth, script, train_config, tmp_path, monkeypatch):
    """What is not finite on one of two processes, a sample's actions, is skipped on both: as on one, to rounding."""
    (tmp_path / "spoiled.py").write_text(SPOILED.format(root=str(ROOT), step=fifth))
    command = [tmp_path / "spoiled.py", *run.flags[1:], "--max-steps", 4, "--out", tmp_path / "two"]
    done = script(*command, "--num-workers", 0, ranks=2)
    assert done.code == 0, done.text
    poisoned(math.nan, fifth, monkeypatch)
    train.main(train_config(tmp_path / "one", variant="la_align", max_steps=4))
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert column(one, "skipped") == column(two, "skipped") and column(two, "skipped")[1] == 1
    sound = [step for step in range(4) if not one[step]["skipped"]]
    assert_same_losses([two[step] for step in sound], [one[step] for step in sound])


def test_torchrun_that_restarts_needs_a_folder(train_config, monkeypatch):
    """Or every restart would begin a run of its own."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="torchrun may restart this run .--max-restarts., but out is not set"):
        train.main(train_config("", variant="baseline"))


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_schedules_by_hand():
    """Warm-up in equal steps; constant; halved every n steps; cosine to 1 %; nothing else."""

    def rate(schedule, steps, **options):
        return [common.learning_rate(step, 10, 1.0, schedule, **options) for step in steps]

    assert np.allclose(rate("constant", range(5), warmup_ratio=0.3), [1 / 4, 2 / 4, 3 / 4, 1, 1])
    assert rate("constant", range(3)) == [1, 1, 1]
    assert rate("step", (0, 2, 3, 5, 6, 9), decay_every=3) == [1, 1, 0.5, 0.5, 0.25, 0.125]
    assert np.allclose(rate("cosine", (2, 6, 10), warmup_ratio=0.2), [1, 0.505, 0.01])
    with pytest.raises(ValueError, match="lr_scheduler is 'linear'; choose constant, step or cosine"):
        rate("linear", [0])


def test_what_is_decayed(train_config, tmp_path):
    """Matrices decay, `gate_proj` among them; norms, biases, gates and queries never; each is in one group."""
    vla = prepare_run_of(train_config(tmp_path / "run", variant="la_align"), ONE).vla
    groups = common.parameter_groups(vla, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    name_of = {id(p): name for name, p in vla.named_parameters()}
    decayed, undecayed = ({name_of[id(p)] for p in group["params"]} for group in groups)
    assert not decayed & undecayed and decayed | undecayed == set(name_of.values())
    assert {
        "queries",
        "head.queries",
        "head.blocks.0.gate",
        "head.norm.weight",
        "backbone.qwen.language_model.norm.weight",
        "latent_head.bias",
    } <= undecayed
    assert {"latent_head.weight", "head.out.weight", "head.blocks.0.image.weight"} <= decayed
    assert {
        f"backbone.qwen.language_model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    } <= decayed


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("changes, message", (
    ({"global_batch_size": 6, "per_device_batch_size": 4}, "per_device_batch_size is 4; it must divide the 6 samples"),
    ({"save_every": 0}, "save_every is 0; it must be at least 1"),
    ({"val_fraction": 1.0}, "val_fraction is 1.0; it must be at least 0 and below 1"),
    ({"data_weights": (1.0, 2.0)}, "data_weights has 2 entries for 1 data sets"),
    ({"out": "", "resume": True}, "resume is set but out is not"),
    ({"cameras": ("front",)}, r"no camera \['front'\]; it has \['image', 'wrist_image'\]"),
    ({"align_target": "quantised"}, "hold continuous vectors, but align_target is 'quantised'"),
    ({"chunk": 5, "variant": "la_tok"}, "action tokenizer .*'chunk': 8.*'chunk': 5"),
    ({"cameras": ("image", "image")}, "cameras are image, image; name each once"),
    ({"head_width": 10}, "head_width is 10; it must be a multiple of 4"),
    ({"text_length": 8}, "text_length is 8; train with a larger --text-length"),
))  # fmt: skip
def test_settings_that_cannot_work(changes, message, train_config, tmp_path):
    """A ValueError with the field and the value."""
    with pytest.raises(ValueError, match=message):
        train.main(train_config(**{"out": tmp_path / "run"} | changes))
    assert not (tmp_path / "run").exists()


def test_batch_that_the_processes_cannot_share(train_config, tmp_path):
    """6 samples for 4 processes."""
    with pytest.raises(ValueError, match="global_batch_size is 6; it must be a multiple of the 4 processes"):
        prepare.check_config(train_config(tmp_path, global_batch_size=6), 4)


def test_unknown_variant(script_here, rlds, tmp_path):
    """The command line lists the five and makes no folder."""
    done = script_here("train.py", "--variant", "la_best", "--data", rlds, "--out", tmp_path / "run")
    assert done.code != 0 and "la_best" in done.text and "la_align" in done.text and not (tmp_path / "run").exists()


def commands_in(message):
    """The commands in an error message that make latent targets, parsed as the command line would be."""
    kinds = {"lam": train_latent.LamTraining, "tokenizer": train_latent.TokenizerTraining}
    configs = []
    for script, options in re.findall(r"python (train_latent|label)\.py ([^&\n]+)", message):
        if script == "label":
            configs.append(tyro.cli(label.Config, args=options.split()))
        else:
            configs.append(tyro.extras.subcommand_cli_from_dict(kinds, args=options.split()))
    return configs


def test_missing_labels_name_the_commands_that_make_them(rlds, train_config, tmp_path):
    """Two commands that are accepted: a model, then labels where training looks; no folder is made."""
    for where in ((), (tmp_path / "nowhere.safetensors",)):
        with pytest.raises(FileNotFoundError, match="variant la_direct needs latent labels") as caught:
            train.main(train_config(tmp_path / "run", variant="la_direct", labels=where, delta=5))
        lam, labelling = commands_in(str(caught.value))
        assert lam.delta == 5 and lam.data == [rlds] and labelling.data == rlds and lam.out == labelling.lam
        if where:
            assert labelling.out == where[0]
    assert not (tmp_path / "run").exists()


def test_missing_tokenizer_names_the_command_that_makes_it(rlds, train_config, tmp_path):
    """One command that is accepted, with the folder where training looks."""
    with pytest.raises(FileNotFoundError, match="variant la_tok needs an action tokenizer") as caught:
        train.main(train_config(tmp_path / "run", variant="la_tok", tokenizer=str(tmp_path / "tokenizer")))
    (made,) = commands_in(str(caught.value))
    assert made.data == [rlds] and made.out == tmp_path / "tokenizer" and not (tmp_path / "run").exists()


def test_labels_of_the_release_need_an_explicit_choice(rlds_latents, train_config, tmp_path):
    """Quantised vectors are refused by default, as is an unknown horizon; they train when asked for."""
    released = dict(variant="la_align", data=(rlds_latents,), labels=(), max_steps=1)
    with pytest.raises(ValueError, match="not its horizon; state it"):
        train.main(train_config(tmp_path / "run", **released, align_target="quantised"))
    released["delta"] = 11
    with pytest.raises(ValueError, match="hold quantised vectors, but align_target is 'continuous'"):
        train.main(train_config(tmp_path / "run", **released))
    train.main(train_config(tmp_path / "run", **released, align_target="quantised"))
    assert read_log(tmp_path / "run")[0]["latent_loss"] > 0


def test_existing_folder_stays_untouched(train_config, tmp_path):
    """Nothing is written into a folder that holds something."""
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="exists and is not empty.*--out.*--resume"):
        train.main(train_config(tmp_path, variant="baseline"))
    assert contents(tmp_path) == before


def test_resume_with_other_settings_is_refused(run, train_config, tmp_path):
    """The changed setting is named with both values, and the run stays as it is."""
    out = shutil.copytree(run.folder, tmp_path / "run")
    before = contents(out)
    with pytest.raises(ValueError, match=r"trained with other settings: .*learning_rate 0.001 \(now 0.1\)"):
        train.main(train_config(out, variant="la_align", max_steps=40, learning_rate=0.1, resume=True))
    assert contents(out) == before


def test_checkpoint_of_another_action_size_is_refused(run, tmp_path):
    """Which tensor has which shape."""
    out = shutil.copytree(run.folder, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    config["model"]["action_size"] = 6
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"head.out.weight is \(7, 64\), the model's is \(6, 64\)"):
        policies.load_vla(out)
