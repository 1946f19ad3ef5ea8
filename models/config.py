"""The shapes of the models: one frozen dataclass per family, and the published sizes by name.

- A configuration is data: hashable (static under `jax.jit`), and one JSON object on disk (`to_dict`
  and `from_dict`), which stands beside every checkpoint.
- One `T5Config` covers T5 v1.0, v1.1, Flan, LM-adapted, mT5, umT5, ByT5 and Sentence-T5; one
  `DecoderConfig` covers GPT-2, Llama, Qwen 2 and 3, and Gemma 1 to 3. They differ in these fields
  only, never in code of their own.
- Parameters are float32 always; `dtype` is what the matrix products compute in. Softmax, norms and
  logits are float32 whatever it says. So is the residual stream, unless `residual_dtype` says
  otherwise: with a bfloat16 stream the logits of a Flan-T5-base shape are off by 1.7% of their size
  (float32 against it), with a float32 stream by 1.0%, most of it from rounding the weights. What it
  costs is memory traffic, and in training the memory of saved residuals.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu")  # "gelu" is the tanh approximation
DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "xla", "looped", "pallas", "pallas_interpret", "cudnn")
REMAT = ("none", "dots", "projections", "no_cross", "no_hidden", "attention", "full")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a model computes, whatever its family. Changing these changes no result but rounding."""

    dtype: str = "float32"
    residual_dtype: str = "float32"
    attention: str = "auto"  # the kernel: see attention.attention_mask
    scan_layers: bool = True  # one compiled layer, run by lax.scan; False unrolls, see layers.Stack
    remat: str = "none"  # what the backward pass recomputes, see layers.REMAT_POLICIES

    family: ClassVar[str]

    def __post_init__(self):
        _check("dtype", self.dtype, DTYPES)
        _check("residual_dtype", self.residual_dtype, DTYPES)
        _check("attention", self.attention, ATTENTION)
        _check("remat", self.remat, REMAT)
        if (self.dtype, self.residual_dtype) == ("float32", "bfloat16"):
            raise ValueError("residual_dtype='bfloat16' wants dtype='bfloat16'")

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serialisable dictionary that `from_dict` reads back."""
        return {"family": self.family, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class T5Config(RunConfig):
    """Shape of a T5 encoder-decoder, or of an encoder alone (`num_decoder_layers=0`)."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    d_kv: int = 64
    activation: str = "gelu"
    gated: bool = True
    tie_embeddings: bool = False
    scale_tied_logits: bool = True  # v1.0 multiplies its tied logits by d_model ** -0.5
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    relpos_per_layer: bool = False  # umT5: every layer has a bias table of its own
    sentence_head: int | None = None  # Sentence-T5: dimension of the embedding
    dropout_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    family: ClassVar[str] = "t5"

    def __post_init__(self):
        super().__post_init__()
        _check("activation", self.activation, ACTIVATIONS)
        if self.relpos_buckets % 4:
            raise ValueError(f"relpos_buckets={self.relpos_buckets} must be a multiple of 4")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was pretrained with.

    "linear" divides every frequency by `factor`. "llama3" divides the slow ones only: wavelengths
    over original_length / low_frequency_factor wholly, those under
    original_length / high_frequency_factor not at all, and in between by interpolation.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        _check("rope_scaling.kind", self.kind, ("linear", "llama3"))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(RunConfig):
    """Shape of a decoder-only language model. The defaults are Llama's."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048  # rows of the table of learned positions; advisory for rotary ones
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # local layers see this many latest tokens, themselves included
    global_every: int = 0  # of so many layers the last sees everything all the same; 0: none does
    local_rope_theta: float | None = None  # rotary base of the local layers, unscaled (Gemma 3)
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # Gemma stores scale - 1
    post_norms: bool = False  # Gemma 2, 3: each block's output is normed before it is added
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tie_embeddings: bool = False
    dropout_rate: float = 0.0
    initializer_range: float = 0.02
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int = 1

    family: ClassVar[str] = "decoder"

    def __post_init__(self):
        super().__post_init__()
        _check("activation", self.activation, ACTIVATIONS)
        _check("positions", self.positions, ("rotary", "learned"))
        _check("norm", self.norm, ("rms", "layer"))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if isinstance(self.rope_scaling, dict):  # as JSON brings it
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))


ModelConfig = T5Config | DecoderConfig
FAMILIES: dict[str, type] = {"t5": T5Config, "decoder": DecoderConfig}


def from_dict(values: dict[str, Any]) -> ModelConfig:
    """Reads what `to_dict` wrote. Raises ValueError on an unknown family or field."""
    values = dict(values)
    family = values.pop("family", None)
    _check("family", family, tuple(FAMILIES))
    known = {field.name for field in dataclasses.fields(FAMILIES[family])}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown fields of a {family!r} configuration: {', '.join(unknown)}")
    return FAMILIES[family](**values)


def _check(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


# --------------------------------------------------------------------------------------------------
# Published sizes


def _t5(d_model, d_ff, layers, heads, vocab_size=32_128, **fields) -> T5Config:
    encoder_layers, decoder_layers = layers if isinstance(layers, tuple) else (layers, layers)
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        **fields,
    )


_V1_0 = {"activation": "relu", "gated": False, "tie_embeddings": True, "dropout_rate": 0.1}
_V1_0_SIZES = {  # d_model, d_ff, layers, heads, d_kv
    "small": (512, 2048, 6, 8, 64),
    "base": (768, 3072, 12, 12, 64),
    "large": (1024, 4096, 24, 16, 64),
    "3b": (1024, 16_384, 24, 32, 128),
    "11b": (1024, 65_536, 24, 128, 128),
}
_V1_1_SIZES = {  # d_model, d_ff, layers, heads; d_kv is 64
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10_240, 24, 64),
}
_BYT5_SIZES = {  # the encoder is three times as deep as the decoder
    "small": (1472, 3584, (12, 4), 6),
    "base": (1536, 3968, (18, 6), 12),
    "large": (1536, 3840, (36, 12), 16),
    "xl": (2560, 6720, (36, 12), 32),
    "xxl": (4672, 12_352, (36, 12), 64),
}
_SENTENCE_T5_SIZES = {"base": "base", "large": "large", "xl": "3b", "xxl": "11b"}


def _gpt2(d_model, layers, heads) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=50_257,
        d_model=d_model,
        d_ff=4 * d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        max_length=1024,
        positions="learned",
        norm="layer",
        norm_epsilon=1e-5,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        bos_id=50_256,
        eos_id=50_256,
    )


def _named() -> dict[str, ModelConfig]:
    named: dict[str, ModelConfig] = {}
    for size, (d_model, d_ff, layers, heads, d_kv) in _V1_0_SIZES.items():
        named[f"t5_{size}"] = _t5(d_model, d_ff, layers, heads, d_kv=d_kv, **_V1_0)
    for size, v1_0 in _SENTENCE_T5_SIZES.items():
        named[f"sentence_t5_{size}"] = dataclasses.replace(
            named[f"t5_{v1_0}"], num_decoder_layers=0, sentence_head=768
        )
    for size, shape in _V1_1_SIZES.items():
        named[f"t5_v1_1_{size}"] = _t5(*shape)
        named[f"flan_t5_{size}"] = _t5(*shape)
        named[f"mt5_{size}"] = _t5(*shape, vocab_size=250_112)
        named[f"umt5_{size}"] = _t5(*shape, vocab_size=256_384, relpos_per_layer=True)
    for size, shape in _BYT5_SIZES.items():
        named[f"byt5_{size}"] = _t5(*shape, vocab_size=384)
    for size, shape in {
        "": (768, 12, 12),
        "_medium": (1024, 24, 16),
        "_large": (1280, 36, 20),
        "_xl": (1600, 48, 25),
    }.items():
        named[f"gpt2{size}"] = _gpt2(*shape)
    return named


NAMED: dict[str, ModelConfig] = _named()
