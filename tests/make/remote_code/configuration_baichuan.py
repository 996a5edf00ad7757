"""The sizes of a Baichuan, as its config.json has them."""

from transformers import PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    """Sizes only. With `max_position_embeddings` it is a 7B (RoPE), without one a 13B (ALiBi)."""

    model_type = "baichuan"

    def __init__(
        self, vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, max_position_embeddings=None, z_loss_weight=None, pad_token_id=0,
        tie_word_embeddings=False, **rest,
    ):  # fmt: skip
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.z_loss_weight = z_loss_weight
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **rest)
