"""The recipe of the tiny model, at a scale of seconds: seeded, resumable, and saved as it is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hforce.attention.dense import BlockCausal
from hforce.attention.rope import Rope3D
from hforce.models.dit import WanConfig
from hforce.models.taehv import TaehvConfig
from hforce.models.tiny import TinyModel
from hforce.toy.data import chunk_words, encode_clips, film_of, latent_mask, thing_mask, video_batch, word_ids
from hforce.toy.evaluate import SHOWN, curves, interval, markdown, sheet
from hforce.toy.film import Cut, Film, chunk_start, layout
from hforce.toy.train import (
    Phase,
    Recipe,
    Run,
    Trainer,
    init_weights,
    make_clips,
    rate,
    refine,
    train_codec,
    train_transformer,
    with_patch,
)
from hforce.toy.world import SLOTS, Scene, render

RECIPE = Recipe(
    codec_steps=2, codec_batch=2, codec_frames=5, clips=6, parts=2, save_every=1,
    coarse=Phase("coarse", patch=2, steps=3, batch=2, first_batch=2),
    fine=Phase("fine", patch=1, steps=3, batch=2, first_batch=2),
    longer=Phase("longer", patch=1, steps=2, batch=2, first_batch=2, begin=3, peak=0.5),
)  # fmt: skip
SMALL = WanConfig(
    dim=48, ffn_dim=48, layers=2, heads=2, text_dim=16, text_len=8, in_channels=12, out_channels=12, patch=(1, 1, 1)
)
CODEC = TaehvConfig(12, 8, (12, 8, 8, 8), space_down=(1, 2, 1), space_up=(2, 1, 1), patch=4)


def train(run: Run) -> TinyModel:
    torch.manual_seed(run.recipe.seed)
    model = TinyModel(SMALL, CODEC)
    train_codec(run, model)
    return train_transformer(run, model, make_clips(run, model))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, TinyModel]:
    """The folder of a run that was never interrupted, and its model. They are shared: change nothing."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(Run(folder, RECIPE, "cpu"))


class StoppedRun(Run):
    """A run that dies right after a checkpoint of one phase of the transformer."""

    def __init__(self, out: Path, last: str, at: int) -> None:
        super().__init__(out, RECIPE, "cpu")
        self.last, self.at = f"{last}.pt", at

    def save(self, name: str, values: dict) -> None:
        super().save(name, values)
        if name == self.last and values["step"] == self.at:
            raise KeyboardInterrupt


