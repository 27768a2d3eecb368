"""Three commands: parse, call, print."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hforce
from hforce.errors import HforceError, InterruptedRun, UsageError

if TYPE_CHECKING:
    from hforce.config import Config
    from hforce.generate import Result
    from hforce.prompts import Item

DEMO = "prompts/demo.txt"
MODEL, INPUT, OUTPUT, LOOK = "Model and cache", "What to make", "Where it goes", "Configuration"

app = typer.Typer(
    name="hforce",
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Model name, or a file of weights of the tiny kind.")]
SizeOption = Annotated[str, typer.Option("--size", help="Width x height in pixels, as 64x64; empty: the model's own.")]
ConfigOption = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; may be given several times.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting, as cache.memory.options.episodes=3.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the noise.")]
DurationOption = Annotated[str, typer.Option("--duration", "-d", help="Length of each video, as 30s or 1.5m.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hforce {hforce.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and results only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell more.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Minute-long video from a 5-second model, without training: a KV cache for every attention head.

    Results go to standard output, progress and messages to standard error.
    """
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="hforce: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("hforce").setLevel(level)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[str, typer.Option("--prompt-file", "-f", help="Prompts: .txt, .jsonl, or - for stdin.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder, or one .mp4 file.")] = Path("outputs"),
    duration: DurationOption = "",
    frames: Annotated[int | None, typer.Option("--frames", help="Length in video frames, instead of --duration.")] = None,
    seed: SeedOption = None,
    policy: Annotated[str, typer.Option("--policy", help="head-forcing, window, sink, full, uniform, ...")] = "",
    roles: Annotated[str, typer.Option("--roles", help="profile, random:SEED, inverse or uniform.")] = "",
    profile: Annotated[str, typer.Option("--profile", help="Head profile (JSON); empty: the model's own.")] = "",
    upscale: Annotated[int | None, typer.Option("--upscale", help="Enlarge every pixel so many times.")] = None,
    on_exists: Annotated[str, typer.Option("--on-exists", help="skip, overwrite or error.")] = "skip",
    model: ModelOption = "",
    size: SizeOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show every setting and stop.")] = False,
) -> None:
    """Make videos from prompts.

    Without a prompt it plays the demo. Example: hforce generate -p "a red circle bouncing sideways" -d 30s -o out
    """
    from hforce.config import describe

    flags = {"video.seconds": _seconds(duration), "sample.seed": seed, "cache.setup": policy, "cache.roles": roles}
    flags |= {"cache.profile": profile, "video.upscale": upscale}
    settings = _load(model, size, config, set_, flags)
    if frames is not None:
        if duration or frames < 1:
            raise UsageError("--frames takes a number of at least 1, and no --duration beside it")
        settings.video.seconds = frames / settings.video.fps
    if print_config:
        typer.echo(describe(settings), nl=False)
        return
    if on_exists not in ("skip", "overwrite", "error"):
        raise UsageError(f"--on-exists {on_exists!r}: expected skip, overwrite or error")
    items = _items(prompt or [], prompt_file, settings)
    from hforce import generate as verb
    from hforce.progress import VideoProgress

    with VideoProgress(_is_quiet(context)) as progress:
        result = verb.run(settings, items, output, on_exists, progress.update)
    _report(result)


