"""The model card of a run, RUN/README.md, which the Hugging Face Hub shows once the run is uploaded.

train.py writes it at its end; eval.py then keeps the results in it up to date and leaves the rest as people edited it.
No path of this machine is in it, but for the names of files and folders.
"""

import json
import re
import shlex
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from curves import draw_curves
from dataspec import PRESETS, parse_spec
from files import file_hash, read_json, read_metadata, write_text
from model import VARIANTS
from results import markdown_table
from tiny import SIZES

BEGIN, END = "<!-- results: written by eval.py -->", "<!-- end of the results -->"
UPLOAD = 'hf upload OWNER/NAME RUN --exclude "training-*" --exclude "watch/*" --exclude "best/*"'
MOST_INSTRUCTIONS = 20  # that a card lists
RELEASES = {r"libero_(spatial|object|goal|10)_no_noops": "openvla/modified_libero_rlds"}  # data set -> its repository
CONTROL_TEXTS = {  # an option of eval.py that changes what is evaluated -> what it means, with its value
    "blind": "all images are black",
    "black_camera": "the image of `{}` is black",
    "swap_cameras": "the first two cameras are exchanged",
    "mute": "no instruction",
    "swap_instruction": "the instruction of another task",
    "execute": "{} actions of each chunk are executed",
    "average_chunks": "chunks that overlap are averaged",
    "max_steps": "an episode fails after {} steps",
}


def finish_run(setup, done, main):
    """Draw the curves of a finished run, write its card and print what comes next, in the `main` process alone.

    setup: a `prepare.Setup`; done: the number of updates; when a signal ended the run before its last, only print how
    to continue.
    """
    if not main:
        return
    if done < setup.steps:
        again = f"the same command with --out {shlex.quote(str(setup.run))} --resume"
        print(f"Ctrl-C or SIGTERM: saved after {done} of {setup.steps} steps. Continue: {again}", flush=True)
        return
    for make in (draw_curves, write_card, write_best_card):
        attempt(make, setup.run)
    print(f"run: {setup.run}\nnext: {next_command(setup.run, setup.description)}", flush=True)


def attempt(make, run):
    """Call make(run). Any error is a warning, because the run and its results are saved already."""
    try:
        make(run)
    except Exception as error:
        print(f"WARNING: {run}: {make.__name__} failed: {error!r}", file=sys.stderr, flush=True)


def next_command(run, description):
    """Return what to do with a trained run: evaluate it, if a simulator has its robot."""
    if not description["model"]["action_size"]:
        return f"train a policy from its weights: python train.py --init-from {shlex.quote(str(run))}"
    if any(entry["embodiment"] == "libero" for entry in description["data"]):
        return f"python eval.py {shlex.quote(str(run))}"
    return f"use it from Python: Policy({json.dumps(str(run))}), see docs/training.md"


# ----------------------------------------------------------------------------------------------------------------------
# The card


def write_card(run):
    """Write the card of a run anew."""
    run = Path(run)
    config = read_json(run / "config.json")
    note = f"<!-- To upload this folder: {UPLOAD} -->"
    parts = [note, introduction(run, config), usage(config), *map(describe_observation, config["data"])]
    text = "\n\n".join(parts)
    card = ModelCard(f"---\n{make_metadata(config).to_yaml()}\n---\n{text}\n")
    add_results(card, run, config)
    write_text(run / "README.md", str(card))


def write_best_card(run):
    """Write the card of the best save, if the run was evaluated while it trained."""
    if (Path(run) / "best").exists():
        write_card(Path(run) / "best")


def update_card(run):
    """Put the results that are in a run's folder into its card, which is written if there is none."""
    path = Path(run) / "README.md"
    if not path.exists():
        write_card(run)
        return
    card = ModelCard(path.read_text())
    add_results(card, Path(run), read_json(Path(run) / "config.json"))
    write_text(path, str(card))


def make_metadata(config):
    """Return the card's metadata as the Hub reads it."""
    backbone = config["model"]["backbone"]
    names = [entry["name"] for entry in config["data"]]
    on_the_hub = [hub for name in names for pattern, hub in RELEASES.items() if re.fullmatch(pattern, name)]
    robots = [entry.get("embodiment", "libero") for entry in config["data"]]
    tags = ["robotics", "vision-language-action", "latent-actions", config["model"]["variant"], *robots]
    return ModelCardData(
        license="apache-2.0",
        library_name="latent-actions",
        pipeline_tag="robotics",
        tags=list(dict.fromkeys(tags)),
        base_model=backbone if is_hub_name(backbone) else None,
        datasets=sorted(set(on_the_hub)) or None,
        model_name=model_name(config),
    )


