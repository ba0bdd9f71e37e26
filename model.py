"""The vision-language-action model: a Qwen3-VL backbone, an action head, and five ways to supervise latent actions.

Implements *From Pixels to Tokens: A Systematic Study of Latent Action Supervision for Vision-Language-Action Models*
(arXiv 2605.04678). All variants share one forward pass:

    prompt    [chat prefix, image tokens, text, padding, assistant header, placeholders], decoded in parallel
    backbone  nu^(k), the residual stream of the language model after k of its N layers (nu^(N): after the final norm)
    head      one bridge-attention block for each k = ceil(N/2)..N; H action queries -> H x A actions
    loss      L_action + lambda x L_latent; `VARIANTS` says what the placeholders are and what L_latent asks of them

Axes: B batch, C cameras, L tokens, T text tokens, D width, N layers, H chunk steps, A action size, P codes per step,
Q placeholders, K codes, d width of a latent action, M head blocks, W width of the head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from backbone import Backbone
from batches import AUGMENTATIONS, prepare_images
from common import autocast
from tiny import SIZES


@dataclass(frozen=True)
class Variant:
    """One row of the paper's comparison. Placeholders are ordered latent before action, and time first: [H, P]."""

    latents: bool  # P latent placeholders per chunk step
    actions: bool  # action placeholders, one per chunk step
    target: str  # whose latent actions are predicted: "image" (labels of the data), "action" (tokenizer), "" none
    loss: str  # how: "codes" (cross-entropy; with --continuous regression), "cosine", "" not at all
    weight: float  # lambda


VARIANTS = {
    "baseline": Variant(latents=False, actions=True, target="", loss="", weight=0.0),
    "la_align": Variant(latents=False, actions=True, target="image", loss="cosine", weight=1.0),
    "la_direct": Variant(latents=True, actions=False, target="image", loss="codes", weight=0.1),
    "la_cond": Variant(latents=True, actions=True, target="image", loss="codes", weight=0.1),
    "la_tok": Variant(latents=True, actions=False, target="action", loss="codes", weight=0.1),
}

ACTION_LOSSES = {"l1": torch.abs, "l2": torch.square}  # of the error of each normalised action dimension
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # that `--loss quantile` predicts of each; the median is the action


@dataclass
class ModelConfig:
    """Everything that fixes the shape of a model; saved with each run, so that loading needs no other knowledge."""

    variant: str
    backbone: str  # a row of `tiny.SIZES`, a Qwen3-VL checkpoint folder or a hub id
    cameras: int
    image_size: int
    text_length: int  # tokens that instruction and request may take
    chunk: int  # H
    action_size: int  # A
    proprio_size: int  # 0: the head sees no proprioceptive state
    codes_per_step: int = 4  # P
    num_codes: int = 16  # K
    code_dim: int = 128  # d
    action_loss: str = "l1"
    augmentation: str = "crop"  # of the images: what training does to them, and evaluation to match (batches.py)
    continuous: bool = False
    align_layer: int = 0
    placeholders_per_step: int = 1
    latent_weight: float = -1.0
    tuning: str = ""  # "lora", "full" or "frozen"; "": lora, and random backbones in full
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_targets: tuple = ()  # last names of the linear layers that get LoRA; (): all
    head_width: int = 0
    gate: float = 0.0
    embodiments: tuple = ()  # of several: (name, action size, proprio size, cameras); above are then the largest


