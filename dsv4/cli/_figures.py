"""Pictures. Each function draws one from a JSON document into a file, all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.cli._modes import BASELINE, BASELINE_COLOR, MODES
from dsv4.cli._output import count_of, replacing
from dsv4.cli._shapes import LayerShape
from dsv4.errors import ConfigError

_SUFFIXES = (".png", ".svg", ".pdf")


def check_matplotlib(path: Path) -> None:
    """Fail before a long measurement rather than after it.

    Raises:
        ConfigError: no matplotlib, or a kind of file that is not drawn.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError('a picture needs matplotlib: pip install "dsv4[plot]"') from error


def plot_times(document: Mapping[str, Any], path: Path) -> None:
    """Time a call against tokens, from the document of ``dsv4 bench``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in document["modes"]:
        points = sorted((p for p in document["results"] if p["mode"] == name), key=lambda p: p["tokens"])
        tokens = [p["tokens"] for p in points]
        axes.fill_between(
            tokens,
            [p["p10_us"] / 1e3 for p in points],
            [p["p90_us"] / 1e3 for p in points],
            color=MODES[name].color,
            alpha=0.15,
            linewidth=0,
        )
        label = f"{MODES[name].label} ({document['modes'][name]['backend']})"
        axes.plot(tokens, [p["median_us"] / 1e3 for p in points], "o-", color=MODES[name].color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = sorted({p["tokens"] for p in document["results"]})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(10, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens in a call")
    axes.set_ylabel("time of a call [ms], median and p10 to p90")
    shape = LayerShape(**document["shape"])
    threads = document["threads"]
    where = document["device"] + (f", {count_of(threads, 'thread')}" if threads else "")
    axes.set_title(f"Time of one NVFP4 MoE layer\n{shape}, {document['routing']} routing, {where}", fontsize=10)
    axes.legend(frameon=False)
    _finish(figure, [axes], path)


def plot_quality(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """What each number format costs and saves: perplexity, KL divergence, bytes.

    Args:
        rows: one a format: ``mode`` (a key of ``MODES``, or ``"bf16"``), ``perplexity``, ``kl``, ``kl_error``,
            ``expert_bytes``.
        title: of the whole picture.
        path: where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(1, 3, sharey=True)
    labels = [MODES[row["mode"]].label if row["mode"] in MODES else BASELINE for row in rows]
    colors = [MODES[row["mode"]].color if row["mode"] in MODES else BASELINE_COLOR for row in rows]
    places = range(len(rows))

    perplexities = [row["perplexity"] for row in rows]
    base, spread = perplexities[0], max(perplexities) - min(perplexities)
    panels[0].axvline(base, color=BASELINE_COLOR, linewidth=0.8, linestyle="--")
    panels[0].scatter(perplexities, places, c=colors, s=60, zorder=3)
    for place, value in zip(places, perplexities, strict=True):
        change = "" if value == base else f" ({value / base - 1:+.2%})"
        panels[0].annotate(f"{value:.3f}{change}", (value, place), (7, 7), textcoords="offset points", fontsize=8.5)
    panels[0].set_xlim(min(perplexities) - 0.3 * spread, max(perplexities) + 1.3 * spread)
    panels[0].set_title("Perplexity on held-out text", fontsize=10)
    panels[0].set_xlabel("perplexity (axis starts above 0)")

    kl = [row["kl"] for row in rows]
    errors = [row["kl_error"] for row in rows]
    _bars(panels[1], kl, colors, [f"{value:.4f}" if value else "(reference)" for value in kl], errors)
    panels[1].set_title("Distance from bf16's predictions", fontsize=10)
    panels[1].set_xlabel("KL divergence [nats per token], ± standard error")

    megabytes = [row["expert_bytes"] / 1e6 for row in rows]
    shares = [""] + [f" ({value / megabytes[0]:.0%})" for value in megabytes[1:]]
    _bars(panels[2], megabytes, colors, [f"{v:.2f}{share}" for v, share in zip(megabytes, shares, strict=True)])
    panels[2].set_title("Weights of the routed experts", fontsize=10)
    panels[2].set_xlabel("size [MB]")

    panels[0].set_yticks(places, labels)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    _finish(figure, panels, path)


def _bars(
    axes: Any,
    values: Sequence[float],
    colors: Sequence[str],
    texts: Sequence[str],
    errors: Sequence[float | None] | None = None,
) -> None:
    """Horizontal bars from zero, each with its value written behind it."""
    axes.barh(range(len(values)), values, color=colors, height=0.6)
    ends = list(values)
    if errors is not None:
        shown = [place for place, error in enumerate(errors) if error]
        axes.errorbar(
            [values[i] for i in shown], shown, xerr=[errors[i] for i in shown], fmt="none", ecolor="black", capsize=3
        )
        ends = [value + (error or 0) for value, error in zip(values, errors, strict=True)]
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, 1.4 * max(ends))


def _finish(figure: Any, panels: Sequence[Any], path: Path) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, axis="both" if len(panels) == 1 else "x", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)
