"""Model configurations: one frozen dataclass per family (sizes by name: models/published.py).

- A configuration is data: hashable (static under `jax.jit`) and stored as one JSON object beside
  every checkpoint (`to_dict`, `from_dict`).
- `T5GemmaConfig` is a decoder with an encoder of the same kind of layers.
- `T5Config` covers T5 v1.0, v1.1, Flan, LM-adapted, mT5, umT5, ByT5 and Sentence-T5;
  `DecoderConfig` covers GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, OLMo 2 and 3,
  SmolLM3, Phi-3 and 4, Granite, and the mixtures of experts Mixtral, Qwen 2 and 3, and OLMoE;
  `EncoderConfig` covers BERT, RoBERTa, XLM-R, ModernBERT, and DeBERTa v2 and v3. Models of one
  family differ in fields only, not in code.
- Any model may have a `Head`, which makes one vector of a text: an embedding, or logits of classes.
- Code outside models/ reads the properties of `ModelConfig` (`has_encoder`, `start_id`, ...) and
  does not distinguish families.
- Parameters are float32; `dtype` is the dtype of matrix products. Softmax, norms and logits are
  always float32. The residual stream is float32 unless `residual_dtype` says otherwise: in bfloat16
  the logits of a Flan-T5-base shape differ from float32 by 1.7% of their size, with a float32
  stream by 1.0%, most of which comes from rounding the weights. A float32 stream costs memory
  traffic and, in training, memory for saved residuals.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from models.kernels import KERNELS

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu")  # "gelu" is the tanh approximation
HEAD_ACTIVATIONS = ("identity", "tanh", "sigmoid", *ACTIVATIONS)
POOLINGS = ("mean", "max", "first", "last")
HEAD_KINDS = ("embedding", "values", "classes", "independent")
DTYPES = ("float32", "bfloat16")
MLP_KERNELS = ("auto", "xla", "triton", "triton_interpret")
REMAT = ("none", "dots", "operands", "projections", "no_cross", "no_hidden", "attention", "full")


def _added(default: Any) -> Any:
    """Return a field that configurations written before it existed do not have.

    `to_dict` leaves it out while it has its default, so that score sets and runs of the same model
    keep their digests.
    """
    return dataclasses.field(default=default, metadata={"added": True})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of the computation. They change results by rounding only."""

    dtype: str = "float32"
    residual_dtype: str = "float32"
    attention: str = "auto"  # a kernel of models/kernels, "auto", or "package.module:KERNEL"
    scan_layers: bool = True  # one compiled layer, run by lax.scan; False unrolls, see layers.Stack
    remat: str = "none"  # what the backward pass recomputes, see layers.REMAT_POLICIES
    mlp_kernel: str = _added("auto")  # of gated MLPs, forward, see mlp.MLP

    def __post_init__(self) -> None:
        _check("dtype", self.dtype, DTYPES)
        _check("residual_dtype", self.residual_dtype, DTYPES)
        if ":" not in self.attention:
            _check("attention", self.attention, ("auto", *KERNELS))
        _check("remat", self.remat, REMAT)
        _check("mlp_kernel", self.mlp_kernel, MLP_KERNELS)
        if (self.dtype, self.residual_dtype) == ("float32", "bfloat16"):
            raise ValueError("residual_dtype='bfloat16' requires dtype='bfloat16'")


