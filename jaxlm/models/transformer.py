"""The decoder: one block, stacked and scanned."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from jaxlm import tree
from jaxlm.models.attention import Implementation, attention
from jaxlm.models.functional import functional
from jaxlm.models.layers import Activation, FeedForward, Linear, Product, RMSNorm, rotary
from jaxlm.models.masks import Mask, causal
from jaxlm.models.masks import window as window_of
from jaxlm.numbers import check_whole, is_whole
from jaxlm.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a decoder: what must be known to read its weights. It is saved with them.

    Raises:
        ValueError: a size that is no whole number of 1 or more, `width` that `heads` doesn't divide, `heads` that
            `kv_heads` doesn't divide, an odd head width, an unknown activation, a window below 1, windows that don't go
            into `layers` whole times, or a soft cap, `rope_theta` or `norm_epsilon` out of range.
    """

    vocab: int
    """Number of token ids."""
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    """Key and value heads, each shared by `heads / kv_heads` query heads; None: as many as `heads`."""
    hidden: int | None = None
    """Width of the feed-forward layer; None: 8/3 of `width` for SwiGLU, rounded up to 32, else 4 times `width`."""
    activation: Activation = "swiglu"
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation, a scale per element of a head."""
    tied: bool = False
    """The output matrix is the transposed embedding."""
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    windows: Sequence[int | None] | None = None
    """How many keys each layer sees, from the query's own on back, repeated over the layers: with (256, 256, None)
    every third layer sees all. None: all do. With several, rematerialized layers keep a copy of their parameters."""
    softcap: int | float | None = None
    """Attention's scores x become `softcap * tanh(x / softcap)`, as in Gemma 2; None: they don't."""

    def __post_init__(self):
        for name in ("vocab", "layers", "width", "heads", "key_heads", "hidden_width"):
            check_whole("TransformerConfig", **{name: getattr(self, name)})
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"TransformerConfig: unknown activation {self.activation!r}; use one of {get_args(Activation)}"
            )
        if self.width % self.heads:
            raise ValueError(f"TransformerConfig: width {self.width} is not divisible by {self.heads} heads")
        if self.heads % self.key_heads:
            raise ValueError(f"TransformerConfig: {self.heads} heads are not divisible by {self.key_heads} kv_heads")
        if self.head_width % 2:
            raise ValueError(
                f"TransformerConfig: rotary positions need an even head width, not {self.width}/{self.heads}"
            )
        if self.windows is not None:
            object.__setattr__(self, "windows", tuple(self.windows))  # from JSON it comes as a list
            if not self.windows or not all(width is None or is_whole(width) for width in self.windows):
                raise ValueError(
                    f"TransformerConfig: windows are {self.windows}; use whole numbers of 1 or more, or None"
                )
            if self.layers % len(self.windows):
                raise ValueError(
                    f"TransformerConfig: {self.layers} layers are not divisible by the {len(self.windows)} of windows"
                )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"TransformerConfig: softcap is {self.softcap}; use a number above 0, or None")
        for name in ("rope_theta", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TransformerConfig: {name} is {getattr(self, name)}; use a number above 0")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return -(-self.width * 8 // (3 * 32)) * 32 if self.activation == "swiglu" else 4 * self.width


class Cache(NamedTuple):
    """The keys and values of the positions seen so far, for generating."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    length: Int[Array, ""]
    """Positions seen."""


