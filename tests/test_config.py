"""Configuration: layers, and what each kind of wrong input says."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hforce.config import describe, load_config, violations, with_setup
from hforce.errors import ConfigError, HforceError, InputError, UsageError
from hforce.resources import resource
from hforce.settings import SETUPS, CacheConfig, Config, ProfileConfig, RolePolicy, SampleConfig
from hforce.units import Grid, parse_duration, parse_moment, parse_size


def written(folder: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def failure(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(files=[written(folder, text)])
    assert caught.value.exit_code == 78
    return str(caught.value).replace(f"{folder}/", "")


def test_every_default_keeps_its_own_rule():
    assert violations(Config()) == []
    first = [1000, 937, 875, 750, 625, 500, 375, 250]
    roles = ProfileConfig(anchor=0, local=0.35)
    own = Config(cache=CacheConfig(switch="keep"), sample=SampleConfig(first_steps=first), profile=roles)
    assert load_config() == own


def test_later_layers_win(tmp_path):
    one = written(tmp_path, "video: {crf: 20, fps: 8}\nsample:\n  steps: [1000, 500]\n")
    two = written(tmp_path, "video:\n  crf: 21\n", "two.yaml")
    config = load_config(files=[one, two], overrides=["sample.seed=7", "model.name=other"])
    assert (config.video.crf, config.video.fps, config.sample.steps) == (21, 8, [1000, 500])
    assert (config.sample.seed, config.model.name) == (7, "other")


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config(files=[written(tmp_path, ""), written(tmp_path, "# only this\n", "two.yaml")]) == load_config()


@pytest.mark.parametrize("preset", [path.stem for path in resource("presets/tiny.yaml").parent.glob("*.yaml")])
def test_every_preset_loads_and_holds_only_what_differs(preset):
    given = {
        f"{section}.{key}": value
        for section, keys in yaml.safe_load(resource(f"presets/{preset}.yaml").read_text()).items()
        for key, value in keys.items()
    }
    sections = (dataclasses.asdict(config).items() for config in (Config(), load_config(preset)))
    was, now = ({f"{name}.{key}": value for name, keys in each for key, value in keys.items()} for each in sections)
    assert given == {key: value for key, value in now.items() if value != was[key]}


def test_describe_reads_back(tmp_path):
    config = load_config(overrides=["cache.setup=uniform", "cache.memory.options.window=5", "model.size=64x64"])
    assert load_config(files=[written(tmp_path, describe(config))]) == config


def test_a_setup_is_a_bundle_and_explicit_settings_win(tmp_path):
    assert load_config(overrides=["cache.setup=window"]).cache.memory == RolePolicy("window", {})
    file = written(tmp_path, "cache:\n  setup: sink\n  memory: {options: {window: 4}}\n")
    config = load_config(files=[file], overrides=["cache.roles=inverse"])
    assert config.cache.memory == RolePolicy("sink", {"window": 4})
    assert config.cache.roles == "inverse"


def test_the_setup_is_applied_before_what_is_set_beside_it(tmp_path):
    typed = ["cache.memory.options.window=4", "cache.setup=sink"]
    assert load_config(overrides=typed).cache.memory == RolePolicy("sink", {"window": 4})
    file = written(tmp_path, "cache: {memory: {options: {window: 4}}, setup: sink}\n")
    assert load_config(files=[file]).cache.memory == RolePolicy("sink", {"window": 4})


@pytest.mark.parametrize("first", SETUPS)
@pytest.mark.parametrize("then", ["head-forcing", "window", "random", "hf-10"])
def test_a_setup_on_the_command_line_wins_over_a_file_in_which_everything_is_set(tmp_path, first, then):
    file = written(tmp_path, describe(load_config(overrides=[f"cache.setup={first}", "video.crf=30"])))
    changed = load_config(files=[file], flags={"cache.setup": then})
    assert changed == load_config(overrides=[f"cache.setup={then}", "video.crf=30"])


def test_a_flag_is_taken_as_it_is():
    odd = ("🦊 愛.png", "a'b\"c\\d.png", "f\udcff.png", "1e3", "null")
    for text in (*odd, "a${b}.png", "${oc.env:HOME}", "\\${b}", "\\\\${b}"):
        assert load_config(flags={"video.init_image": text}).video.init_image == text


@pytest.mark.parametrize("setup", SETUPS)
def test_another_setup_leaves_no_trace_of_the_first(setup):
    config = load_config(overrides=["cache.setup=window", "video.crf=30"])
    expected = load_config(overrides=[f"cache.setup={setup}", "video.crf=30"])
    assert with_setup(config, setup) == expected


def test_the_roles_of_head_forcing_keep_their_settings_under_random_roles():
    config = load_config(overrides=["cache.memory.options.episodes=9"])
    assert with_setup(config, "random").cache.memory.options == {"episodes": 9}
    assert with_setup(config, "window").cache.memory == RolePolicy("window", {})
    assert config.cache.roles == "profile"


def test_changing_a_config_does_not_change_the_setups():
    with_setup(Config(), "uniform").cache.memory.options["window"] = 99
    load_config(overrides=["cache.setup=uniform"]).cache.memory.options["window"] = 99
    assert SETUPS["uniform"]["memory"].options["window"] == 6


def test_an_unknown_key_names_file_line_and_nearest(tmp_path):
    message = failure(tmp_path, "model:\n  name: tiny\nvideo:\n  fsp: 16\n")
    assert message == "run.yaml:4: unknown key 'video.fsp' (did you mean 'video.fps'?)"


@pytest.mark.parametrize("text, expected", [
    ("video:\n  crf: high\n", "run.yaml:2: video.crf: expected a whole number, got 'high'"),
    ("video:\n  crf: 3.7\n", "run.yaml:2: video.crf: expected a whole number, got '3.7'"),
    ("video:\n  fps: true\n", "run.yaml:2: video.fps: expected a whole number, got 'True'"),
    ("sample:\n  steps: 1000\n", "run.yaml:2: sample.steps: expected a list of whole numbers, got '1000'"),
    ("model:\n  name: no\n", "run.yaml:2: model.name: expected text (quote it), got 'False'"),
    ("video:\n", "run.yaml:1: video: expected a section with keys below it, got 'None'"),
    ("cache:\n  memory: window\n", "run.yaml:2: cache.memory: expected a section with keys below it, got 'window'"),
    ("video: 3\n", "run.yaml:1: video: expected a section with keys below it, got '3'"),
    ("sample:\n  warp: maybe\n", "run.yaml:2: sample.warp: expected true or false, got 'maybe'"),
    ("video:\n  crf: 99\n", "run.yaml:2: video.crf: 99 is outside 0 to 51"),
    ("video:\n  seconds: .nan\n", "run.yaml:2: video.seconds: nan is not a number of seconds above 0 and up to 24 h"),
    ("video:\n  seconds: 1:30\n", "run.yaml:2: YAML would read 1:30 in sixties"),
    ("cache:\n  setup: head-forcin\n", "unknown 'head-forcin' (did you mean 'head-forcing'?); known are head-forcing,"),
    ("cache:\n  roles: random:SEED\n", "run.yaml:2: cache.roles: unknown 'random:SEED'"),
    ("sample:\n  steps: [500, 1000]\n", "run.yaml:2: sample.steps: [500, 1000] are not timesteps falling"),
    ("sample:\n  chunk: one\n", "run.yaml:2: sample.chunk: expected a whole number, got 'one'"),
    ("model:\n  release: causvit\n", "run.yaml:2: model.release: unknown 'causvit' (did you mean 'causvid'?)"),
    ("bench:\n  setups: []\n", "run.yaml:2: bench.setups: expected at least one value"),
    ("model:\n  size: 833x481\n", "run.yaml:2: model.size: a side of 833 pixels"),
    ("model:\n  name: '???'\n", "run.yaml:2: model.name: still ???"),
    ("cache:\n  memory:\n    options:\n      'a[0]': 1\n", "run.yaml:4: unknown key 'cache.memory.options.a[0]'"),
    ("- 1\n", "run.yaml:1: expected 'section:'"),
    ("just words\n", "run.yaml:1: expected 'section:'"),
    ("video:\n\tcrf: 1\n", "run.yaml:2:1: not valid YAML"),
    ("video:\n  crf: 1\n  crf: 2\n", "not valid YAML: found duplicate key crf"),
    ("video: !!python/object:os.system {}\n", "not valid YAML"),
    ("video: &v\n  crf: *v\n", "run.yaml: more than 10000 keys or 32 levels"),
    (b"model:\n  name: \xff\n", "run.yaml:2: not UTF-8: byte 15 is 0xff"),
    ("a: " + "{a: " * 10_000, "run.yaml:1: nested more than 32 levels"),
    ("#" * (1 << 20) + "\nvideo: {}\n", "run.yaml is larger than the 1 MiB"),
])
def test_a_wrong_file_says_where_and_what(tmp_path, text, expected):
    assert expected in failure(tmp_path, text)


def test_all_faults_are_told_together(tmp_path):
    message = failure(tmp_path, "video:\n  fsp: 1\n  crf: high\nmodle:\n  name: tiny\n")
    assert message.splitlines() == [
        "run.yaml:2: unknown key 'video.fsp' (did you mean 'video.fps'?)",
        "run.yaml:3: video.crf: expected a whole number, got 'high'",
        "run.yaml:5: unknown key 'modle.name' (did you mean 'model.name'?)",
    ]
    message = failure(tmp_path, "video: {crf: 99, fps: 0}\nprofile: {anchor: 1.5}\n")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("text", [
    "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{" + ", ".join(f"x{j}: *a{i - 1}" for j in range(9)) + "}\n"
                                 for i in range(1, 20)),
    "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 20)),
])
def test_an_alias_bomb_does_not_go_off(tmp_path, text):
    failure(tmp_path, text)


@pytest.mark.parametrize("value", ["${oc.env:HFORCE_SECRET}", "${${video.preset}:HFORCE_SECRET}", "a ${oc.env:HOME,x}",
                                   "$${model.name}{oc.env:HFORCE_SECRET}"])
def test_a_resolver_is_an_error_and_is_not_resolved(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HFORCE_SECRET", "hunter2")
    text = f"model:\n  checkpoint: '{value}'\ncache: {{memory: {{options: {{a: ['{value}']}}}}}}\n"
    message = failure(tmp_path, text)
    assert "hunter2" not in message
    assert message.count("only plain references such as ${video.fps}") == 2


def test_a_plain_reference_is_followed_and_a_lost_one_is_named(tmp_path):
    assert load_config(files=[written(tmp_path, "bench: {seconds: '${video.seconds}'}\n")]).bench.seconds == 60.0
    assert "run.yaml:1: model.name: the reference '${no.such}' leads nowhere" in failure(
        tmp_path, "model: {name: '${no.such}'}\n")
    assert "leads nowhere" in failure(tmp_path, "model: {name: '${model.name}'}\n")


@pytest.mark.parametrize("override, expected", [
    ("video.crf", "expected section.key=value"),
    ("=3", "expected section.key=value"),
    ("video.crf=99", "--set: video.crf: 99 is outside 0 to 51"),
    ("video.fsp=3", "did you mean 'video.fps'?"),
    ("video.crf=[", "not a value YAML can read"),
    ("video.seconds=1:30", "not a value YAML can read"),
    ("cache.memory.policy=3", "expected text"),
])
def test_a_wrong_override_is_a_usage_error(override, expected):
    with pytest.raises(UsageError) as caught:
        load_config(overrides=[override])
    assert caught.value.exit_code == 2
    assert expected in str(caught.value)


def test_faults_from_file_and_command_line_count_as_the_files(tmp_path):
    with pytest.raises(ConfigError):
        load_config(files=[written(tmp_path, "video: {crf: 99}\n")], overrides=["video.fps=0"])


def test_options_take_any_value():
    config = load_config(overrides=["cache.memory.options.episodes=6", "cache.memory.options={novelty: 0.5, x: [1]}"])
    assert config.cache.memory.options == {"episodes": 6, "novelty": 0.5, "x": [1]}


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match="did you mean 'tiny'") as caught:
        load_config("tinny")
    assert "wan2.1-t2v-1.3b" in caught.value.mend


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_missing_file_or_a_folder_is_a_missing_input(tmp_path, name):
    with pytest.raises(InputError):
        load_config(files=[tmp_path / name])


@given(st.text(max_size=200))
def test_no_text_brings_anything_but_our_errors(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(files=[path])
    except HforceError:
        pass


@given(st.sampled_from(sorted(f"{section.name}.{key.name}" for section in dataclasses.fields(Config)
                              for key in dataclasses.fields(getattr(Config(), section.name)))), st.text(max_size=20))
def test_no_override_brings_anything_but_our_errors(key, value):
    try:
        load_config(overrides=[f"{key}={value}"])
    except UsageError:
        pass


@pytest.mark.parametrize("text, seconds", [("60s", 60), ("1.5m", 90), ("2min", 120), ("1m30s", 90), ("1h", 3600)])
def test_a_duration_has_a_unit(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["90", "nan", "inf", "1e400", "-5s", "0s", "", "s", "25h", "9" * 400 + "s", "10 10s"])
def test_a_wrong_duration_shows_how_to_write_one(text):
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert caught.value.mend


@pytest.mark.parametrize("text, seconds", [("0s", 0), ("12s", 12), ("192f", 12), ("48l", 12), ("16c", 12), ("2m", 120)])
def test_a_moment_counts_seconds_frames_latents_or_chunks(text, seconds):
    assert parse_moment(text, Grid(fps=16, stride=4, chunk=3)) == seconds


@pytest.mark.parametrize("text", ["832x480", "832X480", "832 x 480", "832×480"])
def test_a_size_is_width_by_height(text):
    assert parse_size(text) == (832, 480)


@pytest.mark.parametrize("text, near", [("833x480", "832 or 848"), ("0x64", "nearest is 16"), ("64000x64", "4096")])
def test_a_wrong_size_names_the_nearest(text, near):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert near in caught.value.mend


@pytest.mark.parametrize("text", ["", "64", "-64x64", "axb", "64x64x64"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError):
        parse_size(text)


def test_a_path_that_is_no_text_cannot_be_shown() -> None:
    with pytest.raises(ConfigError, match="is not UTF-8"):
        describe(load_config(flags={"cache.profile": "p\udce9.json"}))


def test_the_preset_is_that_of_the_model_that_is_named(tmp_path: Path) -> None:
    """However it is named: nothing of the tiny model's own settings may stay."""
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  name: wan2.1-t2v-1.3b\n")
    wanted = load_config("wan2.1-t2v-1.3b")
    assert load_config(files=[file]) == load_config(overrides=["model.name=wan2.1-t2v-1.3b"]) == wanted
    assert wanted.sample.first_steps is None and load_config().sample.first_steps
    assert load_config(overrides=["model.name=other"]).model.name == "other"


def test_another_policy_does_not_inherit_the_options_of_a_setup() -> None:
    config = load_config(overrides=["cache.setup=hf-10", "cache.memory.policy=window", "cache.memory.options.frames=9"])
    assert config.cache.memory == RolePolicy("window", {"frames": 9})
    kept = load_config(overrides=["cache.setup=hf-10", "cache.memory.policy=sink", "cache.memory.options.window=3"])
    assert kept.cache.memory == RolePolicy("sink", {"window": 3})
    linked = ["cache.local.options.window=4", "cache.memory.options=${cache.local.options}"]
    config = load_config(overrides=["cache.setup=hf-10", "cache.memory.policy=sink", *linked])
    assert config.cache.local.options == config.cache.memory.options == {"window": 4}
