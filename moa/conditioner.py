"""Subjects and prompts → what any diffusers Stable Diffusion pipeline takes.

    conditioning = conditioner(["a man on a horse"], subjects=[[photo]], words=[["man"]])
    images = pipeline(**conditioning, num_inference_steps=50, guidance_scale=5.0).images

`pipeline` is any pipeline that takes `prompt_embeds` and `cross_attention_kwargs` and whose U-Net has the adapter
installed. A subject is a photo (PIL image, array or [3, H, W] tensor) or a precomputed image feature ([F] tensor).
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.func import functional_call

from moa.adapter import MoAAdapter
from moa.attention import MoAContext, Recorder

logger = logging.getLogger(__name__)

NullBranch = Literal["expert", "prior"]
Photo = Image.Image | np.ndarray | Tensor
Span = tuple[int, int]

MIN_SIDE = 16
"""Smallest side of a subject's photo in pixels: below it there is nothing to recognise."""


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
        assert self.cross_attention_kwargs is not None
        return self.cross_attention_kwargs["moa"]


class SubjectConditioner:
    """Binds subjects to words of prompts, and encodes both.

    tokenizer, text_encoder: the prior's. image_encoder, image_processor: of the class CLIPVisionModelWithProjection
    (anything whose output has `image_embeds`) and CLIPImageProcessor; only needed where subjects are photos.
    null_branch: what the unconditional half of guidance runs: "expert", as trained (the personalization expert on the
        negative prompt without subject), or "prior" (the router fixed to the prior: nothing but the base U-Net).
    personalize_below: at this timestep and above the router is fixed to the prior; 1000 never does.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module,
        image_encoder: nn.Module | None,
        image_processor: Any,
        adapter: MoAAdapter,
        null_branch: NullBranch = "expert",
        personalize_below: int = 1000,
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"{type(tokenizer).__name__} gives no character offsets; use transformers ≥ 5's CLIPTokenizer "
                "or CLIPTokenizerFast"
            )
        check_null_branch(null_branch)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.image_processor = image_processor
        self.adapter = adapter
        self.null_branch: NullBranch = null_branch
        self.personalize_below = personalize_below

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
        recorder: Recorder | None = None,
    ) -> Conditioning:
        """Encode a batch of prompts, each with its own subjects (none, one or more).

        prompts: one or B prompts. For a single string, `subjects` and `words`/`spans`/`tokens` are flat lists; for a
            list of prompts they are lists of lists, [] for a prompt without subject.
        Where a subject goes: `words` ("man"; the same word again means its next occurrence), `spans` (character
            offsets (start, end) of the word, end exclusive) or `tokens` (indices into the tokenized prompt).
        guidance: whether the pipeline runs classifier-free guidance (guidance_scale > 1): doubles the batch.
        prior_only: images of the base U-Net; one for all prompts, or one each.
        Raises ValueError for words that are not in the prompt, past the text encoder's limit or given for another
        number of subjects, and for images that are broken, too small or not finite.
        """
        prompts, subjects, bindings = as_batch(prompts, subjects, spans=spans, words=words, tokens=tokens)
        token = [
            self._bind(prompt, photos, kind, binding)
            for prompt, photos, (kind, binding) in zip(prompts, subjects, bindings, strict=True)
        ]
        features = self._features(subjects)
        embeds = self.encode_text(prompts).repeat_interleave(num_images_per_prompt, 0)
        fixed = [prior_only] * len(prompts) if isinstance(prior_only, bool) else list(prior_only)
        if len(fixed) != len(prompts):
            raise ValueError(f"prior_only has {len(fixed)} entries for {len(prompts)} prompts: give one each")
        context = self._context(embeds, features, token, fixed, num_images_per_prompt, recorder)
        if not guidance:
            return Conditioning(prompt_embeds=embeds, cross_attention_kwargs={"moa": context})
        negative = self._negative(negative_prompts, len(prompts)).repeat_interleave(num_images_per_prompt, 0)
        branch = self.null_branch if null_branch is None else check_null_branch(null_branch)
        return Conditioning(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            cross_attention_kwargs={"moa": with_guidance(context, negative, branch)},
        )

    # ── Text ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads, start and end included (77 for SD1.5)."""
        limit = getattr(self.text_encoder.config, "max_position_embeddings", self.tokenizer.model_max_length)
        return min(self.tokenizer.model_max_length, limit)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Token embeddings [B, T, D] of the frozen text encoder, as Stable Diffusion pipelines compute them."""
        inputs = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = inputs.attention_mask.to(device)
        return self.text_encoder(inputs.input_ids.to(device), attention_mask=mask)[0]

    def token_indices(self, prompt: str, spans: Sequence[Span]) -> list[int]:
        """The last token of each span of characters (start, end), end exclusive: where its image feature goes.

        Raises ValueError, naming the prompt, for spans that are empty, outside the prompt, or part of a word; that
        lie past the text encoder's limit; whose word the tokenizer does not know; or that share a token.
        """
        encoded = self.tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
        offsets = encoded["offset_mapping"]
        if len(offsets) > self.max_tokens:
            logger.warning("the prompt is cut after %d of %d tokens: %r", self.max_tokens, len(offsets), prompt)
        indices = []
        for start, end in spans:
            check_whole_word(prompt, start, end)
            inside = [i for i, (s, e) in enumerate(offsets) if start <= s < e <= end]
            if not inside:
                raise ValueError(f"{prompt[start:end]!r} has no token of its own in the prompt {prompt!r}")
            self._check_token(prompt, prompt[start:end], inside[-1], encoded["input_ids"])
            indices.append(inside[-1])
        if len(set(indices)) < len(indices):
            raise ValueError(f"two subjects are bound to one token of the prompt {prompt!r}: give each its own word")
        return indices

    def _check_token(self, prompt: str, word: str, index: int, ids: Sequence[int]) -> None:
        if index >= self.max_tokens - 1:
            raise ValueError(
                f"{word!r} is token {index} of the prompt {prompt!r}, past the {self.max_tokens} tokens that the text "
                "encoder reads: shorten the prompt, or move the subject to its front"
            )
        if ids[index] == self.tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer does not know {word!r} of the prompt {prompt!r}: use another word")

    def _bind(self, prompt: str, photos: Sequence, kind: str, binding: Sequence) -> list[int]:
        """Token index of each subject of one prompt."""
        if len(photos) != len(binding):
            raise ValueError(f"{len(photos)} subjects but {len(binding)} {kind} for the prompt {prompt!r}: one each")
        if kind == "words":
            return self.token_indices(prompt, find_words(prompt, binding))
        if kind == "spans":
            return self.token_indices(prompt, [(int(start), int(end)) for start, end in binding])
        ids = self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        for index in binding:
            if not 0 < index < len(ids) - 1:
                raise ValueError(f"token {index} is not inside the prompt {prompt!r}: 1 … {len(ids) - 2} are")
            self._check_token(prompt, f"token {index}", index, ids)
        if len(set(binding)) < len(binding):
            raise ValueError(f"two subjects are bound to one token of the prompt {prompt!r}: give each its own")
        return [int(index) for index in binding]

    def _negative(self, negative_prompts: str | Sequence[str] | None, count: int) -> Tensor:
        if negative_prompts is None or isinstance(negative_prompts, str):
            return self.encode_text([negative_prompts or ""]).expand(count, -1, -1)
        if len(negative_prompts) != count:
            raise ValueError(f"{len(negative_prompts)} negative prompts for {count} prompts: give one, or one each")
        return self.encode_text(negative_prompts)

    # ── Images ────────────────────────────────────────────────────────────────────────────────────

    def pixel_values(self, photos: Sequence[Photo]) -> Tensor:
        """Whole photos, padded to squares, as the image encoder wants them: [N, 3, H, W] on its device."""
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError("subjects given as photos need an image_encoder and an image_processor (or give features)")
        squares = [pad_to_square(to_rgb(photo)) for photo in photos]
        pixels = self.image_processor(images=squares, return_tensors="pt")["pixel_values"]
        parameter = next(self.image_encoder.parameters())
        return pixels.to(parameter.device, parameter.dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Image features [N, F]: pooled and projected, through the adapter's copies of the encoder's trained layers.

        With gradient where it is enabled: only those copies get one if the encoder is frozen.
        """
        if self.image_encoder is None:
            raise ValueError("this conditioner has no image_encoder")
        overrides = self.adapter.image_encoder_overrides(pixel_values.device, pixel_values.dtype)
        if overrides:
            output = functional_call(self.image_encoder, overrides, (), {"pixel_values": pixel_values})
        else:
            output = self.image_encoder(pixel_values=pixel_values)
        return output.image_embeds

    @torch.no_grad()
    def _features(self, subjects: Sequence[Sequence]) -> list[list[Tensor]]:
        """Feature [F] of each subject of each prompt; all photos run through the image encoder in one batch."""
        photos = [subject for row in subjects for subject in row if not is_feature(subject)]
        encoded = iter(self.encode_images(self.pixel_values(photos)) if photos else ())
        features = [[s if is_feature(s) else next(encoded) for s in row] for row in subjects]
        width = self.adapter.config["image_feature_dim"]
        for feature in (feature for row in features for feature in row):
            if feature.shape != (width,):
                raise ValueError(f"an image feature has shape {tuple(feature.shape)}, the adapter takes ({width},)")
            if not bool(feature.isfinite().all()):
                raise ValueError("an image feature is not finite: check the photo and the image encoder's precision")
        return features

    def _context(
        self,
        embeds: Tensor,
        features: Sequence[Sequence[Tensor]],
        token: Sequence[Sequence[int]],
        prior_only: Sequence[bool],
        repeats: int,
        recorder: Recorder | None,
    ) -> MoAContext:
        """The conditional half: `embeds` is repeated already, the rest is repeated here."""
        batch, most = len(features), max(map(len, features), default=0)
        width = self.adapter.config["image_feature_dim"]
        feature = torch.zeros(batch, most, width, dtype=embeds.dtype, device=embeds.device)
        index = torch.zeros(batch, most, dtype=torch.int64, device=embeds.device)
        present = torch.zeros(batch, most, dtype=torch.bool, device=embeds.device)
        for row, (row_features, row_tokens) in enumerate(zip(features, token, strict=True)):
            for column, (one, position) in enumerate(zip(row_features, row_tokens, strict=True)):
                feature[row, column] = one
                index[row, column] = position
                present[row, column] = True
        fixed = torch.tensor(prior_only, dtype=torch.bool, device=embeds.device)
        feature, index, present, fixed = (x.repeat_interleave(repeats, 0) for x in (feature, index, present, fixed))
        return MoAContext(embeds, feature, index, present, fixed, recorder, self.personalize_below)


