"""What heads look at: shares by frame as the cache has them, and a report that can tell a sink from an averager."""

import pytest
import torch

from hforce.build import build_backbone
from hforce.config import load_config
from hforce.toy.heads import look, measure, plot, report

PROMPTS = ("a slow red circle bouncing sideways", "a fast blue square passing left")


def even(layers=2, heads=3, frames=21):
    return torch.full((2, 4, layers, heads, frames), 1 / frames)


def test_shares_add_up_to_one_and_depend_on_prompt_and_seed():
    config = load_config()
    backbone = build_backbone(config)
    with torch.inference_mode():
        one, again, other, seed = (look(config, backbone, PROMPTS[i], n) for i, n in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert one.shape == (backbone.geometry.layers, backbone.geometry.heads, 21)
    torch.testing.assert_close(one.sum(dim=-1), torch.ones(one.shape[:2]))
    assert torch.equal(one, again)
    assert not torch.equal(one, other) and not torch.equal(one, seed)


def test_all_prompts_and_seeds_are_measured():
    with torch.inference_mode():
        masses, chunk = measure(load_config(), PROMPTS, (0,))
    assert masses.shape[:2] == (1, 2) and chunk == 3


@pytest.mark.parametrize(("share", "sinks"), [(0.0, 0), (0.3, 1)])
def test_a_head_on_its_first_frame_counts_as_a_sink(share, sinks):
    masses = even()
    masses[:, :, 1, 2] *= 1 - share
    masses[:, :, 1, 2, 0] += share
    text = report(masses, load_config(), chunk=3)
    assert f"| heads with more than 2 times an even share on the first frame | {sinks} |" in text
    assert "| even and odd prompts | 1.000 |" in text


def test_prompts_that_disagree_are_told():
    masses = even()
    masses[:, 0::2, 0, 0, -1] += 0.5
    masses[:, 1::2, 1, 1, -1] += 0.5
    text = report(masses / masses.sum(dim=-1, keepdim=True), load_config(overrides=["profile.local=0.2"]), chunk=3)
    assert "| even and odd prompts | 0.667 |" in text  # two of six heads


def test_the_picture_is_drawn(tmp_path):
    plot(even()[0, 0], 3, tmp_path / "deep" / "attention.png")
    assert (tmp_path / "deep" / "attention.png").read_bytes().startswith(b"\x89PNG")