def model_name(config):
    """Return a name of a run that does not depend on its folder."""
    return "-".join([config["model"]["variant"], *[entry["name"] for entry in config["data"]]])


def is_hub_name(backbone):
    """Return whether a backbone was loaded from the Hub: not from a folder, and not made of random weights."""
    return backbone not in SIZES and not Path(backbone).exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", backbone))


# ----------------------------------------------------------------------------------------------------------------------
# Its sections


def introduction(run, config):
    """Return what the model is and how it was made."""
    model, settings = config["model"], config["train"]
    statistics = read_json(run / "dataset_statistics.json")
    data = []
    for entry in config["data"]:
        stored = statistics[entry["name"]]
        counts = f"{stored['num_trajectories']} episodes, {stored['num_transitions']} steps"
        data.append(f"`{entry['name']}` ({counts}; robot {entry.get('embodiment', 'libero')})")
    updates = read_metadata(run / "model.safetensors").get("step", "?")
    rows = {
        "variant": f"`{model['variant']}`: {describe_variant(model)}",
        "backbone": describe_backbone(model),
        "data": ", ".join(data),
        "updates": f"{updates} of {settings['global_batch_size']} samples, seed {settings['seed']}",
        "command": f"`{shown_command(config['command'])}`",
        "commit": f"{config['commit']}, torch {config['torch']}",
    }
    lines = [
        f"# {model['variant']} on {', '.join(entry['name'] for entry in config['data'])}",
        "",
        "A vision-language-action policy with latent-action supervision, after",
        "[From Pixels to Tokens](https://arxiv.org/abs/2605.04678).",
        "",
        markdown_table(["", ""], rows.items()),
    ]
    if (run / "curves.png").exists():
        lines += ["", "![Training](curves.png)"]
    return "\n".join(lines)


def describe_variant(model):
    """Return what a model's placeholders are and what its latent loss compares."""
    variant = VARIANTS[model["variant"]]
    kinds = ["latent"] * variant.latents + ["action"] * variant.actions
    text = f"{' and '.join(kinds)} placeholders"
    if not variant.loss:
        return f"{text}, no latent loss"
    source = {"image": "image-based latent actions", "action": "codes of the action tokenizer"}[variant.target]
    weight = variant.weight if model["latent_weight"] < 0 else model["latent_weight"]
    loss = "regression" if model["continuous"] and variant.loss == "codes" else variant.loss
    return f"{text}, latent loss ({loss}, weight {weight:g}) on {source}"


def describe_backbone(model):
    """Return where the backbone's weights come from, without folders."""
    name = model["backbone"]
    if name in SIZES:
        return f"`{name}`: a small Qwen3-VL, trained from random weights"
    return f"`{name if is_hub_name(name) else Path(name).name}`, {model['tuning'] or 'lora'}"


def usage(config):
    """Return how to load and ask the policy."""
    entry = next((entry for entry in config["data"] if spec_of(entry).action), None)
    if not entry:
        return (
            "## Use\n\nIt saw no action, so it is no policy yet; `python train.py --init-from RUN` trains one from it."
        )
    frames = ", ".join(f'"{camera}": {re.sub(r"[^a-zA-Z0-9]", "_", camera)}' for camera in entry["cameras"])
    state = '"state": state, ' if config["model"]["proprio_size"] else ""
    options = f', data="{entry["name"]}"' if len(config["data"]) > 1 else ""
    backbone = config["model"]["backbone"]
    if backbone not in SIZES and not is_hub_name(backbone):
        options += f', backbone="FOLDER OF {Path(backbone).name}"'
    instruction = next((text for text in entry["instructions"] if text.strip()), "")
    return f"""## Use

With the code of the commit above; `OWNER/NAME` is this repository, or a folder with its files:

```python
from latent_actions import Policy

policy = Policy("OWNER/NAME"{options})
# images: u8 [height, width, 3], upright, of any size; the state is in the units of the data
observation = {{"images": {{{frames}}}, {state}"instruction": {json.dumps(instruction)}}}
actions = policy(observation)  # {config["model"]["chunk"]} actions
```

`python eval.py OWNER/NAME` evaluates it."""


def spec_of(entry):
    """Return the `DataSpec` of a data set; runs from before there were descriptions had only LIBERO's."""
    return parse_spec(entry["spec"], "config.json") if "spec" in entry else PRESETS["libero"]


