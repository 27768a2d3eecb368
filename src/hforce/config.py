"""What can be set, with which default, and how presets, files and --set change it."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hforce.errors import ConfigError, UsageError
from hforce.models.families import FAMILIES, SELF_FORCING, find_family
from hforce.resources import presets
from hforce.rules import Rule, amount, each, falling, nearest, one_of, seconds, size, within
from hforce.settings import EAGER, OWN, SETUPS, SUITES, CacheConfig, Config, RolePolicy
from hforce.which_model import DEFAULT
from hforce.yamlfile import key_lines, read_yaml_text, yaml_error

COMMAND_LINE = "--set"
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # one that is not escaped
_BUNDLES = (("cache", "setup", SETUPS), ("bench", "suite", SUITES))


@dataclass(frozen=True)
class Setting:
    """One value that somebody set: dotted `path`, `value`, and `origin` ("run.yaml:3" or "--set")."""

    path: str
    value: Any
    origin: str


_SEED = within(0, 2**63 - 1)
_SETUP = one_of(*SETUPS)
_SPEEDS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
_RULES: Mapping[str, Rule] = MappingProxyType({
    "model.size": size,
    "model.dtype": one_of("auto", "float32", "bfloat16", "float16"),
    "model.release": one_of("", *(family.name for family in FAMILIES)),
    "model.device": one_of("auto", "cpu", "cuda", "mps", also=r"cuda:\d{1,3}", shown="cuda:N"),
    "model.vae_device": one_of("", "cpu", "cuda", "mps", also=r"cuda:\d{1,3}", shown="cuda:N"),
    "model.memory": one_of("auto", "speed", "balanced", "low"),
    "model.memory_limit": amount,
    "model.threads": within(0, 1024),
    "cache.setup": _SETUP,
    "cache.roles": one_of("profile", "inverse", "uniform", also=r"random:\d{1,18}", shown="random:SEED"),
    "cache.switch": one_of("keep", "flush", "recache"),
    "cache.recache_frames": within(0, 1000, " latent frames"),
    "cache.backend": one_of("vendor", "auto", "sdpa", "cudnn", "varlen", "triton", "triton-key", "reference"),
    "sample.steps": falling(1),
    "sample.first_steps": falling(0),
    "sample.shift": within(0.01, 100),
    "sample.chunk": within(1, 1000, " latent frames"),
    "sample.context_noise": within(0, 1000),
    "sample.seed": _SEED,
    "video.seconds": seconds,
    "video.fps": within(1, 240, " frames per second"),
    "video.crf": within(0, 51),
    "video.preset": one_of(*_SPEEDS),
    "video.upscale": within(1, 16),
    "profile.seeds": each(_SEED),
    "profile.mode": one_of("native21", "rolling30"),
    "profile.anchor": within(0, 1),
    "profile.local": within(0, 1),
    "profile.sink_frames": within(1, 1000),
    "profile.query_stride": within(1, 1_000_000),
    "profile.threshold": one_of("quantile", "absolute"),
    "profile.min_vote": within(0, 1),
    "bench.setups": each(one_of(*SETUPS, EAGER)),
    "bench.seconds": seconds,
    "bench.seed": _SEED,
    "bench.warmup": within(0, 1000, " chunks"),
    "bench.suite": one_of("", *SUITES),
    "bench.videos": within(2, 1000, " videos"),
    "bench.workers": within(0, 1024, " processes"),
    "bench.layers": within(0, 1000, " layers"),
    "bench.decoders": each(one_of(OWN, "taehv", "wan-vae")),
})


def load_config(
    preset: str = "",
    files: Iterable[Path | str] = (),
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Defaults, changed by the preset, then by `files`, then by the command line: `overrides` and `flags`.

    Without a preset it is the one that `model.name` is set to, or else the tiny model's. A setup or suite that one of
    these three names is applied before its other settings, and undoes the one before. `overrides` are texts
    "section.key=value", `flags` dotted keys and values as they are meant. All faults are reported together, each with
    its file and line: UsageError when all of them come from the command line, else ConfigError; InputError for a file
    that is not there.
    """
    in_files = [setting for file in files for setting in _file_settings(Path(file))]
    typed = [setting for text in overrides for setting in _override_settings(text)]
    typed += [Setting(key, _as_it_is(value), COMMAND_LINE) for key, value in flags.items()]
    given = [*in_files, *typed]
    named = next((str(setting.value) for setting in reversed(given) if setting.path == "model.name"), DEFAULT)
    packaged = _file_settings(_preset_path(preset or (named if named in presets() else DEFAULT)))
    tree, faults = OmegaConf.structured(Config), []
    for stage in (packaged, in_files, typed):
        _apply_bundles(tree, stage)
        faults += [fault for setting in stage if (fault := _apply(tree, setting))]
    faults += _broken_references(tree, (*packaged, *given))
    _report(faults)
    _undo_options(tree, (in_files, typed))
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config), "the tree was made from Config"
    origins = {setting.path: setting.origin for setting in (*packaged, *given)}
    _report([(origins.get(path, ""), f"{path}: {message}") for path, message in violations(config)])
    return config


