"""CausalWan and the noise levels give the numbers of diffusers' Wan transformer and flow-matching scheduler."""

from __future__ import annotations

import pytest
import torch
from tests.builders import close, draw
from torch import Tensor, nn

from hforce.attention.dense import BlockCausal
from hforce.attention.rope import Rope3D
from hforce.models.dit import CausalWan, WanConfig
from hforce.sampler import TRAIN_STEPS, few_step, make_steps, sigma_table

pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

FRAMES, ROWS, COLUMNS = 3, 6, 8  # of a latent clip
SIZES = {  # by head_dim
    24: WanConfig(96, 160, 3, 4, text_dim=32, text_len=40),
    128: WanConfig(256, 192, 2, 2, text_dim=32, text_len=40),
}
NAMES = (  # in diffusers -> in the release (reference, 4.4)
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.to_out.0", "self_attn.o"), ("attn2.to_out.0", "cross_attn.o"),
    ("attn1.to_", "self_attn."), ("attn2.to_", "cross_attn."),
    ("attn1.", "self_attn."), ("attn2.", "cross_attn."),
    (".norm2.", ".norm3."), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"), ("proj_out", "head.head"),
)  # fmt: skip


def released_name(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    table = "modulation" if name.startswith("blocks.") else "head.modulation"
    return name.replace("scale_shift_table", table)


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> tuple[WanTransformer3DModel, CausalWan]:
    """The same random weights in both."""
    c = SIZES[request.param]
    theirs = WanTransformer3DModel(
        num_attention_heads=c.heads, attention_head_dim=c.head_dim, ffn_dim=c.ffn_dim, num_layers=c.layers,
        text_dim=c.text_dim,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(request.param)
    for name, weight in theirs.named_parameters():
        spread = 0.3 if weight.dim() == 1 or "table" in name else weight[0].numel() ** -0.5
        nn.init.normal_(weight, mean=float("norm" in name and "weight" in name), std=spread, generator=generator)
    ours = CausalWan(c)
    ours.load_state_dict({released_name(name): value for name, value in theirs.state_dict().items()})
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def inputs(c: WanConfig) -> tuple[Tensor, Tensor]:
    """Latents [1, F, C, h, w], and text [1, T, text_dim] filled up with zeros."""
    text = torch.zeros(1, c.text_len, c.text_dim)
    text[:, :17] = draw(1, 17, c.text_dim, seed=1)
    return draw(1, FRAMES, c.in_channels, ROWS, COLUMNS), text


def attend_all(c: WanConfig) -> BlockCausal:
    return BlockCausal(Rope3D((ROWS // 2, COLUMNS // 2), c.head_dim), [FRAMES])


@pytest.mark.parametrize("timestep", [1000.0, 937.5, 250.0, 0.0])
def test_one_block_of_frames_is_the_bidirectional_model(pair, timestep):
    theirs, ours = pair
    latents, text = inputs(ours.config)
    expected = theirs(latents.transpose(1, 2), torch.tensor([timestep]), text).sample.transpose(1, 2)
    t = torch.full((1, FRAMES), timestep)
    flow = ours(latents, t, ours.project_text(text[:, :17]), attend_all(ours.config))
    assert float(expected.std()) > 0.3
    close(flow, expected, 1e-4)


def test_a_timestep_per_frame_is_one_per_token_there(pair):
    theirs, ours = pair
    latents, text = inputs(ours.config)
    t = torch.tensor([[1000.0, 625.0, 0.0]])
    per_token = t.repeat_interleave(ROWS * COLUMNS // 4, dim=1)
    expected = theirs(latents.transpose(1, 2), per_token, text).sample.transpose(1, 2)
    close(ours(latents, t, ours.project_text(text), attend_all(ours.config)), expected, 1e-4)


def test_bf16_is_near_float32(pair):
    theirs, ours = pair
    latents, text = inputs(ours.config)
    expected = theirs(latents.transpose(1, 2), torch.tensor([625.0]), text).sample.transpose(1, 2)
    half = CausalWan(ours.config).requires_grad_(False)
    half.load_state_dict(ours.state_dict())
    half, latents, text = half.bfloat16(), latents.bfloat16(), text.bfloat16()
    flow = half(latents, torch.full((1, FRAMES), 625.0), half.project_text(text), attend_all(ours.config))
    assert flow.dtype == torch.bfloat16
    assert float((flow.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_noise_levels_are_those_of_the_flow_matching_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=shift)
    close(sigma_table(shift), scheduler.sigmas, 1e-6)
    close(sigma_table(shift) * TRAIN_STEPS, scheduler.timesteps, 1e-3)


def test_a_step_to_the_clean_latents_is_an_euler_step_to_zero():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=5.0)
    steps = make_steps([1000, 750, 500, 250], 5.0, True)
    for step in steps:
        scheduler.set_timesteps(sigmas=[step.sigma], device="cpu")
        scheduler.timesteps, scheduler.sigmas = torch.tensor([step.timestep]), torch.tensor([step.sigma, 0.0])
        noisy, flow = draw(1, 3, 4, 2, 2), draw(1, 3, 4, 2, 2, seed=1)
        expected = scheduler.step(flow, scheduler.timesteps[0], noisy).prev_sample
        close(few_step(lambda x, t, flow=flow: flow, [step], iter([noisy])), expected, 1e-6)


def test_fresh_noise_is_added_as_the_scheduler_adds_it():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=5.0)
    first, second = make_steps([1000, 500], 5.0, True)
    start, fresh, seen = draw(1, 3, 4, 2, 2), draw(1, 3, 4, 2, 2, seed=1), []

    def flow(x: Tensor, t: float) -> Tensor:
        seen.append(x)
        return x * t / TRAIN_STEPS

    few_step(flow, [first, second], iter([start, fresh]))
    clean = start - first.sigma * start
    close(seen[1], scheduler.scale_noise(clean, torch.tensor([second.timestep]), fresh), 1e-5)
