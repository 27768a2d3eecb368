"""The recipe of the tiny model, at a scale of seconds: seeded, resumable, and saved as it is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hforce.attention.dense import BlockCausal
from hforce.attention.rope import Rope3D
from hforce.models.dit import WanConfig
from hforce.models.taehv import TaehvConfig
from hforce.models.tiny import TinyModel
from hforce.toy.data import encode_clips, latent_mask, object_mask, scene_of, video_batch, word_ids
from hforce.toy.evaluate import SHOWN, curves, interval, markdown, sheet
from hforce.toy.train import Recipe, Run, Trainer, init_weights, make_clips, rate, train_codec, train_transformer
from hforce.toy.world import SLOTS

RECIPE = Recipe(codec_steps=2, codec_batch=2, codec_frames=5, clips=6, steps=3, batch=2, first_batch=2, save_every=1)
SMALL = WanConfig(dim=48, ffn_dim=48, layers=2, heads=2, text_dim=16, text_len=8, in_channels=12, out_channels=12)
CODEC = TaehvConfig(12, 8, (12, 8, 8, 8), space_down=(1, 2, 1), space_up=(2, 1, 1), patch=4)


def train(folder: Path, recipe: Recipe = RECIPE) -> TinyModel:
    run = Run(folder, recipe, "cpu")
    torch.manual_seed(recipe.seed)
    model = TinyModel(SMALL, CODEC)
    train_codec(run, model)
    return train_transformer(run, model, make_clips(run, model))


class StoppedRun(Run):
    """A run that dies right after its second checkpoint of the transformer."""

    def save(self, name: str, values: dict) -> None:
        super().save(name, values)
        if name == "transformer.pt" and values["step"] == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole").state_dict()
    run = StoppedRun(tmp_path / "stopped", RECIPE, "cpu")
    torch.manual_seed(RECIPE.seed)
    model = TinyModel(SMALL, CODEC)
    train_codec(run, model)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(run, model, make_clips(run, model))
    resumed = train(tmp_path / "stopped").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    model = train(tmp_path)
    model.save(tmp_path / "tiny.safetensors", torch.float32)
    loaded = TinyModel.load(tmp_path / "tiny.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_curves_are_logged(tmp_path):
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"codec", "clips", "transformer", "validation"}
    named = {name: (steps, values) for name, steps, values in curves(tmp_path / "log.jsonl")}
    assert named["validation clip"][0] == [1, 2, 3]


def test_latents_are_normalised(tmp_path):
    run = Run(tmp_path, replace(RECIPE, clips=12), "cpu")
    model = TinyModel(SMALL, CODEC)
    latents = make_clips(run, model).latents.float()
    torch.testing.assert_close(latents.mean(dim=(0, 1, 3, 4)), torch.zeros(12), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 1, 3, 4)), torch.ones(12), atol=1e-2, rtol=0)


def test_clips_depend_on_seed_and_number_alone():
    codec = TinyModel(SMALL, CODEC).codec
    few, many = (encode_clips(codec, 3, count, "cpu", at_once) for count, at_once in ((3, 2), (5, 8)))
    torch.testing.assert_close(few.latents, many.latents[:3], rtol=0, atol=2e-3)
    assert torch.equal(few.words, many.words[:3])
    assert word_ids(scene_of(3, 1).words) == few.words[1].tolist()
    assert len(few.words[0]) == len(SLOTS)


def test_masks_cover_the_object():
    scene = scene_of(0, 4)
    pixels, cells = object_mask(scene, 64), latent_mask(scene, 8)
    assert pixels.shape == (81, 64, 64)
    assert cells.shape == (21, 8, 8)
    video, mask = video_batch(0, 0, 2, 5)
    assert video.shape == (2, 5, 3, 64, 64)
    assert 0 < mask.float().mean() < 0.7


def test_loss_of_a_clip_is_that_of_its_chunks_seen_one_by_one():
    """Teacher forcing in one pass equals predicting each noisy chunk after the clean ones before it."""
    model = TinyModel(SMALL, CODEC)
    init_weights(model, 0)
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.1)
    rope = Rope3D((4, 4), SMALL.head_dim)
    x0, noisy = torch.randn(2, 1, 9, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[700.0] * 3 + [300.0] * 3 + [900.0] * 3])
    text = model.dit.project_text(model.words(torch.zeros(1, 8, dtype=torch.long)))
    both, times = torch.cat([x0, noisy], dim=1), torch.cat([t * 0, t], dim=1)
    together = model.dit(both, times, text, BlockCausal(rope, [3] * 3, teacher_forcing=True))[:, 9:]
    for chunk in range(3):
        past = slice(0, 3 * chunk)
        own = slice(3 * chunk, 3 * chunk + 3)
        x = torch.cat([x0[:, past], noisy[:, own]], dim=1)
        times = torch.cat([t[:, past] * 0, t[:, own]], dim=1)
        alone = model.dit(x, times, text, BlockCausal(rope, [3] * (chunk + 1)))[:, own]
        torch.testing.assert_close(together[:, own], alone, atol=1e-5, rtol=0)


def test_loss_of_the_truth_is_zero(tmp_path):
    """A model that predicts noise - clean exactly has no loss, whatever the weights of the mask."""
    run = Run(tmp_path, RECIPE, "cpu")
    model = TinyModel(SMALL, CODEC)
    clips = make_clips(run, model)
    trainer = Trainer(model, RECIPE, "cpu")
    seen = {}

    def oracle(x, sigma, words, attend):
        return (x - seen["clean"]) / sigma[:, :, None, None, None].clamp_min(1e-6)

    trainer._flow = oracle
    batch = clips.batch(torch.arange(2), "cpu")
    seen["clean"] = batch[0][:, :3]
    loss = trainer.first_loss(batch, torch.Generator().manual_seed(1))
    assert loss.item() < 1e-6


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [rate(step, 100, replace(RECIPE, warmup=10)) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] == 1.0
    assert rates[29] == 1.0
    assert rates[60] > rates[80] > rates[99] > 0


def test_reports_show_intervals_and_rows(tmp_path):
    mean, low, high = interval([0.0, 1.0, 1.0, float("nan"), 1.0])
    assert low < mean == 0.75 < high
    table = {name: [1.0, 0.5] for name in SHOWN}
    text = markdown({"truth": table})
    assert text.splitlines()[2].startswith("| truth | 0.750 [0.500, 1.000] |")
    video = torch.zeros(9, 64, 64, 3, dtype=torch.uint8).numpy()
    sheet([video, video], tmp_path / "sheet.png", 3)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