def with_guidance(context: MoAContext, negative: Tensor, null_branch: NullBranch) -> MoAContext:
    """The context of the doubled batch: the unconditional half [B, T, D] in front, without subjects."""
    fixed = context.prior_only | (null_branch == "prior")
    return MoAContext(
        text=torch.cat([negative, context.text]),
        features=torch.cat([torch.zeros_like(context.features), context.features]),
        token=torch.cat([torch.zeros_like(context.token), context.token]),
        present=torch.cat([torch.zeros_like(context.present), context.present]),
        prior_only=torch.cat([fixed, context.prior_only]),
        recorder=context.recorder,
        personalize_below=context.personalize_below,
    )


def check_null_branch(value: str) -> NullBranch:
    if value not in ("expert", "prior"):
        raise ValueError(f"null_branch: {value!r}; it is 'expert' or 'prior'")
    return value  # type: ignore[return-value]


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


def as_batch(
    prompts: str | Sequence[str], subjects: Sequence | None, **places: Sequence | None
) -> tuple[list[str], list[list], list[tuple[str, list]]]:
    """Prompts, subjects of each, and (kind, places) of each, from one prompt with flat lists or a list of each."""
    single = isinstance(prompts, str)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    given = {kind: value for kind, value in places.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"say where the subjects go in one way, not by {' and '.join(given)}")
    if single:
        subjects = None if subjects is None else [as_list(subjects)]
        given = {kind: [as_list(value)] for kind, value in given.items()}
    photos = [list(row) for row in nested("subjects", subjects, len(texts))]
    if not given and any(photos):
        raise ValueError("subjects without a place: give the words, spans or tokens that they are bound to")
    kind, value = next(iter(given.items()), ("words", None))
    return texts, photos, [(kind, list(row)) for row in nested(kind, value, len(texts))]


