"""Pages that open from disk: their parts (`page.py`, `page.css`, `page.js`), and those of `report` and `analyze`."""
