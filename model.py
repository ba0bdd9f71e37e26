"""The vision-language-action model: a Qwen3-VL backbone, an action head, and five ways to supervise latent actions.

Implements *From Pixels to Tokens: A Systematic Study of Latent Action Supervision for Vision-Language-Action Models*
(arXiv 2605.04678). All variants share one forward pass:

    prompt    [chat prefix, image slots, text, padding, assistant header, placeholders], decoded in parallel
    backbone  nu^(k), the residual stream of the language model after k of its N layers (nu^(N): after the final norm)
    head      one bridge-attention block for each k = ceil(N/2)..N; H action queries -> H x A actions
    loss      L_action + lambda x L_latent; `VARIANTS` says what the placeholders are and what L_latent asks of them

Left out: the language-model head (never run), generation, video.

Axes: B batch, C cameras, L tokens, T text tokens, D width, N layers, H chunk steps, A action size, P codes per step,
Q placeholders, K codes, d width of a latent action, M head blocks.
"""

import functools
import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLTextRMSNorm

from common import autocast, load_tensors, load_trainable, read_json
from data import normalise, prepare_images, statistics_hash, unnormalise

MAX_TOKENS = 8192  # of a prompt: attention masks grow with the square
PROMPT = "{instruction}\nPlease predict the next {chunk} robot actions:"


@dataclass(frozen=True)
class Variant:
    """One row of the paper's comparison. Placeholders are ordered latent before action, and time first: [H, P]."""

    latents: bool  # P latent placeholders per chunk step
    actions: bool  # action placeholders, one per chunk step
    target: str  # what the latent loss compares with: "" none, "image" or "action" codes, "align" image vectors
    weight: float  # lambda


VARIANTS = {
    "baseline": Variant(latents=False, actions=True, target="", weight=0.0),
    "la_align": Variant(latents=False, actions=True, target="align", weight=1.0),
    "la_direct": Variant(latents=True, actions=False, target="image", weight=0.1),
    "la_cond": Variant(latents=True, actions=True, target="image", weight=0.1),
    "la_tok": Variant(latents=True, actions=False, target="action", weight=0.1),
}

TINY_TEXT = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    initializer_range=0.1,
    rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
)
TINY_VISION = dict(
    depth=3,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    patch_size=16,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=64,
    num_position_embeddings=36,
    deepstack_visual_indexes=[0, 1, 2],
    initializer_range=0.1,
)
TINY_WORDS = """user assistant Please predict the next robot actions put bowl on stove top of cabinet plate
open middle drawer push to front turn cream cheese in wine bottle rack pick up and place it black between
ramekin from table center cookie box wooden alphabet soup basket salad dressing bbq sauce ketchup tomato
butter milk chocolate pudding orange juice both moka pot pots bottom close mug yellow white left right book
back compartment caddy microwave""".split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Spec:
    """Everything that fixes the shape of a model; saved with each run, so that loading needs no other knowledge."""

    variant: str
    backbone: str  # "tiny", a Qwen3-VL checkpoint directory or a hub id
    cameras: int
    image_size: int
    text_length: int  # tokens that instruction and request may take
    chunk: int
    action_size: int
    proprio_size: int  # 0: the head sees no proprioceptive state
    codes_per_step: int = 4  # P
    num_codes: int = 16  # K
    code_dim: int = 128  # d
    action_loss: str = "l1"
    continuous: bool = False
    align_layer: int = 0
    placeholders_per_step: int = 1
    latent_weight: float = -1.0
    tuning: str = ""  # "lora", "full" or "frozen"; "": lora, and the tiny backbone in full
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_targets: tuple = ()  # last names of the linear layers that get LoRA; (): all
    head_width: int = 0
    gate: float = 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Backbone


def tiny_tokenizer():
    """Byte-level tokenizer of 512 entries in which the words of LIBERO's instructions are single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(form, normalized=False) for word in TINY_WORDS for form in (" " + word, word)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], chat_template=CHAT_TEMPLATE)


def tiny_config(tokenizer):
    """Qwen3-VL's architecture at 0.7 M parameters."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token_id", "image_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    return Qwen3VLConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, tie_word_embeddings=True, **ids)


