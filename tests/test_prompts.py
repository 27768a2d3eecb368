"""Prompt files: what is read, what is refused, and how videos are called."""

import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.errors import DataError, InputError
from hforce.prompts import Item, Shot, file_stem, load_prompts
from hforce.resources import resource
from hforce.toy.world import SLOTS, parse


def written(folder: Path, content: str | bytes, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def row(folder: Path, **entry: object) -> Item:
    return load_prompts(written(folder, json.dumps(entry)))[0]


def failure(folder: Path, content: str | bytes, name: str = "prompts.jsonl") -> str:
    with pytest.raises(DataError) as caught:
        load_prompts(written(folder, content, name))
    assert caught.value.exit_code == 65
    return str(caught.value).replace(f"{folder}/", "")


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    items = load_prompts(written(tmp_path, "a cat\n\n# a heading\n  a dog  ", "p.txt"))
    assert [(item.shots[0].prompt, item.line) for item in items] == [("a cat", 1), ("# a heading", 3), ("a dog", 4)]
    assert items[0] == Item(None, (Shot("a cat"),), line=1)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa cat\na dog\n", b"a cat\r\na dog\r\n", b"a cat\na dog"])
def test_the_clean_file_and_its_variants_read_the_same(tmp_path, content):
    clean = load_prompts(written(tmp_path, b"a cat\na dog\n", "clean.txt"))
    assert load_prompts(written(tmp_path, content, "p.txt")) == clean


def test_a_line_separator_within_a_prompt_does_not_split_it(tmp_path):
    items = load_prompts(written(tmp_path, "a\u2028cat\x0bpurrs\na dog\n", "p.txt"))
    assert [(item.shots[0].prompt, item.line) for item in items] == [("a\u2028cat\x0bpurrs", 1), ("a dog", 2)]


def test_escapes_and_markup_are_kept_for_the_model(tmp_path):
    prompt = "\x1b[31ma [/nope] \u202ecat ${HOME} <script>"
    assert load_prompts(written(tmp_path, prompt, "p.txt"))[0].shots[0].prompt == prompt


def test_a_row_has_a_name_a_seed_and_a_duration(tmp_path):
    item = row(tmp_path, prompt="a cat", name="cat-1", seed=7, duration="1m30s")
    assert item == Item("cat-1", (Shot("a cat"),), seed=7, seconds=90.0, line=1)


def test_a_list_of_prompts_shares_the_time(tmp_path):
    item = row(tmp_path, prompts=["a cat", "a dog"], duration="10s")
    assert [shot.seconds for shot in item.timed(10)] == [5, 5]


@pytest.mark.parametrize("moments", [("0s", "12s", "24s"), ("0f", "192f", "384f"), ("0l", "48l", "96l"),
                                     ("0c", "16c", "32c")])
def test_a_schedule_counts_in_four_units(tmp_path, moments):
    schedule = [{"at": at, "prompt": prompt} for at, prompt in zip(moments, "abc", strict=True)]
    assert row(tmp_path, schedule=schedule).shots == (Shot("a", 12), Shot("b", 12), Shot("c", None))
    assert row(tmp_path, schedule=schedule, duration="30s").shots[2] == Shot("c", 6)


def test_the_last_shot_takes_the_rest():
    item = Item(None, (Shot("a", 12), Shot("b")))
    assert item.timed(60) == (Shot("a", 12), Shot("b", 48))
    with pytest.raises(DataError, match="the shots take 12s, the video has 10s"):
        item.timed(10)
    with pytest.raises(DataError):
        Item(None, (Shot("a", 12),)).timed(60)


@pytest.mark.parametrize("entry, expected", [
    ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
    ('["a"]', "expected an object in braces, got '[\"a\"]'"),
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "prompt": "b"}', "the same key twice"),
    ('{"prompt": "a", "sede": 1}', "unknown key 'sede' (did you mean 'seed'?)"),
    ('{"prompt": "a", "\\u001b[31m": 1}', r"unknown key '\x1b[31m'"),
    ('{"prompt": 3}', "prompt: expected text, got '3'"),
    ('{"prompt": "  "}', "prompt: empty"),
    ('{"prompt": "a\\u0000b"}', "prompt: NUL character at column 2"),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ('{"name": "a"}', "expected one of prompt, prompts and schedule, got none"),
    ('{"prompt": "a", "prompts": ["a"]}', "got prompt and prompts"),
    ('{"prompts": []}', "prompts: expected a list with at least one entry"),
    ('{"prompts": ["a", 2]}', "prompts[1]: expected text"),
    ('{"prompt": "a", "seed": -1}', "seed: expected a whole number from 0"),
    ('{"prompt": "a", "seed": true}', "seed: expected a whole number from 0"),
    ('{"prompt": "a", "seed": 9223372036854775808}', "seed: expected a whole number from 0"),
    ('{"prompt": "a", "duration": 10}', 'duration: expected text such as "10s"'),
    ('{"prompt": "a", "duration": "10"}', "duration: '10' is not a length of time; write it with a unit"),
    ('{"prompt": "a", "name": "../../etc/x"}', "name: '../../etc/x' is not a file name"),
    ('{"prompt": "a", "name": "con"}', "name: 'con' is not a file name"),
    ('{"schedule": "a"}', "schedule: expected a list"),
    ('{"schedule": [{"at": "0s"}]}', "schedule[0]: expected an object with exactly at and prompt"),
    ('{"schedule": [{"at": "5s", "prompt": "a"}]}', "the first shot starts at 0s, not at 5s"),
    ('{"schedule": [{"at": "0s", "prompt": "a"}, {"at": "0s", "prompt": "b"}]}', "schedule[1].at: 0s is not after 0s"),
    ('{"schedule": [{"at": "0s", "prompt": "a"}, {"at": "0.2s", "prompt": "b"}]}', "chunks last 0.75s"),
    ('{"schedule": [{"at": "0s", "prompt": "a"}, {"at": "9s", "prompt": "b"}], "duration": "9s"}',
     "before the end at 9s"),
    ('{"schedule": [{"at": "0s", "prompt": "a"}, {"at": "9", "prompt": "b"}]}', "schedule[1].at: '9' is not a moment"),
])
def test_a_wrong_row_says_what_is_wrong(tmp_path, entry, expected):
    message = failure(tmp_path, f'{{"prompt": "fine"}}\n{entry}\n')
    assert message.startswith("prompts.jsonl:2: ")
    assert expected in message
    assert "\x1b" not in message