def empty_cache(config: TransformerConfig, rows: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """A cache for `length` positions of each of `rows` rows."""
    shape = (config.layers, rows, length, config.key_heads, config.head_width)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


class Where(NamedTuple):
    """Where in their documents the tokens are: the same for all layers."""

    first: Int[Array, ""]
    """The index of the first token among the cached ones; 0 without a cache."""
    positions: Int[Array, "#B T"]
    """Counted from the start of each document."""
    segments: Integer[Array, "B T"] | None


KeysAndValues = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
Attend = Callable[..., Float[Array, "B T N H"]]
"""`attend(q, k, v, first=, segments=)`: `attention` with a layer's mask."""


class Attention(nnx.Module):
    """Projections, rotary positions and causal attention."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, *, out_scale: float, product: Product):
        self.config = config
        inner = config.heads * config.head_width
        self.q = Linear(config.width, inner, rngs, product=product)
        self.k = Linear(config.width, config.key_heads * config.head_width, rngs, product=product)
        self.v = Linear(config.width, config.key_heads * config.head_width, rngs, product=product)
        self.o = Linear(inner, config.width, rngs, std=out_scale * inner**-0.5, product=product)
        norm = RMSNorm if config.qk_norm else None
        self.q_norm = norm and norm(config.head_width, rngs, epsilon=config.norm_epsilon)
        self.k_norm = norm and norm(config.head_width, rngs, epsilon=config.norm_epsilon)

    def __call__(
        self, x: Float[Array, "B T D"], where: Where, cached: KeysAndValues | None, attend: Attend
    ) -> tuple[Float[Array, "B T D"], KeysAndValues | None]:
        config = self.config
        q, k, v = (linear(x).reshape(*x.shape[:2], -1, config.head_width) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotary(y, where.positions, config.rope_theta) for y in (q, k))
        if cached is not None:
            cached = _put(cached[0], k, where.first), _put(cached[1], v, where.first)
            k, v = cached
        y = attend(q, k, v, first=0 if cached is None else where.first, segments=where.segments)
        return self.o(y.reshape(*x.shape[:2], -1)), cached


class Block(nnx.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, product: Product):
        # Such an `out_scale` keeps the residual stream's variance independent of depth.
        options: Any = {"out_scale": (2 * config.layers) ** -0.5, "product": product}
        self.attention_norm = RMSNorm(config.width, rngs, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs, **options)
        self.feed_forward_norm = RMSNorm(config.width, rngs, epsilon=config.norm_epsilon)
        self.feed_forward = FeedForward(config.width, config.hidden_width, config.activation, rngs, **options)

    def __call__(
        self, x: Float[Array, "B T D"], where: Where, cached: KeysAndValues | None, attend: Attend
    ) -> tuple[Float[Array, "B T D"], KeysAndValues | None]:
        y, cached = self.attention(self.attention_norm(x), where, cached, attend)
        x = x + checkpoint_name(y, "attention")
        return x + checkpoint_name(self.feed_forward(self.feed_forward_norm(x)), "feed_forward"), cached


class Transformer(nnx.Module):
    """A decoder of the Llama family: RMSNorm before each part, rotary positions, grouped queries.

    The blocks' parameters are stacked, `[L ...]`, and run by one `jax.lax.scan`.

    Args:
        config: the shape.
        rngs: the keys to draw parameters with.
        unroll: run the layers one after another in the compiled program rather than in a loop: longer to compile,
            often faster on GPUs. The parameters are the same.
        wrap_layer: a wrapper of the function `layer(params, *args)` that each block is, such as `jax.checkpoint` or
            `grads.gather_layers(...)`.
        mask: what all layers see, each within its window: one of `masks`.
        implementation: of attention, one of `attention`'s; None: the fastest that can do it on the default backend.
        product: how the blocks' linear layers multiply, such as `precision.product_in(jnp.int8)`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rngs: nnx.Rngs,
        *,
        unroll: bool = False,
        wrap_layer: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        mask: Mask = causal,
        implementation: Implementation | None = None,
        product: Product = jnp.matmul,
    ):
        self.config, self.unroll, self.wrap_layer = config, unroll, wrap_layer
        self.mask, self.implementation = mask, implementation
        self.embed = nnx.Param(config.width**-0.5 * jax.random.normal(rngs.params(), (config.vocab, config.width)))
        keys = jax.random.split(rngs.params(), config.layers)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key), product))(keys)
        self.norm = RMSNorm(config.width, rngs, epsilon=config.norm_epsilon)
        self.head = None if config.tied else Linear(config.width, config.vocab, rngs)

    def __call__(
        self,
        tokens: Integer[Array, "B T"],
        *,
        segments: Integer[Array, "B T"] | None = None,
        cache: Cache | None = None,
        window: int | None = None,
        head: Callable[[jax.Array, jax.Array], Any] | None = None,
    ) -> Any:
        """Logits, `[B T V]` float32, of the token after each; with a `cache`, `(logits, cache)`.

        Args:
            tokens: ids below `config.vocab`.
            segments: the document number of each token in its row, counted from 1; attention and positions restart
                with each document. None: each row is one document.
            cache: what came before `tokens`. Where these don't fit in what is left of it, the result is NaN.
            window: a static number: for this call no layer sees more keys, as in schedules that widen the window
                (https://arxiv.org/abs/2503.15450).
            head: a function to return the result of in place of logits, of the last hidden states, `[B T D]`, and the
                output matrix, `[D V]`.

        Raises:
            ValueError: both `segments` and `cache`, more tokens than the cache holds, a window below 1, or what the
                attention can't do.
        """
        if segments is not None and cache is not None:
            raise ValueError("Transformer: got both segments and a cache; generate for one document a row")
        embed = self.embed[...]
        if cache is not None and tokens.shape[1] > cache.k.shape[2]:
            raise ValueError(
                f"Transformer: {tokens.shape[1]} tokens for a cache of {cache.k.shape[2]}; make a longer one"
            )
        first = jnp.zeros((), jnp.int32) if cache is None else cache.length
        positions = first + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if segments is not None:
            positions = positions - _starts(segments)
        where = Where(first, positions, segments)
        cached: Any = None if cache is None else (cache.k, cache.v)
        options: dict[str, Any] = {"softcap": self.config.softcap, "implementation": self.implementation}
        attends = [functools.partial(attention, mask=mask, **options) for mask in self._masks(window)]
        layers = [_layer(attend, self.wrap_layer) for attend in attends]

        def run(x: Any, given: Any) -> tuple[Any, Any]:
            """The layers of one period of the windows."""
            if len(layers) == 1:  # without a detour, on which XLA copies more
                return layers[0](given[0], x, where, given[1])
            found: list[Any] = []
            for i, layer in enumerate(layers):
                block, cached = jax.tree.map(lambda leaf, i=i: leaf[i], given)
                x, cached = layer(block, x, where, cached)
                found.append(cached)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), found[0], *found[1:])

        given = self.blocks, cached
        if len(layers) > 1:
            given = jax.tree.map(lambda leaf: leaf.reshape(-1, len(layers), *leaf.shape[1:]), given)
        x, cached = jax.lax.scan(
            run,
            # Looked up in float32, where the gradients of a token add up: bfloat16 stops at some 256 of them.
            embed.astype(jnp.float32)[tokens].astype(embed.dtype),
            given,
            unroll=self.config.layers // len(layers) if self.unroll else 1,
        )
        if len(layers) > 1:
            cached = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cached)
        if cache is not None:
            x = jnp.where(first + tokens.shape[1] <= cache.k.shape[2], x, jnp.nan)
        matrix = embed.T if self.head is None else self.head.kernel[...]
        out = (head or _logits)(self.norm(x), jnp.asarray(matrix))
        return out if cached is None else (out, Cache(cached[0], cached[1], first + tokens.shape[1]))

    def _masks(self, window: int | None) -> Sequence[Mask]:
        """The layers' masks, over one period."""
        widths = self.config.windows or (None,)
        narrowed = self.mask if window is None else self.mask & window_of(window)
        return [narrowed if width is None else narrowed & window_of(width) for width in widths]