def check_model_config(config):
    """Raise ValueError naming the first setting that cannot work."""
    if config.variant not in VARIANTS:
        raise ValueError(f"variant is '{config.variant}'; choose one of {', '.join(VARIANTS)}")
    if config.tuning not in ("", "lora", "full", "frozen"):
        raise ValueError(f"tuning is '{config.tuning}'; choose lora, full or frozen")
    if config.backbone in SIZES and (config.tuning or config.lora_targets):
        name = "tuning" if config.tuning else "lora_targets"
        raise ValueError(
            f"{name} is {getattr(config, name)!r}, but the {config.backbone} backbone is always trained in full"
        )
    if config.lora_targets and config.tuning not in ("", "lora"):
        raise ValueError(f"lora_targets are {', '.join(config.lora_targets)}, but tuning is '{config.tuning}': no LoRA")
    if config.action_loss not in (*ACTION_LOSSES, "quantile"):
        raise ValueError(f"action_loss is '{config.action_loss}'; choose {', '.join(ACTION_LOSSES)} or quantile")
    if config.augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation is '{config.augmentation}'; choose {' or '.join(AUGMENTATIONS)}")
    if config.placeholders_per_step > 1 and config.variant != "baseline":
        raise ValueError(
            f"placeholders_per_step is {config.placeholders_per_step} with {config.variant}; "
            "only the baseline takes more than 1"
        )
    heads = max(4, config.head_width // 64)
    if config.head_width % heads:
        raise ValueError(f"head_width is {config.head_width}; it must be a multiple of {heads}")
    if config.continuous and VARIANTS[config.variant].loss != "codes":
        names = [name for name, variant in VARIANTS.items() if variant.loss == "codes"]
        raise ValueError(f"continuous targets are for {', '.join(names)}, not for {config.variant}")


# ----------------------------------------------------------------------------------------------------------------------
# Action head


class HeadBlock(nn.Module):
    """Bridge attention (VLA-Adapter, arXiv 2509.09372): one softmax over the action queries, the placeholders with the
    proprioceptive state, and the image tokens, whose keys are scaled by tanh(gate).

    As in its published code, the values are not scaled: with gate 0, where a pretrained backbone starts, every image
    token has the logit 0 and all of them together take 26 to 88 % of the attention, the more of them the more.
    """

    def __init__(self, width, states, heads, gate):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.norm_states = nn.LayerNorm(states)
        self.norm_mlp = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.own = nn.Linear(width, 2 * width)  # keys and values of the queries themselves ...
        self.bridge = nn.Linear(states, 2 * width)  # ... of the placeholders ...
        self.image = nn.Linear(states, 2 * width)  # ... of the image tokens ...
        self.state = nn.Linear(width, 2 * width)  # ... and of the proprioceptive state
        self.out = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.tensor(float(gate)))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, placeholders, images, proprio, image_mask=None):
        """Update the queries x [B, H, W].

        placeholders: [B, Q, D] and images: [B, C tokens, D], states of one layer; proprio: [B, 0 or 1, W]; image_mask:
        bool [B, C tokens], the image tokens that a sample has (default: all).
        """
        h = self.norm(x)
        image_k, image_v = self.image(self.norm_states(images)).chunk(2, -1)  # [B, C tokens, W] each
        rest = torch.cat([self.own(h), self.bridge(self.norm_states(placeholders)), self.state(proprio)], 1)
        k, v = rest.chunk(2, -1)
        k = torch.cat([k, image_k * self.gate.tanh()], 1)  # [B, H + Q + 1 + C tokens, W]
        v = torch.cat([v, image_v], 1)
        mask = None
        if image_mask is not None:
            mask = F.pad(image_mask, (rest.shape[1], 0), value=True)[:, None, None]  # [B, 1, 1, keys]
        mixed = F.scaled_dot_product_attention(*(self._split_heads(t) for t in (self.query(h), k, v)), attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))  # [B, H, W]
        return x + self.mlp(self.norm_mlp(x))

    def _split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, tokens, W / heads]


class EmbodimentLinear(nn.Module):
    """A linear layer of its own for each embodiment, on inputs and to outputs that are padded to the largest size."""

    def __init__(self, inputs, outputs):
        """inputs, outputs: the sizes of each embodiment."""
        super().__init__()
        inputs = [max(1, size) for size in inputs]  # of nothing there is one padded 0
        self.layers = nn.ModuleList(nn.Linear(size, out) for size, out in zip(inputs, outputs, strict=True))
        self.size = max(outputs)

    def forward(self, x, embodiment):
        """Map x [B, ..., largest input] to [B, ..., largest output]. embodiment: i64 [B]"""
        outputs = []
        for layer in self.layers:
            out = layer(x[..., : layer.in_features])
            outputs.append(F.pad(out, (0, self.size - out.shape[-1])))
        chosen = F.one_hot(embodiment, len(outputs)).to(x.dtype)  # [B, E]
        return torch.einsum("be,eb...->b...", chosen, torch.stack(outputs))  # [B, ..., largest output]


