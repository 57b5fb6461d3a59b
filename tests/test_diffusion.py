"""Diffusion pipelines as they are released: schedulers, precisions, memory. No weights are real."""

import copy
import json
import shutil
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_stable_diffusion, write_images
from test_device import Waits, learn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import grokd
from grokd import Augment, Classifier, Data, Generator, Input, Judge, Problem, Runtime, Store

# scheduler/scheduler_config.json as released. Fields of other schedulers stand in them too: what
# is built from them by another name takes those.
LATENT = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
          "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
          "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd15": LATENT | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"},
    "sd21": LATENT | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0",
                      "prediction_type": "v_prediction"},
    "turbo": LATENT | {"_class_name": "EulerDiscreteScheduler",
                       "_diffusers_version": "0.24.0.dev0", "interpolation_type": "linear",
                       "prediction_type": "epsilon", "sigma_max": None, "sigma_min": None,
                       "timestep_spacing": "trailing", "timestep_type": "discrete",
                       "use_karras_sigmas": False},
}
# What sets the UNet of 2.x apart from that of 1.x (attention_head_dim 8, convolutions).
TWO: dict[str, Any] = {"attention_head_dim": [1, 2], "use_linear_projection": True,
                       "dual_cross_attention": False, "only_cross_attention": False,
                       "upcast_attention": True}
