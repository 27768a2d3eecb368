"""A head profile for the eye: as text and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from hforce.cache.roles import HeadRecord, HeadRole, Profile, label
from hforce.documents import write_bytes
from hforce.errors import OutputError, UnavailableError, cannot_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange and gray of Okabe and Ito stay apart for all kinds of colour vision; letters and markers tell as much.
COLORS: Mapping[HeadRole, str] = MappingProxyType(
    {HeadRole.ANCHOR: "#0072B2", HeadRole.LOCAL: "#E69F00", HeadRole.MEMORY: "#8C939C"}
)
MARKERS: Mapping[HeadRole, str] = MappingProxyType({HeadRole.ANCHOR: "^", HeadRole.LOCAL: "s", HeadRole.MEMORY: "o"})
INK, FAINT, GRID = "#22262B", "#6B727B", "#E4E7EA"
DPI = 150
PALEST = 0.35  # strength of the colour of a head on which no prompt agrees
LONGEST_NAME, LONGEST_MODE = 24, 12  # letters that are shown of a model's and of a mode's name
MOST_TICKS = 12  # numbers at an axis before only every fifth is written
WIDEST_ROW = 30  # heads a layer that are written apart


class Levels(NamedTuple):
    """Attention masses that part anchor heads from the rest, and local heads from memory; None where nothing is."""

    anchor: float | None
    local: float | None


def levels(profile: Profile) -> Levels:
    """The masses at which the roles part: as set, or halfway between the heads on both sides of a quantile."""
    cuts = profile.method.thresholds
    if profile.method.threshold == "absolute":
        return Levels(cuts.anchor or None, cuts.local or None)
    rows = range(0, len(profile.heads), profile.model.num_heads)
    stats = [[head.stats for head in profile.heads[i : i + profile.model.num_heads]] for i in rows]
    sink, current = [[s.sink_mass for s in row] for row in stats], [[s.current_mass for s in row] for row in stats]
    # Labelled anew, since votes may have sent heads elsewhere after the cut.
    roles = label(sink, current, cuts.anchor, cuts.local)
    places = [(roles.at(head.layer, head.head), head.stats) for head in profile.heads]
    return Levels(
        _halfway([(role is HeadRole.ANCHOR, s.sink_mass) for role, s in places]),
        _halfway([(role is HeadRole.LOCAL, s.current_mass) for role, s in places if role is not HeadRole.ANCHOR]),
    )


def show(profile: Profile) -> str:
    """The map, one letter a head and one row a layer, and what it rests on: plain text of at most 80 columns."""
    roles, size = profile.role_map(), len(str(profile.model.num_layers - 1))
    gap = " " if roles.heads <= WIDEST_ROW else ""
    rows = [f"layer {layer:>{size}}  {gap.join(letters)}" for layer, letters in enumerate(roles.letters())]
    return "\n".join([_title(profile), "", *rows, "", *_legend(profile), "", *_trust(profile)])


def check_plot(path: Path) -> None:
    """Finds out whether a plot can be drawn and may have this name.

    Raises UnavailableError without matplotlib, OutputError for a name that does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise OutputError(f"plots are PNG pictures, {path.name!r} ends otherwise", f"name it {path.stem}.png")
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnavailableError("plots need matplotlib, which is not installed", 'pip install "hforce[plot]"') from error