def _logits(x: Float[Array, "B T D"], matrix: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    product = _narrow_product if matrix.dtype == jnp.bfloat16 else _product
    return product(*tree.vary_alike(x.reshape(-1, x.shape[-1]), matrix)).reshape(*x.shape[:2], -1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_narrow_product = jax.custom_vjp(_product)
"""Also the gradient's products are of bfloat16. By itself JAX would take the logits' gradient in float32 and widen the
other operands to it, which takes GPUs twice the time and twice the traffic of their largest array."""


def _narrow_product_backward(operands: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    grad = grad.astype(b.dtype)
    return _product(grad, b.T).astype(a.dtype), _product(a.T, grad).astype(b.dtype)


_narrow_product.defvjp(lambda a, b: (_product(a, b), (a, b)), _narrow_product_backward)


def _layer(attend: Attend, wrap_layer: Any) -> Callable[..., tuple[Any, KeysAndValues | None]]:
    """A block as a function of its parameters, `layer(block, x, where, cached)`."""

    def layer(block: Block, x: Any, where: Where, cached: KeysAndValues | None) -> Any:
        return block(x, where, cached, attend)

    return wrap_layer(layer) if wrap_layer else layer


def _put(
    cached: Float[Array, "B S K H"], new: Float[Array, "B T K H"], first: Int[Array, ""]
) -> Float[Array, "B S K H"]:
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), first, axis=1)


def _starts(segments: Integer[Array, "B T"]) -> Int[Array, "B T"]:
    """The position at which each token's segment begins."""
    positions = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    begins = segments != jnp.roll(segments, 1, axis=1)
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def stacked(params: Params) -> Any:
    """Which parameters `[L ...]` hold the layers' one after another: True or False for each."""
    return tree.labels(params, {"blocks/.*": True, ".*": False}, unused=True)


def matrices(params: Params) -> Any:
    """Which parameters are matrices inside the blocks, those that Muon is for: True or False for each."""
    return tree.labels(params, {"blocks/.*/kernel": True, ".*": False}, unused=True)


def tensor_parallel(config: TransformerConfig) -> dict[str, PartitionSpec]:
    """Rules for `sharding.lay_out`: which parameters are divided over the axis `model`, and along which dimension.

    As in Megatron-LM (https://arxiv.org/abs/1909.08053, section 3): what makes heads and hidden units, by columns; what
    takes them, by rows. Each block then needs two all-reduces of activations forward and two backward.
    """
    rules = {
        r"blocks/attention/[qkv]/kernel": PartitionSpec(None, None, "model"),
        r"blocks/feed_forward/(gate|up)/kernel": PartitionSpec(None, None, "model"),
        r"blocks/.*/(o|down)/kernel": PartitionSpec(None, "model"),
    }
    head = {} if config.tied else {"head/kernel": PartitionSpec(None, "model")}
    return rules | head | {".*": PartitionSpec()}


def transformer(config: TransformerConfig, **options: Any):
    """`Transformer(config, rngs, **options)` as `(init, apply)`."""
    return functional(lambda rngs: Transformer(config, rngs, **options))
