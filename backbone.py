"""The backbone: Qwen3-VL without its language-model head, run with static shapes over transformers' modules.

All images have one size and every sample one layout, so a forward pass without loops over samples, boolean scatters or
waits for the GPU gives what transformers' own gives, to rounding (tests). lora.py says which weights are trained.
Left out: the language-model head, generation, video.

Axes: B batch, C cameras, S side of an image, L tokens, T text tokens, D width, N layers, Q placeholders.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from lora import set_trainable
from pretrained import load_qwen

MAX_CACHED = 100_000  # instructions, whose ids stay on the device: 1 KB each
MAX_TOKENS = 8192  # of a prompt: attention masks grow with the square
PROMPT = "{instruction}\nPlease predict the next {chunk} robot actions:"


def prompt_ids(tokenizer, instruction, chunk):
    """Return the token ids of an instruction followed by the request for `chunk` actions."""
    return tokenizer(PROMPT.format(instruction=instruction, chunk=chunk), add_special_tokens=False)["input_ids"]


class Backbone(nn.Module):
    """Qwen3-VL and the fixed layout of its prompt:

    [chat prefix, image tokens of each camera, text, padding, assistant header, placeholders]
    """

    def __init__(self, config, num_placeholders, base=None):
        """config: a `ModelConfig`; base: (Qwen3VLModel, tokenizer) to use instead of loading `config.backbone`."""
        super().__init__()
        self.qwen, self.tokenizer = base or load_qwen(config)
        set_trainable(self.qwen, config)
        for module in rms_norms(self.qwen):
            module.forward = functools.partial(_rms_norm, module)
        self.chunk = config.chunk
        self.cameras = config.cameras
        self.camera_counts = sorted({cameras for *_, cameras in config.embodiments}) or [config.cameras]
        self.num_placeholders = num_placeholders  # Q
        self.checkpointing = False  # recompute activations in the backward pass instead of keeping them
        text, vision = self.qwen.config.text_config, self.qwen.config.vision_config
        self.width, self.layers = text.hidden_size, text.num_hidden_layers
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        if config.image_size < 1 or config.image_size % (self.patch * self.merge):
            raise ValueError(
                f"image_size is {config.image_size}; "
                f"it must be a multiple of {self.patch * self.merge} for {config.backbone}"
            )
        self.grid = config.image_size // self.patch  # patches along one side
        self.tokens_per_image = (self.grid // self.merge) ** 2
        self.reserve_text(config.text_length)

    # -- prompt ------------------------------------------------------------------------------------------------------

    def reserve_text(self, text_length):
        """Make room for so many tokens of text. Raise ValueError where the prompt would be too long."""
        tokens = text_length + self.cameras * self.tokens_per_image + self.num_placeholders
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"the prompt would take {tokens} tokens ({self.cameras} images of {self.tokens_per_image}, "
                f"{text_length} of text, {self.num_placeholders} placeholders), more than {MAX_TOKENS}; "
                "fewer or smaller images, a shorter text"
            )
        self.text_length = text_length
        self.cached_ids = {}  # (instruction, device) -> (ids [T], their number), on that device
        self._build_layout()
        self.to(self.qwen.device)

    def _build_layout(self):
        """Split the chat template into the fixed ids before and after the text; fix positions and rotary tables."""
        content = [{"type": "image"}] * self.cameras + [{"type": "text", "text": "\0"}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, after = chat.split("\0")
        image_token = self.qwen.config.image_token_id
        pad = self.tokenizer.convert_ids_to_tokens(image_token)
        before = self._ids(before.replace(pad, pad * self.tokens_per_image))
        after = self._ids(after)
        self.first_image = before.index(self.qwen.config.vision_start_token_id)
        self.image_end = self.first_image + self.cameras * (self.tokens_per_image + 2)  # a start and an end each
        self.text_start = len(before)
        self.header_start = self.text_start + self.text_length
        self.length = self.header_start + len(after) + self.num_placeholders  # L
        fixed = before + [0] * self.text_length + after
        self.register_buffer("fixed_ids", torch.tensor(fixed), persistent=False)  # [L - Q]
        is_image = torch.zeros(self.length, dtype=torch.bool)
        is_image[: self.image_end] = self.fixed_ids[: self.image_end] == image_token
        self.register_buffer("is_image", is_image, persistent=False)  # [L]
        camera = (torch.arange(self.length) - self.first_image) // (self.tokens_per_image + 2)
        inside = (camera >= 0) & (torch.arange(self.length) < self.image_end)
        self.register_buffer("camera_of", torch.where(inside, camera, -1), persistent=False)  # [L]
        table_of = torch.zeros(self.cameras + 1, dtype=torch.long)  # of a number of cameras, which table is read
        table_of[self.camera_counts] = torch.arange(len(self.camera_counts))
        self.register_buffer("table_of", table_of, persistent=False)
        positions = torch.stack([self._mrope_positions(count) for count in self.camera_counts], 1)
        self.register_buffer("positions", positions, persistent=False)  # [3, camera counts, L]
        rotary = self.qwen.language_model.rotary_emb
        cos, sin = rotary(rotary.inv_freq.float(), positions.to(rotary.inv_freq.device))  # of its device and type
        vision_cos, vision_sin = self._vision_rope()
        self.register_buffer("cos", cos, persistent=False)  # [camera counts, L, head_dim]
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("vision_cos", vision_cos, persistent=False)  # [grid^2, head_dim]
        self.register_buffer("vision_sin", vision_sin, persistent=False)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _mrope_positions(self, cameras):
        """Return M-RoPE positions (time, row, column) i64 [3, L] of a prompt without padding.

        An image is one step in time and a grid in rows and columns; other tokens advance all three. Tokens of cameras
        beyond the first `cameras` advance nothing, as if they were not there.
        """
        side = self.grid // self.merge
        rows, columns = np.divmod(np.arange(self.tokens_per_image), side)
        positions = []
        at = 0
        for token in range(self.length):
            inside = token - self.first_image
            camera, slot = divmod(inside, self.tokens_per_image + 2)
            in_image = 0 <= inside < self.image_end - self.first_image
            if in_image and camera >= cameras:
                positions.append((at, at, at))
            elif in_image and 1 <= slot <= self.tokens_per_image:
                positions.append((at, at + rows[slot - 1], at + columns[slot - 1]))
                at += side if slot == self.tokens_per_image else 0
            else:
                positions.append((at, at, at))
                at += 1
        return torch.tensor(np.array(positions).T)

    def instruction_ids(self, instruction):
        """Return the token ids of an instruction with its request. Raise ValueError when they exceed `text_length`."""
        ids = prompt_ids(self.tokenizer, instruction, self.chunk)
        if len(ids) > self.text_length:
            raise ValueError(
                f"the instruction {instruction!r} takes {len(ids)} tokens with its request, "
                f"but text_length is {self.text_length}; train with a larger --text-length"
            )
        return ids

    def knows(self, instruction):
        """Return whether the ids of an instruction are on the device, so that it needs no tokenizer and has room."""
        return (instruction, self.fixed_ids.device) in self.cached_ids

    def tokenise(self, instructions):
        """Map B instructions to ids i64 [B, T], padded with 0 on the right, and their numbers i64 [B].

        Only a new instruction is copied to the device; known ones are stacked there.
        """
        device = self.fixed_ids.device
        if len(self.cached_ids) > MAX_CACHED:
            self.cached_ids.clear()
        entries = []
        for text in instructions:
            if (text, device) not in self.cached_ids:
                ids = torch.tensor(self.instruction_ids(text))
                padded = F.pad(ids, (0, self.text_length - len(ids)))
                self.cached_ids[text, device] = padded.to(device), torch.tensor(len(ids)).to(device)
            entries.append(self.cached_ids[text, device])
        ids, counts = zip(*entries)
        return torch.stack(ids), torch.stack(counts)

    def positions_and_mask(self, counts, num_cameras=None):
        """Return each token's place in a prompt without padding, i64 [B, L], and the attention mask bool [B, 1, L, L].

        Rotary tables are read at these places. The mask is causal and hides padding, and cameras that a sample does not
        have. counts: i64 [B] real text tokens; num_cameras: i64 [B], None: all have all cameras.
        """
        places = torch.arange(self.length, device=counts.device)
        skipped = (self.text_length - counts)[:, None] * (places >= self.header_start)  # [B, L]
        padding = (places >= self.text_start + counts[:, None]) & (places < self.header_start)  # [B, L]
        if num_cameras is not None:
            padding = padding | (self.camera_of >= num_cameras[:, None])
        causal = places[:, None] >= places  # [L, L]
        return places - skipped, causal & ~padding[:, None, None, :]

    # -- pixels ------------------------------------------------------------------------------------------------------

    def patches(self, images):
        """Cut f32 [B, C, 3, S, S] into [B C, grid^2, 3 p p], in merge-block order as the image processor does."""
        side, m, p = self.grid // self.merge, self.merge, self.patch
        x = images.flatten(0, 1).view(-1, 3, side, m, p, side, m, p)  # [B C, 3, side, m, p, side, m, p]
        return x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)  # [B C, grid^2, 3 p p]

    def vision(self, images):
        """Map f32 [B, C, 3, S, S] in [-1, 1] to image tokens [B, C, tokens, D] and a list of deepstack features."""
        visual, batch = self.qwen.visual, images.shape[:2]
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # a still image fills both temporal halves: add them
        x = F.linear(self.patches(images).to(weight.dtype), weight, visual.patch_embed.proj.bias)  # [B C, grid^2, Dv]
        x = x + self._vision_positions()
        deepstack = []
        wanted = list(visual.deepstack_visual_indexes)
        for number, block in enumerate(visual.blocks):
            x = self._run_layer(self._vision_block, block, x)
            if number in wanted:
                features = visual.deepstack_merger_list[wanted.index(number)](x)
                deepstack.append(features.view(*batch, self.tokens_per_image, -1))  # [B, C, tokens, D]
        return visual.merger(x).view(*batch, self.tokens_per_image, -1), deepstack

    def _vision_block(self, block, x):
        """Run one vision block with all images of the batch in one attention call. x: [B C, grid^2, Dv]"""
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B C, heads, grid^2, head_dim]
        q, k = (_rotate(t, self.vision_cos, self.vision_sin) for t in (q, k))
        v = v.contiguous()  # else the backward pass would keep all of qkv for it
        x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))

    def _merge_order(self, table):
        """Reorder [grid, grid, n] (rows, columns) to [grid^2, n] in merge-block order."""
        side, m = self.grid // self.merge, self.merge
        return table.view(side, m, side, m, -1).transpose(1, 2).flatten(0, 3)  # [grid^2, n]

    def _vision_positions(self):
        """Resample the learned square table of positions to this image size, [grid^2, Dv]."""
        table = self.qwen.visual.pos_embed.weight
        old = math.isqrt(len(table))
        square = table.T.view(1, -1, old, old).float()  # [1, Dv, old, old]
        resized = F.interpolate(square, (self.grid, self.grid), mode="bilinear", align_corners=True)
        return self._merge_order(resized[0].permute(1, 2, 0)).to(table.dtype)

    def _vision_rope(self):
        """Return cos and sin f32 [grid^2, head_dim] of the axial rotary embedding: half rows, half columns."""
        config = self.qwen.config.vision_config
        head = config.hidden_size // config.num_heads
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        frequencies = 1.0 / theta ** (torch.arange(0, head // 2, 2).float() / (head // 2))
        places = torch.arange(self.grid)
        grid = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1)  # [grid, grid, 2]
        angles = (self._merge_order(grid)[..., None] * frequencies).flatten(1).repeat(1, 2)  # [grid^2, head_dim]
        return angles.cos(), angles.sin()

    # -- forward -----------------------------------------------------------------------------------------------------

    def rotary_tables(self, places, num_cameras=None):
        """Return cos and sin [B, L, head_dim] of tokens at some places i64 [B, L]; num_cameras: as above."""
        if num_cameras is None:
            return self.cos[0][places], self.sin[0][places]
        table = self.table_of[num_cameras][:, None]  # [B, 1]
        return self.cos[table, places], self.sin[table, places]

    def forward(self, images, text, counts, placeholders, keep=None, num_cameras=None):
        """Return {k: nu^(k) [B, L, D]} for each k in `keep` (default: all, 0 to N).

        nu^(k) is the residual stream after k layers, deepstack included; nu^(N) is taken after the final norm.
        images: f32 [B, C, 3, S, S] in [-1, 1]; text: i64 [B, T]; counts: i64 [B] real text tokens;
        placeholders: [Q, D]; num_cameras: i64 [B], of samples that do not have all C cameras; None: all do.
        """
        language, batch = self.qwen.language_model, len(images)
        keep = range(self.layers + 1) if keep is None else keep
        image_tokens, deepstack = self.vision(images)
        before, after = self.fixed_ids[: self.text_start], self.fixed_ids[self.header_start :]
        ids = torch.cat([before.expand(batch, -1), text, after.expand(batch, -1)], 1)  # [B, L - Q]
        queries = placeholders.to(image_tokens.dtype).expand(batch, -1, -1)
        x = torch.cat([language.embed_tokens(ids), queries], 1)  # [B, L, D]
        x = torch.where(self.is_image[:, None], self._scatter_to_image_tokens(image_tokens), x)
        places, mask = self.positions_and_mask(counts, num_cameras)
        rope = tuple(table.to(x.dtype) for table in self.rotary_tables(places, num_cameras))  # [B, L, head_dim]
        states = {0: x} if 0 in keep else {}
        for number, layer in enumerate(language.layers):
            x = self._run_layer(layer, x, attention_mask=mask, position_embeddings=rope)
            if number < len(deepstack):
                x = x + self._scatter_to_image_tokens(deepstack[number])
            if number + 1 in keep:
                states[number + 1] = x if number + 1 < self.layers else language.norm(x)
        return states

    def _run_layer(self, layer, *inputs, **named):
        """Call layer(*inputs, **named); under gradient checkpointing without keeping its activations."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
        return layer(*inputs, **named)

    def _scatter_to_image_tokens(self, features):
        """Spread [B, C, tokens, D] over the prompt: [B, L, D], zeros at all but the image tokens."""
        padded = F.pad(features, (0, 0, 1, 1)).flatten(1, 2)  # start and end token of each camera
        return F.pad(padded, (0, 0, self.first_image, self.length - self.image_end))  # [B, L, D]

    def image_states(self, x):
        """Pick the image tokens of [B, L, D]: f32 [B, C tokens, D]."""
        blocks = x[:, self.first_image : self.image_end].unflatten(1, (self.cameras, -1))  # start, tokens, end
        return blocks[:, :, 1:-1].flatten(1, 2).float()  # [B, C tokens, D]

    def image_mask(self, num_cameras):
        """Return which of `image_states` a sample has, bool [B, C tokens]. num_cameras: i64 [B]."""
        cameras = torch.arange(self.cameras, device=num_cameras.device).repeat_interleave(self.tokens_per_image)
        return cameras < num_cameras[:, None]

    def placeholder_states(self, x):
        """Pick the placeholders of [B, L, D]: f32 [B, Q, D]."""
        return x[:, -self.num_placeholders :].float()


def _rotate(x, cos, sin):
    """Apply rotary embeddings to x [..., tokens, head_dim]."""
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rms_norms(qwen):
    """Return the RMS norms of the language model."""
    return [module for module in qwen.modules() if isinstance(module, Qwen3VLTextRMSNorm)]


def _rms_norm(module, x):
    """Compute transformers' RMS norm as one kernel on a GPU instead of six; the same bits in f32."""
    with torch.autocast(x.device.type, enabled=False):  # which would copy x to f32
        return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), module.variance_epsilon)
