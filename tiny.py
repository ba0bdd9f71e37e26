"""Backbones that start from random weights: their sizes, and the small tokenizer that they share.

Another size is another row of `SIZES`, and `--backbone NAME` trains it (docs/fork.md).
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

SIZES = {  # name -> (text, vision) settings of Qwen3VLConfig
    "tiny": (
        dict(
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
        ),
        dict(
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
        ),
    ),
}
WORDS = """user assistant Please predict the next robot actions put bowl on stove top of cabinet plate
open middle drawer push to front turn cream cheese in wine bottle rack pick up and place it black between
ramekin from table center cookie box wooden alphabet soup basket salad dressing bbq sauce ketchup tomato
butter milk chocolate pudding orange juice both moka pot pots bottom close mug yellow white left right book
back compartment caddy microwave""".split()
SPECIAL_TOKENS = [f"<|{name}|>" for name in "endoftext im_start im_end vision_start vision_end image_pad".split()]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """Return a byte-level tokenizer of 512 entries in which the words of LIBERO's instructions are single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(form, normalized=False) for word in WORDS for form in (" " + word, word)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL_TOKENS[0], chat_template=CHAT_TEMPLATE)


def tiny_config(tokenizer, size="tiny"):
    """Return the Qwen3VLConfig of a row of `SIZES`; "tiny" has 0.7 M parameters."""
    text, vision = SIZES[size]
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
