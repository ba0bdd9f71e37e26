"""univla.py: checkpoints load and give what an independent reading gives, functions over UniVLA's state dict.

B batch, T frames (2), S tokens of one frame's sequence, N patches (256), L text tokens, D width, H heads (12), E width
of a head, P codes (4), C width of a code, K codebook size (16).
"""

import functools
import textwrap
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import latent
import train_latent
import univla

H, P, K, N, DEPTH = 12, 4, 16, 256, 12


@dataclass
class Widths:
    """The widths of a model, D and C."""

    tokens: int
    codes: int


FULL = Widths(tokens=768, codes=128)  # UniVLA's
NARROW = Widths(tokens=48, codes=8)  # as deep, and computed in seconds
STACKS = ("dino_encoder.blocks", "encoder.transformer_blocks", "decoder.transformer_blocks")
ONLY = ("", "action_latent", "to_codebook", "vq", "action_up")  # key prefix, queries, down, quantiser, up
CONTROLLABLE = ("", "action_latent_controllable", "to_codebook", "vq_action", "action_up")
OTHER = ("other_", "action_latent", "to_codebook_uncontrol", "vq", "action_up_uncontrol")
NOT_IN_UNIVLA = ("centre", "sums", "counts", "unused", "updates")  # tensors of our model alone
CODE_SETS = {1: [ONLY], 2: [CONTROLLABLE, OTHER]}  # in the order of the sequence


# ----------------------------------------------------------------------------------------------------------------------
# Random checkpoints


def shapes(stage, widths=FULL):
    """Return {name: shape} of the checkpoint of stage 1 or 2, without stage 1's T5 (`text_encoder.*`)."""
    D, C = widths.tokens, widths.codes
    bare = {"dino_encoder.cls_token": (1, 1, D), "dino_encoder.register_tokens": (1, 4, D)}
    bare |= {"dino_encoder.mask_token": (1, D), "dino_encoder.pos_embed": (1, 1370, D)}
    linears = {"dino_encoder.patch_embed.proj": (D, 3, 14, 14), "patch_up": (D, D), "decoder.out": (D, D)}
    linears |= {"encoder.ffn.1": (D, D), "decoder.ffn.1": (D, D)} | ({"lang_proj": (D, D)} if stage == 1 else {})
    norms = ["dino_encoder.norm", "encoder.ffn.0", "encoder.ffn.2", "decoder.ffn.0", "decoder.ffn.2"]
    for _, queries, down, quantiser, up in CODE_SETS[stage]:
        bare |= {queries: (1, 1, P, D), f"{quantiser}.codebook.weight": (K, C)}
        linears |= {down: (C, D), up: (D, C)}
    for dino, enc, dec in ([f"{stack}.{i}" for stack in STACKS] for i in range(DEPTH)):
        bare |= {f"{dino}.ls1.gamma": (D,), f"{dino}.ls2.gamma": (D,)}
        linears |= {f"{dino}.attn.qkv": (3 * D, D), f"{dino}.attn.proj": (D, D)}
        for mlp in (f"{dino}.mlp.fc1", f"{enc}.ffn.0", f"{dec}.ffn.0"):
            linears |= {mlp: (4 * D, D)}
        for mlp in (f"{dino}.mlp.fc2", f"{enc}.ffn.3", f"{dec}.ffn.3"):
            linears |= {mlp: (D, 4 * D)}
        for attention in (f"{enc}.spatial_attn", f"{enc}.temporal_attn", f"{dec}.spatial_attn"):
            bare |= {f"{attention}.to_{part}.weight": (D, D) for part in "qkv"}
            linears |= {f"{attention}.to_out.0": (D, D)}
        norms += [f"{name}.norm{n}" for name in (dino, enc, dec) for n in (1, 2)] + [f"{enc}.norm3"]
    table = bare | {f"{name}.{part}": (D,) for name in norms for part in ("weight", "bias")}
    table |= {f"{name}.weight": shape for name, shape in linears.items()}
    table |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return {f"lam.{name}": shape for name, shape in table.items()}