def text_tokenizer(backbone):
    """The tokenizer of "tiny", of a Qwen3-VL checkpoint directory or of a hub id; ValueError for another checkpoint."""
    if backbone == "tiny":
        return tiny_tokenizer()
    config = AutoConfig.from_pretrained(backbone)
    if config.model_type != "qwen3_vl":
        raise ValueError(
            f"backbone {backbone} is a '{config.model_type}' checkpoint; "
            "give --backbone tiny or a Qwen3-VL one (model_type qwen3_vl)"
        )
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        number = getattr(config, name)
        if number not in tokenizer.added_tokens_decoder:
            raise ValueError(
                f"the tokenizer of {backbone} has no special token {number}, the {name} of its config; "
                "put the tokenizer files of the same Qwen3-VL release beside the weights"
            )
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {backbone} has no chat template; add the release's chat_template.jinja")
    return tokenizer


def request_ids(tokenizer, instruction, chunk):
    """Token ids of the instruction with the request for actions."""
    return tokenizer(PROMPT.format(instruction=instruction, chunk=chunk), add_special_tokens=False)["input_ids"]


class Backbone(nn.Module):
    """Qwen3-VL without its language-model head, run with static shapes over transformers' own modules and weights."""

    def __init__(self, spec, placeholders, base=None):
        """placeholders: Q, the number of positions appended to the prompt; base: as for `VLA`."""
        super().__init__()
        self.qwen, self.tokenizer = base or load_base(spec)
        tune(self.qwen, spec)
        for module in norms(self.qwen):
            module.forward = functools.partial(_rms_norm, module)
        self.text_length, self.chunk, self.cameras = spec.text_length, spec.chunk, spec.cameras
        self.queries_count = placeholders  # Q
        self.checkpointing = False  # compute activations again in the backward pass instead of keeping them
        text, vision = self.qwen.config.text_config, self.qwen.config.vision_config
        self.width, self.layers = text.hidden_size, text.num_hidden_layers
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        if spec.image_size < 1 or spec.image_size % (self.patch * self.merge):
            raise ValueError(
                f"image_size is {spec.image_size}; "
                f"it must be a multiple of {self.patch * self.merge} for {spec.backbone}"
            )
        self.grid = spec.image_size // self.patch  # patches along one side
        self.slots = (self.grid // self.merge) ** 2  # image tokens of one camera
        tokens = spec.text_length + spec.cameras * self.slots + placeholders
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"the prompt would take {tokens} tokens ({spec.cameras} images of {self.slots}, {spec.text_length} of "
                f"text, {placeholders} placeholders), more than {MAX_TOKENS}; fewer or smaller images, a shorter text"
            )
        self.known_ids = {}  # (instruction, device) -> ids [T] and their number, there already
        self._lay_out()

    # -- prompt ------------------------------------------------------------------------------------------------------

    def _lay_out(self):
        """Splits the chat template into the fixed ids before and after the text, and fixes positions and slots."""
        content = [{"type": "image"}] * self.cameras + [{"type": "text", "text": "\0"}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, after = chat.split("\0")
        pad = self.tokenizer.convert_ids_to_tokens(self.qwen.config.image_token_id)
        before, after = self._ids(before.replace(pad, pad * self.slots)), self._ids(after)
        self.first_image = before.index(self.qwen.config.vision_start_token_id)
        self.image_end = self.first_image + self.cameras * (self.slots + 2)  # start, slots, end of each camera
        self.text_start, self.header_start = len(before), len(before) + self.text_length
        self.length = self.header_start + len(after) + self.queries_count  # L
        fixed = before + [0] * self.text_length + after
        self.register_buffer("fixed_ids", torch.tensor(fixed), persistent=False)  # [L - Q]
        is_image = torch.zeros(self.length, dtype=torch.bool)
        is_image[: self.image_end][self.fixed_ids[: self.image_end] == self.qwen.config.image_token_id] = True
        self.register_buffer("is_image", is_image, persistent=False)  # [L]
        self.register_buffer("positions", self._positions(), persistent=False)  # [3, L]
        cos, sin = self.qwen.language_model.rotary_emb(torch.zeros(1), self.positions[:, None])
        tables = {"cos": cos[0], "sin": sin[0]} | dict(zip(("vision_cos", "vision_sin"), self._vision_rope()))
        for name, table in tables.items():  # [L, head_dim], [grid^2, head_dim]
            self.register_buffer(name, table, persistent=False)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _positions(self):
        """M-RoPE positions (time, row, column) i64 [3, L] of a prompt without padding: an image is one step in time, a
        grid in the others."""
        side = self.grid // self.merge
        rows, columns = np.divmod(np.arange(self.slots), side)
        positions, at = [], 0
        for number in range(self.length):
            inside = number - self.first_image
            camera, slot = divmod(inside, self.slots + 2)
            if 0 <= inside < self.image_end - self.first_image and 1 <= slot <= self.slots:
                positions.append((at, at + rows[slot - 1], at + columns[slot - 1]))
                at += side if slot == self.slots else 0
            else:
                positions.append((at, at, at))
                at += 1
        return torch.tensor(np.array(positions).T)

    def text_ids(self, instruction):
        """Token ids of the whole request. Raises ValueError when they do not fit `text_length`."""
        ids = request_ids(self.tokenizer, instruction, self.chunk)
        if len(ids) > self.text_length:
            raise ValueError(
                f"the instruction {instruction!r} takes {len(ids)} tokens with its request, "
                f"but text_length is {self.text_length}; train with a larger --text-length"
            )
        return ids

    def tokenise(self, instructions):
        """[B] strings -> (ids i64 [B, T] padded with 0 on the right, counts i64 [B]) on this module's device.

        Only a new instruction travels there; known ones are stacked where they lie.
        """
        device, rows = self.fixed_ids.device, []
        for text in instructions:
            if (text, device) not in self.known_ids:
                ids = torch.tensor(self.text_ids(text))
                padded = F.pad(ids, (0, self.text_length - len(ids)))
                self.known_ids[text, device] = padded.to(device), torch.tensor(len(ids)).to(device)
            rows.append(self.known_ids[text, device])
        ids, counts = zip(*rows)
        return torch.stack(ids), torch.stack(counts)

    def places_and_mask(self, counts):
        """i64 [B, L]: the place of each token if there were no padding, which its position follows; attention mask bool
        [B, 1, L, L], causal and without padding. counts: i64 [B] real text tokens."""
        places = torch.arange(self.length, device=counts.device)
        skipped = (self.text_length - counts)[:, None] * (places >= self.header_start)  # [B, L]
        padding = (places >= self.text_start + counts[:, None]) & (places < self.header_start)  # [B, L]
        causal = places[:, None] >= places  # [L, L]
        return places - skipped, causal & ~padding[:, None, None, :]

    # -- pixels ------------------------------------------------------------------------------------------------------

    def patches(self, images):
        """f32 [B, C, 3, S, S] -> [B C, grid^2, 3 p p]: in merge-block order, as the image processor's."""
        side, m, p = self.grid // self.merge, self.merge, self.patch
        x = images.flatten(0, 1).view(-1, 3, side, m, p, side, m, p)
        return x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)

    def vision(self, images):
        """f32 [B, C, 3, S, S] in [-1, 1] -> ([B, C, slots, D], deepstack features: list of the same shape)."""
        visual, batch = self.qwen.visual, images.shape[:2]
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # a still image fills both temporal halves: add them
        x = F.linear(self.patches(images).to(weight.dtype), weight, visual.patch_embed.proj.bias)  # [B C, grid^2, Dv]
        x = x + self._vision_positions()
        deep, wanted = [], list(visual.deepstack_visual_indexes)
        for number, block in enumerate(visual.blocks):
            x = self._through(self._vision_block, block, x)
            if number in wanted:
                deep.append(visual.deepstack_merger_list[wanted.index(number)](x).view(*batch, self.slots, -1))
        return visual.merger(x).view(*batch, self.slots, -1), deep

    def _vision_block(self, block, x):
        """All images of the batch in one attention call. x: [B C, grid^2, Dv]"""
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B C, heads, grid^2, head_dim]
        q, k = (_rotate(t, self.vision_cos, self.vision_sin) for t in (q, k))
        v = v.contiguous()  # else the backward pass would keep all of qkv for it
        x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))

    def _merge_order(self, table):
        """[grid, grid, n] in rows and columns -> [grid^2, n] in merge-block order."""
        side, m = self.grid // self.merge, self.merge
        return table.view(side, m, side, m, -1).transpose(1, 2).flatten(0, 3)

    def _vision_positions(self):
        """The learned square table of positions, resampled to this image size. [grid^2, Dv]"""
        table = self.qwen.visual.pos_embed.weight
        old = math.isqrt(len(table))
        resized = F.interpolate(
            table.T.view(1, -1, old, old).float(), (self.grid, self.grid), mode="bilinear", align_corners=True
        )
        return self._merge_order(resized[0].permute(1, 2, 0)).to(table.dtype)

    def _vision_rope(self):
        """cos, sin f32 [grid^2, head_dim] of the axial rotary embedding (frequencies: half rows, half columns)."""
        config = self.qwen.config.vision_config
        head = config.hidden_size // config.num_heads
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        frequencies = 1.0 / theta ** (torch.arange(0, head // 2, 2).float() / (head // 2))
        places = torch.arange(self.grid)
        grid = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1)  # [grid, grid, 2]
        angles = (self._merge_order(grid)[..., None] * frequencies).flatten(1).repeat(1, 2)  # [grid^2, head_dim]
        return angles.cos(), angles.sin()

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, images, text, counts, placeholders, keep=None):
        """{k: nu^(k) [B, L, D]} for each k in `keep`, or for all, 0..N.

        images: f32 [B, C, 3, S, S] in [-1, 1]; text: i64 [B, T]; counts: i64 [B] real text tokens;
        placeholders: [Q, D].
        """
        language, batch = self.qwen.language_model, len(images)
        keep = range(self.layers + 1) if keep is None else keep
        image_tokens, deep = self.vision(images)
        before, after = self.fixed_ids[: self.text_start], self.fixed_ids[self.header_start :]
        ids = torch.cat([before.expand(batch, -1), text, after.expand(batch, -1)], 1)  # [B, L - Q]
        queries = placeholders.to(image_tokens.dtype).expand(batch, -1, -1)
        x = torch.cat([language.embed_tokens(ids), queries], 1)  # [B, L, D]
        x = torch.where(self.is_image[:, None], self._at_images(image_tokens), x)
        places, mask = self.places_and_mask(counts)
        rope = self.cos[places].to(x.dtype), self.sin[places].to(x.dtype)  # [B, L, head_dim]
        states = {0: x} if 0 in keep else {}
        for number, layer in enumerate(language.layers):
            x = self._through(layer, x, attention_mask=mask, position_embeddings=rope)
            if number < len(deep):
                x = x + self._at_images(deep[number])
            if number + 1 in keep:
                states[number + 1] = x if number + 1 < self.layers else language.norm(x)
        return states

    def _through(self, function, *inputs, **named):
        """function(*inputs, **named), under gradient checkpointing without keeping what it computes on the way."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
        return function(*inputs, **named)

    def _at_images(self, features):
        """[B, C, slots, D] -> [B, L, D]: the features at their slots, zeros elsewhere."""
        spread = F.pad(features, (0, 0, 1, 1)).flatten(1, 2)  # start and end token of each camera
        return F.pad(spread, (0, 0, self.first_image, self.length - self.image_end))

    def image_states(self, x):
        """[B, L, D] -> f32 [B, C slots, D]"""
        blocks = x[:, self.first_image : self.image_end].unflatten(1, (self.cameras, -1))  # start, slots, end
        return blocks[:, :, 1:-1].flatten(1, 2).float()

    def placeholder_states(self, x):
        """[B, L, D] -> f32 [B, Q, D]"""
        return x[:, -self.queries_count :].float()


def _rotate(x, cos, sin):
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def norms(qwen):
    """The RMS norms of the language model."""
    return [module for module in qwen.modules() if isinstance(module, Qwen3VLTextRMSNorm)]


def _rms_norm(module, x):
    """What transformers' own forward gives, as one kernel on a GPU instead of six: the same bits in f32."""
    with torch.autocast(x.device.type, enabled=False):  # which would copy x to f32
        return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), module.variance_epsilon)


