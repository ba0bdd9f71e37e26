"""Helpers of the model tests: small models of each variant and random batches for them."""

import torch

from model import VLA, ModelConfig

TEXTS = [
    "put the bowl on the stove",
    "put the bowl on top of the cabinet now",
    "open the drawer",
    "put the bowl on the plate",
]
CHUNK = 4


def small_config(variant, **changes):
    """Return a small `ModelConfig`: two cameras of 64 px (4 tokens each), chunks of 4, 2 of 8 codes a step (la_tok: 1).

    It has 4 layers of width 64.
    """
    sizes = dict(
        cameras=2,
        image_size=64,
        text_length=24,
        chunk=CHUNK,
        action_size=7,
        proprio_size=8,
        codes_per_step=1 if variant == "la_tok" else 2,
        num_codes=8,
        code_dim=16,
        gate=1.0,
    )
    return ModelConfig(variant, "tiny", **sizes | changes)


def build(variant, **changes):
    """Return a small model with seeded weights."""
    torch.manual_seed(0)
    return VLA(small_config(variant, **changes))


def batch_for(vla, size=4, seed=1):
    """Return a random batch; the last steps of the second sample lie past the end of its episode."""
    rng = torch.Generator().manual_seed(seed)
    sizes = vla.config
    codes = (size, sizes.chunk, sizes.codes_per_step)
    valid = torch.ones(size, sizes.chunk, dtype=torch.bool)
    valid[1:2, -2:] = False
    return {
        "images": [
            torch.randint(0, 256, (size, 64, 64, 3), generator=rng, dtype=torch.uint8) for _ in range(sizes.cameras)
        ],
        "text": (TEXTS * size)[:size],
        "proprio": torch.rand(size, 8, generator=rng)[:, : sizes.proprio_size or 8] * 2 - 1,
        "actions": torch.rand(size, sizes.chunk, sizes.action_size, generator=rng) * 2 - 1,
        "valid": valid,
        "action_weight": torch.ones(size, sizes.action_size),
        "codes": torch.randint(0, 8, codes, generator=rng),
        "vectors": torch.randn(*codes, 16, generator=rng),
    }


def images_for(vla, size, seed=2):
    """Return random images as the backbone takes them, f32 [size, C, 3, S, S] in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    side = vla.config.image_size
    return torch.rand(size, vla.config.cameras, 3, side, side, generator=rng) * 2 - 1


def losses_and_gradients(vla, batch):
    """Return the losses of a batch, and the gradients of all that is trained, in one list."""
    vla.zero_grad(set_to_none=True)
    losses = vla(batch)
    losses["loss"].backward()
    return [
        *(value for value in losses.values() if torch.is_tensor(value)),
        *(p.grad for p in vla.parameters() if p.requires_grad),
    ]
