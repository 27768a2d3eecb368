"""Numbers of the public reference (Self-Forcing, TAEHV), recorded with tiny random weights, are reproduced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hforce.attention.dense import BlockCausal, Kernel, plain_softmax, sdpa
from hforce.attention.rope import Rope3D, turn
from hforce.cache.heads import HeadCache
from hforce.cache.policies import make_policy
from hforce.cache.roles import HeadRole, RoleMap
from hforce.geometry import Geometry
from hforce.models.dit import Block, CausalWan, RMSNorm, WanConfig, sinusoid
from hforce.models.taehv import TAEHV, TaehvConfig
from hforce.sampler import Step, make_steps, sigma_at, sigma_table, warp
from hforce.stream import Sampling, Stream, Take

GOLDEN = Path(__file__).parent / "data" / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())
PIPELINES = sorted(n.removesuffix(".safetensors") for n in INDEX["files"] if ".pipeline_" in n)
ROLLOUTS = sorted(n.removesuffix(".safetensors") for n in INDEX["files"] if ".rollout_" in n)
MODELS = ("tiny24", "tiny128")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def model(name: str) -> CausalWan:
    c = INDEX["configs"][name]
    sizes = WanConfig(c["dim"], c["ffn_dim"], c["num_layers"], c["num_heads"], c["text_dim"], c["text_len"])
    built = CausalWan(sizes)
    built.load_state_dict({key: value.float() for key, value in golden(f"{name}.weights").items()})
    return built.eval().requires_grad_(False)


def geometry(wan: CausalWan, rows: int, columns: int, chunk: int = 3) -> Geometry:
    c = wan.config
    return Geometry(c.layers, c.heads, c.head_dim, (rows // 2, columns // 2), chunk)


def cache_like(settings: dict[str, int], wan: CausalWan, chunk: int) -> HeadCache:
    """The reference's cache: a window that counts the chunk, the first frames of it fixed, absolute positions."""
    window, sink = settings["local_attn_size"], settings["sink_size"]
    options: dict[str, object] = {"sink": sink, "window": window - chunk - sink} if window > 0 else {"frames": 21}
    policy = make_policy("sink" if window > 0 else "full", positions="true", **options)
    roles = RoleMap.uniform(HeadRole.MEMORY, wan.config.layers, wan.config.heads)
    return HeadCache(geometry(wan, *settings["latent_hw"], chunk), roles, {HeadRole.MEMORY: policy})