@dataclass(frozen=True, kw_only=True)
class HeadLayer:
    """A linear layer of a head, then an activation and possibly a layer norm.

    Attributes:
      size: number of outputs.
      norm_epsilon: of the norm; None: there is no norm.
      norm_bias: whether the norm has a bias.
    """

    size: int
    activation: str = "identity"
    bias: bool = True
    norm_epsilon: float | None = None
    norm_bias: bool = False

    def __post_init__(self) -> None:
        _check("activation", self.activation, HEAD_ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class Head:
    """The map from a text's states to one vector: pooling over its tokens, then layers.

    Attributes:
      kind: what the vector is: an "embedding"; "values" (of a regression); logits of "classes", one
        of which applies; logits of "independent" classes, any of which may apply.
      pooling: "mean" or "max" over the text's tokens, or the state of its "first" or "last" one.
      labels: names of the values or classes; none for an embedding.
      max_tokens: longest text that the head was made for, special tokens included; None: the
        model's limit.
      prompts: (name, text) of what may stand in front of a text.
      prompt: what stands there by default.
      lower_case: texts are lower-cased before they are tokenized.
    """

    kind: str
    pooling: str
    layers: tuple[HeadLayer, ...] = ()
    labels: tuple[str, ...] = ()
    max_tokens: int | None = None
    prompts: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    lower_case: bool = False

    def __post_init__(self) -> None:
        _check("head.kind", self.kind, HEAD_KINDS)
        _check("head.pooling", self.pooling, POOLINGS)
        read = [HeadLayer(**x) if isinstance(x, dict) else x for x in self.layers]  # from JSON
        object.__setattr__(self, "layers", tuple(read))
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "prompts", tuple((name, text) for name, text in self.prompts))
        texts = [*self.labels, *(text for pair in self.prompts for text in pair)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("labels and prompts of a head are texts")
        outputs = self.layers[-1].size if self.layers else None
        if self.kind != "embedding" and outputs != len(self.labels):
            raise ValueError(f"a head of {outputs} outputs has {len(self.labels)} labels")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(RunConfig):
    """Fields and properties that all families share.

    Attributes:
      tie_embeddings: the output head is the transposed embedding table.
      head: makes one vector of a text; a model with a head predicts no tokens.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    activation: str
    gated: bool = True
    tie_embeddings: bool = False
    dropout_rate: float = 0.0
    pad_id: int = 0
    eos_id: int = 1
    head: Head | None = _added(None)  # noqa: RUF009

    family: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("activation", self.activation, ACTIVATIONS)
        if isinstance(self.head, dict):  # read from JSON
            object.__setattr__(self, "head", Head(**self.head))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dictionary that `from_dict` reads."""
        values = {"family": self.family, **dataclasses.asdict(self)}
        for field in dataclasses.fields(self):
            if "added" in field.metadata and getattr(self, field.name) == field.default:
                del values[field.name]
        if self.head is not None:
            values["head"] = json.loads(json.dumps(values["head"]))  # tuples are lists in a file
        return values

    @property
    def encoder_layers(self) -> int:
        """Number of layers that read a whole input bidirectionally."""
        raise NotImplementedError

    @property
    def decoder_layers(self) -> int:
        """Number of layers with causal self-attention."""
        raise NotImplementedError

    @property
    def has_encoder(self) -> bool:
        """True where the model's input is `encoder_input_tokens`."""
        return self.encoder_layers > 0

    @property
    def has_decoder(self) -> bool:
        """True where the model predicts tokens from left to right."""
        return self.decoder_layers > 0

    @property
    def predicts_tokens(self) -> bool:
        """True where the model has logits of tokens."""
        return self.has_decoder and self.head is None

    @property
    def head_size(self) -> int:
        """Dimension of an attention head."""
        raise NotImplementedError

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads

    @property
    def max_positions(self) -> int | None:
        """Length beyond which the model has no positions; None if there is no such limit."""
        return None

    @property
    def start_id(self) -> int | None:
        """Token that the decoder's input begins with; None if the first token is a text's own."""
        raise NotImplementedError

    @property
    def text_prefix(self) -> tuple[int, ...]:
        """Tokens in front of a text or prompt that the model reads."""
        return ()

    @property
    def text_suffix(self) -> tuple[int, ...]:
        """Tokens after a text or prompt that the model reads."""
        return ()

    @property
    def framed_by_tokenizer(self) -> bool:
        """True where only the tokenizer says what stands around a text."""
        return False

    @property
    def sentence_size(self) -> int | None:
        """Dimension of the vector that a head makes of a text; None if there is no head."""
        if self.head is None:
            return None
        return self.head.layers[-1].size if self.head.layers else self.d_model

    def with_head(self, head: Head) -> "ModelConfig":
        """Return the configuration of the same model with a head that reads its text states."""
        return dataclasses.replace(self, head=head)

    @property
    def position_columns(self) -> int:
        """Number of relative positions that every query and key is multiplied with (DeBERTa)."""
        return 0

    @property
    def encoder_shape(self) -> "ModelConfig":
        """Configuration with the widths of the encoder, where they may differ (T5Gemma)."""
        return self

    @property
    def absorbs(self) -> bool:
        """True where cross-attention may absorb its key and value projections."""
        return self.has_encoder and self.has_decoder


@dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Shape of a T5 encoder-decoder, or of an encoder alone (`num_decoder_layers=0`)."""

    num_encoder_layers: int
    num_decoder_layers: int
    d_kv: int = 64
    activation: str = "gelu"
    scale_tied_logits: bool = True  # v1.0 multiplies its tied logits by d_model ** -0.5
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    relpos_per_layer: bool = False  # umT5: every layer has its own bias table
    sentence_head: int | None = None  # Sentence-T5: dimension of the embedding
    layer_norm_epsilon: float = 1e-6
    decoder_start_id: int = 0

    family: ClassVar[str] = "t5"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relpos_buckets % 4:
            raise ValueError(f"relpos_buckets={self.relpos_buckets} must be a multiple of 4")

    @property
    def encoder_layers(self) -> int:
        return self.num_encoder_layers

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers

    @property
    def head_size(self) -> int:
        return self.d_kv

    @property
    def start_id(self) -> int:
        return self.decoder_start_id

    @property
    def text_suffix(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def sentence_size(self) -> int | None:
        return self.sentence_head or super().sentence_size

    def with_head(self, head: Head) -> ModelConfig:
        """Return the configuration of the encoder alone with a head."""
        return dataclasses.replace(self, num_decoder_layers=0, sentence_head=None, head=head)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies for texts longer than those of pretraining.

    "linear" divides every frequency by `factor`. "llama3" divides only low frequencies: those of
    wavelengths over original_length / low_frequency_factor by `factor`, those of wavelengths under
    original_length / high_frequency_factor by 1, and interpolates between. "yarn" (Peng et al.,
    arXiv 2309.00071) divides frequencies likewise, by the same two wavelengths, but interpolates
    over the index of the frequency, from and to whole indices if `whole_dimensions`; it multiplies
    queries and keys by `magnitude`.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192
    magnitude: float = 1.0
    whole_dimensions: bool = True

    def __post_init__(self) -> None:
        _check("rope_scaling.kind", self.kind, ("linear", "llama3", "yarn"))


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Gated MLPs of a layer, of which each token is read by a few.

    Attributes:
      count: number of experts in a layer.
      chosen: experts that read a token, those of the largest probability.
      d_ff: width of an expert.
      normalized: the probabilities of the chosen, which weight their outputs, are divided by their
        sum.
      shared_d_ff: width of one more MLP, which reads every token and is weighted by a sigmoid
        (Qwen2-MoE); 0: there is none.
    """

    count: int
    chosen: int
    d_ff: int
    normalized: bool = True
    shared_d_ff: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"a token cannot choose {self.chosen} of {self.count} experts")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Shape of a decoder-only language model. The defaults are Llama's."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048  # rows of the table of learned positions; not a limit for rotary ones
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # local layers see this many latest tokens, themselves included
    global_every: int = 0  # every n-th layer sees all tokens nevertheless; 0: none does
    local_rope_theta: float | None = None  # rotary base of the local layers, unscaled (Gemma 3)
    rotary_fraction: float = _added(1.0)  # share of a head's dimensions that are rotated (GPT-NeoX)
    unrotated_every: int = _added(
        0
    )  # every n-th layer has no rotary positions (SmolLM3); 0: all have
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # Gemma stores scale - 1
    pre_norms: bool = _added(True)  # each block's input is normalized (not in OLMo 2)
    post_norms: bool = False  # each block's output is normalized (Gemma 2 and 3, OLMo 2)
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # normalizes each head of queries and keys
    qk_norm_joint: bool = _added(False)  # `qk_norm` normalizes all heads together instead (OLMo 2)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = _added(1.0)  # factor of each block's output (Granite)
    logit_scale: float = _added(1.0)
    parallel_residual: bool = _added(False)  # both blocks of a layer read its input (GPT-NeoX)
    # Instead of the MLP of width d_ff, in every layer.
    experts: Experts | None = _added(None)  # noqa: RUF009
    initializer_range: float = 0.02
    bos_id: int | None = None

    family: ClassVar[str] = "decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("positions", self.positions, ("rotary", "learned"))
        _check("norm", self.norm, ("rms", "layer"))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.unrotated_every and self.window is not None:
            raise ValueError("unrotated_every and window exclude each other")
        if isinstance(self.rope_scaling, dict):  # read from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if isinstance(self.experts, dict):
            object.__setattr__(self, "experts", Experts(**self.experts))
        if self.experts is not None and not (self.gated and not self.mlp_bias):
            raise ValueError("experts are gated and have no biases")

    @property
    def encoder_layers(self) -> int:
        return 0

    @property
    def decoder_layers(self) -> int:
        return self.num_layers

    @property
    def head_size(self) -> int:
        return self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads

    @property
    def max_positions(self) -> int | None:
        return self.max_length if self.positions == "learned" else None

    @property
    def start_id(self) -> int | None:
        return self.bos_id

    @property
    def text_prefix(self) -> tuple[int, ...]:
        return () if self.bos_id is None else (self.bos_id,)


