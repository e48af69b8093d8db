"""A comparison's report: on the terminal, as a table of numbers, and as a page with plots."""

import base64
import csv
import io
import re
import textwrap
from pathlib import Path

import numpy as np
from rich.table import Column, Table

from harness.record import dig
from harness.verdict import LATENCY, find_metric, get_start, list_parts, show

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito
MARKERS = "osD^vPX"


def print_report(report, console):
    """Warnings, metrics as rows with up to three entries as columns, last the sentence"""
    for line in report["warnings"]:
        console.print(f"warning: {line}")
    for line in report["deliberate"]:
        console.print(f"on purpose: {line}")
    for indices in np.array_split(range(len(report["labels"])), -(-len(report["labels"]) // 3)):
        columns = [Column(report["labels"][index], overflow="fold") for index in indices]
        table = Table("", *columns, show_lines=True)
        for row in report["rows"]:
            cells = ["\n".join(row["cells"][index]["lines"]) for index in indices]
            table.add_row(row["title"], *cells)
        console.print(table)
    console.print(report["legend"])
    console.print(report["parity"])
    for number, reason in enumerate(report["footnotes"], 1):
        console.print(f"({number}) {reason}")
    for line in report["failed"]:
        console.print(f"failed: {line}")
    console.print(report["sentence"])


def write_csv(report, path):
    """A line for each entry and metric: numbers in full, empty where there is none"""
    names = "estimate low high coverage pairs".split()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header = "entry metric unit runs median min max how against".split()
        writer.writerow([*header, *(f"against_{name}" for name in names), "reason"])
        for row in report["rows"]:
            for label, cell in zip(report["labels"], row["cells"], strict=True):
                if row["key"]:
                    versus = cell["versus"] or {}
                    unit = re.split(", |: ", row["title"])[-1]
                    values = [len(cell["values"]), cell["median"], cell["low"], cell["high"]]
                    against = [row["how"], report["reference"]["label"]] if versus else ["", ""]
                    reason = cell["reason"] or versus.get("reason")
                    compared = [*against, *(versus.get(name) for name in names), reason]
                    writer.writerow([label, row["key"], unit, *values, *compared])


# ---- Plots ---------------------------------------------------------------------------------------


def look(index):
    return {"color": COLOURS[index % 7], "marker": MARKERS[(index + index // 7) % 7]}


def name_rows(axes, report):
    labels = [label.replace(":--", ": --").replace(" --", "\n--") for label in report["labels"]]
    rows = [[line for x in label.split("\n") for line in textwrap.wrap(x, 22)] for label in labels]
    labels = ["\n".join([*row[:4], "..."] if len(row) > 5 else row) for row in rows]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def plot_repeats(axes, report, key="images_per_second"):
    """Each repeat a dot, a row an entry"""
    for index, cell in enumerate(report["cells"][key]):
        if cell["values"]:
            colour = look(index)["color"]
            axes.plot([cell["low"], cell["high"]], [index, index], color=colour, linewidth=2)
            axes.plot([cell["median"]] * 2, [index - 0.3, index + 0.3], color=colour, linewidth=3)
            heights = index + np.linspace(-0.2, 0.2, len(cell["values"]) + 2)[1:-1]
            axes.scatter(cell["values"], heights, 60, zorder=3, edgecolor="white", **look(index))
    name_rows(axes, report)
    values = [value for cell in report["cells"][key] for value in cell["values"]]
    is_wide = min(values, default=1) * 10 < max(values, default=1)
    axes.set(xlabel=find_metric(key)[0], xscale="log" if is_wide else "linear")


def plot_memory(axes, report):
    for key, shift in (("device_peak_mib", -0.2), ("host_peak_mib", 0.2)):
        for index, cell in enumerate(report["cells"][key]):
            if cell["values"]:
                colour, place = look(index)["color"], index + shift
                bar = {"facecolor": "white", "hatch": "//"} if shift > 0 else {"facecolor": colour}
                axes.barh(place, cell["median"], height=0.36, edgecolor=colour, **bar)
                text = f" {show(cell['median'])} {key.partition('_')[0]}"
                axes.annotate(text, (cell["median"], place), va="center")
    name_rows(axes, report)
    axes.margins(x=0.5)
    axes.set(xlabel="peak memory, MiB (host: hatched)")


def plot_curves(axes, report, over):
    runs = [list(entry["ok"].values()) for entry in report["entries"]]
    validated = any(dig(item, "quality.val_accuracy") for items in runs for item in items)
    name = "validation" if validated else "training"
    for index, (label, items) in enumerate(zip(report["labels"], runs)):
        for item in items:
            curve = dig(item, "quality.val_accuracy" if validated else "quality.accuracy") or []
            curve = np.array(curve, float) * 100  # null becomes nan
            start = get_start(item, ("import", "build"))[0]
            if over == "minutes" and start is None:
                continue
            minutes = (np.cumsum(dig(item, "timing.epoch_seconds") or []) + (start or 0)) / 60
            x = minutes if over == "minutes" else np.arange(1, len(curve) + 1)
            shown = min(len(x), len(curve))
            axes.plot(x[:shown], curve[:shown], label=label, alpha=0.7, **look(index))
            label = None  # one name for all repeats
    label = "epochs" if over == "epochs" else "import, build and training, minutes"
    axes.set(xlabel=label, ylabel=f"{name} accuracy, %")


def plot_latency(axes, report, name):
    """Medians over batch sizes, a line an entry, with what the repeats spread"""
    for index, label in enumerate(report["labels"]):
        found = [
            (int(key.split()[0]), cells[index])
            for key, cells in report["cells"].items()
            if key.endswith(f" {name}") and cells[index]["values"]
        ]
        sizes = [size for size, _ in found]
        cells = [cell for _, cell in found]
        axes.plot(sizes, [cell["median"] for cell in cells], label=label, **look(index))
        spread = ([cell[end] for cell in cells] for end in ("low", "high"))
        axes.fill_between(sizes, *spread, alpha=0.2, color=look(index)["color"])
    sizes = sorted({int(key.split()[0]) for key in report["cells"]})
    axes.set(xlabel="batch size", ylabel=LATENCY[name][0], xscale="log", yscale="log")
    axes.set_xticks(sizes, sizes)


def plot_throughput(axes, report):
    """Throughput against latency, a point a batch size"""
    for index, label in enumerate(report["labels"]):
        cells = report["cells"]
        sizes = [key.split()[0] for key in cells if key.endswith(" images_per_second")]
        points = [
            [cells[f"{size} {name}"][index]["median"] for name in ("p50_ms", "images_per_second")]
            for size in sizes
        ]
        known = [(size, point) for size, point in zip(sizes, points) if None not in point]
        if known:
            axes.plot(*zip(*(point for _, point in known)), label=label, **look(index))
        for size, point in known:
            axes.annotate(size, point, xytext=(4, 4), textcoords="offset points", fontsize=10)
    axes.set(xlabel="p50, ms", ylabel="images/s", xscale="log")


def plot_cost(axes, report):
    cells, met = report["cells"], [epochs for epochs, _ in report["break_even"] if epochs]
    items = [item for entry in report["entries"] for item in entry["ok"].values()]
    ran = max([len(dig(item, "timing.epoch_seconds") or []) for item in items], default=1)
    end = max([ran, *(1.4 * epochs for epochs in met if epochs < 20 * ran)])
    for index, label in enumerate(report["labels"]):
        start, epoch = (cells[key][index]["median"] for key in ("start_seconds", "epoch_seconds"))
        if None in (start, epoch):
            continue
        epochs = report["break_even"][index][0]
        name = f"{label}: {show(start)} s + {show(epoch)} s an epoch"
        name += f"; break-even at {show(epochs)} epochs" if epochs else ""
        axes.plot([0, end], [start, start + end * epoch], label=name, **look(index))
        if epochs and epochs <= end:
            line = [[epochs] * 2, [0, start + epochs * epoch]]
            axes.plot(*line, ":*", color="black", markersize=14, markevery=[1])
    axes.set(xlabel="epochs", ylabel="import, build, compile\nand training, s", ylim=(0, None))


def number_log_axis(axis):
    """Ticks with plain numbers on a logarithmic axis, also where it spans no power of ten"""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, StrMethodFormatter

    if not isinstance(axis.get_major_locator(), FixedLocator):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.minorticks_off()


def draw(plot, report, *arguments, form="svg"):
    """Bytes of one plot, 5 inches wide in 12 points: legible on a phone"""
    import matplotlib  # only where a report is written: its import takes most of a second
    from matplotlib.figure import Figure

    count = len(report["labels"])
    height = 1.2 + 0.7 * count if plot in (plot_repeats, plot_memory) else 3.4 + 0.35 * count
    with matplotlib.rc_context({"font.size": 12, "svg.hashsalt": "compare"}):
        figure = Figure(figsize=(5, height), layout="constrained", dpi=200)
        axes = figure.add_subplot()
        plot(axes, report, *arguments)
        if axes.get_xscale() == "linear":
            axes.set_xlim(0, axes.get_xlim()[1] * 1.03)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                number_log_axis(axis)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            labels = [textwrap.fill(x, 42, max_lines=4, placeholder=" ...") for x in labels]
            figure.legend(handles, labels, loc="outside upper center", fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


OVER_MINUTES = "Accuracy over minutes, each repeat a line"


def list_plots(report):
    """{title: (function, arguments beside axes and report)}, the most telling first"""
    if not report["is_served"]:
        return {
            "Training speed: each repeat a dot, the bar the median": (plot_repeats,),
            "Peak memory, medians": (plot_memory,),
            "Accuracy over epochs, each repeat a line": (plot_curves, "epochs"),
            OVER_MINUTES: (plot_curves, "minutes"),
            "Cost of starting, cost per epoch": (plot_cost,),
        }
    names = ("p50_ms", "p99_ms", "images_per_second")
    sizes = {key.split()[0] for key in report["cells"]}
    if len(sizes) == 1:
        keys = {LATENCY[name][0]: f"{min(sizes)} {name}" for name in names}
        return {
            f"{title}: each repeat a dot, the bar the median": (plot_repeats, key)
            for title, key in keys.items()
            if key in report["cells"]
        }
    plots = {
        f"{LATENCY[name][0]} over batch sizes, median and range": (plot_latency, name)
        for name in names
    }
    return plots | {"Throughput against latency, a point a batch size": (plot_throughput,)}


def write_report(report, folder):
    """report.html (one page, nothing from elsewhere), report.md, .csv, .svg and .png; of training
    also accuracy.svg, over minutes. Returns their paths"""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    shown = list_plots(report)
    plots = {title: draw(plot, report, *given) for title, (plot, *given) in shown.items()}
    plot, *given = next(iter(shown.values()))
    files = {"report.svg": next(iter(plots.values()))}
    files["report.png"] = draw(plot, report, *given, form="png")
    if OVER_MINUTES in plots:
        files["accuracy.svg"] = plots[OVER_MINUTES]
    pictures = {title: base64.b64encode(plot).decode() for title, plot in plots.items()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    used = {"show": show, "dig": dig, "list_parts": list_parts}
    for form in ("html", "md"):
        template = environment.get_template(f"compare_report.{form}.j2")
        text = template.render(report=report, pictures=pictures, **used)
        if form == "md":  # it has no tags with attributes, where alone quotes could do harm
            text = text.replace("&#39;", "'").replace("&#34;", '"')
        files[f"report.{form}"] = text.encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_csv(report, folder / "report.csv")
    return [folder / name for name in (*files, "report.csv")]
