"""Subjects and prompts → what any diffusers Stable Diffusion pipeline takes.

    conditioning = conditioner("a man on a horse", subjects=[photo], words=["man"])
    images = pipeline(**conditioning, num_inference_steps=50, guidance_scale=5.0).images

`pipeline` is any pipeline that takes `prompt_embeds` and `cross_attention_kwargs` and whose U-Net has the
adapter installed. A subject is a photo (`moa.photos.Photo`) or a precomputed image feature, a tensor [F].
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import BaseOutput, scale_lora_layers, unscale_lora_layers
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from moa.adapter import MoAAdapter, check_sparse_threshold
from moa.attention import MoAContext, Recorder
from moa.photos import Photo, pad_to_square, to_rgb

logger = logging.getLogger(__name__)

NullBranch = Literal["expert", "prior"]
Span = tuple[int, int]


@dataclass
class Conditioning(BaseOutput):
    """Arguments of a diffusers pipeline call: `pipeline(**conditioning)`.

    The embeddings are [B · num_images_per_prompt, T, D]: already repeated, so leave the pipeline's own
    num_images_per_prompt at 1. negative_prompt_embeds is None without guidance.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    cross_attention_kwargs: dict[str, Any] | None = None

    @property
    def context(self) -> MoAContext:
        """What goes to the U-Net beside the text."""
        assert self.cross_attention_kwargs is not None
        return self.cross_attention_kwargs["moa"]