def load_base(spec):
    """(Qwen3VLModel, tokenizer) of the tiny backbone, on random weights, or of a pretrained one."""
    tokenizer = text_tokenizer(spec.backbone)
    if spec.backbone == "tiny":
        return Qwen3VLModel._from_config(tiny_config(tokenizer), attn_implementation="sdpa"), tokenizer
    half = spec.tuning != "full" and torch.cuda.is_available()  # what is trained stays f32
    dtype = torch.bfloat16 if half else torch.float32
    return Qwen3VLModel.from_pretrained(spec.backbone, dtype=dtype, attn_implementation="sdpa"), tokenizer


def tune(qwen, spec):
    """Makes trainable what `spec.tuning` says of the backbone: its weights, low-rank updates of them, or nothing."""
    tuning = spec.tuning or ("full" if spec.backbone == "tiny" else "lora")
    qwen.requires_grad_(tuning == "full")
    if tuning == "lora":
        add_lora(qwen, spec.lora_rank, spec.lora_alpha, spec.lora_targets)


def add_lora(module, rank, alpha, targets=()):
    """Adds trainable low-rank updates to the linear layers of `module` whose last name is in `targets` (default: all).

    Raises ValueError listing the names that there are.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 2 s to import, and the tiny backbone does without

    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    known = sorted({_last_name(name) for name in linear})
    if not set(targets) <= set(known):
        raise ValueError(f"lora_targets are {', '.join(targets)}; the linear layers here are {', '.join(known)}")
    chosen = [name for name in linear if not targets or _last_name(name) in targets]
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), module)
    for _, layer in lora_layers(module):
        layer.forward = functools.partial(_low_rank, layer)
    for parameter in module.parameters():
        if parameter.requires_grad:  # peft makes them in the base's bf16, where small updates round to nothing
            parameter.data = parameter.data.float()


def _low_rank(layer, x):
    """W x + s B A x as peft's layer computes it, but scaled and added inside the last product: no pass of its own."""
    rows = x.flatten(0, -2)
    out, up = layer.base_layer(rows), layer.lora_B["default"].weight
    out.addmm_(layer.lora_A["default"](rows), up.T.to(out.dtype), alpha=layer.scaling["default"])
    return out.unflatten(0, x.shape[:-1])