@dataclass(frozen=True, kw_only=True)
class T5GemmaConfig(DecoderConfig):
    """Shape of an encoder-decoder of Gemma's layers. The fields are the decoder's.

    Attributes:
      encoder: shape of the encoder, whose `window` counts the tokens on either side. The settings
        of the computation and the special tokens are the decoder's.
    """

    encoder: DecoderConfig | None = None

    family: ClassVar[str] = "t5gemma"

    def __post_init__(self) -> None:
        super().__post_init__()
        encoder = self.encoder
        if isinstance(encoder, dict):  # read from JSON
            encoder = DecoderConfig(**encoder)
        if encoder is None:
            raise ValueError("a T5Gemma has an encoder")
        if self.head is not None:
            raise ValueError("heads of a T5Gemma are not supported")
        for part in (self, encoder):
            if part.positions != "rotary" or part.parallel_residual or part.residual_scale != 1.0:
                raise ValueError(
                    "a T5Gemma has rotary positions, and blocks one after the other without a scale"
                )
        shared = [field.name for field in dataclasses.fields(RunConfig)]
        shared += ["pad_id", "eos_id", "bos_id", "dropout_rate", "initializer_range"]
        fields: dict[str, Any] = {name: getattr(self, name) for name in shared}
        fields |= {"tie_embeddings": True, "logit_softcap": None}  # an encoder has no logits
        object.__setattr__(self, "encoder", dataclasses.replace(encoder, **fields))

    @property
    def encoder_layers(self) -> int:
        return self.encoder_shape.num_layers

    @property
    def encoder_shape(self) -> DecoderConfig:
        assert self.encoder is not None  # see `__post_init__`
        return self.encoder

    @property
    def absorbs(self) -> bool:
        return False

    @property
    def sentence_size(self) -> int | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Disentangled:
    """Relative positions of DeBERTa v2 and v3 (He et al., arXiv 2006.03654).

    Attributes:
      rows: rows of the table of relative positions, twice the number of distances that it tells
        apart in one direction.
      max_distance: distances from here on are alike.
      logarithmic: the far half of the rows is spaced by the logarithm of the distance.
      to_position, from_position: whether queries see positions, and positions keys.
      shared: positions are projected as the tokens are; otherwise they have their own projections.
      norm: the table is normalized.
    """

    rows: int
    max_distance: int
    logarithmic: bool = True
    to_position: bool = True
    from_position: bool = True
    shared: bool = True
    norm: bool = True


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Shape of an encoder-only model. The defaults are BERT's."""

    num_layers: int
    max_length: int = 512  # tokens of the longest text
    positions: str = "learned"  # "none" where only the attention knows of them (DeBERTa)
    position_offset: int = 0  # row of a text's first token in the table of learned positions
    token_types: int = 2  # rows of the table of token types; every token is of type 0
    embedding_size: int | None = None  # of the embedding tables, if it is not d_model (DeBERTa)
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None  # rotary base of the local layers; None: the same
    window: int | None = None  # local layers see this many tokens on either side
    global_every: int = 1  # the first layer and every n-th from there see all tokens
    disentangled: Disentangled | None = None
    post_norms: bool = True  # normalizes the residual stream itself, and not blocks' inputs
    norm_epsilon: float = 1e-12
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    activation: str = "gelu_exact"
    gated: bool = False
    initializer_range: float = 0.02

    family: ClassVar[str] = "encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("positions", self.positions, ("learned", "rotary", "none"))
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}"
            )
        if self.global_every < 1:
            raise ValueError(f"global_every={self.global_every} must be at least 1")
        if isinstance(self.disentangled, dict):  # read from JSON
            object.__setattr__(self, "disentangled", Disentangled(**self.disentangled))

    @property
    def encoder_layers(self) -> int:
        return self.num_layers

    @property
    def decoder_layers(self) -> int:
        return 0

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads

    @property
    def max_positions(self) -> int | None:
        return self.max_length if self.positions == "learned" else None

    @property
    def start_id(self) -> int | None:
        return None

    @property
    def framed_by_tokenizer(self) -> bool:
        return True

    @property
    def position_columns(self) -> int:
        if (relative := self.disentangled) is None:
            return 0
        return relative.rows * (relative.to_position + relative.from_position)


FAMILIES: dict[str, type[ModelConfig]] = {
    config.family: config for config in (T5Config, T5GemmaConfig, DecoderConfig, EncoderConfig)
}


def from_dict(values: dict[str, Any]) -> ModelConfig:
    """Return the configuration that `to_dict` wrote.

    Raises:
      ValueError: an unknown family or field.
    """
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