UNETS: dict[str, dict[str, Any]] = {"sd15": {}, "sd21": TWO, "turbo": TWO}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start("float64")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny random pipelines with the schedulers and fields of the released ones."""
    import diffusers

    folders = {}
    for name, config in SCHEDULERS.items():
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        folder = tmp_path_factory.mktemp(name)
        folders[name] = save_stable_diffusion(folder, scheduler, **UNETS[name])
        path = Path(folders[name]) / "scheduler/scheduler_config.json"
        path.write_text(json.dumps(config))
    return folders


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = write_images(tmp_path / "images", per_group=4)
    return grokd.open_store(Data(size=16, crop=12, attribute_column="place",
                                 store=str(folder / "store")), str(folder))


SETTINGS = Augment(steps=2, iterations=3, realism=1.0, in_flight=3, min_teacher=0.6,
                   max_student=0.4, prompt="a {}")


def network(seed: int) -> Classifier:
    model = grokd.build_model("cnn2", "random", 2, Input(), seed).double()
    with torch.no_grad():
        model.head.weight.mul_(20)  # sure of something
    return model.eval().requires_grad_(False)


def judge(store: Store, settings: Augment) -> Judge:
    return Judge([network(0), network(1)], network(2), store, settings)


def make(source: str, settings: Augment, store: Store, runtime: Runtime) -> Generator:
    return Generator(source, settings, store.class_names, store.data.size, runtime)


def records(source: str, store: Store, runtime: Runtime, settings: Augment,
            sources: list[int]) -> dict[int, dict[str, Any]]:
    made = make(source, settings, store, runtime)
    return {r["source"]: r for r in
            grokd.generate(made, judge(store, settings), store, sources, seed=3)}


# Schedulers

DETERMINISTIC = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                 "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler",
                 "DEISMultistepScheduler"]
RANDOM = ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", DETERMINISTIC + RANDOM)
def test_a_sample_starts_alike_before_and_after_others(
    pixels: str, store: Store, runtime: Runtime, scheduler: str, strength: float
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, strength=strength)
    raw, generator = store.raw(np.array([0])), make(pixels, settings, store, runtime)
    first = generator.begin(raw, 7)
    noise = float((first - generator.latents(raw)).std())
    assert noise > 0.1
    with torch.no_grad():
        images = generator.images(first, torch.tensor([0]), [7])
        assert torch.equal(generator.begin(raw, 7), first)
        assert torch.equal(generator.images(first, torch.tensor([0]), [7]), images)


@pytest.mark.parametrize("scheduler", DETERMINISTIC + RANDOM)
def test_result_does_not_depend_on_the_flight(
    pixels: str, store: Store, runtime: Runtime, scheduler: str
) -> None:
    """Samples that refill the flight start after others were sampled, as after a kill."""
    settings = replace(SETTINGS, scheduler=scheduler, strength=0.5)
    sources = [0, 5, 9, 12]
    together = records(pixels, store, runtime, replace(settings, in_flight=4), sources)
    for flight in (1, 3):
        found = records(pixels, store, runtime, replace(settings, in_flight=flight), sources)
        for source in sources:
            assert np.array_equal(found[source]["image"], together[source]["image"])
            assert found[source]["score"] == pytest.approx(together[source]["score"], abs=1e-5)


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
                                       "KDPM2AncestralDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_schedulers_that_ask_twice_in_a_step_are_refused_in_one_line(
    released: dict[str, str], store: Store, runtime: Runtime, scheduler: str, strength: float
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, strength=strength)
    with pytest.raises(Problem, match=rf"{scheduler} .*: choose DDIMScheduler") as refusal:
        make(released["turbo"], settings, store, runtime)
    assert "\n" not in str(refusal.value)


def test_a_scheduler_that_refuses_so_many_steps_is_one_line(
    pixels: str, store: Store, runtime: Runtime
) -> None:
    settings = replace(SETTINGS, scheduler="LCMScheduler", steps=50, strength=0.51)
    with pytest.raises(Problem, match="LCMScheduler refuses 99 steps") as refusal:
        make(pixels, settings, store, runtime)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler",
                                       "UniPCMultistepScheduler"])
@pytest.mark.parametrize("steps, strength, total", [(50, 0.82, 61), (50, 0.49, 103),
                                                    (50, 0.415, 121)])
def test_noise_levels_that_do_not_exist_are_refused(
    released: dict[str, str], store: Store, runtime: Runtime, scheduler: str, steps: int,
    strength: float, total: int
) -> None:
    """Spacing "trailing" rounds its last timestep to -1 for some totals: to the highest noise."""
    settings = replace(SETTINGS, scheduler=scheduler, steps=steps, strength=strength)
    refused = rf"{total} in all, .* down to -1, .* generator's 0 to 999: choose"
    with pytest.raises(Problem, match=refused) as refusal:
        make(released["turbo"], settings, store, runtime)
    assert "\n" not in str(refusal.value)
    for change in ({"steps": steps - 1}, {"strength": strength - 0.015}):
        generator = make(released["turbo"], replace(settings, **change), store, runtime)
        assert float(generator.scheduler.timesteps.min()) >= 0
        assert float(generator.scheduler.timesteps.max()) <= 999


def test_leading_spacing_with_an_offset_cannot_pass_the_last_level(
    released: dict[str, str], store: Store, runtime: Runtime
) -> None:
    settings = replace(SETTINGS, steps=10, strength=0.01)
    with pytest.raises(Problem, match=r"1000 in all, .* up to 1000, .* 0 to 999: choose"):
        make(released["sd15"], settings, store, runtime)


@pytest.mark.parametrize("scheduler", ["", "DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("change", [{}, {"thresholding": True, "sample_max_value": 1.5}])
def test_latents_are_not_clipped_as_pixels_are(
    released: dict[str, str], pixels: str, store: Store, runtime: Runtime, tmp_path: Path,
    scheduler: str, change: dict[str, Any]
) -> None:
    """Latents of Stable Diffusion reach +-4; fields that a configuration lacks clip at +-1."""
    folder = tmp_path / "pipeline"
    shutil.copytree(released["turbo"], folder)
    config = {key: value for key, value in SCHEDULERS["turbo"].items() if key != "clip_sample"}
    if not scheduler:
        config["_class_name"] = "DDIMScheduler"
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace("EulerDiscreteScheduler", "DDIMScheduler"))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | change))
    settings = replace(SETTINGS, scheduler=scheduler, steps=1, strength=1.0)
    generator = make(str(folder), settings, store, runtime)
    assert not generator.scheduler.config.get("clip_sample")
    assert not generator.scheduler.config.get("thresholding")
    z = torch.full((1, 4, 8, 8), 60.0).double()  # alpha is .07 at the last level: 4 and more
    t = generator.scheduler.timesteps[0]
    more = {"generator": torch.Generator()} if scheduler == "DDPMScheduler" else {}
    step: Any = generator.scheduler.step
    clean = step(torch.zeros_like(z), t, z, **more).pred_original_sample
    torch.testing.assert_close(clean, z / generator.scheduler.alphas_cumprod[999].double() ** 0.5)
    of_pixels = make(pixels, settings, store, runtime)
    assert of_pixels.scheduler.config.clip_sample  # as it was trained


def pipeline_images(folder: str, generator: Generator, z: Tensor, settings: Augment,
                    prompt: str) -> Tensor:
    """What the pipeline itself makes of a latent, in 0..1."""
    pipeline: Any = grokd.load_pipeline(folder)
    pipeline.to(torch.float64)
    pipeline.scheduler = copy.deepcopy(generator.scheduler)
    return pipeline(prompt, num_inference_steps=settings.steps, output_type="pt",
                    guidance_scale=settings.guidance_scale,
                    latents=z / pipeline.scheduler.init_noise_sigma).images


@pytest.mark.parametrize("name, scheduler, steps", [
    ("sd15", "", 1), ("sd15", "DDIMScheduler", 6), ("sd15", "EulerDiscreteScheduler", 3),
    ("sd21", "", 4), ("sd21", "DPMSolverMultistepScheduler", 4),
    ("turbo", "", 1), ("turbo", "", 4), ("turbo", "DDIMScheduler", 1),
])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
def test_images_are_those_of_the_pipeline_itself(
    released: dict[str, str], store: Store, runtime: Runtime, name: str, scheduler: str,
    steps: int, guidance_scale: float
) -> None:
    """From noise alone, as text to image: 0 means no guidance too, as SD-Turbo is documented."""
    settings = replace(SETTINGS, scheduler=scheduler, steps=steps, strength=1.0,
                       guidance_scale=guidance_scale)
    generator = make(released[name], settings, store, runtime)
    z = generator.begin(store.raw(np.array([0])), 5)
    sigma = float(generator.scheduler.init_noise_sigma)
    assert float(z.std()) == pytest.approx(sigma, rel=0.2)
    expected = pipeline_images(released[name], generator, z, settings,
                               settings.prompt.format(store.class_names[1]))
    with torch.no_grad():
        images = generator.images(z, torch.tensor([1]), [5])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_a_prompt_may_hold_braces_of_its_own(released: dict[str, str], runtime: Runtime) -> None:
    settings = replace(SETTINGS, prompt="a {x}, {}")
    text: Any = Generator(released["turbo"], settings, ["cat", "dog"], 16, runtime).text
    assert len(text) == 3 and not torch.equal(text[0], text[1])


def test_turbo_starts_at_the_last_level_from_noise_alone(
    released: dict[str, str], store: Store, runtime: Runtime
) -> None:
    settings = replace(SETTINGS, scheduler="", steps=1, strength=1.0)
    generator = make(released["turbo"], settings, store, runtime)
    assert generator.scheduler.timesteps.tolist() == [999]
    starts = [generator.begin(store.raw(np.array([i])), 5) for i in (0, 9)]
    assert torch.equal(*starts)  # nothing of the source
    assert 12 < float(starts[0].std()) < 18  # sigma 14.6


# Precision


def half(precision: str) -> Runtime:
    """Networks in that precision, on the CPU, where accelerate offers no float16."""
    return replace(Runtime.start("float32"), precision=precision)


class FaintJudge(Judge):
    """A judge so sure that its gradients are faint, by another power of two for each sample."""

    faintness = 0

    def gradient(self, images: Tensor, labels: Tensor, keys: Any, iterations: Any) -> Any:
        gradient, figures = super().gradient(images, labels, keys, iterations)
        powers = [2.0 ** (-self.faintness * (1 + key % 2)) for key in keys]
        return gradient * torch.tensor(powers).to(gradient)[:, None, None, None], figures


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_faint_gradients_guide_as_strong_ones(
    pixels: str, store: Store, precision: str
) -> None:
    """float16 holds nothing under 6e-8; a sample whose networks are sure must still move."""
    settings = replace(SETTINGS, max_student=0.0, iterations=2)
    made: dict[int, list[dict[str, Any]]] = {}
    for faintness in (0, 14):  # 6e-5 and 4e-9 of the gradient
        networks = [network(seed).float() for seed in range(3)]
        judges = FaintJudge(networks[:2], networks[2], store, settings)
        judges.faintness = faintness
        generator = make(pixels, settings, store, half(precision))
        assert generator.network_dtype == getattr(torch, precision)
        made[faintness] = list(grokd.generate(generator, judges, store, [0, 5, 9], seed=3))
    for strong, faint in zip(*made.values(), strict=True):
        assert faint["score"] == strong["score"] and faint["iterations"] == strong["iterations"]
        assert np.array_equal(faint["image"], strong["image"])


def test_gradient_of_latents_in_float16_is_that_of_float32(pixels: str, store: Store) -> None:
    gradients = []
    for precision in ("float32", "float16"):
        generator = make(pixels, SETTINGS, store, half(precision))
        z = torch.cat([generator.begin(store.raw(np.array([i])), 7 + i) for i in (0, 9)])
        z.requires_grad_()
        images = generator.images(z, torch.tensor([0, 1]), [7, 16])
        upward = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
        upward *= torch.tensor([1e-9, 1e3])[:, None, None, None]
        gradients.append(grokd.latent_gradient(images, z, upward))
        assert gradients[-1].dtype == torch.float32
    for exact, short in zip(*gradients, strict=True):
        assert float(exact.norm()) > 0
        assert float((short - exact).norm() / exact.norm()) < 0.02


def test_gradients_of_float32_keep_their_bits(pixels: str, store: Store) -> None:
    generator = make(pixels, SETTINGS, store, half("float32"))
    z = generator.begin(store.raw(np.array([0])), 7).requires_grad_()
    upward = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(2)) * 0.3
    plain = torch.autograd.grad(generator.images(z, torch.tensor([0]), [7]), z, upward)[0]
    images = generator.images(z, torch.tensor([0]), [7])
    assert torch.equal(grokd.latent_gradient(images, z, upward), plain)


@pytest.fixture(scope="module")
def overflowing(stable_diffusion: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its autoencoder's activations pass 65504 on the way, as those of Stable Diffusion can."""
    folder = tmp_path_factory.mktemp("overflowing") / "pipeline"
    shutil.copytree(stable_diffusion, folder)
    vae = grokd.load_pipeline(str(folder)).vae
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e6)
        vae.encoder.conv_in.weight.mul_(1e6)
    vae.save_pretrained(folder / "vae")
    return str(folder)


