"""How figures are drawn and kept: one style, whatever the user's own is, the three formats of a
figure, and a second process to draw some of them in."""

import contextlib
import ctypes
import gc
import io
import multiprocessing
import signal
import sys
import warnings

from pairwise import cli, files

import fontTools.subset
import matplotlib.style
from matplotlib import font_manager

# Of these fonts the first that is installed draws what matplotlib's own one lacks.
CJK = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS"),
)
STYLE = {
    "font.family": ["DejaVu Sans", *[x for x in CJK if x in font_manager.get_font_names()][:1]],
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 7),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 7),
    "legend.handlelength": 2.8,
    "pdf.fonttype": 42,
    "svg.hashsalt": "pairwise",  # It makes the ids in an SVG the same in every run.
}
# The text in a PDF is laid out: its fonts need no tables for that, which double the time.
getattr(fontTools.subset.Options, "_drop_tables_default", []).extend(["GDEF", "GPOS", "GSUB"])


@contextlib.contextmanager
def style():
    """A context in which matplotlib draws by its own defaults and STYLE, whatever the user's
    matplotlibrc says, and a character that no font has as a box, without a word. The garbage
    collector, a sixth of the time, waits until it ends."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support")
            yield
    finally:
        if collects:
            gc.enable()


def formats(fig):
    """Return a figure as {"png", "pdf", "svg": bytes}. `style` must be in force."""
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffers = {kind: io.BytesIO() for kind in undated}
    if fig.get_layout_engine():  # All three formats have the layout that is found here.
        fig.draw_without_rendering()
        fig.set_layout_engine(None)
    for kind, buffer in buffers.items():
        fig.savefig(buffer, format=kind, dpi=300, metadata=undated[kind])
    return {kind: buffer.getvalue() for kind, buffer in buffers.items()}


def keep(drawn, stem):
    """Write stem.png and stem.pdf of `formats`; returns the SVG."""
    for kind in ("png", "pdf"):
        with files.replacing(stem.with_name(f"{stem.name}.{kind}")) as partial:
            partial.write_bytes(drawn[kind])
    return drawn["svg"]


def save(fig, stem):
    """Write stem.png and stem.pdf; returns the figure as SVG, bytes. `style` must be in force."""
    return keep(formats(fig), stem)


@contextlib.contextmanager
def elsewhere(function, *args):
    """A context with what returns function(*args). A second process computes it meanwhile, on Linux
    with a second core; where there is none, or it fails, this process does so when asked."""
    if sys.platform != "linux" or cli.usable_cores() < 2:
        yield lambda: function(*args)
        return
    receive, send = multiprocessing.Pipe(duplex=False)

    def compute():
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive this process
        with contextlib.suppress(BaseException):
            send.send(function(*args))

    def result():
        with contextlib.suppress(EOFError, OSError):
            return receive.recv()
        return function(*args)

    process = multiprocessing.get_context("fork").Process(target=compute)
    process.start()
    send.close()
    try:
        yield result
    finally:
        process.kill()
        process.join()
        receive.close()