class ActionHead(nn.Module):
    """H learned queries pass through one block per used layer of the backbone; each becomes one action.

    Embodiments share all of it but the projection of the state and the output layer.
    """

    def __init__(self, config, states, blocks, width):
        """config: `ModelConfig`; states: width D of the backbone's states; blocks: M."""
        super().__init__()
        count = len(config.embodiments)
        self.queries = nn.Parameter(0.5 * torch.randn(config.chunk, width))  # one per chunk step: steps can differ
        self.several = count > 0
        self.proprio = None
        if config.proprio_size and self.several:
            self.proprio = EmbodimentLinear([size for _, _, size, _ in config.embodiments], [width] * count)
        elif config.proprio_size:
            self.proprio = nn.Linear(config.proprio_size, width)
        heads = max(4, width // 64)
        self.blocks = nn.ModuleList(HeadBlock(width, states, heads, config.gate) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.guesses = len(QUANTILES) if config.action_loss == "quantile" else 1  # n, of each number
        if self.several:
            self.out = EmbodimentLinear([width] * count, [size * self.guesses for _, size, *_ in config.embodiments])
        else:
            self.out = nn.Linear(width, config.action_size * self.guesses)

    def forward(self, layers, proprio, embodiment=None, image_mask=None):
        """Return actions f32 [B, H, A, n]: n quantiles of each number, or one guess.

        layers: M pairs (placeholders [B, Q, D], images [B, C tokens, D]) of states; proprio: f32 [B, proprio size];
        embodiment: i64 [B], of several; image_mask: as of `HeadBlock`.
        """
        batch = len(proprio)
        which = [embodiment] if self.several else []
        x = self.queries.expand(batch, -1, -1)  # [B, H, W]
        token = self.proprio(proprio, *which)[:, None] if self.proprio else x[:, :0]
        for block, (placeholders, images) in zip(self.blocks, layers, strict=True):
            x = block(x, placeholders, images, token, image_mask)
        return self.out(self.norm(x), *which).unflatten(-1, (-1, self.guesses))  # [B, H, A, n]


# ----------------------------------------------------------------------------------------------------------------------
# The five variants


class VLA(nn.Module):
    """Backbone, placeholders, head, and the latent loss of one variant."""

    def __init__(self, config, base=None):
        """config: `ModelConfig`; base: (Qwen3VLModel, tokenizer) to use instead of loading `config.backbone`."""
        super().__init__()
        check_model_config(config)
        self.config = config
        self.variant = VARIANTS[config.variant]
        self.num_latents = config.chunk * config.codes_per_step if self.variant.latents else 0
        num_actions = config.chunk * config.placeholders_per_step if self.variant.actions else 0
        self.backbone = Backbone(config, self.num_latents + num_actions, base)
        width, layers = self.backbone.width, self.backbone.layers
        self.queries = nn.Parameter(0.02 * torch.randn(self.num_latents + num_actions, width))  # [Q, D]
        if not 0 <= config.align_layer <= layers:
            raise ValueError(f"align_layer is {config.align_layer}, but {config.backbone} has layers 1 to {layers}")
        self.head_layers = range(math.ceil(layers / 2), layers + 1)
        self.latent_layer = layers  # whose placeholder states the latent loss reads
        if self.variant.loss and not self.variant.latents:  # without placeholders of its own
            self.latent_layer = config.align_layer or round(17 * layers / 28)
        self.head = ActionHead(config, width, len(self.head_layers), config.head_width or min(width, 1024))
        self.latent_head = self._latent_head(width)

    def _latent_head(self, width):
        """Build what turns placeholder states into a prediction: K logits of the codes, or a vector of width d."""
        if not self.variant.loss:
            return None
        if self.variant.loss != "codes":
            return nn.Linear(width, self.config.code_dim)
        if self.config.continuous:
            return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.config.code_dim))
        return nn.Linear(width, self.config.num_codes)

    def forward(self, batch):
        """Compute the losses of one micro-batch, each a sum over valid entries divided by a constant.

        batch: of `batches.ActionChunks`, collated: images list of C u8 [B, h, w, 3]; text [B] strings; proprio
        f32 [B, N] normalised; actions f32 [B, H, A] normalised; valid bool [B, H]; action_weight f32 [B, A]; draws
        f32 [B, C, 6] or absent (no augmentation); for a latent loss codes i64 [B, H, P] and vectors f32 [B, H, P, d];
        of several embodiments embodiment i64 [B] and num_cameras i64 [B]. Return {"loss", "action_loss"} and, where
        there is one, "latent_loss"; under "samples" the part f32 [B] of each sample in these two, without gradient;
        under "sums" [numerator, denominator] of shares: "latent_accuracy", the codes predicted right of all.
        """
        guesses, latents = self.predict_all(batch)
        error = action_errors(guesses, batch["actions"], self.config.action_loss)  # [B, H, A]
        errors = {"action_loss": error * batch["valid"][:, :, None] * batch["action_weight"][:, None]}
        sums = {}
        if self.variant.loss:
            errors["latent_loss"], sums = self.latent_errors(latents, batch)
        losses = {name: _mean(error) for name, error in errors.items()}
        weight = self.variant.weight if self.config.latent_weight < 0 else self.config.latent_weight
        loss = losses["action_loss"] + weight * losses.get("latent_loss", 0.0)
        samples = {name: error.detach().flatten(1).sum(1) / max(1, error[0].numel()) for name, error in errors.items()}
        return {"loss": loss, "samples": samples, "sums": sums} | losses

    def predict(self, batch):
        """Return actions f32 [B, H, A], normalised, and the placeholder states f32 [B, Q, D] of the latent loss."""
        guesses, latents = self.predict_all(batch)
        return guesses[..., self.head.guesses // 2], latents

    def predict_all(self, batch):
        """Return as `predict`, but all guesses f32 [B, H, A, n] of the actions (`ActionHead`)."""
        images = prepare_images(batch["images"], self.config.image_size, batch.get("draws"), self.config.augmentation)
        proprio = batch["proprio"] if self.config.proprio_size else batch["proprio"][:, :0]
        text, counts = self.backbone.tokenise(batch["text"])
        embodiment = batch["embodiment"] if self.config.embodiments else None
        num_cameras = batch["num_cameras"] if len(self.backbone.camera_counts) > 1 else None
        return self.forward_pass(images, text, counts, proprio, embodiment, num_cameras)

    def forward_pass(self, images, text, counts, proprio, embodiment=None, num_cameras=None):
        """Run backbone and head once, on tensors of fixed shapes (this is what is compiled); return as `predict_all`.

        images, text, counts: as of `Backbone.forward`. On a GPU, or with weights in bf16, the backbone runs in bf16;
        pixels, head and losses stay in f32.
        """
        backbone = self.backbone
        half = backbone.qwen.language_model.embed_tokens.weight.dtype == torch.bfloat16
        with autocast(self.queries.device, half):
            keep = {*self.head_layers, self.latent_layer}
            states = backbone(images, text, counts, self.queries, keep, num_cameras)
        layers = [(backbone.placeholder_states(states[k]), backbone.image_states(states[k])) for k in self.head_layers]
        image_mask = None if num_cameras is None else backbone.image_mask(num_cameras)
        guesses = self.head(layers, proprio, embodiment, image_mask)
        return guesses, backbone.placeholder_states(states[self.latent_layer])

    def latent_errors(self, latents, batch):
        """Return the errors [B, ...] whose mean is the paper's L_latent, and what `forward` calls sums.

        latents: states nu^(k) [B, Q, D] of the placeholders. Invalid steps count 0.
        """
        valid = batch["valid"].float()
        if self.variant.loss == "cosine":  # 1 - cos(linear(nu^(k)), mean of c over the P codes)
            guess = self.latent_head(latents)  # [B, H, d]
            error = 1 - F.cosine_similarity(guess, batch["vectors"].mean(2), dim=-1)  # [B, H]
            return error * valid, {}
        if self.variant.loss != "codes":
            raise ValueError(f"variant {self.config.variant} has the latent loss '{self.variant.loss}', which is none")
        guess = self.latent_head(latents[:, : self.num_latents])  # [B, H P, K or d]
        guess = guess.unflatten(1, (self.config.chunk, self.config.codes_per_step))  # [B, H, P, K or d]
        if self.config.continuous:
            error = (guess - batch["vectors"]).square().mean(3)  # [B, H, P]
            return error * valid[:, :, None], {}
        codes = batch["codes"]
        error = F.cross_entropy(guess.flatten(0, 2), codes.flatten(), reduction="none").view_as(codes)  # [B, H, P]
        hits = (guess.argmax(-1) == codes) * valid[:, :, None]
        accuracy = torch.stack([hits.sum(), valid.sum() * self.config.codes_per_step])
        return error * valid[:, :, None], {"latent_accuracy": accuracy}


def action_errors(guesses, actions, loss):
    """Return the error of each number, f32 [B, H, A]. guesses: f32 [B, H, A, n] of actions f32 [B, H, A].

    loss: of `ACTION_LOSSES`, or "quantile": twice the mean pinball loss (Koenker and Bassett, 1978), L1 for a median.
    """
    error = guesses - actions[..., None]
    if loss != "quantile":
        return ACTION_LOSSES[loss](error[..., 0])
    quantiles = torch.linspace(QUANTILES[0], QUANTILES[-1], len(QUANTILES), device=error.device)  # without a host wait
    return 2 * torch.maximum(-quantiles * error, (1 - quantiles) * error).mean(-1)


def _mean(error):
    """Return the mean of errors; 0 where there are none, as of a model without actions."""
    return error.mean() if error.numel() else error.sum()