def _last_name(name):
    return name.rpartition(".")[2]


def lora_layers(module):
    """[(name, layer)] of the linear layers with a low-rank update."""
    return [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")]


def merge_lora(module):
    """Adds each low-rank update to its matrix, once: plain linear layers remain, with nothing left to merge again."""
    for name, layer in lora_layers(module):
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())


def base_hash(module):
    """Short hash over names, shapes and first values of all frozen weights: which base model a run was trained on.

    The values are hashed in bf16, so that a GPU (base in bf16) and a CPU (in f32) agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        if not tensor.requires_grad:
            digest.update(
                f"{name}{tuple(tensor.shape)}".encode()
                + tensor.detach().flatten()[:1024].bfloat16().float().cpu().numpy().tobytes()
            )
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Action head


class HeadBlock(nn.Module):
    """Bridge attention (VLA-Adapter): one softmax over the action queries, the placeholders with the proprioceptive
    state, and the image tokens, whose keys are gated by tanh(gate)."""

    def __init__(self, width, states, heads, gate):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_states, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(states), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.own, self.bridge, self.image = (
            nn.Linear(width, 2 * width),
            nn.Linear(states, 2 * width),
            nn.Linear(states, 2 * width),
        )
        self.state = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.tensor(float(gate)))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, placeholders, images, proprio):
        """x: [B, H, W]; placeholders: [B, Q, D] and images: [B, C slots, D] of one layer; proprio: [B, 0 or 1, W]."""
        h = self.norm(x)
        image_k, image_v = self.image(self.norm_states(images)).chunk(2, -1)
        rest = torch.cat([self.own(h), self.bridge(self.norm_states(placeholders)), self.state(proprio)], 1)
        k, v = rest.chunk(2, -1)
        k, v = torch.cat([k, image_k * self.gate.tanh()], 1), torch.cat([v, image_v], 1)  # [B, H + Q + 1 + C slots, W]
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  [B, heads, tokens, W / heads]
        mixed = F.scaled_dot_product_attention(split(self.query(h)), split(k), split(v))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class ActionHead(nn.Module):
    """H learned queries pass through one block per used layer of the backbone; each becomes one action."""

    def __init__(self, chunk, action_size, proprio_size, states, blocks, width, gate):
        super().__init__()
        self.queries = nn.Parameter(0.5 * torch.randn(chunk, width))  # one per chunk step, so that steps can differ
        self.proprio = nn.Linear(proprio_size, width) if proprio_size else None
        self.blocks = nn.ModuleList(HeadBlock(width, states, max(4, width // 64), gate) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, action_size)

    def forward(self, layers, proprio):
        """layers: M state pairs (placeholders [B, Q, D], images [B, C slots, D]); proprio: f32 [B, N]. -> [B, H, A]"""
        batch = len(proprio)
        x = self.queries.expand(batch, -1, -1)  # [B, H, W]
        token = self.proprio(proprio)[:, None] if self.proprio else x[:, :0]
        for block, (placeholders, images) in zip(self.blocks, layers, strict=True):
            x = block(x, placeholders, images, token)
        return self.out(self.norm(x))


# ----------------------------------------------------------------------------------------------------------------------
# The five variants


class VLA(nn.Module):
    """Backbone, placeholders, head, and the latent loss of one variant."""

    def __init__(self, spec, base=None):
        """base: (Qwen3VLModel, tokenizer) to build on, instead of loading what `spec.backbone` names."""
        super().__init__()
        _check_spec(spec)
        self.spec, self.variant = spec, VARIANTS[spec.variant]
        self.latent_count = spec.chunk * spec.codes_per_step if self.variant.latents else 0
        action_count = spec.chunk * spec.placeholders_per_step if self.variant.actions else 0
        self.backbone = Backbone(spec, self.latent_count + action_count, base)
        width, layers = self.backbone.width, self.backbone.layers
        self.queries = nn.Parameter(0.02 * torch.randn(self.latent_count + action_count, width))  # [Q, D]
        if not 0 <= spec.align_layer <= layers:
            raise ValueError(f"align_layer is {spec.align_layer}, but {spec.backbone} has layers 1 to {layers}")
        self.head_layers = range(math.ceil(layers / 2), layers + 1)
        self.latent_layer = layers  # whose placeholder states the latent loss reads
        if self.variant.target == "align":
            self.latent_layer = spec.align_layer or round(17 * layers / 28)
        head_width, blocks = spec.head_width or min(width, 1024), len(self.head_layers)
        self.head = ActionHead(spec.chunk, spec.action_size, spec.proprio_size, width, blocks, head_width, spec.gate)
        self.latent_head = self._latent_head(width)

    def _latent_head(self, width):
        """What turns placeholder states into a prediction of the latent action; None for the baseline."""
        if self.variant.target == "align":
            return nn.Linear(width, self.spec.code_dim)
        if self.variant.target and self.spec.continuous:
            return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.spec.code_dim))
        return nn.Linear(width, self.spec.num_codes) if self.variant.target else None

    def forward(self, batch):
        """Losses of one micro-batch, each a sum over valid entries divided by a constant.

        batch: images list of C u8 [B, h, w, 3]; text [B] strings; proprio f32 [B, N] normalised; actions f32 [B, H, A]
        normalised; valid bool [B, H]; draws f32 [B, C, 6] or absent (no augmentation); for a latent loss codes
        i64 [B, H, P] and vectors f32 [B, H, P, d]. Returns {"loss", "action_loss"} and, where there is one,
        "latent_loss" and "latent_accuracy" (share of codes predicted right).
        """
        actions, latents = self.run(batch)
        error = actions - batch["actions"]
        error = error.abs() if self.spec.action_loss == "l1" else error.square()
        result = {"action_loss": (error * batch["valid"][:, :, None]).mean()}
        result |= self.latent_losses(latents, batch) if self.variant.target else {}
        weight = self.variant.weight if self.spec.latent_weight < 0 else self.spec.latent_weight
        return {"loss": result["action_loss"] + weight * result.get("latent_loss", 0.0)} | result

    def run(self, batch):
        """(actions f32 [B, H, A] normalised, placeholder states f32 [B, Q, D] that the latent loss reads)."""
        images = prepare_images(batch["images"], self.spec.image_size, batch.get("draws"))
        proprio = batch["proprio"] if self.spec.proprio_size else batch["proprio"][:, :0]
        return self.act(images, *self.backbone.tokenise(batch["text"]), proprio)

    def act(self, images, text, counts, proprio):
        """The one forward pass, on tensors of fixed shapes alone (what is compiled); inputs and outputs as above.

        On a GPU, or with weights in bf16, the backbone runs in bf16; pixels, head and losses stay in f32.
        """
        bb, device = self.backbone, self.queries.device
        half = bb.qwen.language_model.embed_tokens.weight.dtype == torch.bfloat16
        with autocast(device, half):
            states = bb(images, text, counts, self.queries, {*self.head_layers, self.latent_layer})
        pairs = [(bb.placeholder_states(states[k]), bb.image_states(states[k])) for k in self.head_layers]
        return self.head(pairs, proprio), bb.placeholder_states(states[self.latent_layer])

    def latent_losses(self, latents, batch):
        """L_latent of the paper, from the placeholder states nu^(k) [B, Q, D]; steps past the episode's end count 0."""
        valid, spec = batch["valid"].float(), self.spec
        if self.variant.target == "align":  # 1 - cos(linear(nu^(k)), mean of c over the P codes)
            guess = self.latent_head(latents)  # [B, H, d]
            return {"latent_loss": ((1 - F.cosine_similarity(guess, batch["vectors"].mean(2), dim=-1)) * valid).mean()}
        guess = self.latent_head(latents[:, : self.latent_count]).unflatten(
            1, (spec.chunk, spec.codes_per_step)
        )  # [B, H, P, K or d]
        if spec.continuous:
            error = (guess - batch["vectors"]).square().mean(3)  # [B, H, P]
            return {"latent_loss": (error * valid[:, :, None]).mean()}
        loss = F.cross_entropy(guess.flatten(0, 2), batch["codes"].flatten(), reduction="none").view_as(batch["codes"])
        hits = (guess.argmax(-1) == batch["codes"]) * valid[:, :, None]
        accuracy = hits.sum() / (valid.sum() * spec.codes_per_step).clamp(min=1)
        return {"latent_loss": (loss * valid[:, :, None]).mean(), "latent_accuracy": accuracy}