def mean_and_std(name, shape, widths):
    """Return those of a random tensor: small matrices and biases, near-one norms, spread-out tokens and codes."""
    if len(shape) == 1 and not name.endswith("bias"):  # LayerScale or LayerNorm
        return (0.5 if name.endswith("gamma") else 1.0), 0.1
    if name.endswith(".codebook.weight"):
        return 0.0, 1.0
    if any(part in name for part in ("_token", "pos_embed", "action_latent")):
        return 0.0, 0.5
    return 0.0, 0.02 * (FULL.tokens / widths.tokens) ** 0.5


def random_state(stage, widths, seed=0):
    """Return a state dict of the names and shapes of `shapes`, f32, with activations of order one in every block."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(stage, widths).items():
        mean, std = mean_and_std(name, shape, widths)
        state[name] = torch.empty(shape).normal_(mean, std, generator=generator)
    return state


def empty_state(stage):
    """Return a full-size state dict of the right names and shapes whose tensors take no room."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes(stage).items()}


def save(path, state, **more):
    """Write a Lightning checkpoint with a state dict and more entries; return its path."""
    torch.save({"state_dict": state} | more, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The independent reading


def linear(p, name, x):
    """Apply the linear layer `name` of the tensors p."""
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(p, name, x, eps=1e-5):
    """Apply the layer norm `name` of the tensors p over the last axis."""
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def attend(q, k, v, visible):
    """Softmax attention of 12 heads; `visible` broadcasts over the scores, False hides a key from a query."""
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(-3, -2) for x in (q, k, v))  # [..., H, S, E]
    scores = q @ k.mT * q.shape[-1] ** -0.5  # [..., H, S, S]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)  # [..., S, D]


def dino_positions(p):
    """Resample the 37 x 37 table to the 16 x 16 patches of 224 pixels, behind the class position: [1, 1 + N, D]."""
    first, grid = p["dino_encoder.pos_embed"].split([1, 37 * 37], dim=1)
    grid = grid.mT.unflatten(-1, (37, 37))  # [1, D, 37, 37]
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2).mT], dim=1)


def dino_block(p, name, x):
    """Apply one block of DINOv2 to [B, S, D]."""
    q, k, v = linear(p, f"{name}.attn.qkv", norm(p, f"{name}.norm1", x, 1e-6)).chunk(3, dim=-1)  # [B, S, D] each
    x = x + p[f"{name}.ls1.gamma"] * linear(p, f"{name}.attn.proj", attend(q, k, v, torch.tensor(True)))
    y = F.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x, 1e-6)))  # [B, S, 4D]
    return x + p[f"{name}.ls2.gamma"] * linear(p, f"{name}.mlp.fc2", y)