class PromptEncoder:
    """The prior's text side: token embeddings, and the tokens of words."""

    def __init__(self, tokenizer: Any, text_encoder: nn.Module):
        """tokenizer: one that gives character offsets; CLIPTokenizer of transformers ≥ 5 does."""
        if not getattr(tokenizer, "is_fast", False):
            name = type(tokenizer).__name__
            raise TypeError(f"{name} gives no character offsets: use transformers ≥ 5's CLIPTokenizer")
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included (77 for SD1.5)."""
        limit = getattr(self.text_encoder.config, "max_position_embeddings", self.tokenizer.model_max_length)
        return min(self.tokenizer.model_max_length, limit)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], lora_scale: float | None = None) -> Tensor:
        """Token embeddings [B, T, D] of the frozen text encoder, as Stable Diffusion computes them.

        lora_scale: that of LoRA layers in the text encoder; None leaves them as they are.
        """
        inputs = self.tokenizer(
            [self.spelled_out(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = inputs.attention_mask.to(device)
        with lora_scaled(self.text_encoder, lora_scale):
            return self.text_encoder(inputs.input_ids.to(device), attention_mask=mask)[0]

    def spelled_out(self, prompt: str) -> str:
        """The prompt with every token of textual inversions of several vectors, as diffusers reads it."""
        return TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)

    def token_indices(self, prompt: str, spans: Sequence[Span]) -> list[int]:
        """The last token of each span of characters (start, end), end exclusive: there the feature goes.

        Raises:
            ValueError, naming the prompt: a span is empty, outside the prompt or part of a word; its word
            lies past the text encoder's limit or is unknown to the tokenizer; two spans end on the same
            token.
        """
        ids, offsets = self._tokens(prompt)
        indices = []
        for span in spans:
            check_whole_word(prompt, *span)
            start, end = (len(self.spelled_out(prompt[:at])) for at in span)
            inside = [i for i, (s, e) in enumerate(offsets) if start <= s < e <= end]
            if not inside:
                raise ValueError(f"{prompt[slice(*span)]!r} has no token of its own in the prompt {prompt!r}")
            indices.append(inside[-1])
        return self._checked(prompt, indices, ids, offsets)

    def explicit_tokens(self, prompt: str, indices: Sequence[int]) -> list[int]:
        """Token indices given by hand, checked as those of `token_indices`.

        Each vector of a textual inversion is a token.
        """
        ids, offsets = self._tokens(prompt)
        for index in indices:
            if not 0 < index < len(ids) - 1:
                raise ValueError(f"token {index} is not in the prompt {prompt!r}: 1 … {len(ids) - 2} are")
        return self._checked(prompt, [int(index) for index in indices], ids, offsets)

    def _tokens(self, prompt: str) -> tuple[list[int], list[Span]]:
        """All token ids of a prompt, and their characters in `spelled_out(prompt)`."""
        text = self.spelled_out(prompt)
        encoded = self.tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        ids = encoded["input_ids"]
        if len(ids) > self.max_tokens:
            logger.warning(
                "the prompt is cut after %d of its %d tokens: %r", self.max_tokens, len(ids), prompt
            )
        return ids, encoded["offset_mapping"]

    def _checked(self, prompt: str, indices: list[int], ids: list[int], offsets: list[Span]) -> list[int]:
        for index in indices:
            word = self.spelled_out(prompt)[slice(*offsets[index])]
            if index >= self.max_tokens - 1:
                raise ValueError(
                    f"{word!r} is token {index} of the prompt {prompt!r}, past the {self.max_tokens} that "
                    "the text encoder reads: shorten the prompt, or move the subject to its front"
                )
            if ids[index] == self.tokenizer.unk_token_id:
                raise ValueError(
                    f"the tokenizer does not know {word!r} of the prompt {prompt!r}: use another"
                )
        if len(set(indices)) < len(indices):
            raise ValueError(f"two subjects share a token of the prompt {prompt!r}: give each its own word")
        return indices


class SubjectConditioner(PromptEncoder):
    """Binds subjects to words of prompts, and encodes both."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module,
        image_encoder: nn.Module | None,
        image_processor: Any,
        adapter: MoAAdapter,
        null_branch: NullBranch = "expert",
        personalize_below: int | None = None,
        sparse_threshold: float = 0.0,
    ):
        """tokenizer, text_encoder: the prior's.

        image_encoder, image_processor: CLIPVisionModelWithProjection (or whatever returns `image_embeds`)
            and its CLIPImageProcessor; None where subjects are precomputed features only.
        null_branch: what the unconditional half of guidance runs. "expert", as trained: the mixture on
            the negative prompt without subject. "prior": the router fixed to the prior, so only the base
            U-Net.
        personalize_below: at this timestep and above the router is fixed to the prior; 1000 never does, None
            is what the adapter's config says.
        sparse_threshold: pixels to which the router gives a personalization expert no more than this are
            left to the prior, and cost no expert; 0 leaves none.
        """
        super().__init__(tokenizer, text_encoder)
        if image_encoder is not None and adapter is not None:
            adapter.check_image_encoder(image_encoder)
        self.image_encoder = image_encoder
        self.image_processor = image_processor
        self.adapter = adapter
        self.null_branch = check_null_branch(null_branch)
        self.personalize_below = personalize_below
        self.sparse_threshold = check_sparse_threshold(sparse_threshold)

    @property
    def decides_below(self) -> int:
        """`personalize_below`, or the adapter's."""
        own = self.personalize_below
        return self.adapter.config["personalize_below"] if own is None else own

    def __call__(
        self,
        prompts: str | Sequence[str],
        subjects: Sequence | None = None,
        spans: Sequence | None = None,
        words: Sequence | None = None,
        tokens: Sequence | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance: bool = True,
        prior_only: bool | Sequence[bool] = False,
        null_branch: NullBranch | None = None,
        personalize_below: int | None = None,
        sparse_threshold: float | None = None,
        recorder: Recorder | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Conditioning:
        """Encode a batch of prompts, each with its own subjects (none, one or more).

        prompts: one or B prompts. For a single string, `subjects` and `words`/`spans`/`tokens` are flat
            lists; for a list of prompts they are lists of lists, [] for a prompt without subject.
        words, spans, tokens: where each subject goes, in one of three ways: words of the prompt (the same
            word again means its next occurrence), character offsets (start, end), end exclusive, or token
            indices.
        guidance: whether the pipeline runs classifier-free guidance (guidance_scale > 1); doubles the batch.
        prior_only: images of the base U-Net; one for all prompts, or one each.
        null_branch, personalize_below, sparse_threshold: None takes the conditioner's.
        cross_attention_kwargs: what else goes to the U-Net. "scale", that of a LoRA, holds for the text
            encoder too, as in diffusers.

        Raises:
            ValueError: a word not in its prompt, past the text encoder's limit, or not one for each
            subject; a photo that is broken, too small or not finite; a feature of another width.
        """
        texts, photos, kind, places = as_batch(prompts, subjects, spans=spans, words=words, tokens=tokens)
        index = [self._bind(*row, kind) for row in zip(texts, photos, places, strict=True)]
        others = cross_attention_kwargs or {}
        scale = others.get("scale")
        embeds = self.encode_text(texts, scale).repeat_interleave(num_images_per_prompt, 0)
        fixed = [prior_only] * len(texts) if isinstance(prior_only, bool) else list(prior_only)
        if len(fixed) != len(texts):
            raise ValueError(f"prior_only has {len(fixed)} entries for {len(texts)} prompts: give one each")
        features = self._features(photos)
        context = self._context(embeds, features, index, fixed, num_images_per_prompt)
        context.recorder = recorder
        if personalize_below is not None:
            context.personalize_below = personalize_below
        if sparse_threshold is not None:
            context.sparse_threshold = check_sparse_threshold(sparse_threshold)
        if not guidance:
            return Conditioning(prompt_embeds=embeds, cross_attention_kwargs={**others, "moa": context})
        negative = self._negative(negative_prompts, len(texts), scale)
        negative = negative.repeat_interleave(num_images_per_prompt, 0)
        branch = self.null_branch if null_branch is None else check_null_branch(null_branch)
        context = with_guidance(context, negative, branch)
        return Conditioning(embeds, negative, {**others, "moa": context})

    def pixel_values(self, photos: Sequence[Photo]) -> Tensor:
        """Whole photos, padded to squares, as the image encoder wants them: [N, 3, H, W], on its device."""
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError("photos need an image_encoder and an image_processor; or give image features")
        squares = [pad_to_square(to_rgb(photo)) for photo in photos]
        pixels = self.image_processor(images=squares, return_tensors="pt")["pixel_values"]
        parameter = next(self.image_encoder.parameters())
        return pixels.to(parameter.device, parameter.dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Image features [N, F], pooled and projected, through the encoder layers that the adapter trained.

        With gradient where that is enabled; if the encoder is frozen, only the adapter's layers get one.
        """
        if self.image_encoder is None:
            raise ValueError("this conditioner has no image_encoder")
        overrides = self.adapter.image_encoder_overrides(pixel_values.device, pixel_values.dtype)
        if not overrides:
            return self.image_encoder(pixel_values=pixel_values).image_embeds
        return functional_call(self.image_encoder, overrides, (), {"pixel_values": pixel_values}).image_embeds

    @torch.no_grad()
    def encode_photos(self, photos: Sequence[Photo]) -> Tensor:
        """Image features [N, F] of photos, to keep and hand in as subjects."""
        return self.encode_images(self.pixel_values(photos))

    def _bind(self, prompt: str, photos: Sequence, places: Sequence, kind: str) -> list[int]:
        """Token index of each subject of one prompt."""
        if len(photos) != len(places):
            raise ValueError(f"{len(photos)} subjects but {len(places)} {kind} for the prompt {prompt!r}")
        if kind == "words":
            return self.token_indices(prompt, find_words(prompt, places))
        return self.token_indices(prompt, places) if kind == "spans" else self.explicit_tokens(prompt, places)

    def _negative(
        self, negative_prompts: str | Sequence[str] | None, count: int, lora_scale: float | None
    ) -> Tensor:
        if negative_prompts is None or isinstance(negative_prompts, str):
            return self.encode_text([negative_prompts or ""], lora_scale).expand(count, -1, -1)
        if len(negative_prompts) != count:
            raise ValueError(
                f"{len(negative_prompts)} negative prompts for {count} prompts: give one, or one each"
            )
        return self.encode_text(negative_prompts, lora_scale)

    def _features(self, subjects: Sequence[Sequence]) -> list[list[Tensor]]:
        """Feature [F] of each subject of each prompt; all photos run through the image encoder at once."""
        photos = [subject for row in subjects for subject in row if not is_feature(subject)]
        encoded = iter(self.encode_photos(photos) if photos else ())
        features = [[s if is_feature(s) else next(encoded) for s in row] for row in subjects]
        width = self.adapter.config["image_feature_dim"]
        for feature in (feature for row in features for feature in row):
            if feature.shape != (width,):
                raise ValueError(
                    f"an image feature has shape {tuple(feature.shape)}, the adapter takes ({width},)"
                )
            if not bool(feature.isfinite().all()):
                raise ValueError(
                    "an image feature is not finite: check the photo and the encoder's precision"
                )
        return features

    def _context(
        self,
        embeds: Tensor,
        features: Sequence[Sequence[Tensor]],
        index: Sequence[Sequence[int]],
        prior_only: Sequence[bool],
        repeats: int,
    ) -> MoAContext:
        """The conditional half, padded to the most subjects of a prompt; `embeds` is repeated already."""
        batch, most = len(features), max(map(len, features), default=0)
        feature = embeds.new_zeros(batch, most, self.adapter.config["image_feature_dim"])
        token = torch.zeros(batch, most, dtype=torch.int64, device=embeds.device)
        present = torch.zeros(batch, most, dtype=torch.bool, device=embeds.device)
        for row, (row_features, row_index) in enumerate(zip(features, index, strict=True)):
            for column, (one, position) in enumerate(zip(row_features, row_index, strict=True)):
                feature[row, column] = one
                token[row, column] = position
                present[row, column] = True
        fixed = torch.tensor(prior_only, dtype=torch.bool, device=embeds.device)
        return MoAContext(
            text=embeds,
            features=feature.repeat_interleave(repeats, 0),
            token=token.repeat_interleave(repeats, 0),
            present=present.repeat_interleave(repeats, 0),
            prior_only=fixed.repeat_interleave(repeats, 0),
            personalize_below=self.decides_below,
            sparse_threshold=self.sparse_threshold,
        )


def with_guidance(context: MoAContext, negative: Tensor, null_branch: NullBranch) -> MoAContext:
    """The context of the doubled batch: the unconditional half, [B, T, D] and without subjects, in front."""
    fixed = context.prior_only | (null_branch == "prior")
    return MoAContext(
        text=torch.cat([negative, context.text]),
        features=torch.cat([torch.zeros_like(context.features), context.features]),
        token=torch.cat([torch.zeros_like(context.token), context.token]),
        present=torch.cat([torch.zeros_like(context.present), context.present]),
        prior_only=torch.cat([fixed, context.prior_only]),
        recorder=context.recorder,
        personalize_below=context.personalize_below,
        sparse_threshold=context.sparse_threshold,
    )


def without_guidance(context: MoAContext) -> MoAContext:
    """The conditional half of a doubled batch's context, as `with_guidance` got it."""
    tensors = {name: value for name, value in vars(context).items() if isinstance(value, Tensor)}
    halves: dict[str, Any] = {name: value.chunk(2)[1] for name, value in tensors.items()}
    return replace(context, **halves)


@contextmanager
def lora_scaled(model: nn.Module, scale: float | None) -> Iterator[None]:
    """Within the `with` block the LoRA layers of `model` have that scale, as a pipeline's call gives it."""
    if scale is None:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


def check_null_branch(value: NullBranch) -> NullBranch:
    if value not in ("expert", "prior"):
        raise ValueError(f"null_branch: {value!r}; it is 'expert' or 'prior'")
    return value


def is_feature(subject: Any) -> bool:
    """Whether a subject is a precomputed image feature [F] rather than a photo."""
    return isinstance(subject, Tensor) and subject.ndim == 1


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────


def as_batch(
    prompts: str | Sequence[str], subjects: Sequence | None, **places: Sequence | None
) -> tuple[list[str], list[list], str, list[list]]:
    """(prompts, subjects of each, "words" | "spans" | "tokens", place of each subject of each)."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    given = {kind: value for kind, value in places.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"say where the subjects go in one way, not by {' and '.join(given)}")
    kind, where = next(iter(given.items()), ("words", None))
    if isinstance(prompts, str):
        subjects = None if subjects is None else [flat(subjects)]
        where = None if where is None else [flat(where)]
    photos = per_prompt("subjects", subjects, len(texts))
    if where is None and any(photos):
        raise ValueError("subjects without a place: give the words, spans or tokens that they are bound to")
    return texts, photos, kind, per_prompt(kind, where, len(texts))


def flat(value: Any) -> list:
    """The subjects or places of a single prompt as a list; one alone need not be in one."""
    return [value] if isinstance(value, (Image.Image, np.ndarray, Tensor, str, int)) else list(value)


def per_prompt(name: str, rows: Sequence | None, count: int) -> list[list]:
    """`rows`, checked to be one list a prompt; empty lists for None."""
    if rows is None:
        return [[] for _ in range(count)]
    if len(rows) != count or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(
            f"{name}: {count} prompts take {count} lists, one each, [] for a prompt without subject"
        )
    return [list(row) for row in rows]


def find_words(prompt: str, words: Sequence[str]) -> list[Span]:
    """Character span of each word in the prompt: whole words, whatever the case.

    The k-th time that a word is asked for is its k-th occurrence.

    Raises:
        ValueError, naming word and prompt: there are too few.
    """
    spans: list[Span] = []
    asked: dict[str, int] = {}
    for word in words:
        found = [
            match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
        ]
        number = asked.get(word.lower(), 0)
        asked[word.lower()] = number + 1
        if not word.strip() or number >= len(found):
            times = "not in" if not found or not word.strip() else f"only {len(found)} times in"
            raise ValueError(f"the subject word {word!r} is {times} the prompt {prompt!r}")
        spans.append(found[number])
    return spans


def check_whole_word(prompt: str, start: int, end: int) -> None:
    """ValueError, naming the prompt, unless the characters start … end − 1 are whole words of it."""
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"the span ({start}, {end}) is empty or outside the prompt {prompt!r}")
    if any(0 < at < len(prompt) and prompt[at - 1 : at + 1].isalnum() for at in (start, end)):
        raise ValueError(
            f"the span ({start}, {end}), {prompt[start:end]!r}, cuts a word of the prompt {prompt!r}"
        )