def _check_spec(spec):
    if spec.variant not in VARIANTS:
        raise ValueError(f"variant is '{spec.variant}'; choose one of {', '.join(VARIANTS)}")
    if spec.tuning not in ("", "lora", "full", "frozen"):
        raise ValueError(f"tuning is '{spec.tuning}'; choose lora, full or frozen")
    if spec.backbone == "tiny" and (spec.tuning or spec.lora_targets):
        name = "tuning" if spec.tuning else "lora_targets"
        raise ValueError(f"{name} is {getattr(spec, name)!r}, but the tiny backbone is always trained in full")
    if spec.lora_targets and spec.tuning not in ("", "lora"):
        raise ValueError(f"lora_targets are {', '.join(spec.lora_targets)}, but tuning is '{spec.tuning}': no LoRA")
    if spec.action_loss not in ("l1", "l2"):
        raise ValueError(f"action_loss is '{spec.action_loss}'; choose l1 or l2")
    if spec.placeholders_per_step > 1 and spec.variant != "baseline":
        raise ValueError(
            f"placeholders_per_step is {spec.placeholders_per_step} with {spec.variant}; "
            "only the baseline takes more than 1"
        )
    if spec.continuous and VARIANTS[spec.variant].target not in ("image", "action"):
        raise ValueError(f"continuous targets are for la_direct, la_cond and la_tok, not for {spec.variant}")