def _apply_bundles(tree: DictConfig, stage: Iterable[Setting]) -> None:
    """What the setup and the suite named last in a stage change, after what those before them had changed is undone."""
    for section, chooser, bundles in _BUNDLES:
        named = [str(setting.value) for setting in stage if setting.path == f"{section}.{chooser}"]
        if not named or named[-1] not in bundles:
            continue
        fresh = OmegaConf.structured(Config)[section]
        for key in bundles.get(str(tree[section][chooser]), {}):
            tree[section][key] = fresh[key]
        for key, value in bundles[named[-1]].items():
            tree[section][key] = value


def _undo_options(tree: DictConfig, stages: Iterable[Iterable[Setting]]) -> None:
    """Takes back what the setup set for a policy of its own, where a role was given another one."""
    given: set[str] = set()  # since the setup was named
    for stage in stages:
        paths = {setting.path for setting in stage}
        given = paths if "cache.setup" in paths else given | paths
    for role, policy in SETUPS.get(str(tree.cache.setup), {}).items():
        if not isinstance(policy, RolePolicy) or tree.cache[role].policy == policy.policy:
            continue
        own = tree.cache[role].options
        if not OmegaConf.is_interpolation(tree.cache[role], "options"):
            for key in [key for key in policy.options if f"cache.{role}.options.{key}" not in given and key in own]:
                del own[key]


def with_setup(config: Config, setup: str) -> Config:
    """The same configuration under another named setup; settings of roles that the setup leaves alone stay."""
    if setup == config.cache.setup:
        return config
    changes = copy.deepcopy(dict(SETUPS[setup]))
    undone = {key: getattr(CacheConfig(), key) for key in SETUPS[config.cache.setup]}
    cache = dataclasses.replace(config.cache, **{"roles": "profile", **undone, **changes, "setup": setup})
    return dataclasses.replace(config, cache=cache)


def describe(config: Config) -> str:
    """The whole configuration as YAML, as `load_config` reads it, after a comment on what null stands for.

    Raises ConfigError for a path that is no text.
    """
    release = config.model.release
    recipe = dataclasses.asdict(find_family(release).recipe if release else SELF_FORCING)
    values = ", ".join(f"{key}: {json.dumps(recipe[key])}" for key in vars(config.sample) if key in recipe)
    whose = f"as {release} has it" if release else "as its release has it, or else as Self-Forcing"
    note = f"# null in `sample`: left to the model, {whose}\n# {values}\n"
    try:
        return note + str(OmegaConf.to_yaml(OmegaConf.structured(config)))
    except UnicodeEncodeError as error:
        text = str(error.object).encode("utf-8", "backslashreplace").decode()
        raise ConfigError(f"{text} is not UTF-8, and YAML holds nothing else", "rename the file") from error


def violations(config: Config) -> list[tuple[str, str]]:
    """Every value that cannot be meant: its dotted path, and what was expected."""
    checks: list[tuple[str, str | None]] = []
    for path, value in _leaves(config):
        rule = _RULES.get(path)
        checks.append((path, rule(value) if rule and value is not None else None))
    if config.video.init_image and config.video.init_video:
        checks.append(("video.init_video", "a video starts from a picture or from another video, not from both"))
    return [(path, message) for path, message in checks if message]


