"""Role maps, the rule that labels heads, and the profile file with its faults."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hforce.cache.roles import (
    Calibration,
    Fingerprint,
    HeadRecord,
    HeadRole,
    HeadStats,
    Method,
    Profile,
    ProfiledModel,
    RoleMap,
    Summary,
    Thresholds,
    check_model,
    head_order,
    label,
    load_profile,
    margins,
    save_profile,
)
from hforce.errors import DataError, InputError, OutputError

L, A, M = HeadRole.LOCAL, HeadRole.ANCHOR, HeadRole.MEMORY


def drawn(layers: int, heads: int, seed: int) -> list[list[float]]:
    source = random.Random(seed)
    return [[source.random() for _ in range(heads)] for _ in range(layers)]


def a_profile(layers: int = 2, heads: int = 3) -> Profile:
    sink, current = drawn(layers, heads, 1), drawn(layers, heads, 2)
    role_map, margin = label(sink, current), margins(sink, current)
    records = tuple(
        HeadRecord(
            layer=layer,
            head=head,
            role=role_map.at(layer, head),
            margin=margin[layer][head],
            vote=1.0,
            stats=HeadStats(
                sink_mass=sink[layer][head],
                middle_mass=0.1,
                current_mass=current[layer][head],
                last4_mass=0.5,
                sd_sink=0.01,
                sd_current=0.02,
                n=12,
            ),
        )
        for layer in range(layers)
        for head in range(heads)
    )
    return Profile(
        created_at="2026-01-02T03:04:05Z",
        generator={"hforce": "0.1.0", "torch": "2.13.0"},
        model=ProfiledModel(
            id="tiny",
            arch="tiny-causal",
            num_layers=layers,
            num_heads=heads,
            head_dim=16,
            tokens_per_frame=16,
            frames_per_chunk=3,
            fingerprint=Fingerprint(value="ab" * 32),
        ),
        calibration=Calibration(
            num_prompts=1,
            prompts_sha256="cd" * 32,
            prompts=("a red circle, ünïcode",),
            seeds=(0,),
            num_frames=21,
            size=(64, 64),
            timesteps=(1000.0, 750.0, 500.0, 250.0),
            dtype="float32",
            device="cpu",
            attention="sdpa",
            mode="native21",
            policy="full",
            chunks=(3, 4, 5, 6),
            query_stride=1,
        ),
        method=Method(threshold="quantile", thresholds=Thresholds(anchor=0.25, local=0.2), sink_frames=1, min_vote=0.0),
        heads=records,
        summary=Summary(counts=role_map.counts(), split_half_agreement=1.0),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "heads.json"
    save_profile(a_profile(), path)
    return path


def altered(path: Path, change: Any) -> Path:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# Role maps


def test_a_map_knows_its_size_counts_and_letters() -> None:
    roles = RoleMap(((L, A, M), (M, M, A)))
    assert (roles.layers, roles.heads, roles.at(0, 1), roles.at(1, 2)) == (2, 3, A, A)
    assert roles.counts() == {L: 1, A: 2, M: 3}
    assert roles.letters() == ("LAM", "MMA")


@pytest.mark.parametrize("rows", [(), ((),), ((L, M), (L,))])
def test_a_ragged_or_empty_map_is_refused(rows: tuple[tuple[HeadRole, ...], ...]) -> None:
    with pytest.raises(DataError):
        RoleMap(rows)


def test_uniform_gives_all_heads_one_role() -> None:
    assert RoleMap.uniform(M, 3, 2).letters() == ("MM", "MM", "MM")


@given(seed=st.integers(0, 1000))
def test_shuffled_keeps_the_counts_and_depends_on_the_seed_alone(seed: int) -> None:
    roles = label(drawn(6, 4, 0), drawn(6, 4, 1))
    assert roles.shuffled(seed).counts() == roles.counts()
    assert roles.shuffled(seed) == roles.shuffled(seed)


def test_shuffled_really_moves_roles() -> None:
    roles = label(drawn(6, 4, 0), drawn(6, 4, 1))
    assert len({roles.shuffled(seed) for seed in range(5)}) == 5


@given(seed=st.integers(0, 1000))
def test_inverse_keeps_the_counts(seed: int) -> None:
    roles = label(drawn(5, 4, seed), drawn(5, 4, seed + 1), anchor=seed % 7 / 6, local=seed % 5 / 4)
    assert roles.inverse().counts() == roles.counts()
    assert roles.inverse(drawn(5, 4, seed), drawn(5, 4, 3)).counts() == roles.counts()


def test_inverse_gives_local_to_the_lowest_current_mass_then_anchor_to_the_lowest_sink_mass() -> None:
    roles = RoleMap(((L, A, M, M),))
    inverse = roles.inverse(current=[[0.9, 0.5, 0.1, 0.2]], sink=[[0.1, 0.8, 0.3, 0.2]])
    assert inverse.letters() == ("AMLM",)


def test_inverse_without_masses_takes_memory_heads_spread_over_the_layers() -> None:
    roles = RoleMap(((L, M, M, M), (A, M, M, M)))
    assert roles.inverse().letters() == ("MLMM", "MAMM")


def test_inverse_of_few_memory_heads_still_keeps_the_counts() -> None:
    assert RoleMap(((L, L, A),)).inverse().letters() == ("LAL",)


def test_a_map_of_another_size_is_refused_with_both_sizes() -> None:
    roles = RoleMap.uniform(M, 30, 12)
    roles.check(30, 12, "wan")
    with pytest.raises(DataError, match="30 x 12 heads, model 'tiny' has 6 x 4") as error:
        roles.check(6, 4, "tiny")
    assert "hforce profile --model tiny" in error.value.mend


def test_head_order_makes_roles_contiguous_and_keeps_the_order_within() -> None:
    assert head_order(RoleMap(((L, A, M, L, M), (M, M, A, A, L)))) == ((2, 4, 1, 0, 3), (0, 1, 2, 3, 4))


# Labels


def test_wan_has_ninety_anchor_and_fifty_four_local_heads() -> None:
    counts = label(drawn(30, 12, 0), drawn(30, 12, 1)).counts()
    assert counts == {A: 90, L: 54, M: 216}


def test_labels_by_quantile() -> None:
    sink = [[0.9, 0.1, 0.2, 0.1]]
    current = [[0.99, 0.3, 0.8, 0.4]]
    assert label(sink, current, anchor=0.25, local=1 / 3).letters() == ("AMLM",)


def test_labels_by_absolute_mass() -> None:
    sink, current = [[0.9, 0.3, 0.2, 0.1]], [[0.9, 0.9, 0.5, 0.6]]
    assert label(sink, current, anchor=0.25, local=0.5, threshold="absolute").letters() == ("AAML",)
    assert label(sink, current, anchor=0.0, local=0.0, threshold="absolute").letters() == ("MMMM",)


def test_ties_go_to_the_lower_layer_and_head() -> None:
    flat = [[0.5, 0.5], [0.5, 0.5]]
    assert label(flat, flat, anchor=0.25, local=1 / 3).letters() == ("AL", "MM")


def test_a_mass_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="layer 0 head 1"):
        label([[0.1, float("nan")]], [[0.1, 0.2]])


def test_margins_reach_to_the_nearest_cut() -> None:
    sink = [[0.9, 0.5, 0.2, 0.1]]  # cut at 0.7
    current = [[0.9, 0.3, 0.8, 0.4]]  # of the last three: cut at 0.6
    assert margins(sink, current, anchor=0.25, local=1 / 3)[0] == pytest.approx((0.2, 0.2, 0.2, 0.2))


def test_margins_against_absolute_cuts() -> None:
    sink, current = [[0.9, 0.2, 0.1]], [[0.1, 0.9, 0.1]]
    assert margins(sink, current, 0.25, 0.5, "absolute")[0] == pytest.approx((0.65, 0.05, 0.15))


def test_margin_is_one_where_nothing_could_change_the_role() -> None:
    assert margins(drawn(2, 2, 0), drawn(2, 2, 1), anchor=0.0, local=0.0) == ((1.0, 1.0), (1.0, 1.0))


@given(seed=st.integers(0, 500), share=st.floats(0, 1), rest=st.floats(0, 1))
def test_labels_and_margins_agree_with_a_second_count(seed: int, share: float, rest: float) -> None:
    sink, current = drawn(4, 3, seed), drawn(4, 3, seed + 1000)
    counts = label(sink, current, share, rest).counts()
    assert counts[A] == round(share * 12)
    assert counts[L] == round(rest * (12 - counts[A]))
    assert all(0 <= margin <= 1 for row in margins(sink, current, share, rest) for margin in row)


# The profile file


def test_a_profile_survives_the_file(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = load_profile(saved)
    assert profile.model_copy(update={"content_sha256": ""}) == a_profile()
    assert profile.content_sha256 == profile.digest()
    assert profile.role_map() == label(drawn(2, 3, 1), drawn(2, 3, 2))
    assert profile.inverse() == profile.role_map().inverse(drawn(2, 3, 2), drawn(2, 3, 1))
    assert not caplog.records


def test_saving_twice_gives_the_same_bytes_and_leaves_nothing_else(saved: Path) -> None:
    before = saved.read_bytes()
    save_profile(load_profile(saved), saved)
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_saving_where_no_folder_is_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot create .*nowhere"):
        save_profile(a_profile(), tmp_path / "nowhere" / "heads.json")


def test_saving_onto_a_folder_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "heads.json").mkdir()
    with pytest.raises(OutputError):
        save_profile(a_profile(), tmp_path / "heads.json")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_profile_is_a_missing_input(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError):
            load_profile(path)


def test_a_byte_order_mark_and_room_for_others_are_accepted(saved: Path) -> None:
    altered(saved, lambda d: d.update(x={"note": [1, None, {"deep": "er"}]}))
    saved.write_bytes(b"\xef\xbb\xbf" + saved.read_bytes())
    assert load_profile(saved).x == {"note": [1, None, {"deep": "er"}]}


def test_a_profile_changed_by_hand_is_used_with_a_warning(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {"local": "memory", "memory": "anchor", "anchor": "local"}
    altered(saved, lambda d: d["heads"][0].update(role=other[d["heads"][0]["role"]]))
    with caplog.at_level(logging.WARNING):
        load_profile(saved)
    assert "changed after it was measured" in caplog.text


def _swap(document: dict[str, Any]) -> None:
    heads = document["heads"]
    heads[1], heads[2] = heads[2], heads[1]


FAULTS = {
    "wrong type": (lambda d: d["heads"][3].update(margin="wide"), "heads[3].margin: "),
    "whole number as text": (lambda d: d["model"].update(num_heads="3"), "model.num_heads: "),
    "true for a number": (lambda d: d["heads"][0].update(layer=True), "heads[0].layer: "),
    "not a number": (lambda d: d["heads"][2]["stats"].update(sink_mass=float("nan")), "heads[2].stats.sink_mass: "),
    "infinite": (lambda d: d["heads"][2]["stats"].update(sd_sink=float("inf")), "heads[2].stats.sd_sink: "),
    "mass out of range": (lambda d: d["heads"][1]["stats"].update(middle_mass=1.5), "heads[1].stats.middle_mass: "),
    "unknown role": (lambda d: d["heads"][4].update(role="boss"), "heads[4].role: "),
    "unknown field": (lambda d: d["model"].update(hat="red"), "model.hat: "),
    "missing field": (lambda d: d["model"].pop("arch"), "model.arch: "),
    "missing head": (lambda d: d["heads"].pop(2), "heads[2]: layer 0 head 2 is missing here, found layer 1 head 0"),
    "missing last head": (lambda d: d["heads"].pop(), "heads: layer 1 head 2 is missing"),
    "duplicate head": (lambda d: d["heads"].insert(1, d["heads"][0]), "heads[1]: layer 0 head 0 stands here a second"),
    "one more head": (lambda d: d["heads"].append(d["heads"][5]), "heads[6]: layer 1 head 2 stands here a second"),
    "head outside": (lambda d: d["heads"].append({**d["heads"][5], "layer": 2, "head": 0}), "heads[6]: layer 2 head 0"),
    "heads out of order": (_swap, "heads[1]: layer 0 head 1 is missing here, found layer 0 head 2"),
    "far too many promised": (lambda d: d["model"].update(num_layers=10**15), "heads: layer 2 head 0 is missing"),
    "another kind": (lambda d: d.update(kind="recipe"), "kind: "),
    "no version": (lambda d: d.pop("schema_version"), "schema_version: "),
    "version 0": (lambda d: d.update(schema_version=0), "schema_version: "),
    "a date of its own": (lambda d: d.update(created_at="yesterday"), "created_at: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_place_in_the_file(saved: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    altered(saved, change)
    with pytest.raises(DataError) as error:
        load_profile(saved)
    assert str(error.value).startswith(f"{saved}: {message}")
    assert "hforce profile" in error.value.mend


def test_many_faults_are_counted(saved: Path) -> None:
    altered(saved, lambda d: [head.update(role="boss") for head in d["heads"]])
    with pytest.raises(DataError, match=r"heads\[0\]\.role: .* \(and 5 more\)"):
        load_profile(saved)


def test_a_newer_profile_asks_for_an_upgrade(saved: Path) -> None:
    altered(saved, lambda d: d.update(schema_version=2, news="all changed"))
    with pytest.raises(DataError, match="schema 2, newer than the 1") as error:
        load_profile(saved)
    assert "upgrade hforce" in error.value.mend


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_a_data_error(saved: Path, share: float) -> None:
    whole = saved.read_bytes().rstrip()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="Invalid JSON: EOF"):
        load_profile(saved)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\x00\x01\x02",
        b"\xff\xfe{\x00",
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"kind":"hforce.head-profile","schema_version":1,"x":{"y":' + b"[" * 100_000,
        b'{"kind":"hforce.head-profile","schema_version":' + b"9" * 5000 + b"}",
        b'{"kind":"\\ud800"}',
    ],
    ids=lambda data: repr(data[:24]),
)
def test_bytes_that_are_no_profile_are_a_data_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "junk.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        load_profile(path)
    assert len(str(error.value)) < 500


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)  # sparse: no disk is used
    with pytest.raises(DataError, match="larger than the 8 MiB"):
        load_profile(path)


def test_a_profile_of_another_model_names_both_fingerprints() -> None:
    profile = a_profile()
    check_model(profile, "ab" * 32, 2, 3)
    with pytest.raises(DataError, match=r"abababababab.*cccccccccccc"):
        check_model(profile, "c" * 64, 2, 3)
    with pytest.raises(DataError, match=r"2 x 3 heads.* 6 x 4"):
        check_model(profile, "ab" * 32, 6, 4)