def plot(profile: Profile, path: Path) -> None:
    """A PNG: left every head by its mass on sink and chunk, with the levels that part roles; right the map of roles.

    Raises what `check_plot` raises, and OutputError or its kin when the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layers, heads = profile.model.num_layers, profile.model.num_heads
    wide, high = max(3.2, 0.26 * heads + 1.0), max(5.2, 0.2 * layers + 2.0)  # inches
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(6.4 + wide, high), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(6.4, wide))
    figure.suptitle(_headline(profile), x=0.012, ha="left", fontsize=11.5, color=INK, parse_math=False, linespacing=1.5)
    _scatter(left, profile)
    _tiles(right, profile)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG; its folder is made. Raises OutputError, PermissionDenied or WriteError."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "hforce"})  # by which `check_result` knows it again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    write_bytes(path, picture.getvalue())


def _scatter(axes: Axes, profile: Profile) -> None:
    """Every head at (mass on the sink, mass on the chunk), with its spread over prompts, and the two levels."""
    big = 46 if len(profile.heads) <= 100 else 20
    for role, color in COLORS.items():
        stats = [head.stats for head in profile.heads if head.role is role]
        x, y = [s.sink_mass for s in stats], [s.current_mass for s in stats]
        spread = [s.sd_sink for s in stats], [s.sd_current for s in stats]
        axes.errorbar(x, y, spread[1], spread[0], fmt="none", ecolor=color, elinewidth=0.8, alpha=0.35, zorder=2)
        name = f"{role.value} ({len(stats)})"
        axes.scatter(x, y, big, color, marker=MARKERS[role], edgecolors="white", linewidths=0.7, label=name, zorder=3)
    axes.margins(0.08)
    for low, high, limit in ((*axes.get_xlim(), axes.set_xlim), (*axes.get_ylim(), axes.set_ylim)):
        limit(max(low, -0.03 * high), high)  # no mass is below 0
    _draw_levels(axes, levels(profile))
    axes.set_xlabel(f"attention mass on {_sink(profile)}", color=INK)
    axes.set_ylabel("attention mass on the chunk being made", color=INK)
    axes.legend(
        frameon=False, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.2
    )
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    _bare(axes)


def _draw_levels(axes: Axes, cuts: Levels) -> None:
    """Anchors lie right of the upright line; left of it, local heads lie above the level one."""
    line: dict[str, Any] = {"color": INK, "linewidth": 1.0, "zorder": 1}
    dashed = (0, (4, 3))
    note: dict[str, Any] = {"fontsize": 8.5, "color": INK, "textcoords": "offset points", "va": "center", "zorder": 1}
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    end = x1
    if cuts.anchor is not None and x0 < cuts.anchor < x1:
        end = cuts.anchor
        axes.plot([end, end], [y0, y1], linestyle=dashed, **line)
        axes.annotate(f"anchor above {end:.3f}", (end, y1), (6, -7), **note)
    if cuts.local is not None and y0 < cuts.local < y1:
        axes.plot([x0, end], [cuts.local] * 2, linestyle=dashed, **line)
        axes.plot([end, x1], [cuts.local] * 2, linestyle=":", alpha=0.4, **line)
        axes.annotate(f"local above {cuts.local:.3f}", (x1, cuts.local), (-4, 8), ha="right", **note)
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)


def _tiles(axes: Axes, profile: Profile) -> None:
    """The map: a tile a head, coloured by role, paler where fewer prompts agree, with the role's letter."""
    from matplotlib.colors import to_rgb

    layers, heads = profile.model.num_layers, profile.model.num_heads
    tiles = [[(1.0, 1.0, 1.0)] * heads for _ in range(layers)]
    for head in profile.heads:
        tiles[head.layer][head.head] = _blend(to_rgb(COLORS[head.role]), head)
        letter, ink = head.role.value[0].upper(), "white" if head.vote > 0.5 else INK
        axes.text(head.head, head.layer, letter, ha="center", va="center", fontsize=8, color=ink, weight="bold")
    axes.imshow(tiles, aspect="auto", interpolation="nearest")
    axes.set_xticks([i - 0.5 for i in range(1, heads)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.set_xticks(_some(heads))
    axes.set_yticks(_some(layers))
    axes.set_xlabel("head", color=INK)
    axes.set_ylabel("layer", color=INK)
    axes.set_title("paler: fewer prompts agree", fontsize=8.5, color=FAINT, loc="left")
    _bare(axes)


def _some(count: int) -> range:
    """Numbers that are written at an axis of so many tiles."""
    return range(0, count, 1 if count <= MOST_TICKS else 5)


def _bare(axes: Axes) -> None:
    """No frame, and ticks without marks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=FAINT, labelsize=9)


def _blend(color: tuple[float, float, float], head: HeadRecord) -> tuple[float, float, float]:
    """The colour, mixed with white by the share of prompts that do not agree."""
    strength = PALEST + (1 - PALEST) * min(max(head.vote, 0.0), 1.0)
    red, green, blue = (1 - strength * (1 - part) for part in color)
    return red, green, blue


def _headline(profile: Profile) -> str:
    agreed, modes = profile.summary.split_half_agreement, profile.summary.mode_agreement
    both = "" if modes is None else f", both modes on {modes:.0%}"
    return f"{_title(profile)}\nhalves of the prompts agree on {agreed:.0%} of the heads{both}"


def _title(profile: Profile) -> str:
    model, seen = profile.model, profile.calibration
    seeds = len(seen.seeds)
    return (
        f"{_plain(model.id, LONGEST_NAME)}, {model.num_layers} x {model.num_heads} heads: "
        f"{_plain(seen.mode, LONGEST_MODE)}, {seen.num_prompts} prompts x {seeds} seed{'s' * (seeds != 1)}"
    )


def _plain(text: str, longest: int) -> str:
    """Text out of a profile, which may come from anywhere, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)[:longest]


def _legend(profile: Profile) -> list[str]:
    """One line a role: letter, name, count, and what makes the role."""
    cuts, shares = levels(profile), profile.method.thresholds
    is_share = profile.method.threshold == "quantile"

    def told(target: str, level: float | None, share: float, of: str) -> str:
        if not share:
            return "none are asked for"
        if level is None:
            return f"mass on {target}: the top {share:.0%} of {of}"
        return f"mass on {target} above {level:.3f}" + (f" (top {share:.0%} of {of})" if is_share else "")

    rules = {
        HeadRole.LOCAL: told("the chunk", cuts.local, shares.local, "the rest"),
        HeadRole.ANCHOR: told(_sink(profile), cuts.anchor, shares.anchor, "all"),
        HeadRole.MEMORY: "all others",
    }
    counts, width = profile.role_map().counts(), len(str(len(profile.heads)))
    return [
        f"{role.value[0].upper()} {role.value:<6} {counts[role]:>{width}} of {len(profile.heads)}  {rule}"
        for role, rule in rules.items()
    ]


def _trust(profile: Profile) -> list[str]:
    """How far prompts, and modes, agree, and on which head least."""
    found, unsure = profile.summary, min(profile.heads, key=lambda head: head.vote)
    modes = "" if found.mode_agreement is None else f", both modes on {found.mode_agreement:.0%}"
    floor = profile.method.min_vote
    sent = f"; below {floor:.0%} a head is memory" if floor > 0 else ""
    least = f"least sure: layer {unsure.layer} head {unsure.head}, {unsure.vote:.0%} of the prompts agree{sent}"
    return [
        f"halves of the prompts agree on {found.split_half_agreement:.0%} of the heads{modes}",
        least if unsure.vote < 1 else "every prompt by itself gives every head this role",
    ]


def _sink(profile: Profile) -> str:
    frames = profile.method.sink_frames
    return "the first frame" if frames == 1 else f"the first {frames} frames"


def _halfway(heads: list[tuple[bool, float]]) -> float | None:
    """Midway between the lowest mass of those above the cut and the highest of those below it."""
    above, below = ([mass for is_above, mass in heads if is_above is side] for side in (True, False))
    return (min(above) + max(below)) / 2 if above and below else None