def _preset_path(name: str) -> Path:
    known = presets()
    if name not in known:
        raise UsageError(f"no preset {name[:60]!r}{nearest(name, known)}", f"presets: {', '.join(known)}")
    return known[name]


def _file_settings(path: Path) -> list[Setting]:
    text = read_yaml_text(path)
    lines = key_lines(text, str(path))
    return [Setting(key, value, f"{path}:{lines.get(key, 1)}") for key, value in _parse(text, str(path))]


def _override_settings(text: str) -> list[Setting]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{COMMAND_LINE} {text[:60]!r}: expected section.key=value", "for example: --set video.crf=23")
    try:
        key_lines(f"value: {value}", COMMAND_LINE)
        parsed = dict(_parse(f"value: {value}", COMMAND_LINE))
    except ConfigError as error:
        raise UsageError(f"{COMMAND_LINE} {text[:60]!r}: not a value YAML can read", "quote it") from error
    return [Setting(key.strip() + path.removeprefix("value"), found, COMMAND_LINE) for path, found in parsed.items()]


def _as_it_is(value: Any) -> Any:
    """A value in which OmegaConf finds no reference: backslashes before one escape it, and each other."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _parse(text: str, name: str) -> Iterator[tuple[str, Any]]:
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise yaml_error(error, name) from error
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: {reason}") from error
    return _leaves(tree)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything below, in order; lists and empty mappings are values."""
    if dataclasses.is_dataclass(node):
        node = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if not isinstance(node, dict) or (prefix and not node):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _schema(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and type of every key, sections included."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from _schema(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _apply(tree: DictConfig, setting: Setting) -> tuple[str, str] | None:
    """Set one value; its origin and what is wrong with it, or None."""
    schema = dict(_schema())
    path, options = setting.path, setting.path.partition(".options.")
    is_option = f"{options[0]}.options" in schema and re.fullmatch(r"[\w.-]*\w", options[2])
    kind = Any if is_option else schema.get(path)
    if kind is None:
        known = [name for name, hint in schema.items() if not dataclasses.is_dataclass(hint)]
        return setting.origin, f"unknown key {path[:80]!r}{nearest(path, known)}"
    if setting.value == "???":
        return setting.origin, f"{path}: still ???; give it a value"
    if _has_resolver(setting.value):
        return setting.origin, f"{path}: only plain references such as ${{video.fps}} are read"
    fits = not (kind is str and not isinstance(setting.value, str))  # OmegaConf would make the text 'False' of no
    try:
        if fits:
            OmegaConf.update(tree, path, setting.value)
            return None
    except (OmegaConfBaseException, ValueError):
        pass
    return setting.origin, f"{path}: expected {_kind_name(kind)}, got {str(setting.value)[:60]!r}"


def _has_resolver(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(_has_resolver(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and _REFERENCE.search(re.sub(r"(?<!\\)\$\{[\w.]+\}", "", value)) is not None


def _broken_references(tree: DictConfig, settings: Iterable[Setting]) -> list[tuple[str, str]]:
    faults = []
    for setting in settings:
        try:
            if _REFERENCE.search(str(setting.value)):
                OmegaConf.to_container(OmegaConf.create({"value": OmegaConf.select(tree, setting.path)}), resolve=True)
        except (OmegaConfBaseException, RecursionError):
            faults.append((setting.origin, f"{setting.path}: the reference {str(setting.value)[:60]!r} leads nowhere"))
    return faults


def _kind_name(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "a section with keys below it"
    names = {int: "a whole number", float: "a number", str: "text (quote it)", bool: "true or false",
             dict: "a mapping", list: "a list of "}
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    name = names.get(get_origin(kind) or kind, "a value")
    return name + ("whole numbers" if kind == list[int] else "words") if get_origin(kind) is list else name


def _report(faults: list[tuple[str, str]]) -> None:
    """Raise all faults as one error; nothing when there are none."""
    if not faults:
        return
    kind = UsageError if all(origin == COMMAND_LINE for origin, _ in faults) else ConfigError
    raise kind("\n".join(f"{origin}: {message}" if origin else message for origin, message in faults),
               "hforce generate --print-config shows every key with its value")
