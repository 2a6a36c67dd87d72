"""Exporting: a trace in the shapes that other programs read, and as tables for SQL.

Rule of the package: it reads a trace, part by part, and changes nothing in it; it imports the trace and nothing else.
What a format cannot represent is refused, never approximated. `formats` lists the formats, `vllm`, `json_lines`,
`oracle_general` and `hot_experts` write one each, `placements` writes placements of experts, `output` puts
complete files in place, `database` answers queries.
"""

from moescope.exporting.database import sql
from moescope.exporting.formats import export
from moescope.exporting.placements import export_placement

__all__ = ["export", "export_placement", "sql"]