def test_a_run_interrupted_in_every_phase_ends_with_the_same_weights(trained, tmp_path):
    for phase, at in (("coarse", 2), ("fine", 2), ("longer", 1)):
        with pytest.raises(KeyboardInterrupt):
            train(StoppedRun(tmp_path, phase, at))
    resumed = train(Run(tmp_path, RECIPE, "cpu")).state_dict()
    for name, value in trained[1].state_dict().items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_a_saved_model_is_loaded_as_it_was(trained, tmp_path):
    model = trained[1]
    model.save(tmp_path / "tiny.safetensors", torch.float32)
    loaded = TinyModel.load(tmp_path / "tiny.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_curves_are_logged(trained):
    log = trained[0] / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    phases = {name for phase in ("coarse", "fine", "longer") for name in (phase, f"{phase} held out")}
    assert {line["stage"] for line in lines} == {"codec", "clips"} | phases
    named = {name: (steps, values) for name, steps, values in curves(log)}
    assert named["coarse held out clip"][0] == named["fine held out clip"][0] == [1, 2, 3]


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
    assert few.words.shape == (3, 7, len(SLOTS))
    assert torch.equal(few.words[1], chunk_words(film_of(3, 1)))


def test_every_chunk_has_the_words_of_the_scene_it_shows():
    one, other = (Scene.sample(np.random.default_rng(seed)) for seed in (0, 1))
    film = Film((Cut(0, one), Cut(chunk_start(2), other), Cut(chunk_start(5), one)))
    assert chunk_words(film).tolist() == [word_ids(s.words) for s in [one] * 2 + [other] * 3 + [one] * 2]


def test_masks_cover_object_and_landmark():
    """A yardstick of its own: what differs between two films that differ in one thing alone lies inside the mask."""
    scene = replace(Scene.sample(np.random.default_rng(4)), color="red", mark="none", landmark="ring")
    film, frames = Film((Cut(0, scene),)), 81
    pixels, cells = thing_mask(layout(film, frames), 64), latent_mask(film, 8)
    assert (pixels.shape, cells.shape) == ((81, 64, 64), (21, 8, 8))
    for change in ({"color": "blue"}, {"mark": "white"}, {"landmark": "cross"}):
        changed = (render(scene, frames) != render(replace(scene, **change), frames)).any(axis=-1)
        assert changed.any() and pixels.numpy()[changed].all()
    assert pixels.float().mean() < 0.5
    assert torch.equal(cells[0], thing_mask(layout(film, 1), 8)[0])


def test_pieces_for_the_codec_are_short_films_some_with_a_cut():
    video, mask = video_batch(0, 0, 12, 9)
    assert (video.shape, mask.shape) == ((12, 9, 3, 64, 64), (12, 9, 1, 64, 64))
    jumps = (video[:, 1:] - video[:, :-1]).abs().mean(dim=(2, 3, 4))
    cuts = (jumps > 0.05).nonzero()
    assert 0 < len(cuts) < 12 and set(cuts[:, 1].tolist()) <= {0, 4}


def test_a_finer_model_begins_as_the_coarse_one_on_pictures_without_detail():
    """Where the four cells of a patch are alike, each is read as the patch was, and drawn as its mean."""
    coarse, fine = TinyModel(with_patch(SMALL, 2), CODEC), TinyModel(SMALL, CODEC)
    init_weights(coarse, 0)
    torch.nn.init.normal_(coarse.dit.head.head.weight, std=0.1)
    refine(fine, coarse)
    patches = torch.randn(1, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cells = patches.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    read = coarse.dit.patch_embedding(cells).repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    torch.testing.assert_close(fine.dit.patch_embedding(cells), read, atol=1e-5, rtol=0)
    tokens, time = torch.randn(1, 48, 48), torch.randn(1, 3, 48)
    drawn = coarse.dit.head(tokens, time).unflatten(-1, (4, 12)).mean(dim=-2)
    torch.testing.assert_close(fine.dit.head(tokens, time), drawn, atol=1e-5, rtol=0)
    for name, value in coarse.dit.blocks.state_dict().items():
        assert torch.equal(fine.dit.blocks.state_dict()[name], value)


def test_loss_of_a_clip_is_that_of_its_chunks_seen_one_by_one():
    """Teacher forcing in one pass equals predicting each noisy chunk, under its own prompt, after the clean ones."""
    model = TinyModel(SMALL, CODEC)
    init_weights(model, 0)
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.1)
    rope = Rope3D((8, 8), SMALL.head_dim)
    x0, noisy = torch.randn(2, 2, 9, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[700.0] * 3 + [300.0] * 3 + [900.0] * 3]).expand(2, -1)
    words = torch.randint(30, (2, 3, 8), generator=torch.Generator().manual_seed(1))

    def flow(x, times, prompts, attend):
        return model.dit(x, times, model.dit.project_text(model.words(prompts).flatten(0, 1)), attend)

    both, times = torch.cat([x0[:, :6], noisy], dim=1), torch.cat([t[:, :6] * 0, t], dim=1)
    together = flow(both, times, torch.cat([words[:, :2], words], dim=1), BlockCausal(rope, [3] * 3, noisy=1))[:, 6:]
    for chunk in range(3):
        past = slice(0, 3 * chunk)
        own = slice(3 * chunk, 3 * chunk + 3)
        x = torch.cat([x0[:, past], noisy[:, own]], dim=1)
        times = torch.cat([t[:, past] * 0, t[:, own]], dim=1)
        alone = flow(x, times, words[:, : chunk + 1], BlockCausal(rope, [3] * (chunk + 1)))[:, own]
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
