"""The report as one self-contained HTML page, and its figures as files (extra `report`)."""
