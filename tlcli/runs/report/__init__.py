"""The report of a run or a sweep: one HTML file that needs nothing else.

It has no script and asks the network for nothing; its Content-Security-Policy allows one style sheet, by its digest,
and pictures that are in the file. All that comes from a run is escaped: jinja2's autoescape writes every word of it.
"""

from tlcli.runs.report.pictures import Pictures
from tlcli.runs.report.rendering import render
from tlcli.runs.report.run_page import run_page
from tlcli.runs.report.saving import check_is_ours, save
from tlcli.runs.report.sweep_page import sweep_page

__all__ = ["Pictures", "check_is_ours", "render", "run_page", "save", "sweep_page"]