def dino(p, images):
    """Return the normalised patch tokens [B, N, D] of u8 images [B, 224, 224, 3]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images / 255 - mean) / std).movedim(-1, 1)  # [B, 3, 224, 224]
    patches = F.conv2d(pixels, p["dino_encoder.patch_embed.proj.weight"], p["dino_encoder.patch_embed.proj.bias"], 14)
    first, registers = (
        p[f"dino_encoder.{name}"].expand(len(images), -1, -1) for name in ("cls_token", "register_tokens")
    )
    x = torch.cat([first, patches.flatten(2).mT], dim=1) + dino_positions(p)  # [B, 1 + N, D], patches row by row
    x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # [B, 1 + 4 + N, D]
    for i in range(DEPTH):
        x = dino_block(p, f"dino_encoder.blocks.{i}", x)
    return norm(p, "dino_encoder.norm", x, 1e-6)[:, -N:]


def attention(p, name, x, visible):
    """Apply the attention `name`, without its norm and residual, to [..., S, D]."""
    q, k, v = (linear(p, f"{name}.to_{part}", x) for part in "qkv")  # [..., S, D] each
    return linear(p, f"{name}.to_out.0", attend(q, k, v, visible))


def over_time(p, name, x):
    """Let each token attend to its own place in the frames up to its own: [B, T, S, D]."""
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()  # [T, T]
    return attention(p, name, x.transpose(1, 2), past).transpose(1, 2)


def block(p, name, x, visible):
    """Apply attention within each frame, in the encoder over time too, then the MLP: [B, T, S, D]."""
    x = x + attention(p, f"{name}.spatial_attn", norm(p, f"{name}.norm1", x), visible)
    if name.startswith("encoder"):
        x = x + over_time(p, f"{name}.temporal_attn", norm(p, f"{name}.norm2", x))
    y = norm(p, f"{name}.norm3" if name.startswith("encoder") else f"{name}.norm2", x)
    return x + linear(p, f"{name}.ffn.3", F.gelu(linear(p, f"{name}.ffn.0", y)))


def sinusoids(length, width):
    """Return positions [length, width]: sine and cosine in turn, wavelengths geometric from 2 pi to 10000 x that."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)  # [length, width / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def transformer(p, name, x, text, text_mask):
    """Apply the encoder or decoder to [B, T, S, D]: the text [B, L, D] joins every frame behind its S tokens."""
    x = norm(p, f"{name}.ffn.2", linear(p, f"{name}.ffn.1", norm(p, f"{name}.ffn.0", x)))
    x = x + sinusoids(x.shape[2], x.shape[3])
    visible = F.pad(text_mask, (x.shape[2], 0), value=True)[:, None, None, None]  # [B, 1, 1, 1, S + L]
    x = torch.cat([x, text[:, None].expand(-1, x.shape[1], -1, -1)], dim=2)  # [B, T, S + L, D]
    for i in range(DEPTH):
        x = block(p, f"{name}.transformer_blocks.{i}", x, visible)
    return x


def nearest(codebook, c):
    """Return the codes [B, P] nearest to c [B, P, C] in Euclidean distance."""
    return (c[:, :, None] - codebook).square().sum(-1).argmin(-1)


@torch.no_grad()
def read(state, stage, frames, text=None, text_mask=None):
    """Return features, codes, c (before quantisation) and prediction of u8 frames [B, 2, 224, 224, 3].

    Stage 1 needs T5 states [B, L, D] and their mask [B, L]; stage 2 has no text, here L = 0.
    """
    p = {name.removeprefix("lam."): tensor for name, tensor in state.items()}
    features = dino(p, frames.flatten(0, 1)).unflatten(0, (-1, 2))  # [B, 2, N, D]
    if stage == 1:
        text = linear(p, "lang_proj", text)  # [B, L, D]
    else:
        text, text_mask = features[:, 0, :0], torch.ones(len(frames), 0, dtype=torch.bool)
    queries = [p[name].expand(len(frames), 2, -1, -1) for _, name, *_ in CODE_SETS[stage]]  # [B, 2, P, D] each
    encoded = transformer(p, "encoder", torch.cat([*queries, features], dim=2), text, text_mask)  # [B, 2, S + L, D]
    z = encoded[:, 1]  # frame 2: [B, S + L, D]
    out, sequence = {"features": features}, []
    for i, (prefix, _, down, quantiser, up) in enumerate(CODE_SETS[stage]):
        c = linear(p, down, z[:, i * P : (i + 1) * P])  # [B, P, C]
        codebook = p[f"{quantiser}.codebook.weight"]
        codes = nearest(codebook, c)
        sequence.append(linear(p, up, codebook[codes]))  # [B, P, D]
        out |= {f"{prefix}codes": codes, f"{prefix}c": c}
    sequence = torch.cat([*sequence, linear(p, "patch_up", features[:, 0])], dim=1)[:, None]  # [B, 1, S, D]
    decoded = transformer(p, "decoder", sequence, text, text_mask)[:, 0, : sequence.shape[2]]  # [B, S, D], text dropped
    return out | {"prediction": linear(p, "decoder.out", decoded[:, -N:])}


