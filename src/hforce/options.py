"""The options of the three commands, and what their help says of them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from hforce.errors import UsageError

MAY_BE_EMPTY = ("--prompt", "--set")  # of which more is said where they are read

Prompt = Annotated[list[str] | None, Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be repeated.")]
Output = Annotated[Path, Option("--output", "-o", metavar="PATH", help="Folder, or one .mp4 file.")]
Model = Annotated[
    str, Option("--model", "-m", metavar="NAME", help="A preset, as tiny; Wan2.1's weights; org/name of the hub.")
]
Device = Annotated[str, Option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps.  [default: auto]")]
Revision = Annotated[str, Option("--revision", metavar="REV", help="Commit, tag or branch of what -m names.")]
Offline = Annotated[bool, Option("--offline", help="Take from the hub only what is here already.")]
Size = Annotated[str, Option("--size", metavar="WxH", help="Pixels, as 64x64.  [default: the model's own]")]
Config = Annotated[
    list[Path] | None, Option("--config", "-c", metavar="FILE", help="Settings (YAML); may be repeated.")
]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="One setting, as video.crf=23; may be repeated."),
]
Seed = Annotated[int | None, Option("--seed", metavar="N", help="Seed of the noise.")]
Duration = Annotated[
    str, Option("--duration", "-d", metavar="TIME", help="Length, as 30s or 1.5m; rounded up to whole chunks.")
]
InitImage = Annotated[
    str, Option("--init-image", metavar="FILE", help="Start from this picture; part of the length.")
]
InitVideo = Annotated[
    str, Option("--init-video", metavar="FILE", help="Go on from this video; part of the length.")
]
Vae = Annotated[
    str, Option("--vae", metavar="FILE", help="Another autoencoder; tiny: taew2_1 beside the model's own.")
]
Plot = Annotated[Path | None, Option("--plot", metavar="FILE", help="Draw it, as PNG.")]
PromptFile = Annotated[
    str | None, Option("--prompt-file", "-f", metavar="FILE", help="Prompts: .txt, .jsonl, or - for stdin.")
]
Frames = Annotated[
    int | None, Option("--frames", metavar="N", help="Length in video frames, rounded up to whole chunks.")
]
Policy = Annotated[
    str, Option("--policy", metavar="NAME", help="head-forcing, hf-10, hf-11, hf-15, window, sink, full...")
]
Roles = Annotated[str, Option("--roles", metavar="NAME", help="profile, random:SEED, inverse or uniform.")]
Profile = Annotated[str, Option("--profile", metavar="FILE", help="Head profile.  [default: the model's own]")]
Strict = Annotated[bool, Option("--strict", help="Refuse a head profile that was edited.")]
Upscale = Annotated[int | None, Option("--upscale", metavar="N", help="Enlarge every pixel so many times.")]
Exists = Annotated[
    str, Option("--on-exists", metavar="WORD", help="skip what the same command made, overwrite, or error.")
]
MemoryMode = Annotated[
    str, Option("--memory-mode", metavar="NAME", help="auto, speed, balanced or low: what stays on the device.")
]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be made, in which memory, and stop.")]
Print = Annotated[bool, Option("--print-config", help="Show every setting and stop.")]
Calibration = Annotated[
    str, Option("--prompt-file", "-f", metavar="FILE", help="Calibration prompts.  [default: 20 packaged ones]")
]
ProfileFile = Annotated[Path, Option("--output", "-o", metavar="FILE", help="Where to write the profile.")]
Show = Annotated[Path | None, Option("--show", metavar="FILE", help="Print the map of a profile and stop.")]
Mode = Annotated[str, Option("--mode", metavar="NAME", help="native21 (5 s videos) or rolling30 (30 s).")]
Compare = Annotated[bool, Option("--compare", help="Measure in both modes, and how far they agree.")]
Anchor = Annotated[float | None, Option("--anchor", metavar="SHARE", help="Share of heads that become anchors.")]
Local = Annotated[float | None, Option("--local", metavar="SHARE", help="Share of the others that become local.")]
Setups = Annotated[
    str, Option("--setups", metavar="NAMES", help="Which to compare, as window,hf-10,hf-11,hf-15.")
]
BenchPrompts = Annotated[
    str, Option("--prompt-file", "-f", metavar="FILE", help="Prompts.  [default: four packaged ones]")
]
Random = Annotated[bool, Option("--random-weights", help="Time a model of the same shape; needs no files.")]
Suite = Annotated[str, Option("--suite", metavar="NAME", help="An experiment instead: tiny-length.")]
Json = Annotated[Path | None, Option("--json", metavar="FILE", help="Write all numbers here.")]
Kernels = Annotated[bool, Option("--kernels", help="Attention backends instead, on layers of the model.")]


def _given(context: Context) -> Iterator[tuple[str, str, Any]]:
    """Name, longest spelling and value of every option of the command line."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            yield name, max(parameter.opts, key=len), context.params[name]


def refuse_empty(context: Context) -> None:
    """Raises UsageError for an option whose value is empty: that of an unset variable in a script, likely."""
    has_empty = any(word == "" or (word.startswith("--") and word.endswith("=")) for word in sys.argv)
    for _, option, value in _given(context):
        values = value if isinstance(value, list | tuple) else [value]
        if option not in MAY_BE_EMPTY and ("" in values or (has_empty and Path() in values)):  # which is "." as well
            raise UsageError(f"{option} is empty", "leave it out, or give it a value")


def refuse(context: Context, option: str, *others: str) -> None:
    """Raises UsageError for options that would do nothing beside this one."""
    for name, other, _ in _given(context):
        if name in others:
            raise UsageError(f"{other} does nothing beside {option}", "leave one of them out")
