"""Exporting: a trace in the shapes that other programs read, and as tables for SQL.

Rule of the room: it reads a trace, part by part, and changes nothing in it; it imports the trace and no other room.
What a format cannot hold is refused, never bent to fit. `formats` knows the formats, `vllm`, `json_lines`,
`oracle_general` and `hot_experts` write one each, `placements` those of placements of experts, `output` puts whole
files in their place, `database` answers queries.
"""

from moescope.exporting.database import sql
from moescope.exporting.formats import export
from moescope.exporting.placements import export_placement

__all__ = ["export", "export_placement", "sql"]
