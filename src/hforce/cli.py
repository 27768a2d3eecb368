"""Three commands: parse, call, print."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Option

import hforce
from hforce import options
from hforce.errors import ConfigError, InterruptedRun, RoomError, UsageError
from hforce.shell import run, say, start

if TYPE_CHECKING:
    from hforce.generate import Result
    from hforce.prompts import Item
    from hforce.settings import Config

log = logging.getLogger(__name__)

DEMO = "prompts/demo.txt"

app = typer.Typer(
    name="hforce",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

Flags = dict[str, tuple[str, Any]]
"""Option as the user writes it -> setting and value; empty values were not given."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hforce {hforce.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress; errors and results only.")] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Tell more.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Minute-long video from a 5-second model, without training: a KV cache for every attention head.

    Results go to standard output, progress and messages to standard error.
    """
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=max(level, logging.WARNING), format="hforce: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("hforce").setLevel(level)


@app.command()
def generate(
    context: typer.Context,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    output: options.Output = Path("outputs"),
    duration: options.Duration = "",
    frames: options.Frames = None,
    seed: options.Seed = None,
    policy: options.Policy = "",
    roles: options.Roles = "",
    profile: options.Profile = "",
    strict: options.Strict = False,
    init_image: options.InitImage = "",
    init_video: options.InitVideo = "",
    upscale: options.Upscale = None,
    on_exists: options.Exists = "skip",
    model: options.Model = "",
    revision: options.Revision = "",
    offline: options.Offline = False,
    device: options.Device = "",
    size: options.Size = "",
    config: options.Config = None,
    set_: options.Set = None,
    vae: options.Vae = "",
    memory_mode: options.MemoryMode = "",
    dry_run: options.DryRun = False,
    print_config: options.Print = False,
) -> None:
    """Make videos from prompts. Without a prompt it plays the demo.

    Example: hforce generate -p "a red circle bouncing" -d 30s -o out

    Example: hforce generate -p "a red circle" --init-image first.png -o a.mp4
    """
    flags: Flags = {"--duration": ("video.seconds", _seconds(duration)), "--seed": ("sample.seed", seed)}
    flags |= {"--policy": ("cache.setup", policy), "--roles": ("cache.roles", roles)}
    flags |= {"--profile": ("cache.profile", profile), "--strict": ("cache.strict", strict or None)}
    flags |= {"--upscale": ("video.upscale", upscale)}
    flags |= {"--init-image": ("video.init_image", init_image), "--init-video": ("video.init_video", init_video)}
    flags |= {"--vae": ("model.vae", vae), "--memory-mode": ("model.memory", memory_mode)}
    flags |= _origin(revision, offline, device)
    settings = _load(context, model, size, config, set_, flags)
    if frames is not None:
        settings.video.seconds = _count_seconds(frames, bool(duration), settings.video.fps)
    if print_config:
        _print(settings, config)
    if on_exists not in ("skip", "overwrite", "error"):
        raise UsageError(f"--on-exists {on_exists!r}: expected skip, overwrite or error")
    items = _items(prompt or [], prompt_file, settings)
    if dry_run:
        _rehearse(settings, items, output, on_exists, config)
    from hforce import generate as verb
    from hforce.progress import VideoProgress

    with _blame(config), VideoProgress(_is_quiet(context), items) as progress:
        result = verb.run(settings, items, output, on_exists, progress.update)
    _report(result, settings.video.contact_sheet)


@app.command()
def profile(
    context: typer.Context,
    prompt_file: options.Calibration = "",
    output: options.ProfileFile = Path("profile.json"),
    plot: options.Plot = None,
    show: options.Show = None,
    mode: options.Mode = "",
    compare: options.Compare = False,
    anchor: options.Anchor = None,
    local: options.Local = None,
    model: options.Model = "",
    revision: options.Revision = "",
    offline: options.Offline = False,
    device: options.Device = "",
    size: options.Size = "",
    config: options.Config = None,
    set_: options.Set = None,
    vae: options.Vae = "",
) -> None:
    """Measure what every attention head looks at, and give it a role.

    Example: hforce profile -o heads.json --plot heads.png
    """
    if show is not None:
        options.refuse(context, "--show", *(name for name in context.params if name not in ("show", "plot")))
    flags: Flags = {"--prompt-file": ("profile.prompts", prompt_file), "--mode": ("profile.mode", mode)}
    flags |= {"--anchor": ("profile.anchor", anchor), "--local": ("profile.local", local), "--vae": ("model.vae", vae)}
    flags |= _origin(revision, offline, device)
    settings = _load(context, model, size, config, set_, flags)
    from hforce import profile as verb
    from hforce.cache.roles import load_profile

    outputs = [path for path in (plot, output if show is None else None) if path is not None]
    _check_results(outputs, [prompt_file, show, *(config or [])])
    if plot is not None:
        verb.check_plot(plot)
    if show is not None:
        measured = load_profile(show)
    else:
        from hforce.progress import CountProgress

        with _blame(config), CountProgress("profiling", _is_quiet(context)) as progress:
            measured = verb.run(settings, output, progress.update, compare=compare)
    if plot is not None:
        verb.plot(measured, plot)
    typer.echo(verb.show(measured))
    if plot is not None:
        typer.echo(plot)
    if show is None:
        typer.echo(output)


@app.command()
def bench(
    context: typer.Context,
    setups: options.Setups = "",
    prompt_file: options.BenchPrompts = "",
    duration: options.Duration = "",
    seed: options.Seed = None,
    random_weights: options.Random = False,
    suite: options.Suite = "",
    kernels: options.Kernels = False,
    json_file: options.Json = None,
    plot: options.Plot = None,
    model: options.Model = "",
    revision: options.Revision = "",
    offline: options.Offline = False,
    device: options.Device = "",
    size: options.Size = "",
    config: options.Config = None,
    set_: options.Set = None,
) -> None:
    """Compare the speed and drift of several setups.

    Example: hforce bench --setups window,full,head-forcing -d 60s
    """
    if kernels:
        options.refuse(context, "--kernels", "setups", "prompt_file", "duration", "seed")
    named = [s.strip() for s in setups.split(",") if s.strip()]
    flags: Flags = {"--setups": ("bench.setups", named), "--prompt-file": ("bench.prompts", prompt_file)}
    flags |= {"--duration": ("bench.seconds", _seconds(duration)), "--seed": ("bench.seed", seed)}
    flags |= {"--suite": ("bench.suite", suite), "--random-weights": ("bench.random_weights", random_weights or None)}
    flags |= _origin(revision, offline, device)
    settings = _load(context, model, size, config, set_, flags)
    from hforce import bench as speed
    from hforce import bench_kernels, length
    from hforce.bench_report import BenchResult
    from hforce.documents import write_document
    from hforce.progress import CountProgress, show_table

    if kernels and settings.bench.suite:
        raise UsageError("--kernels and --suite exclude each other", "run one after the other")
    verb, notes = (length, [json_file]) if settings.bench.suite else (bench_kernels if kernels else speed, [])
    _check_results([path for path in (json_file, plot) if path], [prompt_file, *(config or [])])
    if plot is not None:
        verb.check_plot(plot)
    with _blame(config), CountProgress("benchmark", _is_quiet(context)) as progress:
        result = verb.run(settings, progress.update, *notes)
    written: list[Path] = []
    try:
        if json_file is not None:
            write_document(json_file, verb.to_json(result))
            written.append(json_file)
        if plot is not None:
            verb.plot(result, plot)
            written.append(plot)
    finally:  # whichever of them cannot be had, the others can
        show_table(verb.table(result))
        for path in written:
            typer.echo(path)
    if isinstance(result, BenchResult) and result.stopped:
        raise result.stopped


def _check_results(paths: list[Path], sources: list[Path | str | None]) -> None:
    """Finds out before the work whether its results can be written, and replace nothing but results of hforce."""
    from hforce.documents import check_result
    from hforce.video import check_place

    for number, path in enumerate(paths):
        check_place(path)
        check_result(path, [*(source for source in sources if source), *paths[:number]])


def _origin(revision: str, offline: bool, device: str) -> Flags:
    """Where the model comes from, and where it runs."""
    return {
        "--revision": ("model.revision", revision),
        "--offline": ("model.offline", offline or None),
        "--device": ("model.device", device),
    }


def _load(
    context: typer.Context,
    model: str,
    size: str,
    files: list[Path] | None,
    overrides: list[str] | None,
    flags: Flags,
) -> Config:
    """The configuration: presets, files, --set, then the flags that were given. Errors name the flag, not the key."""
    options.refuse_empty(context)
    from hforce.config import load_config
    from hforce.which_model import which_model

    preset, name, checkpoint = which_model(model)
    flags |= {"-m": ("model.name", name), "--model": ("model.checkpoint", checkpoint), "--size": ("model.size", size)}
    given = {flag: setting for flag, setting in flags.items() if setting[1] not in (None, "", [])}
    try:
        return load_config(preset if model else "", files or [], overrides or [], dict(given.values()))
    except UsageError as error:
        told = str(error)
        for flag, (key, _) in given.items():
            told = told.replace(f"--set: {key}: ", f"{flag}: ")
        raise UsageError(told, error.mend) from error


def _print(settings: Config, files: list[Path] | None) -> NoReturn:
    """Prints every setting, and ends."""
    from hforce.config import describe

    with _blame(files):
        typer.echo(describe(settings), nl=False)
    raise typer.Exit(0)


def _rehearse(
    settings: Config, items: list[Item], output: Path, on_exists: str, files: list[Path] | None
) -> NoReturn:
    """Prints what would be made, and ends: as a run that is refused for want of memory, if it would be."""
    from hforce import dry_run

    with _blame(files):
        found = dry_run.run(settings, items, output, on_exists)
    typer.echo(found.text)
    raise typer.Exit(0 if found.fits else RoomError.exit_code)


@contextmanager
def _blame(files: list[Path] | None) -> Iterator[None]:
    """Without a configuration file, whatever is wrong in the configuration was said on the command line."""
    try:
        yield
    except ConfigError as error:
        if files:
            raise
        raise UsageError(str(error), error.mend) from error


def _items(prompts: list[str], prompt_file: str | None, config: Config) -> list[Item]:
    """What to make: prompts from the command line, from a file, or the demo."""
    from hforce.models.families import find_family
    from hforce.prompts import Item, Shot, load_prompts
    from hforce.resources import resource
    from hforce.units import Grid

    if prompts and prompt_file:
        raise UsageError("--prompt and --prompt-file exclude each other", "put all prompts into the file")
    for prompt in prompts:
        if not prompt.strip():
            raise UsageError(f"the prompt {prompt!r} is empty")
        if any("\ud800" <= char <= "\udfff" for char in prompt):  # what bytes that are no text arrive as
            raise UsageError(f"the prompt {prompt[:60]!r} is not UTF-8")
    if prompts:
        return [Item(None, (Shot(p),), line=n) for n, p in enumerate(prompts, 1)]
    release = config.model.release
    chunk = config.sample.chunk or (find_family(release).recipe.chunk if release else Grid.chunk)
    return load_prompts(prompt_file or resource(DEMO), Grid(fps=config.video.fps, chunk=chunk))


def _count_seconds(frames: int, has_duration: bool, fps: int) -> float:
    """The length of so many video frames, in seconds."""
    from hforce.units import LONGEST

    if has_duration:
        raise UsageError("--frames and --duration exclude each other", "give one of them")
    if not 1 <= frames <= LONGEST * fps:
        raise UsageError(f"--frames: {frames} is outside 1 to {LONGEST * fps:.0f}, which is 24 h")
    return frames / fps


def _seconds(text: str) -> float | None:
    from hforce.units import parse_duration

    return parse_duration(text) if text else None


def _is_quiet(context: typer.Context) -> bool:
    return bool(context.parent and context.parent.params.get("quiet"))


def _report(result: Result, has_sheets: bool) -> None:
    """Paths of videos and contact sheets on standard output. Raises the error of a single failed item, or of a stop."""
    for target in (*result.skipped, *result.made):
        typer.echo(target.video)
        if has_sheets and target.sheet.exists():
            typer.echo(target.sheet)
    for target in result.skipped:
        log.warning("%s was there already, made by the same command", target.video)
    errors = [error for _, error in result.failed]
    if not errors:
        return
    count = len(errors) + len(result.made) + len(result.skipped)
    if count == 1 or isinstance(errors[-1], InterruptedRun):
        raise errors[-1]
    say(f"hforce: {len(errors)} of {count} videos failed")
    raise typer.Exit(1)


def _run() -> int:
    """Runs the command line -> exit code."""
    return run(app)


def main() -> None:
    """The console script."""
    start(app)


if __name__ == "__main__":
    main()
