"""The fonts of figures: one that is installed, else DejaVu Sans of matplotlib; and a cut of that for PDF.

A PDF file embeds the glyphs it uses, for which the whole font is parsed, each time. DejaVu Sans has 6,000 glyphs, and
parsing them took most of the time of a PDF file; the cut has a quarter of them, with the same advances and kerning.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from functools import cache
from pathlib import Path

import matplotlib as mpl
from matplotlib import font_manager

FAMILY = "DejaVu Sans"
CUT_FAMILY = "DejaVu Sans Cut"
_CHARACTERS = (
    range(0x20, 0x250),  # Latin
    range(0x370, 0x400),  # Greek
    range(0x2000, 0x2300),  # punctuation, superscripts, arrows, operators
    range(0x25A0, 0x2600),  # shapes
)


def families() -> list[str]:
    """Names of the fonts in which a character is looked for, the first one first."""
    installed = set(font_manager.get_font_names())
    return [*[name for name in ("Helvetica", "Arial", "Liberation Sans") if name in installed][:1], FAMILY]


@cache
def families_in_pdf() -> list[str]:
    """The same with the cut before the whole font; it is made once a process, and removed with it."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    logging.getLogger("fontTools.subset").setLevel(logging.ERROR)  # it tells of tables that nobody needs
    options = subset.Options(layout_features=["liga"], legacy_kern=True, name_IDs=["*"], glyph_names=True)
    options.drop_tables += ["GDEF", "GPOS", "MATH", "FFTM"]  # `kern` says what GPOS does, and is small
    folder = Path(tempfile.mkdtemp(prefix="moescope-fonts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"):
        font = TTFont(Path(mpl.get_data_path()) / "fonts" / "ttf" / file, recalcTimestamp=False)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=[character for block in _CHARACTERS for character in block])
        subsetter.subset(font)
        for record in font["name"].names:
            record.string = str(record).replace(FAMILY, CUT_FAMILY).replace("DejaVuSans", "DejaVuSansCut")
        font.save(folder / file)
        font_manager.fontManager.addfont(folder / file)
    return [name for family in families() for name in ([CUT_FAMILY, family] if family == FAMILY else [family])]