@pytest.mark.parametrize("precision, dtype", [
    ("float16", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32),
])
def test_an_autoencoder_that_overflows_in_float16_is_kept_in_float32(
    overflowing: str, store: Store, precision: str, dtype: torch.dtype
) -> None:
    generator = make(overflowing, SETTINGS, store, half(precision))
    exact = make(overflowing, SETTINGS, store, half("float32"))
    assert generator.unet.dtype == generator.network_dtype and generator.vae.dtype == dtype
    raw, labels = store.raw(np.array([0])), torch.tensor([0])
    z = generator.begin(raw, 3).requires_grad_()
    images = generator.images(z, labels, [3])
    with torch.no_grad():
        expected = exact.images(z, labels, [3])
    assert float((images - expected).abs().max()) < (0.05 if precision == "bfloat16" else 0.01)
    gradient = torch.autograd.grad(images.sum(), z)[0]
    assert torch.isfinite(gradient).all() and float(gradient.abs().max()) > 0
    assert torch.isfinite(generator.realism(raw, labels)).all()


def test_an_autoencoder_mended_for_float16_stays_in_it(
    stable_diffusion: str, overflowing: str, store: Store, tmp_path: Path
) -> None:
    """And if it is not as it says, its images are not taken for images."""
    for source, finite in ((stable_diffusion, True), (overflowing, False)):
        folder = tmp_path / f"{finite}"
        shutil.copytree(source, folder)
        path = folder / "vae/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": False}))
        settings = replace(SETTINGS, guided=False, strength=1.0)
        generator = make(str(folder), settings, store, half("float16"))
        assert generator.vae.dtype == torch.float16
        networks = [network(seed).float() for seed in range(3)]
        judges = Judge(networks[:2], networks[2], store, settings)
        if finite:
            assert list(grokd.generate(generator, judges, store, [0], seed=3))
            continue
        with pytest.raises(Problem, match=r"float16 .*: use --precision bfloat16") as refusal:
            list(grokd.generate(generator, judges, store, [0], seed=3))
        assert "\n" not in str(refusal.value)


