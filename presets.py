"""The questions of study.py: for each a preset, which says which policies answer it and what its report compares.

To ask another question, write a function that returns cells, and give it a row in `PRESETS`.
"""

from dataclasses import dataclass

from data import open_dataset
from index import split_episodes
from report import Comparison
from tiny import SIZES

IMAGE = ("la_align", "la_direct", "la_cond")  # variants that learn from labels of images
LATENT = ("la_tok", *IMAGE)
CONTROL_FLAGS = {  # what the policy is denied -> flags of eval.py
    "blind": ("--blind",),
    "main camera black": ("--black-camera", "image"),
    "wrist camera black": ("--black-camera", "wrist_image"),
    "cameras swapped": ("--swap-cameras",),
    "mute": ("--mute",),
}
OF_TWO_CAMERAS = ("wrist camera black", "cameras swapped")
OTHER_STARTS = "--seed 20"  # the demonstrations of demos.py begin from the official starts 0 to 19


@dataclass
class Preset:
    """A question: which cells answer it, and what the report compares."""

    question: str
    steps: int
    trials: int
    make: object  # function (config, steps) -> cells
    x: str = ""  # the part of a group on the chart's horizontal axis
    panels: str = ""  # the part of a group that gets a chart of its own
    compare: tuple = ()  # of `Comparison`
    controls: tuple = ()  # what the runs of the first seed are denied
    keeps: int = 0  # the most demonstrations of an instruction that keep their actions where others lose them
    evaluate: str = ""  # options of eval.py, unless the config has some
    notes: str = ""  # what a reader of the report must know


def variants_of(config, known):
    """Return those of `known` that the config asks for."""
    return [variant for variant in known if not config.variants or variant in config.variants]


def training_demonstrations(config):
    """Return (number of training episodes, number of instructions) of the study's data."""
    counts = [0, 0]
    for dataset in map(open_dataset, config.data):
        counts[0] += len(split_episodes(dataset, 0.05, 0)[0])  # --val-fraction's default; the seed changes which
        counts[1] += len(dataset.instructions())
    return counts


