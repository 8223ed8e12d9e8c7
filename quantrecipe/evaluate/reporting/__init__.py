"""Reports: one page that shows what became of a checkpoint, how well, and how that is known.

Nothing here imports torch. Pages are HTML with inline SVG, drawn here; PNG files and images need
the extra ``plot``.
"""

from quantrecipe.evaluate.reporting.materials import Materials, gather
from quantrecipe.evaluate.reporting.page import Report, build
from quantrecipe.evaluate.reporting.writing import write

__all__ = ["Materials", "Report", "build", "gather", "write"]