# Memory


def batches_of(module: Any, gradients: bool = False) -> list[int]:
    """Sizes of the batches that pass through it from now on, or of those with gradients."""
    seen: list[int] = []

    def note(module: Any, inputs: Any) -> None:
        if torch.is_grad_enabled() or not gradients:
            seen.append(len(inputs[0]))

    module.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_decoder_and_network_are_computed_anew_slice_by_slice(
    stable_diffusion: str, store: Store, runtime: Runtime, guidance_scale: float
) -> None:
    settings = replace(SETTINGS, guidance_scale=guidance_scale)
    generator = make(stable_diffusion, settings, store, runtime)
    raw, labels, keys = store.raw(np.arange(5)), torch.tensor([0, 1, 0, 1, 1]), list(range(5))
    found = []
    for size in (0, 1, 2):
        generator.micro_batch = size
        z = torch.cat([generator.begin(raw[i : i + 1], i) for i in range(5)]).requires_grad_()
        network, decoder = batches_of(generator.unet), batches_of(generator.vae.decoder)
        images = generator.images(z, labels, keys)
        gradient = torch.autograd.grad(images.square().sum(), z)[0]
        found.append((images.detach(), gradient, generator.realism(raw, labels)))
        once = {0: [5], 1: [1] * 5, 2: [2, 2, 1]}[size]
        assert decoder == once + once[::-1]  # and again, backwards, for the gradient
        assert max(network) == max(once)
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"cutouts": 2, "noise": 0.1}])
def test_result_does_not_depend_on_the_slice(
    stable_diffusion: str, store: Store, runtime: Runtime, more: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, in_flight=4, **more)
    made = []
    for size in (1, 3, 4):
        generator, judges = make(stable_diffusion, settings, store, runtime), judge(store, settings)
        generator.micro_batch = judges.micro_batch = size
        seen = batches_of(judges.student.trunk, gradients=True)
        found = grokd.generate(generator, judges, store, [0, 3, 5, 9, 12], seed=3)
        made.append({r["source"]: r for r in found})
        assert max(seen) == size
    for other in made[1:]:
        for source, record in made[0].items():
            assert np.array_equal(record["image"], other[source]["image"])
            assert record["score"] == pytest.approx(other[source]["score"], abs=1e-9)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors alive at once, other than the network's own."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.weights = [parameter.untyped_storage() for parameter in network.parameters()]
        self.alive = {storage._cdata for storage in self.weights}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(results)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return results

    def free(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.bytes -= size


def decoder_of(*widths: int) -> Any:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=min(32, widths[0] // 2),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths))
    return vae.decoder


def unet_of(*widths: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(block_out_channels=widths, norm_num_groups=8, **more)


@pytest.mark.parametrize("network, shape, more", [
    (lambda: decoder_of(16, 32, 64, 64), (1, 4, 16, 16), {}),
    (lambda: unet_of(32, 64, 128, 128, sample_size=32, cross_attention_dim=64),
     (1, 4, 32, 32), {"encoder_hidden_states": (1, 77, 64)}),
    (lambda: grokd.build_model("resnet18", "random", 2, Input(), 0).trunk, (1, 3, 64, 64), {}),
])
def test_estimated_memory_is_the_peak_of_a_gradient(
    network: Any, shape: tuple[int, ...], more: dict[str, tuple[int, ...]]
) -> None:
    model = network().eval().requires_grad_(False)

    def inputs(device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        named = {name: torch.rand(size, device=device) for name, size in more.items()}
        steps = [torch.zeros(1, dtype=torch.int64, device=device)] if more else []
        return [torch.rand(shape, device=device).requires_grad_(), *steps], named

    positional, named = inputs("cpu")
    with PeakMemory(model) as memory:
        output = model(*positional, **named)
        torch.autograd.grad(getattr(output, "sample", output).sum(), positional[0])
    positional, named = inputs("meta")
    estimate = grokd.gradient_need(model, *positional, **named).bytes
    assert estimate == pytest.approx(memory.peak, rel=0.15)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype, gibibytes", [(torch.bfloat16, 2.85), (torch.float32, 5.6)])
def test_decoder_of_stable_diffusion_needs_what_was_measured(
    dtype: torch.dtype, gibibytes: float
) -> None:
    """At 512 pixels, saved bytes counted on a real run; here in a second, without its weights."""
    with torch.device("meta"):
        decoder = decoder_of(128, 256, 512, 512).to(dtype).eval().requires_grad_(False)
    z = torch.empty((1, 4, 64, 64), dtype=dtype, device="meta", requires_grad=True)
    need = grokd.gradient_need(decoder, z)
    assert need.bytes / 2**30 == pytest.approx(gibibytes, rel=0.15)
    assert need.elements == 256 * 512 * 512  # of the last upsampling; 32 images pass torch's bound


def test_slices_are_those_that_memory_holds_and_said_before_anything_is_computed(
    stable_diffusion: str, store: Store, runtime: Runtime, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, in_flight=7, cutouts=1)
    generator, judges = make(stable_diffusion, settings, store, runtime), judge(store, settings)
    networks = [generator.unet, generator.vae.decoder, judges.student.trunk]
    passed = [batches_of(network) for network in networks]
    parts = {name: part.bytes for name, part in generator.sample_needs().items()}
    assert parts.keys() == {"UNet", "decoder"} and min(parts.values()) > 1000
    image = torch.empty((1, 3, 12, 12), device="meta", dtype=torch.float64, requires_grad=True)
    views = 2 * 3 * grokd.gradient_need(judges.student.trunk, image).bytes  # cutout; three networks
    need = max(*parts.values(), views)
    for free, before, size in (
        (1e12, 0, 7), (5.1 * need, 0, 4), (need, 0, 1), (1e12, 3, 3), (5.1 * need, 6, 4)
    ):
        monkeypatch.setattr(grokd, "free_bytes", lambda device, free=free: free)
        grokd.fit_memory(generator, judges, before)
        assert (generator.micro_batch, judges.micro_batch) == (size, size)
        assert f", {size} of 7 in flight at a time: " in capsys.readouterr().out
    monkeypatch.setattr(grokd, "free_bytes", lambda device: need - 1)
    with pytest.raises(Problem, match=r"^Guiding one image needs .* GiB of memory \(UNet .*, dec"):
        grokd.fit_memory(generator, judges)
    judges.settings = replace(settings, guided=False)
    grokd.fit_memory(generator, judges)
    assert " GiB for an image, at most (" in capsys.readouterr().out
    judges.settings = replace(settings, micro_batch=3)
    monkeypatch.setattr(grokd, "free_bytes", lambda device: 1e12)
    grokd.fit_memory(generator, judges)
    assert generator.micro_batch == 3
    largest = max(part.elements for part in grokd.guidance_needs(generator, judges).values())
    monkeypatch.setattr(grokd, "MOST_ELEMENTS", 3 * largest - 1)
    grokd.fit_memory(generator, judges)
    assert generator.micro_batch == judges.micro_batch == 2
    guided = replace(settings, guidance_scale=4.0)
    twice = make(stable_diffusion, guided, store, runtime).sample_needs()
    assert twice["UNet"].bytes == pytest.approx(2 * parts["UNet"], rel=0.01)
    assert [len(seen) for seen in passed] == [1 + 10, 1 + 10, 1 + 10]  # meta tensors alone
    assert not any(p.is_meta for network in networks for p in network.parameters())


def test_all_samples_pass_at_once_where_memory_holds_them(
    pixels: str, store: Store, runtime: Runtime
) -> None:
    generator, judges = make(pixels, SETTINGS, store, runtime), judge(store, SETTINGS)
    grokd.fit_memory(generator, judges)
    assert generator.micro_batch == judges.micro_batch == SETTINGS.in_flight


@pytest.mark.parametrize("place", ["images", "gradient"])
def test_a_full_gpu_is_tried_with_half_as_many_samples(
    pixels: str, store: Store, runtime: Runtime, place: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are what they would be with as many from the start; one too many is told."""
    settings, sources = replace(SETTINGS, in_flight=4), [0, 1, 2, 3, 5]
    expected = records(pixels, store, runtime, settings, sources)
    generator, judges = make(pixels, settings, store, runtime), judge(store, settings)
    limit, gradient_of, passed = [2], judges._gradient, list[int]()

    def checked(count: int) -> None:
        passed.append(count)
        if count > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def gradient(images: Tensor, *rest: Any) -> Any:
        checked(len(images))
        return gradient_of(images, *rest)

    if place == "images":
        generator.unet.register_forward_pre_hook(lambda module, args: checked(len(args[0])))
    else:
        monkeypatch.setattr(judges, "_gradient", gradient)
    flight = grokd.Flight(sources)
    found = {r["source"]: r for r in grokd.generate(generator, judges, store, flight, seed=3)}
    assert capsys.readouterr().out.count("memory: full, so 2 samples at a time from now on") == 1
    assert passed.count(4) == 1 and max(passed[passed.index(4) + 1 :]) == 2
    assert generator.micro_batch == judges.micro_batch == flight.micro_batch == 2
    for source, record in expected.items():
        assert (found[source].pop("image") == record.pop("image")).all()
        assert found[source] == pytest.approx(record, nan_ok=True)
    limit[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        next(grokd.generate(generator, judges, store, sources, seed=3))
    assert passed[-1] == 1


def test_a_folder_with_half_precision_alone_is_loaded(
    released: dict[str, str], store: Store, runtime: Runtime, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    settings = replace(SETTINGS, scheduler="DDIMScheduler")
    whole = StableDiffusionPipeline.from_pretrained(released["sd15"], safety_checker=None)
    whole.save_pretrained(tmp_path / "half", variant="fp16")
    assert not [*(tmp_path / "half").rglob("diffusion_pytorch_model.safetensors")]
    shown = [
        make(folder, settings, store, runtime).denoise(
            torch.ones(1, 4, 8, 8).double(), torch.tensor(1), torch.tensor([1]))
        for folder in (released["sd15"], str(tmp_path / "half"))
    ]
    assert torch.equal(*shown)


# Gradients by the schedulers

# These cast the sample to float32 in every step, whatever it was; the others keep its precision.
SINGLE = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
          "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("scheduler", DETERMINISTIC + RANDOM)
def test_gradient_of_every_scheduler_matches_finite_differences(
    pixels: str, store: Store, runtime: Runtime, scheduler: str, strength: float
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, strength=strength, steps=3)
    generator, labels = make(pixels, settings, store, runtime), torch.tensor([0])
    z = generator.begin(store.raw(np.array([0])), 5).requires_grad_()
    random = torch.Generator().manual_seed(1)
    upward = torch.randn((1, 3, 16, 16), generator=random).double()
    direction = torch.randn(z.shape, generator=random).double()

    def value(z: Tensor) -> Tensor:
        return (generator.images(z, labels, [5]) * upward).sum()

    gradient = torch.autograd.grad(value(z), z)[0]
    assert gradient.dtype == torch.float64
    expected = float((gradient * direction).sum())
    assert abs(expected) > 0.1

    @torch.no_grad()
    def slope(step: float) -> float:
        return float(value(z + step * direction) - value(z - step * direction)) / (2 * step)

    if scheduler in SINGLE:
        assert slope(5e-4) == pytest.approx(expected, rel=5e-3)
        assert slope(1e-6) != pytest.approx(expected, rel=1e-5)  # lost in rounding
    else:
        assert slope(1e-6) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name, scheduler", [
    ("sd15", "DDIMScheduler"), ("sd15", "UniPCMultistepScheduler"),
    ("sd21", "DPMSolverMultistepScheduler"), ("sd21", ""), ("turbo", ""),
    ("turbo", "LCMScheduler"),
])
def test_gradients_in_half_precision_point_where_those_of_float32_do(
    released: dict[str, str], store: Store, name: str, scheduler: str, precision: str
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, steps=3, strength=0.5, guidance_scale=2.0)
    gradients, images = [], []
    for kind in ("float32", precision):
        generator = make(released[name], settings, store, half(kind))
        z = generator.begin(store.raw(np.array([0])), 5).requires_grad_()
        images.append(generator.images(z, torch.tensor([1]), [5]))
        upward = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(1)) * 1e-7
        gradients.append(grokd.latent_gradient(images[-1], z, upward).flatten())
        assert gradients[-1].dtype == torch.float32
    assert float((images[0] - images[1]).abs().max()) < 0.05
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.98
    assert 0.9 < float(gradients[1].norm() / gradients[0].norm()) < 1.1


@pytest.mark.parametrize("scheduler", ["utils", "UNet2DModel", "IPNDMScheduler",
                                       "DPMSolverSDEScheduler"])
def test_what_is_no_scheduler_of_images_is_refused(
    pixels: str, store: Store, runtime: Runtime, scheduler: str
) -> None:
    with pytest.raises(Problem, match=f"no scheduler '{scheduler}'"):
        make(pixels, replace(SETTINGS, scheduler=scheduler), store, runtime)


def test_free_memory_counts_what_torch_holds_in_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for name, value in (("memory_reserved", 7), ("memory_allocated", 3), ("mem_get_info", (5, 9))):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert grokd.free_bytes(gpu) == 5 + 7 - 3
    assert 2**28 < grokd.free_bytes(torch.device("cpu")) < 2**50


def test_no_step_of_the_generators_training_waits(store: Store, runtime: Runtime) -> None:
    """Noise, levels and images go to the device without a wait for it."""
    section = grokd.Diffusion(widths=(8, 8), batch_size=4, num_timesteps=50)
    ctx: Any = SimpleNamespace(recipe=SimpleNamespace(diffusion=section), store=store)
    artefact = grokd.Artefact("generator", store.folder.parent / "done.json", "", {}, {})
    training = grokd.Training(grokd.diffusion_job(artefact, ctx, runtime), runtime)
    ahead = [*islice(training.batches(0), 3)]
    learn(training, 1)  # the scheduler's tables go to the device, once
    drawn, noise_like = [], grokd.noise_like

    def noted(*args: Any) -> Tensor:
        drawn.append(args)
        return noise_like(*args)

    # AdamW counts its steps on the host, so that what follows the gradients is left out.
    with pytest.MonkeyPatch.context() as patch, Waits(patch) as waits:
        patch.setattr(grokd, "noise_like", noted)
        for batch, parts in ahead:
            training._accumulate(0, len(batch), parts[0])
    assert waits.seen == []
    assert len(drawn) == len(ahead) == 3  # once a step, for the forward pass and the loss
