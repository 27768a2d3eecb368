"""Everything that can be set, by section, with its default, and the named bundles of settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

OWN = "own"  # the decoder that comes with the model


@dataclass
class ModelConfig:
    """Which model, from where, and on what it runs."""

    name: str = "tiny"
    checkpoint: str = ""  # file or folder of weights, or org/name:file on the hub; empty: the packaged ones
    base: str = ""  # folder (or org/name) of a Wan2.1 release with the other parts; empty: the folder `checkpoint`
    lora: str = ""  # adapter to merge into the checkpoint
    vae: str = ""  # file of an autoencoder to take instead of the release's; tiny: the taew2_1 that lies in `base`
    revision: str = ""  # commit, tag or branch of a `checkpoint` on the hub; empty: the newest, and kept in the sidecar
    offline: bool = False  # take only what the hub's cache has
    release: str = ""  # a line of the table in docs/models.md; empty: as the weights are recognised
    texts: str = ""  # folder where embeddings of prompts are kept; empty: ~/.cache/hforce/texts
    size: str = ""  # "832x480", width x height in pixels; empty: the model's own
    dtype: str = "auto"
    device: str = "auto"
    vae_device: str = ""  # another one for the autoencoder, as cuda:1; empty: the same, or as the memory mode says
    memory: str = "auto"  # what stays on the device: speed, balanced or low; auto: the first of these that fits
    memory_limit: str = ""  # "8GiB": how much memory to plan with; empty: what the device has free
    threads: int = 0  # of the CPU; 0: all cores but one, which the video encoder needs
    graphs: bool = True  # on CUDA: record a pass that comes again, and launch it whole
    compile: bool = False  # join small operations with torch.compile, which takes its time in the first chunk


@dataclass
class RolePolicy:
    """Which policy the heads of one role follow, and its options."""

    policy: str = "memory"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class CacheConfig:
    """How the heads remember: who has which role, and what each role keeps."""

    setup: str = "head-forcing"  # a named bundle of the settings below: see SETUPS
    roles: str = "profile"  # profile, inverse, uniform (every head is a memory head) or random:SEED
    profile: str = ""  # a file; empty: the model's packaged one
    strict: bool = False  # refuse a profile that was edited after it was measured
    switch: str = "recache"  # what happens to the past at a new prompt: keep, flush or recache
    recache_frames: int = 6  # latent frames made anew under the new prompt
    backend: str = "vendor"  # what attends: cudnn where that can run, else sdpa; or one by name; auto times them all
    local: RolePolicy = field(default_factory=lambda: RolePolicy("local"))
    anchor: RolePolicy = field(default_factory=lambda: RolePolicy("anchor"))
    memory: RolePolicy = field(default_factory=lambda: RolePolicy("memory"))


@dataclass
class SampleConfig:
    """How one chunk is denoised. What is null is left to the release: models/families.py has the table."""

    steps: list[int] | None = None  # timesteps in 0..1000, falling
    first_steps: list[int] | None = None  # of a shot's first chunk; empty: as `steps`
    warp: bool | None = None  # look the timesteps up in the shifted schedule
    shift: float | None = None
    chunk: int | None = None  # latent frames denoised together
    context_noise: int = 0  # timestep 0..1000 at which the finished chunk is written to the cache
    seed: int = 0


@dataclass
class VideoConfig:
    """The video file."""

    seconds: float = 60.0
    fps: int = 16
    crf: int = 18
    preset: str = "medium"  # of x264
    upscale: int = 4  # whole-number enlargement for viewing, nearest neighbour
    contact_sheet: bool = True
    init_image: str = ""  # picture that the video starts from
    init_video: str = ""  # video that it goes on from


@dataclass
class ProfileConfig:
    """How head roles are measured."""

    prompts: str = ""  # prompt file; empty: the packaged one
    seeds: list[int] = field(default_factory=lambda: [0])
    mode: str = "native21"  # native21: within the trained span; rolling30: in 30 s roll-outs
    anchor: float = 0.25  # share of all heads (quantile) or attention mass (absolute)
    local: float = 0.20  # share of the heads that are not anchors, or attention mass
    sink_frames: int = 1
    query_stride: int = 1  # every n-th token asks
    threshold: str = "quantile"
    min_vote: float = 0.0  # heads on which fewer prompts agree become memory heads


@dataclass
class BenchConfig:
    """What `hforce bench` compares."""

    setups: list[str] = field(default_factory=lambda: ["window", "sink", "full", "head-forcing"])
    prompts: str = ""  # prompt file; empty: the packaged one
    seconds: float = 60.0
    seed: int = 0
    warmup: int = 2  # chunks that are not timed
    suite: str = ""  # a named experiment instead, with defaults of its own: see SUITES
    videos: int = 64  # that a suite makes under every setup
    workers: int = 0  # processes that a suite is spread over; 0: as many as there are cores
    random_weights: bool = False  # a model of the same shape without its files: speed does not depend on the weights
    layers: int = 0  # of a model with random weights, for small machines; 0: all
    decoders: list[str] = field(default_factory=lambda: [OWN])  # timed side by side, the others with random weights


@dataclass
class Config:
    """Everything that can be set, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


def _uniform(policy: str, **options: Any) -> Mapping[str, Any]:
    return MappingProxyType({"roles": "uniform", "memory": RolePolicy(policy, options)})


def _budget(episodes: int, window: int) -> Mapping[str, Any]:
    """Head Forcing with so many frames for memory heads, and the usual ones for all others."""
    return MappingProxyType({
        "local": RolePolicy("local", {"window": 3}),
        "anchor": RolePolicy("anchor", {"sink": 1, "window": 2}),
        "memory": RolePolicy("memory", {"sink": 3, "episodes": episodes, "window": window}),
    })


# Named bundles: what each changes in CacheConfig. "uniform" gives every head the mean budget of head-forcing as first
# and newest frames, "uniform-memory" the same with episodes: so what roles and what episodes bring are told apart.
# 15 % local 3, 25 % anchor 3 and 60 % memory 12 frames of the past are 8.4 in the mean (8.8 in the tiny model, with
# 35 % local heads and no anchors), rounded up in their favour.
# The N of the budgets hf-N is that mean with the chunk of 3 itself; the defaults of head-forcing are those of hf-11.
SETUPS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "head-forcing": MappingProxyType({}),
    "random": MappingProxyType({"roles": "random:0"}),
    "inverse": MappingProxyType({"roles": "inverse"}),
    "uniform": _uniform("sink", sink=3, window=6),
    "uniform-memory": _uniform("memory", sink=3, episodes=3, window=3),
    "sink": _uniform("sink"),
    "window": _uniform("window"),
    "full": _uniform("full"),
    "hf-10": _budget(episodes=3, window=3),
    "hf-11": _budget(episodes=6, window=3),
    "hf-15": _budget(episodes=9, window=6),
})

EAGER = "reference-eager"  # what `hforce bench` compares besides: `window`, computed as the reference does it

# Named experiments of `hforce bench`: what each changes in BenchConfig.
SUITES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "tiny-length": MappingProxyType({
        "setups": ["head-forcing", "random", "inverse", "uniform", "uniform-memory", "sink", "window", "full"],
        "seconds": 120.0,
    }),
})