# ----------------------------------------------------------------------------------------------------------------------
# A trained run as a policy


def check_gpu(name, capability):
    """Raises ValueError for a GPU without bf16, by its name and compute capability (major, minor)."""
    if tuple(capability) < (8, 0):
        raise ValueError(
            f"the GPU {name} has compute capability {capability[0]}.{capability[1]}, and bf16 needs 8.0 (Ampere); "
            "use a newer one, or the CPU with CUDA_VISIBLE_DEVICES="
        )


def _check_sizes(spec, values):
    """Raises ValueError for a spec of which something is of another type, or needs more than `values` weights: before
    anything of such a size is built. Prompts have a longest length of their own."""
    for field in fields(spec):
        types = {float: (float, int), tuple: (tuple, list)}.get(field.type, field.type)
        value = getattr(spec, field.name)
        if not isinstance(value, types) or field.type is int and value < 0:
            raise ValueError(f"{field.name} is {value!r:.80} in config.json. Put the run's own file back.")
    _check_spec(spec)
    width = spec.head_width or 1
    least = width * max(spec.chunk, spec.action_size, spec.proprio_size, 14 * width)  # of a block of the head
    least = max(least, 64 * max(spec.num_codes, spec.code_dim, spec.lora_rank))  # no backbone is narrower
    if least > values:
        raise ValueError(f"config.json asks for more than the {values} weights of the run: {spec}")