def test_all_bad_lines_are_told_up_to_twenty(tmp_path):
    message = failure(tmp_path, '{"prompt": "a"}\n{"prompt": 1}\n{"prompt": "b"}\nnonsense\n')
    assert [line.split(": ")[0] for line in message.splitlines()] == ["prompts.jsonl:2", "prompts.jsonl:4"]
    many = failure(tmp_path, "{}\n" * 50).splitlines()
    assert len(many) == 21
    assert many[-1] == "prompts.jsonl: and 30 more"


def test_two_rows_may_not_have_one_name(tmp_path):
    rows = '{"prompt": "a", "name": "Caf\\u00e9"}\n{"prompt": "b", "name": "cafe\\u0301"}\n'
    assert failure(tmp_path, rows) == "prompts.jsonl:2: name 'cafe\\u0301' is taken by line 1"


@pytest.mark.parametrize("content, expected", [
    (b"", "no prompts"),
    (b"\n  \n\t\n", "no prompts"),
    (b"a cat\n\xff\xfe\n", "p.txt:2: not UTF-8: byte 6 is 0xff"),
    ("a cat\n".encode("utf-16"), "p.txt:1: not UTF-8: byte 0 is 0xff; it looks like UTF-16"),
    (b"a cat\nb\0c\n", "p.txt:2: prompt: NUL character at column 2"),
    (b"x" * ((1 << 20) + 1), "p.txt:1: prompt: 1048577 bytes long"),
])
def test_a_wrong_text_file_says_where(tmp_path, content, expected):
    assert expected in failure(tmp_path, content, "p.txt")


def test_another_kind_of_file_is_not_read_as_text(tmp_path):
    assert "prompt files end in .txt or .jsonl, not in .csv" in failure(tmp_path, "prompt\na cat\n", "p.csv")


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_a_missing_file_or_a_folder_is_a_missing_input(tmp_path, name):
    with pytest.raises(InputError):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("content", [b"a cat\n", b'{"prompt": "a cat"}\n'])