def as_list(value: Any) -> list:
    """A single photo, feature, word, token or (start, end) pair as a list of one."""
    if isinstance(value, (Image.Image, np.ndarray, Tensor, str, int)):
        return [value]
    values = list(value)
    return [tuple(values)] if len(values) == 2 and isinstance(value, tuple) and isinstance(values[0], int) else values


def nested(name: str, rows: Sequence | None, count: int) -> Sequence[Sequence]:
    """`rows`, checked to be one list a prompt; empty lists for None."""
    if rows is None:
        return [[] for _ in range(count)]
    if len(rows) != count or any(isinstance(row, (str, Image.Image, Tensor, np.ndarray, int)) for row in rows):
        raise ValueError(
            f"{name}: {count} prompts take {count} lists, one a prompt ([] for a prompt without subject); "
            f"got {len(rows)} entries"
        )
    return rows


def find_words(prompt: str, words: Sequence[str]) -> list[Span]:
    """Character span of each word in the prompt, whole words only, whatever the case.

    The k-th time a word is asked for is its k-th occurrence. ValueError, naming the prompt, if there are too few.
    """
    spans: list[Span] = []
    asked: dict[str, int] = {}
    for word in words:
        pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)"
        found = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)] if word.strip() else []
        number = asked.get(word.lower(), 0)
        asked[word.lower()] = number + 1
        if number >= len(found):
            times = "not in" if not found else f"only {len(found)} times in"
            raise ValueError(f"the subject word {word!r} is {times} the prompt {prompt!r}")
        spans.append(found[number])
    return spans


