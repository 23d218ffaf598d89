"""Mixture-of-Attention: the paper on one page (Eq. 4–7; numbers are those of arXiv 2404.11565).

A MoA layer replaces one attention layer of a frozen diffusion U-Net by N attention experts and a router:

    Z = Σ_n R_n ⊙ Expert_n(X, C_n)                                       (Eq. 4, 6)
    R = softmax(Router(X))                     one weight a pixel and expert (Eq. 5, 7)
    Expert_n(X, C) = W_out softmax(W_q X (W_k C)ᵀ / √d) W_v C             (Eq. 1, 2)

Expert 0, the *prior*, is the U-Net's own frozen attention, called through the U-Net's modules, so that a LoRA on
them acts on the prior alone. The others, the paper has one, are the *personalization* experts: trained copies.
In self-attention C_n = X; in cross-attention the prior reads the text (C_0) and the personalization experts read the
multimodal prompt (C_1, Eq. 8, `moa.prompts`). Because the weights of a pixel sum to 1, Eq. 4 is computed as

    Z = Z_0 + Σ_{n ≥ 1} R_n ⊙ (Z_n − Z_0)

which equals the base U-Net bit for bit where the experts agree or R_0 = 1, and costs one tensor less.

Shapes: B batch, A rows of the batch whose personalization experts run, P pixels, d channels of the layer, T tokens,
D channels of the text, S subjects of a prompt (padded), F channels of an image feature, N experts, L layers.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

RouterKind = Literal["linear", "mlp"]
AttentionKind = Literal["sdpa", "explicit"]


# ── What travels to the layers ────────────────────────────────────────────────────────────────────


@dataclass
class Recorder:
    """Collects router weights and attention maps of the layers it names, during the forwards it is handed to.

    Each forward overwrites the last. Read it before `backward`: gradient checkpointing runs a layer twice.

    layers: qualified names of attention layers; None records all.
    maps:   whether cross-attention maps are wanted too (they cost an explicit softmax in those layers).
    router: filled with {layer: R_0, the prior's weight, [B, P] in [0, 1]} (Eq. 7).
    attention: filled with {cross-attention layer: softmax probabilities at each subject's token, averaged over heads
        and personalization experts, [B, S, P] in [0, 1]}; 0 for padded subjects and rows fixed to the prior.
    """

    layers: Collection[str] | None = None
    maps: bool = True
    router: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)

    def wants(self, layer: str) -> bool:
        return self.layers is None or layer in self.layers

    def clear(self) -> None:
        self.router.clear()
        self.attention.clear()


@dataclass
class MoAContext:
    """The subjects of a batch, handed to the U-Net as `cross_attention_kwargs={"moa": context}`.

    Rows are laid out as diffusers lays out its batch: [negative…, positive…] × num_images_per_prompt.
    text:       [B, T, D] token embeddings of the personalization experts (the prior reads `encoder_hidden_states`).
    features:   [B, S, F] image feature of each subject.
    token:      [B, S] int64, index of the token that each subject is bound to; anything where not present.
    present:    [B, S] bool, False for padding.
    prior_only: [B] bool, rows whose router is fixed to the prior.
    personalize_below: at this timestep and above the router is fixed to the prior; 1000 never does.
    """

    text: Tensor
    features: Tensor
    token: Tensor
    present: Tensor
    prior_only: Tensor
    recorder: Recorder | None = None
    personalize_below: int = 1000


@dataclass
class LayerInput:
    """What `moa.adapter` makes of a MoAContext once a U-Net forward, when the timestep is known; A ≤ B rows.

    text: [A, T, D]. prompts: [L, A, S, D], m_{t,l} of Eq. 8 for every cross-attention layer; the text's own embedding
    for padded subjects. token, present: [A, S]. rows: [A] int64 indices into the batch, None when A = B.
    active: False when every row is fixed to the prior, so that nothing but the prior is computed.
    """

    text: Tensor
    prompts: Tensor
    token: Tensor
    present: Tensor
    rows: Tensor | None
    active: bool
    recorder: Recorder | None


# ── Attention, experts, router ────────────────────────────────────────────────────────────────────


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, explicit: bool
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 over `heads` heads: [B, P, d], [B, T, d], [B, T, d] → [B, P, d] and, if `explicit`, the probabilities.

    mask: additive bias broadcastable to [B, heads, P, T], or None. The probabilities are [B, heads, P, T].
    Both ways are equal to rounding; the explicit one is slower on a GPU, faster to train on a CPU.
    """
    batch, pixels, width = query.shape
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if not explicit:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(batch, pixels, width), None
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.baddbmm(
        query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=1 / math.sqrt(query.shape[-1])
    ).unflatten(0, (batch, heads))
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    mixed = torch.bmm(probabilities.flatten(0, 1), value).unflatten(0, (batch, heads))
    return mixed.transpose(1, 2).reshape(batch, pixels, width), probabilities


class Expert(nn.Module):
    """A personalization expert: the four projections of one attention layer (Eq. 2 and the output projection [D]).

    The names differ from diffusers' `to_q/to_k/to_v/to_out.0`, which peft matches by suffix: a LoRA never lands here.
    """

    def __init__(self, query_dim: int, condition_dim: int, inner_dim: int, out_dim: int, bias: bool, out_bias: bool):
        super().__init__()
        self.query = nn.Linear(query_dim, inner_dim, bias=bias)
        self.key = nn.Linear(condition_dim, inner_dim, bias=bias)
        self.value = nn.Linear(condition_dim, inner_dim, bias=bias)
        self.out = nn.Linear(inner_dim, out_dim, bias=out_bias)

    @torch.no_grad()
    def copy_from(self, attn: Attention) -> None:
        """Start as a copy of the prior ("We initialize both of the experts … from a pretrained model", sec. 3.2)."""
        sources = {"query": attn.to_q, "key": attn.to_k, "value": attn.to_v, "out": attn.to_out[0]}
        for name, source in sources.items():
            if not isinstance(source, nn.Linear):
                raise TypeError(
                    f"the U-Net's {name} projection is a {type(source).__name__}, not a plain nn.Linear: build the "
                    "adapter before loading a LoRA or quantizing (pipe.unload_lora_weights() takes one off)"
                )
            getattr(self, name).load_state_dict(source.state_dict())


def make_router(dim: int, experts: int, kind: RouterKind, width: int) -> nn.Module:
    """Router^l of Eq. 7: [.., dim] → [.., experts] logits; `linear`, or an `mlp` with one hidden layer of `width`.

    Its last layer starts at zero, so all experts weigh the same [D]. With more than one personalization expert that
    would leave them equal for ever (same weights, same gradients), so it then starts at normal(0, .02).
    """
    last = nn.Linear(dim if kind == "linear" else width, experts)
    nn.init.zeros_(last.bias)
    if experts == 2:
        nn.init.zeros_(last.weight)
    else:
        nn.init.normal_(last.weight, std=0.02)
    return last if kind == "linear" else nn.Sequential(nn.Linear(dim, width), nn.SiLU(), last)


class MoALayer(nn.Module):
    """What is trained of one MoA layer: its personalization experts and its router."""

    def __init__(
        self,
        query_dim: int,
        condition_dim: int,
        inner_dim: int,
        out_dim: int,
        bias: bool,
        out_bias: bool,
        experts: int = 2,
        router: RouterKind = "linear",
        router_width: int = 64,
    ):
        super().__init__()
        sizes = (query_dim, condition_dim, inner_dim, out_dim, bias, out_bias)
        self.experts = nn.ModuleList(Expert(*sizes) for _ in range(experts - 1))
        self.router = make_router(query_dim, experts, router, router_width)


# ── The processor that diffusers calls ────────────────────────────────────────────────────────────


class MoAAttnProcessor(nn.Module):
    """Runs one MoA layer in the place of a diffusers attention processor.

    `layer` is shared with the adapter that owns it. `index` selects the layer's own m_{t,l}; it is a tensor because
    torch.compile would compile a repeated block anew for every number. Without a context the layer is the prior.
    """

    index: Tensor

    def __init__(self, name: str, layer: MoALayer, index: int, attention: AttentionKind = "sdpa"):
        super().__init__()
        self.name = name
        self.layer = layer
        self.attention = attention
        device = next(layer.parameters()).device
        self.register_buffer("index", torch.tensor([index], device=device), persistent=False)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        moa: LayerInput | None = None,
    ) -> Tensor:
        """hidden_states [B, P, d], encoder_hidden_states [B, T, D] or None (self-attention) → [B, P, d] (Eq. 6)."""
        condition = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_bias(attn, attention_mask, condition)
        prior_modules = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        explicit = self.attention == "explicit"
        output, _ = run_expert(prior_modules, hidden_states, condition, attn.heads, mask, explicit)
        weights = maps = None
        if moa is not None and moa.active:
            output, weights, maps = self.mix(attn, hidden_states, encoder_hidden_states, mask, output, moa)
        if moa is not None and moa.recorder is not None and moa.recorder.wants(self.name):
            record(moa, self.name, hidden_states, weights, maps)
        output = attn.to_out[1](output)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor

    def mix(
        self, attn: Attention, hidden: Tensor, text: Tensor | None, mask: Tensor | None, prior: Tensor, moa: LayerInput
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z of Eq. 4 for the whole batch, and for the active rows the router [A, P, N] and the maps [A, S, P]."""
        x, z0 = take(hidden, moa.rows), take(prior, moa.rows)
        condition = x if text is None else self.multimodal_text(moa)
        wants_maps = text is not None and wants_attention(moa, self.name)
        explicit = wants_maps or self.attention == "explicit"
        weights = self.layer.router(x).softmax(-1)
        z, maps = z0, []
        for n, expert in enumerate(self.layer.experts, start=1):
            modules = (expert.query, expert.key, expert.value, expert.out)
            zn, probabilities = run_expert(modules, x, condition, attn.heads, take(mask, moa.rows), explicit)
            z = torch.addcmul(z, weights[..., n : n + 1].to(zn.dtype), zn - z0)
            if wants_maps and probabilities is not None:
                maps.append(subject_maps(probabilities, moa.token, moa.present))
        z = z if moa.rows is None else prior.index_copy(0, moa.rows, z.to(prior.dtype))
        return z, weights, torch.stack(maps).mean(0) if maps else None

    def multimodal_text(self, moa: LayerInput) -> Tensor:
        """C_1 [A, T, D]: the text with m_{t,l} at the subjects' tokens, everything else as it was (sec. 3.2.1)."""
        if moa.token.shape[1] == 0:
            return moa.text
        prompt = moa.prompts.index_select(0, self.index)[0].to(moa.text.dtype)
        return moa.text.scatter(1, moa.token[..., None].expand_as(prompt), prompt)


def run_expert(
    modules: Sequence[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    condition: Tensor,
    heads: int,
    mask: Tensor | None,
    explicit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention(W_q X, W_k C, W_v C) and the expert's output projection; `modules` are W_q, W_k, W_v, W_out."""
    to_query, to_key, to_value, to_out = modules
    mixed, probabilities = attend(
        to_query(hidden), to_key(condition), to_value(condition), heads, mask, explicit
    )
    return to_out(mixed), probabilities


def attention_bias(attn: Attention, mask: Tensor | None, condition: Tensor) -> Tensor | None:
    """The U-Net's additive attention mask as [B, heads, 1 or P, T]; None stays None."""
    if mask is None:
        return None
    batch, tokens = condition.shape[:2]
    prepared = attn.prepare_attention_mask(mask, tokens, batch)
    return prepared.unflatten(0, (batch, attn.heads))


def take(x, rows: Tensor | None):
    """The given rows of x; x itself when all are taken or there is none."""
    return x if x is None or rows is None else x.index_select(0, rows)


# ── Recording ─────────────────────────────────────────────────────────────────────────────────────


def wants_attention(moa: LayerInput, layer: str) -> bool:
    return moa.recorder is not None and moa.recorder.maps and moa.recorder.wants(layer)


def subject_maps(probabilities: Tensor, token: Tensor, present: Tensor) -> Tensor:
    """[A, heads, P, T] probabilities → [A, S, P] at each subject's token, mean over heads; 0 where not present."""
    index = token[:, None, None, :].expand(-1, *probabilities.shape[1:3], -1)
    maps = probabilities.gather(-1, index).mean(1).transpose(1, 2)
    return maps * present[..., None].to(maps.dtype)


def record(moa: LayerInput, name: str, hidden: Tensor, weights: Tensor | None, maps: Tensor | None) -> None:
    """Put R_0 and the maps of the whole batch into the recorder; rows fixed to the prior have R_0 = 1 and no map."""
    assert moa.recorder is not None
    batch, pixels = hidden.shape[:2]
    if weights is None or moa.rows is None:
        moa.recorder.router[name] = hidden.new_ones(batch, pixels) if weights is None else weights[..., 0]
    else:
        ones = weights.new_ones(batch, pixels)
        moa.recorder.router[name] = ones.index_copy(0, moa.rows, weights[..., 0])
    if maps is not None:
        empty = maps.new_zeros(batch, *maps.shape[1:])
        moa.recorder.attention[name] = maps if moa.rows is None else empty.index_copy(0, moa.rows, maps)