@app.command()
def profile(
    context: typer.Context,
    prompt_file: Annotated[str, typer.Option("--prompt-file", "-f", help="Calibration prompts; empty: the packaged 20.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the profile.")] = Path("profile.json"),
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw sink against current mass, and roles by layer.")] = None,
    show: Annotated[Path | None, typer.Option("--show", help="Print the map of a profile and stop.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="native21 (5 s videos) or rolling30 (30 s).")] = "",
    compare: Annotated[bool, typer.Option("--compare", help="Measure in both modes and tell how far they agree.")] = False,
    anchor: Annotated[float | None, typer.Option("--anchor", help="Share of heads that become anchors.")] = None,
    local: Annotated[float | None, typer.Option("--local", help="Share of the others that become local.")] = None,
    model: ModelOption = "",
    size: SizeOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Measure what every attention head looks at, and give it a role.

    Example: hforce profile -o p.json --plot heads.png, then: hforce generate --profile p.json
    """
    flags = {"profile.prompts": prompt_file, "profile.mode": mode, "profile.anchor": anchor, "profile.local": local}
    settings = _load(model, size, config, set_, flags)
    from hforce import profile as verb
    from hforce.cache.roles import load_profile

    if show is not None:
        measured = load_profile(show)
    else:
        from hforce.progress import CountProgress

        with CountProgress("profiling", _is_quiet(context)) as progress:
            measured = verb.run(settings, output, progress.update, compare=compare)
    typer.echo(verb.show(measured))
    if plot is not None:
        verb.plot(measured, plot)
        typer.echo(plot)
    if show is None:
        typer.echo(output)


@app.command()
def bench(
    context: typer.Context,
    setups: Annotated[str, typer.Option("--setups", help="Comma-separated: window,sink,full,head-forcing,...")] = "",
    prompt_file: Annotated[str, typer.Option("--prompt-file", "-f", help="Prompts; empty: the packaged four.")] = "",
    duration: DurationOption = "",
    seed: SeedOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw chunk times and speeds.")] = None,
    model: ModelOption = "",
    size: SizeOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Time several setups on the same script, in turn, and compare them.

    Example: hforce bench --setups window,full,head-forcing -d 60s --size 128x128 --json bench.json
    """
    flags = {"bench.setups": [s.strip() for s in setups.split(",") if s.strip()], "bench.prompts": prompt_file}
    flags |= {"bench.seconds": _seconds(duration), "bench.seed": seed}
    settings = _load(model, size, config, set_, flags)
    from hforce import bench as verb
    from hforce.documents import write_document
    from hforce.progress import CountProgress, show_table

    with CountProgress("benchmark", _is_quiet(context)) as progress:
        result = verb.run(settings, progress.update)
    show_table(verb.table(result))
    if json_file is not None:
        write_document(json_file, verb.to_json(result))
        typer.echo(json_file)
    if plot is not None:
        verb.plot(result, plot)
        typer.echo(plot)


def _load(
    model: str, size: str, files: list[Path] | None, overrides: list[str] | None, flags: dict[str, Any]
) -> Config:
    """The configuration: presets, files, --set, then the flags that were given."""
    import json

    from hforce.config import load_config

    is_file = model.endswith((".safetensors", ".pt", ".pth"))
    named = {"model.checkpoint" if is_file else "model.name": model, "model.size": size}
    given = {key: value for key, value in (named | flags).items() if value not in (None, "", [])}
    # A JSON text is a YAML value, quotes and all; references are for files, not for flags.
    texts = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    return load_config("tiny", files or [], [*(overrides or []), *texts])


def _items(prompts: list[str], prompt_file: str, config: Config) -> list[Item]:
    """What to make: prompts from the command line, from a file, or the demo."""
    from hforce.prompts import Item, Shot, load_prompts
    from hforce.resources import resource
    from hforce.units import Grid

    if prompts and prompt_file:
        raise UsageError("--prompt and --prompt-file exclude each other", "put all prompts into the file")
    if prompts:
        if empty := next((p for p in prompts if not p.strip()), None):
            raise UsageError(f"the prompt {empty!r} is empty")
        return [Item(None, (Shot(p),), line=n) for n, p in enumerate(prompts, 1)]
    return load_prompts(prompt_file or resource(DEMO), Grid(fps=config.video.fps))


def _seconds(text: str) -> float | None:
    from hforce.units import parse_duration

    return parse_duration(text) if text else None


def _is_quiet(context: typer.Context) -> bool:
    return bool(context.parent and context.parent.params.get("quiet"))


def _report(result: Result) -> None:
    """Paths of videos and contact sheets on standard output. Raises the error of a single failed item."""
    for target in (*result.skipped, *result.made):
        typer.echo(target.video)
        if target.sheet.exists():
            typer.echo(target.sheet)
    for target in result.skipped:
        _say(f"hforce: {target.video} was there already, made by the same command")
    if not result.failed:
        return
    if len(result.failed) == 1 and not result.made and not result.skipped:
        raise result.failed[0][1]
    _say(f"hforce: {len(result.failed)} of {len(result.failed) + len(result.made) + len(result.skipped)} videos failed")
    raise typer.Exit(1)


def _say(text: str) -> None:
    """A line for people, on standard error, with control characters made visible."""
    safe = "".join(c if c in "\n\t" or (c.isprintable() and c not in "\u202a\u202b\u202d\u202e") else repr(c)[1:-1] for c in text)
    typer.echo(safe, err=True)


def _fail(error: HforceError) -> int:
    _say(f"hforce: error: {error}")
    if error.mend:
        _say(f"  hint: {error.mend}")
    return error.exit_code


def _run() -> int:
    """Runs the command line -> exit code. Every expected failure is a line on standard error, never a traceback."""
    try:
        return app(standalone_mode=False) or 0
    except HforceError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        return _fail(error)
    except KeyboardInterrupt:
        _say("hforce: stopped")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail(HforceError("out of memory", "make the video smaller")) and 71
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the option parser
            _say(f"hforce: error: {error.format_message()}")
            return 2
        traceback.print_exc()
        _say(f"hforce: this is a bug of hforce {hforce.__version__}: {type(error).__name__}")
        return 70


def main() -> None:
    """The console script."""
    _on_signal(signal.SIGTERM, 75)
    sys.exit(_run())


def _on_signal(number: int, code: int) -> None:
    """Turns a request to stop into an error, so that files are closed and what was made is kept."""

    def stop(*_: object) -> None:
        raise InterruptedRun(f"stopped by signal {signal.Signals(number).name}", code)

    handler: Callable[..., None] = stop
    signal.signal(number, handler)


if __name__ == "__main__":
    main()
