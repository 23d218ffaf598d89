"""What a U-Net pass and a training step cost, all variants side by side: `snakemake benchmark`.

Every variant runs on the same random weights, in turns, so that what else the machine does falls on all
alike; the median over the turns is kept. Memory is that of a process that runs one variant and nothing else.

    pass            one sample through the U-Net
    guided step     both halves of classifier-free guidance, one sample each
    training step   forward, losses, backward, AdamW; text and image features come precomputed

The floor is the plain pass and one more of its attention modules: no dense mixture of two experts costs less.
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from moa import gpus
from moa.adapter import MoAAdapter
from moa.attention import MoAContext, Recorder
from moa.baselines.fastcomposer import FastComposer, Localization, localize
from moa.conditioner import NullBranch, with_guidance
from moa.files import write_atomically
from moa.layers import attention_layers, select_loss_layers
from moa.losses import masked_loss, object_loss, router_loss
from moa.machine import peak_memory, processor

T = TypeVar("T")
Run = Callable[[], Any]

SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
"""The U-Net of Stable Diffusion 1.5, as arguments of UNet2DConditionModel."""

TOKENS, SUBJECT_TOKEN = 77, 2
IMAGE_DIM = 768  # channels of CLIP ViT-L's projected features, which FastComposer and MoA read
IP_IMAGE_DIM, IP_TOKENS = (
    1024,
    4,
)  # of the IP-Adapter for SD1.5: CLIP ViT-H's features, and tokens made of them
TIMESTEP = 500
THRESHOLD = 0.1  # τ of the sparse variants; the weights that they see are .98 and 2e-9
LOSS_WEIGHT = (
    1e-4  # λ_r, λ_o, and that of FastComposer's localization, which is 1e-3 there and costs the same
)
PRECISION = {"cpu": torch.float32, "cuda": torch.float16}  # of a pass; training is mixed with bfloat16
COLUMNS = (
    "device",
    "resolution",
    "kind",
    "variant",
    "seconds",
    "reference",
    "ratio",
    "cpu_seconds",
    "cpu_ratio",
    "teraflops",
    "flops_ratio",
    "peak_mb",
    "repeats",
    "precision",
    "torch",
    "processor",
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of the stage `benchmark-unet`."""

    sizes: tuple[int, ...] = (256, 512)  # pixels, of the passes and guided steps
    repeats: int = 5  # turns
    training_size: int = 256  # pixels
    training_repeats: int = 3  # turns; 0 leaves training out: FastComposer's step needs 20 GB of memory
    guided: bool = True  # whether guided steps are measured

    def __post_init__(self) -> None:
        for size in (*self.sizes, self.training_size):
            if size < 128 or size % 128:
                raise ValueError(f"{size} pixels: sizes are multiples of 128, to be halved until the middle")
        if self.repeats < 1 or self.training_repeats < 0:
            raise ValueError(f"repeats ({self.repeats}) must be at least 1, training_repeats at least 0")


# ── What all variants share ───────────────────────────────────────────────────────────────────


