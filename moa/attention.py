"""Mixture-of-Attention: the paper on one page (Eq. 1–7 of arXiv 2404.11565).

A MoA layer stands in the place of an attention layer of a frozen diffusion U-Net. It mixes N attention
experts by a router:

    Expert_n(X, C) = W_out softmax(W_q X (W_k C)ᵀ / √d) W_v C                (Eq. 1, 2)
    R = softmax(Router(X)): for every pixel, one weight an expert            (Eq. 5, 7)
    Z = Σ_n R_n ⊙ Expert_n(X, C_n)                                           (Eq. 4, 6)

Expert 0 is the *prior*: the U-Net's own frozen projections, called through the U-Net's modules, so that a
LoRA on them acts on the prior alone. The others, the paper has one, are *personalization* experts:
trained copies. In self-attention C_n = X. In cross-attention the prior reads the text, C_0, and the
personalization experts the multimodal prompt, C_1 (Eq. 8, `moa.prompts`). As the weights of a pixel sum
to 1, Eq. 4 is computed as

    Z = Z_0 + Σ_{n ≥ 1} R_n ⊙ (Z_n − Z_0)

which is the base U-Net bit for bit wherever the experts agree or R_0 = 1.

*Sparse experts*, ours, for sampling: the router is known before the attention, so where R_n ≤ τ the prior
gets expert n's weight too, and the expert neither asks (W_q) nor answers (W_out). Keys and values stay whole;
every expert has its own active pixels. τ = 0 is the dense form above.

Shapes: B batch; A ≤ B rows that are personalized; P pixels; d channels of the layer; T tokens; D channels
of the text; S subjects of a prompt (padded); F channels of an image feature; N experts; L cross-attention
layers.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

RouterKind = Literal["linear", "mlp", "none"]
AttentionKind = Literal["sdpa", "explicit"]


# ── What travels to the layers ─────────────────────────────────────────────────────────────────


@dataclass
class Recorder:
    """Collects router weights and attention maps during the U-Net forwards that it is handed to.

    Each forward overwrites the last. Read it before `backward`: gradient checkpointing runs a layer twice.

    layers: qualified names of the attention layers to record; None records all.
    maps: whether attention maps are wanted too; they cost an explicit softmax in the cross-attention layers.
    router: filled with {layer: R_0, the prior's weight as it was used, [B, P] in [0, 1]}.
    attention: filled with {cross-attention layer: the softmax probabilities at each subject's token, mean
        over heads and personalization experts, [B, S, P] in [0, 1]}; 0 for padding, for rows fixed to the
        prior, and for pixels that a sparse expert did not compute.
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

    Rows lie as in diffusers' batch: [negative…, positive…], each × num_images_per_prompt.

    text: [B, T, D], token embeddings for the personalization experts (the prior reads
    `encoder_hidden_states`).
    features: [B, S, F], image feature of each subject.
    token: [B, S] int64, index of the token that each subject is bound to; ignored where not present.
    present: [B, S] bool, False for padding.
    prior_only: [B] bool, rows whose router is fixed to the prior.
    personalize_below: at this timestep and above the router is fixed to the prior; 1000 never does.
    sparse_threshold: τ in [0, 1) of sparse experts; 0 is dense, as training is.
    """

    text: Tensor
    features: Tensor
    token: Tensor
    present: Tensor
    prior_only: Tensor
    recorder: Recorder | None = None
    personalize_below: int = 1000
    sparse_threshold: float = 0.0


@dataclass
class LayerInput:
    """What the adapter makes of a MoAContext for one U-Net forward, when the timestep is known.

    text: [A, T, D].
    prompts: [L, A, S, D], m_{t,l} of Eq. 8, the text's own embedding for padding; None without subjects.
    token, present: [A, S]; the token of padding is 0.
    rows: [A] int64, which rows of the batch these are; None if all.
    active: False if every row is fixed to the prior; then nothing but the prior is computed.
    threshold: τ of sparse experts; 0 is dense.
    """

    text: Tensor
    prompts: Tensor | None
    token: Tensor
    present: Tensor
    rows: Tensor | None
    active: bool
    recorder: Recorder | None
    threshold: float = 0.0


# ── Attention, experts, router ─────────────────────────────────────────────────────────────────


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, explicit: bool
) -> tuple[Tensor, Tensor | None]:
    """Eq. 1 with heads: [B, P, d], [B, T, d], [B, T, d] → [B, P, d], and the probabilities if explicit.

    mask: additive bias that broadcasts to [B, heads, P, T], or None. Probabilities: [B, heads, P, T].
    Both ways are equal to rounding; the explicit one is slower on a GPU and faster to train on a CPU.
    """
    batch, pixels, width = query.shape
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if not explicit:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(batch, pixels, width), None
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1])
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        scores = (scores.unflatten(0, (batch, heads)) + mask).flatten(0, 1)
    probabilities = scores.softmax(-1).to(value.dtype)  # in single precision inside, whatever the type
    mixed = torch.bmm(probabilities, value).unflatten(0, (batch, heads))
    mixed = mixed.transpose(1, 2).reshape(batch, pixels, width)
    return mixed, probabilities.unflatten(0, (batch, heads))


@dataclass(frozen=True)
class LayerSizes:
    """Channels of one attention layer, whether its projections have biases, and whether it reads the text."""

    query_dim: int
    condition_dim: int
    inner_dim: int
    out_dim: int
    bias: bool
    out_bias: bool
    cross: bool


class Expert(nn.Module):
    """A personalization expert: the four projections of an attention layer (Eq. 2; W_out is our decision).

    Not named to_q, to_k, to_v, to_out.0 as in diffusers: peft matches those by suffix, and no LoRA
    belongs here.
    """

    def __init__(self, sizes: LayerSizes):
        super().__init__()
        self.query = nn.Linear(sizes.query_dim, sizes.inner_dim, bias=sizes.bias)
        self.key = nn.Linear(sizes.condition_dim, sizes.inner_dim, bias=sizes.bias)
        self.value = nn.Linear(sizes.condition_dim, sizes.inner_dim, bias=sizes.bias)
        self.out = nn.Linear(sizes.inner_dim, sizes.out_dim, bias=sizes.out_bias)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value, self.out


class SinglePath(nn.Module):
    """No router: logits whose softmax is exactly (0, 1), so that one fine-tuned path draws every pixel.

    The paper's ablation without the MoA layer (appendix B): attention as fine-tuning would leave it.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """X [B, P, d] → [B, P, 2]."""
        logits = hidden.new_zeros(*hidden.shape[:-1], 2)
        logits[..., 0] = -torch.inf
        return logits


def make_router(dim: int, experts: int, kind: RouterKind, width: int) -> nn.Module:
    """Router^l of Eq. 7, [.., dim] → [.., experts] logits; an "mlp" has one hidden layer of `width`.

    The last layer starts at zero (our decision): all experts weigh the same. Several personalization experts
    would then stay equal for ever, having the same weights and gradients, so for them it starts random, σ
    .02. "none" is `SinglePath`, which has no parameters.
    """
    if kind == "none":
        return SinglePath()
    last = nn.Linear(dim if kind == "linear" else width, experts)
    nn.init.zeros_(last.bias)
    nn.init.normal_(last.weight, std=0 if experts == 2 else 0.02)
    return last if kind == "linear" else nn.Sequential(nn.Linear(dim, width), nn.SiLU(), last)


class MoALayer(nn.Module):
    """What is trained of one MoA layer: its personalization experts and its router."""

    def __init__(
        self, sizes: LayerSizes, experts: int = 2, router: RouterKind = "linear", router_width: int = 64
    ):
        super().__init__()
        self.experts = nn.ModuleList(Expert(sizes) for _ in range(experts - 1))
        self.router = make_router(sizes.query_dim, experts, router, router_width)

    @torch.no_grad()
    def copy_from(self, attn: Attention) -> None:
        """Make all experts copies of the prior, as the paper starts (sec. 3.2). TypeError under a LoRA."""
        sources = {"query": attn.to_q, "key": attn.to_k, "value": attn.to_v, "out": attn.to_out[0]}
        for name, source in sources.items():
            if not isinstance(source, nn.Linear):
                raise TypeError(
                    f"the U-Net's {name} projection is a {type(source).__name__}, no plain nn.Linear: make "
                    "the adapter before weights are quantized or a LoRA loaded (pipe.unload_lora_weights())"
                )
            for expert in self.experts:
                getattr(expert, name).load_state_dict(source.state_dict())


# ── The processor that diffusers calls ─────────────────────────────────────────────────────────


class MoAAttnProcessor(nn.Module):
    """One MoA layer, as the processor of a diffusers attention layer. Without a context it is the prior.

    layer: shared with the adapter, which owns it.
    index: which of the L prompts m_{t,l} is this layer's; a tensor, because torch.compile would compile a
        repeated block anew for every number.
    """

    index: Tensor

    def __init__(
        self, name: str = "", layer: MoALayer | None = None, index: int = 0, attention: AttentionKind = "sdpa"
    ):
        super().__init__()
        if layer is None:  # diffusers makes all processors anew, without arguments, for an IP-Adapter
            raise TypeError(
                "an IP-Adapter cannot come or go while MoA is in the U-Net: call adapter.uninstall(unet)"
            )
        self.name = name
        self.layer = layer
        self.explicit = attention == "explicit"
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
        """X [B, P, d] and text [B, T, D], None in self-attention, → Z [B, P, d] (Eq. 6).

        diffusers hands over those keywords that this signature names.
        """
        condition = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_bias(attn, attention_mask, condition)
        prior = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        output, _ = run_expert(prior, hidden_states, condition, attn.heads, mask, self.explicit)
        weights = maps = None
        if moa is not None and moa.active:
            cross = encoder_hidden_states is not None
            output, weights, maps = self.mix(hidden_states, output, cross, attn.heads, mask, moa)
        if moa is not None and moa.recorder is not None and moa.recorder.wants(self.name):
            record(moa.recorder, moa.rows, self.name, hidden_states, weights, maps)
        output = attn.to_out[1](output)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor

    def mix(
        self, hidden: Tensor, prior: Tensor, cross: bool, heads: int, mask: Tensor | None, moa: LayerInput
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z of Eq. 4 for the whole batch; router [A, P, N] and maps [A, S, P] of the personalized rows."""
        x, z0 = take(hidden, moa.rows), take(prior, moa.rows)
        mask = None if mask is None else take(mask, moa.rows)
        condition = self.multimodal_text(moa) if cross else x
        wanted = cross and moa.recorder is not None and moa.recorder.maps and moa.recorder.wants(self.name)
        weights = leave_to_prior(self.layer.router(x).softmax(-1), moa.threshold)
        z, maps = z0.clone() if moa.threshold > 0 else z0, []
        for n, expert in enumerate(self.layer.experts, start=1):
            assert isinstance(expert, Expert)
            arguments = (expert.projections, x, condition, heads, mask, wanted or self.explicit)
            weight = weights[..., n : n + 1].to(z0.dtype)
            if moa.threshold > 0:
                probabilities = add_sparse(z, z0, weight, *arguments)
            else:
                zn, probabilities = run_expert(*arguments)
                z = torch.addcmul(z, weight, zn - z0)
            if wanted and probabilities is not None:
                maps.append(subject_maps(probabilities, moa.token, moa.present))
        if moa.rows is not None:
            z = prior.index_copy(0, moa.rows, z.to(prior.dtype))
        return z, weights, torch.stack(maps).mean(0) if maps else None

    def multimodal_text(self, moa: LayerInput) -> Tensor:
        """C_1 [A, T, D]: the text, with m_{t,l} in the place of the subjects' tokens (sec. 3.2.1)."""
        if moa.prompts is None:
            return moa.text
        prompt = moa.prompts.index_select(0, self.index)[0]
        return moa.text.scatter(1, moa.token[..., None].expand_as(prompt), prompt)


def run_expert(
    modules: Sequence[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    condition: Tensor,
    heads: int,
    mask: Tensor | None,
    explicit: bool,
) -> tuple[Tensor, Tensor | None]:
    """Expert(X, C) and, if explicit, its probabilities; `modules` are W_q, W_k, W_v and W_out."""
    to_query, to_key, to_value, to_out = modules
    query, key, value = to_query(hidden), to_key(condition), to_value(condition)
    mixed, probabilities = attend(query, key, value, heads, mask, explicit)
    return to_out(mixed), probabilities


def leave_to_prior(weights: Tensor, threshold: float) -> Tensor:
    """R [B, P, N] with the weights R_n ≤ τ, n ≥ 1, given to the prior; R itself for τ = 0."""
    if threshold == 0:
        return weights
    kept = weights[..., 1:] * (weights[..., 1:] > threshold)
    return torch.cat([1 - kept.sum(-1, keepdim=True), kept], -1)


@torch.compiler.disable(
    reason="sparse experts compute as many pixels as the router says: compile without fullgraph"
)
def add_sparse(
    z: Tensor,
    z0: Tensor,
    weight: Tensor,
    modules: Sequence[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    condition: Tensor,
    heads: int,
    mask: Tensor | None,
    explicit: bool,
) -> Tensor | None:
    """Add R_n ⊙ (Z_n − Z_0) to z [B, P, d] in place; weight [B, P, 1] is R_n, 0 where nothing is computed.

    Each sample runs by itself, so that it costs what it needs and does not depend on the others. Returns the
    probabilities if explicit, [B, heads, P, T], 0 where not computed.
    """
    active = weight[..., 0] > 0
    shape = (len(z), heads, z.shape[1], condition.shape[1])
    probabilities = z.new_zeros(shape) if explicit else None
    for row, pixels in enumerate(active.nonzero()[:, 1].split(active.sum(1).tolist())):
        if len(pixels) == 0:
            continue
        bias = mask if mask is None else mask[row : row + 1].expand(-1, -1, shape[2], -1)[:, :, pixels]
        x, text = hidden[row, pixels][None], condition[row : row + 1]
        zn, seen = run_expert(modules, x, text, heads, bias, explicit)
        z[row, pixels] += (weight[row, pixels] * (zn[0] - z0[row, pixels])).to(z.dtype)
        if probabilities is not None and seen is not None:
            probabilities[row, :, pixels] = seen[0].to(z.dtype)
    return probabilities


def attention_bias(attn: Attention, mask: Tensor | None, condition: Tensor) -> Tensor | None:
    """The U-Net's additive attention mask as [B, heads, 1 or P, T]; None stays None."""
    if mask is None:
        return None
    batch, tokens = condition.shape[:2]
    return attn.prepare_attention_mask(mask, tokens, batch).unflatten(0, (batch, attn.heads))


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of x; x itself if all are taken."""
    return x if rows is None else x.index_select(0, rows)


# ── Recording ──────────────────────────────────────────────────────────────────────────────────


def subject_maps(probabilities: Tensor, token: Tensor, present: Tensor) -> Tensor:
    """[A, heads, P, T] probabilities → [A, S, P] at the subjects' tokens, mean over heads; 0 for padding."""
    index = token[:, None, None, :].expand(-1, *probabilities.shape[1:3], -1)
    maps = probabilities.gather(-1, index).mean(1).transpose(1, 2)
    return maps * present[..., None].to(maps.dtype)


def record(
    recorder: Recorder,
    rows: Tensor | None,
    name: str,
    hidden: Tensor,
    weights: Tensor | None,
    maps: Tensor | None,
) -> None:
    """Record R_0 and maps of the whole batch; rows fixed to the prior have R_0 = 1 and no map."""
    batch, pixels = hidden.shape[:2]
    prior = hidden.new_ones(batch, pixels) if weights is None else weights[..., 0]
    if weights is not None and rows is not None:
        prior = prior.new_ones(batch, pixels).index_copy(0, rows, prior)
    recorder.router[name] = prior
    if maps is not None:
        empty = maps.new_zeros(batch, *maps.shape[1:])
        recorder.attention[name] = maps if rows is None else empty.index_copy(0, rows, maps)