@pytest.mark.parametrize("name", MODELS)
def test_single_chunk_with_a_timestep_per_frame(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wan, data = model(name), golden(f"{name}.single_chunk")
    seen: dict[str, Tensor] = {}
    hooks = []
    modules = {part: part for part in ("patch_embedding", "text_embedding", "head", "blocks.0.ffn")}
    for part, module in {**modules, "blocks.0.self_attn": "blocks.0.self_attn.o"}.items():
        hook = wan.get_submodule(module).register_forward_hook(lambda _, __, out, part=part: seen.update({part: out}))
        hooks.append(hook)

    def watch(block: Block, *inputs: Tensor) -> Tensor:
        out = Block.after(block, *inputs)
        seen.setdefault("blocks.0", out)
        return out

    monkeypatch.setattr(wan, "after", watch)
    x = data["in.x"].transpose(1, 2)
    g = geometry(wan, *x.shape[-2:])
    flow = wan(x, data["in.t"], wan.project_text(data["in.context"]), BlockCausal(Rope3D(g.grid, g.head_dim), [3]))
    for hook in hooks:
        hook.remove()
    close(flow.transpose(1, 2), data["out.flow"])
    recorded = {part: "mid." + part.replace("blocks.0", "block0") for part in seen}
    compared = [part for part, key in recorded.items() if key in data]
    assert len(compared) >= 3
    for part in compared:
        close(seen[part].reshape(data[recorded[part]].shape), data[recorded[part]])


@pytest.mark.parametrize("kernel", [sdpa, plain_softmax])
@pytest.mark.parametrize(
    ("name", "blocks", "window"),
    [("block3", [3] * 3, 0), ("block3_local6", [3] * 3, 6), ("first1_block3", [1, 3, 3], 0)],
)
def test_whole_clip_with_block_causal_mask(name: str, blocks: list[int], window: int, kernel: Kernel) -> None:
    wan, data = model("tiny24"), golden("tiny24.full_sequence")
    attend = BlockCausal(Rope3D((3, 4), 24), blocks, window, kernel=kernel)
    text = wan.project_text(data[f"{name}.context"])
    flow = wan(data[f"{name}.x"].transpose(1, 2), data[f"{name}.t"], text, attend)
    close(flow.transpose(1, 2), data[f"{name}.flow"])


def test_teacher_forcing() -> None:
    wan, data = model("tiny24"), golden("tiny24.full_sequence")
    clean, noisy, t = (data[f"teacher_forcing.{key}"] for key in ("clean_x", "x", "t"))
    attend = BlockCausal(Rope3D((3, 4), 24), [3, 3], noisy=1)
    both, times = torch.cat([clean[:, :, :3], noisy], dim=2).transpose(1, 2), torch.cat([t[:, :3] * 0, t], dim=1)
    flow = wan(both, times, wan.project_text(data["teacher_forcing.context"]), attend)
    close(flow[:, 3:].transpose(1, 2), data["teacher_forcing.flow"])


def test_bidirectional_base_model_is_one_block() -> None:
    wan, data = model("tiny24"), golden("tiny24.full_sequence")
    x, t = data["bidirectional.x"].transpose(1, 2), data["bidirectional.t"][:, None].expand(-1, 5)
    attend = BlockCausal(Rope3D((3, 4), 24), [5])
    flow = wan(x, t, wan.project_text(data["bidirectional.context"]), attend)
    close(flow.transpose(1, 2), data["bidirectional.flow"])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout_through_the_cache(name: str) -> None:
    settings, data = INDEX["files"][f"{name}.safetensors"], golden(name)
    wan = model(settings["config"])
    memory = cache_like(settings, wan, settings["chunk"])
    text = wan.project_text(data["in.context"])
    for number in range(settings["chunks"]):
        for kind, timestep in (("noisy", 625.0), ("clean", 0.0)):
            x = data[f"chunk{number}.x_{kind}"].transpose(1, 2)
            flow = wan(x, torch.full(x.shape[:2], timestep), text, memory.attend)
            close(flow.transpose(1, 2), data[f"chunk{number}.flow_{kind}"])
        memory.advance()


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_replays(name: str) -> None:
    settings, data = INDEX["files"][f"{name}.safetensors"], golden(name)
    wan, chunk = model(settings["config"]), settings["num_frame_per_block"]
    steps = make_steps(settings["denoising_step_list"], settings["timestep_shift"], settings["warp_denoising_step"])
    close(torch.tensor([s.timestep for s in steps]), data["in.denoising_steps"].float(), 1e-3)
    is_alone = settings["independent_first_frame"] and not settings["initial_frames"]
    sampling = Sampling(steps, first_frames=int(is_alone), commit_timestep=settings["context_noise"])
    sizes = ([1] if is_alone else []) + [chunk] * ((settings["noise_frames"] - int(is_alone)) // chunk)
    for item in range(settings["batch"]):

        def recorded(number: int, shape: object, item: int = item) -> Iterator[Tensor]:
            begin, draws = sum(sizes[:number]), len(steps) - 1
            yield data["in.noise"][item : item + 1, begin : begin + sizes[number]]
            for draw in range(number * draws, (number + 1) * draws):
                renoise = data[f"in.renoise{draw:02}"].unflatten(0, (settings["batch"], -1))
                yield renoise[item : item + 1]

        stream = Stream(wan, cache_like(settings, wan, chunk), sampling, (16, *settings["latent_hw"]), recorded)
        given = data["in.initial_latent"][item : item + 1] if settings["initial_frames"] else None
        chunks = stream.play([Take(data["in.context"][item : item + 1], len(sizes))], given)
        made = torch.cat([chunk.latents for chunk in chunks], dim=1)
        close(made, data["out.latents"][item : item + 1])


def test_sinusoid_and_norms() -> None:
    data = golden("primitives")
    close(sinusoid(data["sin.t"], 256), data["sin.out_f64"], 1e-9)
    norm = RMSNorm(96, 1e-6)
    norm.weight.data = data["rmsnorm.weight"]
    close(norm(data["rmsnorm.in"]), data["rmsnorm.out"])
    close(norm.bfloat16()(data["rmsnorm.in"].bfloat16()).float(), data["rmsnorm.out_bf16"], 0)
    close(torch.nn.functional.layer_norm(data["rmsnorm.in"], (96,), eps=1e-6), data["layernorm.out"])


@pytest.mark.parametrize("width", [24, 128])
@pytest.mark.parametrize("start", [0, 5, 1021])
def test_rotary_positions(width: int, start: int) -> None:
    data, rope = golden("primitives"), Rope3D((3, 4), width)
    phase = rope.full(torch.arange(start, start + 3))[:, None]
    close(turn(data[f"rope.hd{width}.in"], phase), data[f"rope.hd{width}.out_start{start}"])


@pytest.mark.parametrize("shift", [5, 8])
def test_noise_levels(shift: int) -> None:
    data = golden("scheduler")
    close(sigma_table(shift), data[f"shift{shift}.sigmas"], 1e-6)
    for name, expected in data.items():
        if name.startswith(f"shift{shift}.warp_"):
            steps = [int(n) for n in name.removeprefix(f"shift{shift}.warp_").split("_")]
            close(torch.tensor(warp(steps, shift)), expected, 1e-3)
    looked_up = [sigma_at(t, shift) for t in data[f"shift{shift}.lookup_t"].tolist()]
    close(torch.tensor(looked_up), data[f"shift{shift}.lookup_sigma"], 1e-6)


def test_flow_to_clean_and_noising() -> None:
    data = golden("scheduler")
    for row, t in enumerate(data["conv.t"].tolist()):
        step = Step(t, sigma_at(t, 5))
        clean = data["conv.xt"][row] - step.sigma * data["conv.flow"][row]
        close(clean, data["conv.x0_from_flow"][row])
        noised = (1 - step.sigma) * data["conv.x0"][row] + step.sigma * data["conv.noise"][row]
        close(noised, data["conv.add_noise"][row])


def test_tiny_autoencoder() -> None:
    data = golden("taehv_tiny")
    codec = TAEHV(TaehvConfig(encoder_width=6, decoder_widths=(12, 10, 8, 6))).requires_grad_(False)
    codec.load_state_dict({key[2:]: value for key, value in data.items() if key.startswith("w.")})
    close(codec.decode_raw(data["in.latents"])[0], data["out.raw"])
    close(codec.decode_stream(data["in.latents"], None)[0], data["out.video"])
    close(codec.encode(data["in.video"]), data["out.encoded"])
    memory, pieces = None, []
    for latent in data["in.latents"].split(1, dim=1):
        piece, memory = codec.decode_stream(latent, memory)
        pieces.append(piece)
    assert [p.shape[1] for p in pieces] == [1, 4, 4, 4, 4]
    close(torch.cat(pieces, dim=1), data["out.video"], 1e-6)