class Bench:
    """One architecture, device and size: U-Nets that share one set of random weights, and their inputs."""

    def __init__(self, architecture: Mapping[str, Any], device: str, size: int, dtype: torch.dtype) -> None:
        """size: of the images, in pixels."""
        self.architecture, self.device, self.size, self.dtype = architecture, device, size, dtype
        torch.manual_seed(0)
        self.weights = self._random_unet().state_dict()
        width = architecture["cross_attention_dim"]
        self.latents = self.random(1, architecture["in_channels"], size // 8, size // 8)
        self.text, self.negative = self.random(1, TOKENS, width), self.random(1, TOKENS, width)
        self.features = self.random(1, 1, IMAGE_DIM)
        self.token = torch.full((1, 1), SUBJECT_TOKEN, device=device)
        self.timestep = torch.tensor([TIMESTEP], device=device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def _random_unet(self) -> UNet2DConditionModel:
        """In the wanted type from the start: what is converted needs memory that the variant does not."""
        unet = nn.Module.to(self._empty_unet(), self.dtype).to_empty(device=self.device)
        for module in unet.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return unet

    def _empty_unet(self) -> UNet2DConditionModel:
        with torch.device("meta"):
            return UNet2DConditionModel(**self.architecture)

    def unet(self) -> UNet2DConditionModel:
        """A frozen U-Net on the weights that all share."""
        unet = self._empty_unet()
        unet.load_state_dict(self.weights, assign=True)
        return unet.requires_grad_(False).eval()

    def context(
        self, guided: bool = False, null_branch: NullBranch = "expert", **settings: Any
    ) -> MoAContext:
        """One subject; guided: with the unconditional half in front."""
        one = MoAContext(
            text=self.text,
            features=self.features,
            token=self.token,
            present=torch.ones_like(self.token, dtype=torch.bool),
            prior_only=torch.zeros(1, dtype=torch.bool, device=self.device),
            **settings,
        )
        return with_guidance(one, self.negative, null_branch) if guided else one

    def forward(
        self, unet: UNet2DConditionModel, guided: bool = False, text: Tensor | None = None, **conditions: Any
    ) -> Run:
        """One pass, or both halves of a guided step, without gradients; text: None takes the plain one."""
        latents, timestep, text = self.latents, self.timestep, self.text if text is None else text
        if guided:
            latents, timestep = torch.cat([latents] * 2), torch.cat([timestep] * 2)
            text = torch.cat([self.negative, text])
        return torch.no_grad()(partial(unet, latents, timestep, text, **conditions))


# ── Variants: from a bench to what one turn runs ──────────────────────────────────────────────


def plain(bench: Bench, guided: bool = False) -> Run:
    """The prior's U-Net."""
    return bench.forward(bench.unet(), guided)


def floor(bench: Bench) -> Run:
    """The plain pass, then each of its attention modules once more on the same inputs."""
    unet = bench.unet()
    calls: list[Run] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(partial(module, *args, **kwargs))

    hooks = [
        attn.register_forward_pre_hook(keep, with_kwargs=True) for attn in attention_layers(unet).values()
    ]
    forward = bench.forward(unet)
    forward()
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def run() -> None:
        forward()
        for call in calls:
            call()

    return run


def ip_adapter(bench: Bench) -> Run:
    """IP-Adapter's image tokens in every cross-attention, as diffusers loads and runs it."""
    unet = bench.unet()
    unet._load_ip_adapter_weights([ip_adapter_weights(bench)])
    return bench.forward(unet, added_cond_kwargs={"image_embeds": [bench.random(1, 1, IP_IMAGE_DIM)]})


def ip_adapter_weights(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """Random weights in the layout of IP-Adapter's released file for SD1.5."""
    width = bench.architecture["cross_attention_dim"]
    layers = attention_layers(bench._empty_unet())
    cross = [name for name in layers if layers[name].is_cross_attention]
    cross.sort(key=lambda name: name.startswith("mid_block"))  # the file counts down, up, middle
    numbered = {2 * n + 1: name for n, name in enumerate(cross)}
    projection = {
        "proj.weight": bench.random(IP_TOKENS * width, IP_IMAGE_DIM),
        "proj.bias": bench.random(IP_TOKENS * width),
        "norm.weight": bench.random(width),
        "norm.bias": bench.random(width),
    }
    attention = {
        f"{n}.to_{what}_ip.weight": bench.random(layers[name].to_k.out_features, width) / math.sqrt(width)
        for n, name in numbered.items()
        for what in ("k", "v")
    }
    return {"image_proj": projection, "ip_adapter": attention}


def fastcomposer(bench: Bench) -> Run:
    """FastComposer's fused text, made once an image, in a plain pass."""
    model = fastcomposer_model(bench, bench.unet()).requires_grad_(False)
    localize(model.unet, [], explicit=False)
    return bench.forward(model.unet, text=fused_text(bench, model))


def fastcomposer_model(bench: Bench, unet: UNet2DConditionModel) -> FastComposer:
    """Around `unet`; the image encoder has run before and takes no memory."""
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=IMAGE_DIM))
    model = FastComposer(unet, encoder, image_encoder_layers=0)
    model.fusion.to(bench.device, bench.dtype)
    return model


def fused_text(bench: Bench, model: FastComposer) -> Tensor:
    slots = torch.zeros(1, 2, dtype=torch.int64, device=bench.device)
    return model.fuse(bench.text, bench.token, slots, bench.features[:, 0])


def moa(bench: Bench, guided: bool = False, null_branch: NullBranch = "expert", sparse: bool = False) -> Run:
    """The mixture; sparse: with a quarter of the pixels active in every layer."""
    unet = bench.unet()
    adapter = MoAAdapter.from_unet(unet, IMAGE_DIM).requires_grad_(False)
    adapter.install(unet)
    if sparse:
        for name in adapter.sizes:
            adapter.mixture(name).router.register_forward_hook(a_quarter)
    context = bench.context(guided, null_branch, sparse_threshold=THRESHOLD if sparse else 0.0)
    return bench.forward(unet, guided, cross_attention_kwargs={"moa": context})


def a_quarter(router: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
    """A hook: in place of a router's logits [B, P, 2], after it ran, those that choose the middle square.

    Its side is half the picture's, so that exactly a quarter of the pixels is personalized.
    """
    chosen = middle_square(math.isqrt(logits.shape[-2]), logits.device)
    return torch.where(
        chosen[:, None], logits.new_tensor([0.0, 4.0]), logits.new_tensor([20.0, 0.0])
    ).expand_as(logits)


@cache
def middle_square(side: int, device: torch.device) -> Tensor:
    """[side²] bool, True in the middle square of half the side."""
    chosen = torch.zeros(side, side, dtype=torch.bool, device=device)
    start = (side - side // 2) // 2
    chosen[start : start + side // 2, start : start + side // 2] = True
    return chosen.flatten()


def train_moa(bench: Bench) -> Run:
    """Eq. 11 on the adapter; the U-Net is frozen, in half precision, and has no optimizer state."""
    unet = bench.unet()
    adapter = MoAAdapter.from_unet(unet, IMAGE_DIM).float()
    adapter.install(unet)
    recorder = Recorder(adapter.loss_layers)
    context = bench.context(recorder=recorder)

    def losses(noise: Tensor, mask: Tensor) -> Tensor:
        answer = unet(
            bench.latents, bench.timestep, bench.text, cross_attention_kwargs={"moa": context}
        ).sample
        attention = object_loss(recorder.attention, mask, context.present)
        return masked_loss(answer, noise, mask) + LOSS_WEIGHT * (
            router_loss(recorder.router, mask) + attention
        )

    return training_step(bench, list(adapter.parameters()), losses)


def train_fastcomposer(bench: Bench) -> Run:
    """FastComposer's losses on the whole U-Net, whose weights are single precision, for they are trained."""
    model = fastcomposer_model(bench, bench.unet())
    model.float()
    parameters = list(model.trained().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    cross = [name for name, attn in attention_layers(model.unet).items() if attn.is_cross_attention]
    localize(model.unet, [name for name in select_loss_layers(model.unet) if name in cross], explicit=False)

    def losses(noise: Tensor, mask: Tensor) -> Tensor:
        seen = Localization(bench.token)
        text = fused_text(bench, model)
        conditions = {"localization": seen}
        answer = model.unet(bench.latents, bench.timestep, text, cross_attention_kwargs=conditions).sample
        localization = object_loss(seen.attention, mask, torch.ones_like(bench.token, dtype=torch.bool))
        return masked_loss(answer, noise, mask) + LOSS_WEIGHT * localization

    return training_step(bench, parameters, losses)


def training_step(
    bench: Bench, parameters: Sequence[nn.Parameter], losses: Callable[[Tensor, Tensor], Tensor]
) -> Run:
    """Forward under autocast, backward, clipping and AdamW on `parameters`."""
    noise = torch.randn_like(bench.latents)
    mask = torch.zeros_like(bench.latents[:, :1])
    mask[..., : mask.shape[-1] // 2] = 1
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def run() -> None:
        with torch.autocast(bench.device, torch.bfloat16):
            loss = losses(noise, mask)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


@dataclass(frozen=True)
class Variant:
    """One row of the table: what to run, and the row that it is compared with."""

    kind: str
    name: str
    build: Callable[[Bench], Run]
    half: bool = False  # weights in bfloat16, whatever the device

    @property
    def reference(self) -> str:
        return "fastcomposer" if self.kind == "training step" else "plain"


NULL_PRIOR: dict[str, Any] = {"guided": True, "null_branch": "prior"}
PASSES = (
    Variant("pass", "plain", plain),
    Variant("pass", "floor", floor),
    Variant("pass", "ip_adapter", ip_adapter),
    Variant("pass", "fastcomposer", fastcomposer),
    Variant("pass", "moa_dense", moa),
    Variant("pass", "moa_sparse", partial(moa, sparse=True)),
)
GUIDED = (
    Variant("guided step", "plain", partial(plain, guided=True)),
    Variant("guided step", "moa_dense", partial(moa, guided=True)),
    Variant("guided step", "moa_null_prior", partial(moa, **NULL_PRIOR)),
    Variant("guided step", "moa_sparse_null_prior", partial(moa, **NULL_PRIOR, sparse=True)),
)
TRAINING = (
    Variant("training step", "fastcomposer", train_fastcomposer),
    Variant("training step", "moa", train_moa, half=True),
)


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────


def run(config: BenchmarkConfig, output: Path) -> None:
    """Measure on the CPU, and on a GPU if there is one, and write the table."""
    gpus.take_one()
    rows: list[dict[str, Any]] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for variants, size, repeats in comparisons(config):
            rows += compare(SD15, variants, device, size, repeats)
    write_atomically(output, lambda part: write_table(part, rows))


def comparisons(config: BenchmarkConfig) -> Iterator[tuple[Sequence[Variant], int, int]]:
    """(variants, pixels, turns) of each comparison."""
    for size in config.sizes:
        yield PASSES, size, config.repeats
        if config.guided:
            yield GUIDED, size, config.repeats
    if config.training_repeats:
        yield TRAINING, config.training_size, config.training_repeats


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def compare(
    architecture: Mapping[str, Any], variants: Sequence[Variant], device: str, size: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows of the table for variants of one kind."""
    about = f"{device}, {size} pixels, {variants[0].kind}"
    peaks = [
        alone(peak, architecture, variant, device, size) for variant in tqdm(variants, f"memory: {about}")
    ]
    measured = alone(times, architecture, variants, device, size, repeats)
    base = measured[next(n for n, v in enumerate(variants) if v.name == v.reference)]
    rows = []
    for variant, memory, one in zip(variants, peaks, measured, strict=True):
        rows.append(
            {
                "device": device,
                "resolution": size,
                "kind": variant.kind,
                "variant": variant.name,
                "seconds": f"{one.seconds:.4g}",
                "reference": variant.reference,
                "ratio": f"{one.seconds / base.seconds:.3f}",
                "cpu_seconds": f"{one.cpu_seconds:.4g}",
                "cpu_ratio": f"{one.cpu_seconds / base.cpu_seconds:.3f}",
                "teraflops": f"{one.flops / 1e12:.4g}",
                "flops_ratio": f"{one.flops / base.flops:.3f}",
                "peak_mb": round(memory / 1e6),
                "repeats": repeats,
                "precision": str(dtype_of(variant, device)).removeprefix("torch."),
                "torch": torch.__version__,
                "processor": processor(device),
            }
        )
    return rows


def dtype_of(variant: Variant, device: str) -> torch.dtype:
    """Of the U-Net's weights."""
    if variant.kind == "training step":
        return torch.bfloat16 if variant.half else torch.float32
    return PRECISION[device]


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """The function's answer, from a process of its own.

    All measuring is done in such: Linux counts a parent's peak as its children's too, so it must stay small.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak(architecture: Mapping[str, Any], variant: Variant, device: str, size: int) -> int:
    """The most memory, in bytes, of this process (CPU: resident, with libraries; GPU: allocated there)."""
    turn = variant.build(Bench(architecture, device, size, dtype_of(variant, device)))
    for _ in range(2):  # gradients and the optimizer's state meet in the second training step
        turn()
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


@dataclass(frozen=True)
class Times:
    """One turn of a variant: medians, and what does not vary."""

    seconds: float  # by the clock
    cpu_seconds: float  # that the CPU's cores worked
    flops: int


def times(
    architecture: Mapping[str, Any], variants: Sequence[Variant], device: str, size: int, repeats: int
) -> list[Times]:
    """Of each variant; they run in turns."""
    dtypes = [dtype_of(variant, device) for variant in variants]
    benches = {dtype: Bench(architecture, device, size, dtype) for dtype in dict.fromkeys(dtypes)}
    turns = [variant.build(benches[dtype]) for variant, dtype in zip(variants, dtypes, strict=True)]
    flops = [operations(turn) for turn in turns]  # warms up, too
    taken: list[list[tuple[float, float]]] = [[] for _ in turns]
    for _ in tqdm(range(repeats), f"time: {device}, {size} pixels, {variants[0].kind}"):
        for seconds, turn in zip(taken, turns, strict=True):
            seconds.append(clocked(turn, device))
    columns = [tuple(zip(*pairs, strict=True)) for pairs in taken]
    return [
        Times(statistics.median(clock), statistics.median(cpu), count)
        for (clock, cpu), count in zip(columns, flops, strict=True)
    ]


def clocked(turn: Run, device: str) -> tuple[float, float]:
    """Seconds by the clock, and seconds that the CPU's cores worked for this process."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    clock, cpu = time.perf_counter(), time.process_time()
    turn()
    synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


def operations(turn: Run) -> int:
    """Floating-point operations of matrix products and convolutions in one turn, a product and a sum each."""
    aten = torch.ops.aten
    on_cpu = {  # PyTorch's counter knows the attention of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        turn()
    return counter.get_total_flops()
