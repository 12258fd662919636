"""Run folders -> tables, figures and one self-contained HTML page. Reads files only."""