def check_whole_word(prompt: str, start: int, end: int) -> None:
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"the span ({start}, {end}) is empty or outside the prompt {prompt!r}")
    cuts = [at for at in (start, end) if 0 < at < len(prompt) and prompt[at - 1 : at + 1].isalnum()]
    if cuts:
        raise ValueError(f"the span ({start}, {end}), {prompt[start:end]!r}, cuts a word of the prompt {prompt!r}")


# ── Photos ────────────────────────────────────────────────────────────────────────────────────────


def is_feature(subject: Any) -> bool:
    """Whether a subject is a precomputed image feature [F] rather than a photo."""
    return isinstance(subject, Tensor) and subject.ndim == 1


def to_rgb(photo: Photo) -> Image.Image:
    """A photo of any mode as 8-bit RGB, upright (EXIF), transparency on white.

    Arrays and tensors: [H, W, 3] and [3, H, W], uint8 or float in [0, 1]. 16-bit grey is scaled, not clipped.
    ValueError for broken, non-finite or tiny (< 16 pixels a side) images; TypeError for anything else.
    """
    if isinstance(photo, Tensor):
        photo = photo.detach().float().cpu().movedim(0, -1).numpy() if photo.ndim == 3 else photo.numpy()
    if isinstance(photo, np.ndarray):
        photo = from_array(photo)
    if not isinstance(photo, Image.Image):
        raise TypeError(f"a subject is a PIL image, an array or a tensor, not a {type(photo).__name__}")
    if min(photo.size) < MIN_SIDE:
        raise ValueError(f"a subject's photo is {photo.width} × {photo.height} pixels; at least {MIN_SIDE} a side")
    try:
        photo = ImageOps.exif_transpose(photo)
    except OSError as error:
        raise ValueError(f"a subject's photo cannot be read: {error}") from error
    if photo.mode == "F" or photo.mode.startswith("I"):
        return from_array(np.asarray(photo)).convert("RGB")
    if photo.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in photo.info:
        over = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return photo.convert("RGB")


def from_array(array: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, 3] of uint8, 16-bit integers, or floats in [0, 1], as an 8-bit image."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"an image array has shape {array.shape}; [H, W] or [H, W, 3] is wanted")
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a subject's image has NaN or infinite pixels")
    top = 1.0 if np.issubdtype(array.dtype, np.floating) else 65535.0
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"a subject's image has values from {values.min():g} to {values.max():g}; 0 to {top:g} is read")
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def pad_to_square(image: Image.Image) -> Image.Image:
    """The whole image in the middle of a black square (FastComposer)."""
    side = max(image.size)
    return image if image.width == image.height else ImageOps.pad(image, (side, side), color="black")