def describe_observation(entry):
    """Return what a data set's observations and actions are, as a section. entry: of config.json."""
    spec = spec_of(entry)
    rows = {}
    for camera, stored in entry["cameras"].items():
        size = stored["size"] if isinstance(stored["size"], list) else [stored["size"]] * 2
        rows[f"image `{camera}`"] = f"RGB, upright; stored as {stored['format']} of {size[0]} x {size[1]} in training"
    rows["state"] = ", ".join(f"`{part}`" for part in spec.state) or "none"
    rows["action"] = ", ".join(f"`{part}`" for part in spec.action) or "none"
    if spec.action_names:
        rows["action"] += f": {', '.join(spec.action_names)}"
    for gripper in spec.grippers:
        rows[f"gripper, number {gripper.index}"] = f"{gripper.open:g} open, {gripper.closed:g} closed"
    texts = [text for text in entry["instructions"] if text.strip()]
    more = [f"and {len(texts) - MOST_INSTRUCTIONS} more"] if len(texts) > MOST_INSTRUCTIONS else []
    rows["instructions"] = "; ".join([*texts[:MOST_INSTRUCTIONS], *more]) or "none"
    return f"## Observations and actions of {entry['name']}\n\n{markdown_table(['', ''], rows.items())}"


def shown_command(words):
    """Return a command as text, with the last names of paths that begin at the root, at home or above this folder."""
    return "python " + shlex.join(map(without_folders, words))


def without_folders(word):
    """Return a word of a command in which such a path is cut to its last name."""
    option, separator, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if re.match(r"[/~]|\.\.", value):
        return f"{option}{separator}{Path(value).name}"
    return re.sub(r"(?<![\w.:/-])(~\w*|\.\.)?/([^\s'\"=]*/)?", "", word)


# ----------------------------------------------------------------------------------------------------------------------
# Results


def add_results(card, run, config):
    """Put the summaries that are in a run's folder into its card and the metadata, in the place of older ones."""
    summaries = read_summaries(run)
    uncontrolled = [summary for summary in summaries if not controls(summary)]
    text = "\n\n".join([BEGIN, *format_results(uncontrolled, summaries), END])
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    if re.search(pattern, card.text, re.DOTALL):
        card.text = re.sub(pattern, lambda match: text, card.text, flags=re.DOTALL)
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}\n"
    card.data.eval_results = [
        EvalResult(
            task_type="robotics",
            dataset_type=suite["suite"],
            dataset_name=title(summary, suite),
            metric_type="success_rate",
            metric_name=f"success rate of {suite['episodes']} trials",
            metric_value=round(suite["success_rate"], 4),
        )
        for summary in uncontrolled
        for suite in summary["suites"]
        if suite["episodes"]
    ] or None
    card.data.model_name = model_name(config)


def read_summaries(run):
    """Return what eval.py wrote about the weights that are in a run's folder, but for shards."""
    weights = file_hash(run / "model.safetensors")
    summaries = []
    for path in sorted(run.glob("*.json")):
        content = read_json(path)
        if "suites" in content and not re.search(r"-\d+of\d+$", path.stem):
            if content.get("settings", {}).get("model") == weights:
                summaries.append(content)
    return summaries


def controls(summary):
    """Return what was changed in an evaluation, as texts."""
    settings = summary["settings"]
    return [text.format(settings[name]) for name, text in CONTROL_TEXTS.items() if settings.get(name)]


def title(summary, suite):
    """Return the name of a suite as it was played."""
    simulator = summary["settings"].get("simulator", "LIBERO")
    widened = f", starts widened by {suite['widen']:g} m" if suite["widen"] else ""
    return f"{simulator} {suite['suite']}{widened}"


def format_results(uncontrolled, summaries):
    """Return the section of results as blocks of text; none without results. uncontrolled: those without a control."""
    if not summaries:
        return []
    blocks = ["## Results", "Closed-loop trials, with 95 % Wilson intervals."]
    for summary in uncontrolled:
        for suite in summary["suites"]:
            rows = [[line["instruction"], *cells(line)] for line in [*suite["tasks"], suite | {"instruction": "all"}]]
            blocks.append(markdown_table([title(summary, suite), "success", "", "95 % interval"], rows))
        versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
        commits = ", ".join(summary["commits"])
        blocks.append(f"`{shown_command(summary['command'])}`, commit {commits}, {versions}")
    rows = [
        ["; ".join(controls(summary)), title(summary, suite), *cells(suite)]
        for summary in summaries
        if controls(summary)
        for suite in summary["suites"]
    ]
    if rows:
        blocks.append("Controls, and other ways to play:")
        blocks.append(markdown_table(["what differs", "", "success", "", "95 % interval"], rows))
    return blocks


def cells(counts):
    """Return successes, rate and interval of a `results.tally` as cells of a table."""
    low, high = counts["ci95"]
    rate = f"{100 * counts['success_rate']:.1f} %" if counts["episodes"] else "-"
    errors = f", {counts['errors']} errors" if counts["errors"] else ""
    return [f"{counts['successes']}/{counts['episodes']}{errors}", rate, f"{100 * low:.1f} to {100 * high:.1f} %"]