def fewshot_cells(config, steps):
    """Return cells with 2, 5 or all demonstrations of each instruction labelled, and the others dropped, used as video
    together with the actions (on average half of each batch), or as video first.

    All but the baseline half as long take the same number of updates. Those with video spend half of their samples on
    it, so they train on half as many with actions as where the others are dropped; that baseline shows what this alone
    does.
    la_tok learns from actions alone, so video teaches it nothing.
    """
    episodes, instructions = training_demonstrations(config)
    cells = []
    for labelled in (5, 2, "all"):  # the middle says most, so it comes first
        chosen = [] if labelled == "all" else ["--episodes", labelled]
        number = round(episodes / instructions) if labelled == "all" else labelled
        for rest in ("dropped", "joint", "first"):
            for variant in variants_of(config, ("baseline", *LATENT)):
                if rest != "dropped" and (labelled == "all" or variant not in IMAGE):
                    continue
                options = ["--variant", variant, *chosen]
                stages = [[*options, "--max-steps", steps]]
                if rest == "joint":
                    stages[0] += video_options(labelled * instructions, episodes, 0.5)
                elif rest == "first":
                    video = ["--variant", variant, "--data-fraction", 0, "--rest", "video"]
                    stages = [[*part, "--max-steps", steps // 2] for part in (video, options)]
                cells.append(({"variant": variant, "rest": rest, "labelled": number}, stages))
                if variant == "baseline" and labelled != "all":
                    group = {"variant": "baseline, half as long", "rest": rest, "labelled": number}
                    cells.append((group, [[*options, "--max-steps", steps // 2]]))
    return cells


def video_options(labelled, episodes, share):
    """Return the options of train.py that make `share` of each batch video, on average.

    labelled: number of episodes that keep their actions; episodes: of all, of which the others are the video.
    """
    weight = share / (1 - share) * labelled / (episodes - labelled)
    return ["--rest", "video", "--rest-weight", round(weight, 4)]


def video_cells(config, steps):
    """Return cells with 2 demonstrations of each instruction labelled, which change one thing about joint training with
    the others as video. Those without video, and with half of each batch, are cells of `fewshot`, too."""
    episodes, instructions = training_demonstrations(config)
    labelled = ["--episodes", 2, "--max-steps", steps]
    cells = []
    for variant in variants_of(config, ("baseline", *IMAGE)):
        changes = {"no video": []}
        if variant != "baseline":
            half = video_options(2 * instructions, episodes, 0.5)
            weight = 0.1 if variant == "la_align" else 1.0  # a tenth, or ten times, of the default
            changes |= {
                "a quarter": video_options(2 * instructions, episodes, 0.25),
                "half": half,
                "three quarters": video_options(2 * instructions, episodes, 0.75),
                f"half, lambda {weight:g}": [*half, "--latent-weight", weight],
            }
        cells += [
            ({"variant": variant, "video": video}, [["--variant", variant, *labelled, *options]])
            for video, options in changes.items()
        ]
    return cells


def ablation_cells(config, steps):
    """Return cells that change one thing about a variant on all demonstrations."""
    changes = {
        "baseline": {"as is": [], "32 placeholders": ["--placeholders-per-step", 4]},
        "la_tok": {"as is": [], "continuous": ["--continuous"]},
        "la_align": {
            "as is": [],
            "layer 1": ["--align-layer", 1],
            "last layer": ["--align-layer", SIZES["tiny"][0]["num_hidden_layers"]],
            "lambda 0.1": ["--latent-weight", 0.1],
        },
        "la_direct": {"as is": [], "continuous": ["--continuous"], "lambda 1": ["--latent-weight", 1.0]},
        "la_cond": {"as is": [], "continuous": ["--continuous"], "lambda 1": ["--latent-weight", 1.0]},
    }
    if "--backbone" in config.train:
        del changes["la_align"]["last layer"]  # which is another number there
    return [
        ({"variant": variant, "change": change}, [["--variant", variant, "--max-steps", steps, *options]])
        for variant in variants_of(config, changes)
        for change, options in changes[variant].items()
    ]


def joint_cells(config, steps):
    """Return cells that train all instructions of the data together, and each alone with its share of the updates.

    The baseline also trains each alone with all the updates, which shows what their number does.
    """
    texts = sorted({text for path in config.data for text in open_dataset(path).instructions()})
    cells = []
    for variant in variants_of(config, ("baseline", *LATENT)):
        changes = {"together": [steps]}
        for text in texts:
            changes[f"{text} alone"] = [steps // len(texts), "--instructions", text]
            if variant == "baseline":
                changes[f"{text} alone, as long"] = [steps, "--instructions", text]
        cells += [
            ({"variant": variant, "trained": trained}, [["--variant", variant, "--max-steps", *options]])
            for trained, options in changes.items()
        ]
    return cells


def variant_cells(config, steps):
    """Return cells that train each variant on the data as it is."""
    return [
        ({"variant": variant}, [["--variant", variant, "--max-steps", steps]])
        for variant in variants_of(config, ("baseline", *LATENT))
    ]


def smoke_cells(config, steps):
    """Return two cells that take a minute."""
    return [
        ({"variant": variant, "labelled": 2}, [["--variant", variant, "--episodes", 2, "--max-steps", steps]])
        for variant in variants_of(config, ("baseline", "la_direct"))
    ]


PRESETS = {
    "variants": Preset(
        "What does each variant reach when all demonstrations have actions?",
        6000,
        50,
        variant_cells,
        compare=(Comparison({"variant": "baseline"}),),
        controls=tuple(CONTROL_FLAGS),
    ),
    "fewshot": Preset(
        "Few demonstrations with actions, many without: do latent actions learn from the others?",
        6000,
        20,
        fewshot_cells,
        "labelled",
        "rest",
        (
            Comparison({"variant": "baseline", "rest": "dropped"}),
            Comparison({"variant": "baseline, half as long", "rest": "dropped"}, {"rest": ("joint", "first")}),
            Comparison({"rest": "dropped"}),
        ),
        evaluate=OTHER_STARTS,
        keeps=5,
        notes="Video keeps its instructions, episodes, cameras and states, and loses its actions. Cells with it train "
        "on as many labelled samples as the baseline half as long (joint: in twice as many updates), the others on "
        "twice as many. The codes of la_tok come from a tokenizer of all actions; statistics of all episodes normalise "
        "actions and states; one latent model labels for all seeds.",
    ),
    "ablations": Preset(
        "Which parts of a variant matter?",
        6000,
        50,
        ablation_cells,
        panels="variant",
        compare=(Comparison({"change": "as is"}),),
    ),
    "video": Preset(
        "How much video beside 2 demonstrations an instruction with actions, and how much weight on its labels?",
        6000,
        20,
        video_cells,
        panels="variant",
        compare=(Comparison({"variant": "baseline", "video": "no video"}), Comparison({"video": "half"})),
        evaluate=OTHER_STARTS,
        keeps=2,
        notes="All cells take the same number of updates: the more video, the fewer labelled samples. Statistics of "
        "all episodes normalise actions and states; one latent model labels for all seeds.",
    ),
    "joint": Preset(
        "Does a task lose by being trained with others, and with which variant not?",
        6000,
        50,
        joint_cells,
        panels="variant",
        compare=(Comparison({"trained": "together"}), Comparison({"variant": "baseline"})),
    ),
    "long": Preset(
        "Do latent actions help in long tasks?",
        9500,
        20,
        variant_cells,
        compare=(Comparison({"variant": "baseline"}),),
        evaluate=OTHER_STARTS,
    ),
    "smoke": Preset(
        "Does study.py work?", 2, 1, smoke_cells, "labelled", compare=(Comparison({"variant": "baseline"}),)
    ),
}