def load_vla(run, text_length=0):
    """(VLA in evaluation mode, config of the run). text_length: room for instructions, if another than in training.

    Raises FileNotFoundError or ValueError when `run` is not a finished run.
    """
    run = Path(run)
    for name in ("config.json", "model.safetensors"):
        if not (run / name).exists():
            raise FileNotFoundError(f"{run} has no {name}: it is not a run that train.py saved")
    config, weights = read_json(run / "config.json"), run / "model.safetensors"
    try:
        tensors, _ = load_tensors(weights)
        spec = Spec(**config["model"] | ({"text_length": text_length} if text_length else {}))
        _check_sizes(spec, sum(tensor.numel() for tensor in tensors.values()))
        vla = VLA(spec)
        load_trainable(vla, tensors, weights)
        config["base_hash"], config["data"]  # what is read below and by `Policy`
    except (TypeError, KeyError, OSError) as error:
        raise ValueError(f"{run} cannot be loaded: {error!r}. Put its own files, and its backbone, back.") from error
    if base_hash(vla) != config["base_hash"]:
        raise ValueError(
            f"{run} was trained on another {config['model']['backbone']}: "
            f"base weights hash to {base_hash(vla)}, the run's to {config['base_hash']}"
        )
    return vla.eval(), config


class Policy:
    """policy(images, instructions, proprio) -> actions in physical units, from a run directory.

    On a GPU the backbone's weights are bf16 and the forward is a CUDA graph for each batch size, at most eight of them.
    """

    def __init__(self, run, data="", device=""):
        """data: whose statistics to use, by data set name; needed only when the run was trained on several.

        device: the GPU when there is one, unless stated.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.run = run
        self._load()
        every = read_json(Path(run) / "dataset_statistics.json")
        name = data or (next(iter(every)) if len(every) == 1 else "")
        if name not in every:
            raise ValueError(f"{run} has statistics of {list(every)}, not of '{name}'; choose one of them")
        self.name, self.stats = name, every[name]
        try:
            self.entry = {entry["name"]: entry for entry in self.config["data"]}[name]  # what the run says of it
            trained_with = self.entry["statistics"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{run}/config.json says nothing of '{name}': put the run's own file back") from error
        if statistics_hash(self.stats) != trained_with:
            raise ValueError(
                f"{run}/dataset_statistics.json holds other statistics of '{name}' than the run was trained with "
                f"(hash {statistics_hash(self.stats)}, not {trained_with}): put the run's own file back"
            )

    def _load(self, text_length=0):
        """Reads the run, with LoRA merged into its matrices."""
        vla, self.config = load_vla(self.run, text_length)
        self.vla = vla.to(self.device)
        merge_lora(self.vla)
        if self.vla.queries.is_cuda:
            check_gpu(torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device))
            for parameter in self.vla.backbone.qwen.parameters():
                parameter.data = parameter.data.bfloat16()
            self.vla.act = torch.compile(self.vla.act, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def make_room(self, instructions):
        """Lets the model read these instructions, should they be longer than those of its training.

        Padding is masked, so what it answers to shorter ones stays the same to rounding.
        """
        backbone = self.vla.backbone
        longest = max(len(request_ids(backbone.tokenizer, text, backbone.chunk)) for text in instructions)
        if longest > backbone.text_length:
            self._load((longest + 7) // 8 * 8)

    @torch.inference_mode()
    def __call__(self, images, instructions, proprio):
        """images: list of C arrays u8 [B, h, w, 3] in the run's camera order; instructions: [B] strings;
        proprio: f32 [B, N] in physical units. Returns f32 [B, H, A], standardised (gripper 1 = open)."""
        proprio = torch.from_numpy(normalise(np.asarray(proprio), self.stats["proprio"])).to(self.device)
        batch = {
            "images": [torch.as_tensor(i, device=self.device) for i in images],
            "text": instructions,
            "proprio": proprio,
        }
        actions, _ = self.vla.run(batch)
        return unnormalise(actions.cpu().numpy(), self.stats["action"])