# ----------------------------------------------------------------------------------------------------------------------
# Our model against it


def our_model(stage, widths=FULL, **changes):
    """Return the model that a checkpoint of this stage fits."""
    vit = dict(hidden_size=widths.tokens, num_hidden_layers=DEPTH, num_attention_heads=H, patch_size=14, image_size=518)
    sizes = dict(width=widths.tokens, num_blocks=DEPTH, heads=H, code_dim=widths.codes)
    sizes |= dict(predict_change=False, centre=False)
    sizes = latent.LamSizes(stage=stage, features="dino", image_size=224, **sizes | changes)
    return latent.LatentActionModel(sizes, text_size=widths.tokens, features_config=vit).eval()


@pytest.mark.parametrize("stage", (1, 2))
@torch.no_grad()
def test_checkpoint_gives_what_the_reading_gives(stage, tmp_path):
    """Features, c, codes, predicted patches: of both sets of codes in stage 2, with padded text in stage 1."""
    generator = torch.Generator().manual_seed(1)
    state = random_state(stage, NARROW)
    t5 = {"lam.text_encoder.shared.weight": torch.zeros(2, 2)} if stage == 1 else {}
    model = our_model(stage, NARROW)
    train_latent.init_from_model(model, save(tmp_path / "univla.ckpt", state | t5))
    noise = F.interpolate(torch.rand(4, 3, 4, 4, generator=generator) * 255, size=224, mode="bilinear")
    frames = noise.movedim(1, -1).byte().unflatten(0, (2, 2))  # [B, T, 224, 224, 3]
    text, mask = None, None
    if stage == 1:
        text = torch.randn(2, 5, NARROW.tokens, generator=generator)
        mask = torch.arange(5) < torch.tensor([[5], [3]])
    expected = read(state, stage, frames, text, mask)
    features = model.features(frames.flatten(0, 1)).unflatten(0, (2, 2))
    assert torch.allclose(features, expected["features"], atol=2e-5)
    a, b = features.unbind(1)
    codes, c = model.encode(a, b, text, mask)
    assert torch.equal(codes, expected["codes"]) and torch.allclose(c, expected["c"], atol=5e-5)
    others = model.vectors(a, b, text, mask)[1:]
    assert len(others) == stage - 1 and all(torch.allclose(other, expected["other_c"], atol=5e-5) for other in others)
    quantised = []
    for code_set, vectors in zip(model.code_sets, [c, *others], strict=True):
        quantised.append(code_set.quantiser.codebook[code_set.quantiser.nearest(vectors)])
    assert torch.allclose(model.predict(a, quantised, text, mask), expected["prediction"], atol=5e-5)
    assert model.codes.quantiser.updates == 1  # training goes on from these codes, not from data


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("stage", (1, 2))
def test_full_size_checkpoint_has_the_names_and_shapes_of_the_model(stage, tmp_path):
    """All of them: none is missing, unknown or of another shape."""
    with torch.device("meta"):  # no memory for weights that are not compared
        model = our_model(stage)
    path = save(tmp_path / "univla.ckpt", empty_state(stage))
    train_latent.init_from_model(model, path)
    expected = {name for name in model.state_dict() if name.split(".")[-1] not in NOT_IN_UNIVLA}
    assert univla.univla_tensors(path).keys() == expected


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_first_stage_starts_the_second(tmp_path):
    """Its codebook becomes the frozen one; the task-centric codes stay as they were."""
    D, C = FULL.tokens, FULL.codes
    state = empty_state(1) | {"lam.vq.codebook.weight": torch.randn(K, C), "lam.action_up.bias": torch.randn(D)}
    with torch.device("meta"):  # no memory for weights that are not compared
        model = our_model(2)
    model.codes, model.irrelevant = (latent.CodeSet(model.sizes, D, 0) for _ in range(2))
    before = model.codes.queries.clone()
    train_latent.init_from_model(model, save(tmp_path / "univla.ckpt", state))
    assert torch.equal(model.irrelevant.quantiser.codebook, state["lam.vq.codebook.weight"])
    assert torch.equal(model.irrelevant.up.bias, state["lam.action_up.bias"])
    assert torch.equal(model.codes.queries, before) and model.codes.quantiser.updates == 0