def test_standard_input_is_text_or_rows(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert load_prompts("-")[0].shots == (Shot("a cat"),)


def test_a_hundred_thousand_prompts_are_read(tmp_path):
    items = load_prompts(written(tmp_path, "".join(f"prompt {i}\n" for i in range(100_000)), "p.txt"))
    assert (len(items), items[-1].line) == (100_000, 100_000)


@given(st.binary(max_size=300))
def test_no_bytes_bring_anything_but_our_errors(tmp_path_factory, content):
    for suffix in ("txt", "jsonl"):
        path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
        path.write_bytes(content)
        try:
            assert load_prompts(path)
        except DataError:
            pass


@pytest.mark.parametrize("name", ["demo.txt", "profile.txt", "bench.txt", "switch.jsonl"])
def test_shipped_prompts_say_everything_the_tiny_model_was_taught(name):
    for item in load_prompts(resource(f"prompts/{name}")):
        for shot in item.shots:
            said = parse(shot.prompt)
            assert (set(said.words), said.unknown) == (set(SLOTS), ())


def test_profiling_prompts_cover_every_word_and_differ():
    prompts = [item.shots[0].prompt for item in load_prompts(resource("prompts/profile.txt"))]
    assert len(set(prompts)) == 20
    for slot, words in SLOTS.items():
        assert {parse(prompt).words[slot] for prompt in prompts} == set(words)


def test_a_plain_prompt_is_its_own_name():
    assert file_stem("a person swimming in ocean", 0, set()) == "a person swimming in ocean-0"
    assert file_stem("Ein schöner Tag, heute!", 2, set()) == "Ein schöner Tag, heute!-2"


@pytest.mark.parametrize("prompt", ["../../etc/x", "/abs", "~", "con.mp4", "NUL", "a cat.", ".hidden", "a_cat", "-o x",
                                    "a/b", "a\\b", 'say "hi"', "a: b", "what?", "a\nb", "a\x1b[31mb", "\u202eabc", "",
                                    "...", "x" * 300, "猫" * 90, "the-Scene-1", "a\u2028b", "\ud800"])
def test_a_prompt_that_is_no_name_gets_slug_and_hash(prompt):
    stem = file_stem(prompt, 1, set())
    slug, digest, index = stem.rsplit("-", 2)
    letters = slug.replace("-", "")
    assert letters.isascii() and letters.isalnum()
    assert (len(digest), index) == (8, "1")
    assert file_stem(prompt, 1, set()) == stem


@pytest.mark.parametrize("one, two", [("a cat", "a cat"), ("A Cat", "a cat"), ("Caf\u00e9", "cafe\u0301"),
                                      ("straße", "STRASSE"), ("x" * 300, "x" * 301)])
def test_names_differ_where_a_file_system_would_see_one(one, two):
    taken: set[str] = set()
    stems = [file_stem(prompt, 0, taken) for prompt in (one, two, one)]
    assert len({unicodedata.normalize("NFC", stem).casefold() for stem in stems}) == 3


@given(st.lists(st.text(max_size=120), max_size=8))
def test_names_are_legal_unique_and_found_by_their_prompt(prompts):
    taken: set[str] = set()
    stems = [file_stem(prompt, 0, taken) for prompt in prompts]
    assert len({unicodedata.normalize("NFC", stem).casefold() for stem in stems}) == len(prompts)
    for prompt, stem in zip(prompts, stems, strict=True):
        assert len(f"{stem}.mp4".encode()) <= 240
        assert not set(stem) & set('/\\<>:"|?*_\0\n') and not stem.startswith(".")
        assert stem == f"{prompt}-0" or stem.isascii()


def test_without_a_suffix_a_brace_tells_objects_from_prompts(tmp_path):
    """As of a pipe that a shell opened."""
    for name, count in (("pipe", 1), ("p.txt", 0)):
        (tmp_path / name).write_text('{"prompt": "a red circle", "seed": 3}\n')
        (item,) = load_prompts(tmp_path / name)
        assert (item.seed == 3) == bool(count)