# ----------------------------------------------------------------------------------------------------------------------
# Wrong and unsafe files


def test_wrong_checkpoints_are_refused_with_what_is_wrong(tmp_path):
    """Names, shapes and settings that do not fit; files that are damaged or no checkpoint."""
    models = {}  # {settings: model}; a refused checkpoint changes nothing in it

    def refused(match, state, stage=2, **changes):
        key = (stage, *changes.items())
        if key not in models:
            with torch.device("meta"):
                models[key] = our_model(stage, **changes)
        with pytest.raises(ValueError, match=match):
            train_latent.init_from_model(models[key], save(tmp_path / "univla.ckpt", state))

    lacking = empty_state(2) | {"lam.to_codebook.bias": torch.zeros(64), "lam.odd": torch.zeros(1)}
    del lacking["lam.encoder.transformer_blocks.3.spatial_attn.to_out.0.weight"]
    bias = r"codes.project.bias is \(64,\), the model's is \(128,\)"
    refused(f"{bias}; missing encoder.blocks.3.spatial.out.weight; unknown odd", lacking)
    del lacking["lam.decoder.transformer_blocks.0.spatial_attn.to_k.weight"]
    refused("missing decoder.blocks.0.spatial.qkv.weight;.*unknown decoder.blocks.0.spatial_attn.to_q.weight", lacking)
    settings = "predict_change is True, but there False, centre is True, but there False"
    refused(settings, empty_state(2), predict_change=True, centre=True)
    refused("heads is 8, but there 12", empty_state(2), heads=8)
    refused("stage is 1, but there 2", empty_state(2), stage=1)
    refused(r"codes.quantiser.codebook is \(16, 128\), the model's is \(32, 128\)", empty_state(2), num_codes=32)
    for stage, into, name, missing in (
        (2, 2, "vq_action", "codes"),
        (2, 2, "vq", "irrelevant"),
        (1, 1, "vq", "codes"),
        (1, 2, "vq", "irrelevant"),
    ):
        without_codebook = empty_state(stage)
        del without_codebook[f"lam.{name}.codebook.weight"]
        refused(f"does not fit this model: missing {missing}.quantiser.codebook", without_codebook, into)
    for number, content in enumerate((b"", b"hello", (tmp_path / "univla.ckpt").read_bytes()[:-500])):
        (tmp_path / f"{number}.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=f"{number}.ckpt is no checkpoint, or a damaged one"):
            univla.univla_tensors(tmp_path / f"{number}.ckpt")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="has no 'state_dict', only .'model'.; it must be a Lightning checkpoint"):
        univla.univla_tensors(tmp_path / "other.ckpt")


def test_a_file_with_more_than_tensors_is_refused_with_a_remedy_that_works(tmp_path, monkeypatch):
    """The two lines of the message, run as printed, give a file that loads."""
    partial = functools.partial(torch.optim.AdamW, lr=1e-4)
    path = save(tmp_path / "univla.ckpt", {"lam.patch_up.bias": torch.ones(3)}, hyper_parameters={"optimizer": partial})
    with pytest.raises(ValueError, match="more than tensors: .*functools.partial") as error:
        univla.univla_tensors(path)
    lines = [line for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(lines)), {"torch": torch})
    assert torch.equal(univla.univla_tensors(tmp_path / "weights.ckpt")["patch_up.bias"], torch.ones(3))
